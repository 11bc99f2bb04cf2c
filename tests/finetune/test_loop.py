"""fit(): schedule, accumulation, clipping, dev passes, best and stop, on a model of one weight."""

import math
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn

from data.pairs import Pairs
from datasets import PairBatches, Share, SonnetBatches, TokenizedPairs, TokenizedSonnet
from finetune.early_stopping import EarlyStopper, EarlyStoppingConfig
from finetune.loop import FitConfig, Trainer, fit, lr_factor
from finetune.runtime import Runtime, RuntimeConfig
from models.paraphrase_gpt import ParaphraseGPT, paraphrase_loss
from models.sonnet_gpt import SonnetGPT, sonnet_loss
from modules.lora import LoRAConfig, add_lora
from modules.reft import DiReFT, ReFTConfig
from modules.settings import UserError
from tests.conftest import adamw

CPU = Runtime(torch.device("cpu"))


class Numbers:
    """Batches of numbers with equal sizes."""

    unit = "number"

    def __init__(self, batches):
        self.batches = [torch.tensor(batch, dtype=torch.float32)[:, None] for batch in batches]
        self.n_examples = sum(map(len, self.batches))
        self.batch_size = self.global_size = len(self.batches[0])

    def __len__(self):
        return len(self.batches)

    def shard(self, rank, world_size):
        assert (rank, world_size) == (0, 1)
        return self

    def longest(self, n):
        return {"input_ids": self.batches[0][:n]}

    def epoch(self, number):
        for batch in self.batches:
            mask = torch.ones_like(batch)
            yield {"input_ids": batch, "attention_mask": mask}, Share(len(batch), len(batch), 1)


def squared_error(model, batch):
    return (model(batch["input_ids"]) - 3 * batch["input_ids"]).square().mean()


def weight_model():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model


def run(batches, model=None, evaluate=None, save=None, metric="loss", mode="min", **settings):
    model = model or weight_model()
    patience = settings.pop("patience", 0)
    saved = []
    config = FitConfig(**{"lr": 0.1, "epochs": 1, "weight_decay": 0.0} | settings)
    history, measured = fit(
        model=model,
        loss_function=squared_error,
        optimizer=adamw(model, config),
        batches=Numbers(batches),
        evaluate=evaluate or (lambda: {"loss": 1.0}),
        stopper=EarlyStopper(metric, mode, EarlyStoppingConfig(patience, 0.01)),
        save_best=save or saved.append,
        config=config,
        runtime=CPU,
    )
    return model, history, measured, saved


def test_training_lowers_the_loss_and_history_tells():
    model, history, measured, _ = run([[1, 2], [3, 4]], epochs=60)
    assert model.weight.item() == pytest.approx(3, abs=0.1)
    losses = [record["train_loss"] for record in history]
    assert losses[0] > 1 > 0.01 > losses[-1]
    assert measured["trainable_parameters"] == measured["total_parameters"] == 1
    assert measured["examples_per_second"] == pytest.approx(measured["tokens_per_second"], rel=0.01)
    assert measured["peak_memory_mb"] > 10


def test_accumulated_batches_are_one_larger_batch():
    small, *_ = run([[1], [2], [3], [4], [5]], epochs=3, grad_accum=2)
    large, *_ = run([[1, 2], [3, 4], [5]], epochs=3)
    assert torch.allclose(small.weight, large.weight, atol=1e-6)
    small, *_ = run([[1, 2], [3, 4], [5, 6], [7]], epochs=3, grad_accum=2)  # a smaller last batch
    large, *_ = run([[1, 2, 3, 4], [5, 6, 7]], epochs=3)
    assert torch.allclose(small.weight, large.weight, atol=1e-6)


def test_clipping_limits_the_gradient():
    seen = []

    class Spy(nn.Linear):
        pass

    model = Spy(1, 1, bias=False)
    model.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm().item()))
    original = torch.optim.AdamW.step
    norms = []

    def step(self, *args, **kwargs):
        norms.append(self.param_groups[0]["params"][0].grad.norm().item())
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        run([[100, 200]], model=model, grad_clip=0.5)
    assert seen[0] > 1000
    assert norms == [pytest.approx(0.5, rel=1e-3)]


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [("constant", 1, 1), ("linear", 0.5, 0.1), ("cosine", 0.5, 0.0245)],
)
def test_schedules(schedule, middle, last):
    config = FitConfig(epochs=2, lr_schedule=schedule)
    found = [lr_factor(config, batches_per_epoch=5, step=step) for step in (0, 5, 9)]
    assert found == [1, pytest.approx(middle), pytest.approx(last, abs=1e-3)]


def test_each_step_has_its_learning_rate():
    seen, model = [], weight_model()
    optimizer = adamw(model, FitConfig())
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    config = FitConfig(epochs=1, lr=0.5, lr_schedule="linear", warmup_ratio=0.5)
    trainer = Trainer(model, squared_error, optimizer, config, 4, CPU)
    for _ in range(4):
        trainer.backward({"input_ids": torch.ones(1, 1)})
        trainer.step()
    assert seen == [0.25, 0.5, 0.5, 0.25]


def test_warm_up_rises_on_a_line_and_counts_optimizer_steps():
    config = FitConfig(epochs=4, lr_schedule="linear", warmup_ratio=0.25, grad_accum=2)
    factors = [lr_factor(config, 7, step) for step in range(16)]  # 4 steps an epoch
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[10] == pytest.approx(0.5)
    assert factors[15] == pytest.approx(1 / 12)


def test_one_dev_pass_an_epoch_decides_what_is_saved_and_when_to_stop():
    scores = iter([0.5, 0.6, 0.55, 0.601, 0.602, 0.9])
    calls = []

    def evaluate():
        calls.append(1)
        return {"accuracy": next(scores)}

    _, history, _, saved = run(
        [[1]], evaluate=evaluate, metric="accuracy", mode="max", epochs=9, patience=3
    )
    assert [record["is_best"] for record in history] == [True, True, False, True, True]
    assert [record["epoch"] for record in saved] == [1, 2, 4, 5]
    assert len(calls) == 5


def test_the_model_trains_in_training_mode_after_each_dev_pass():
    model, modes = weight_model(), []
    model.register_forward_hook(lambda module, *_: modes.append(module.training))

    def evaluate():
        model.eval()
        return {"loss": 1.0}

    run([[1], [2]], model=model, evaluate=evaluate, epochs=2)
    assert modes == [True] * (1 + 4)  # one for the report of memory


def test_a_dev_loss_that_is_not_finite_stops_the_run_too():
    with pytest.raises(UserError, match="'loss': nan"):
        run([[1]], evaluate=lambda: {"loss": math.nan}, save=lambda record: pytest.fail("saved"))


def test_a_training_loss_that_is_not_finite_stops_the_run_and_saves_nothing():
    with pytest.raises(UserError, match="step 1: the training loss is nan: try a lower --lr"):
        run([[math.nan]], save=lambda record: pytest.fail("saved"))


def test_the_rows_of_R_are_orthonormal_after_every_step():
    class Edited(DiReFT):
        def __init__(self):
            super().__init__(4, ReFTConfig("direft", rank=2))
            self.trained = []

        def forward(self, x):
            self.trained.append(self.reft_R.detach().clone())
            return super().forward(x.expand(1, 4)).square().sum() - 5 * self.reft_R[0, 0]

    model = Edited()
    run([[1.0]] * 4, model=model, epochs=2)
    matrices = torch.stack(model.trained[1:] + [model.reft_R.detach()])
    assert not torch.allclose(matrices[0], matrices[-1], atol=1e-2)
    assert torch.allclose(matrices @ matrices.mT, torch.eye(2).expand(9, 2, 2), atol=1e-5)


def test_float16_trains_with_a_scaled_loss_and_skips_a_step_that_overflows(gpt):
    """As on GPUs without bfloat16; the CPU has the same autocast and GradScaler."""
    runtime = Runtime(torch.device("cpu"), torch.float16)
    add_lora(gpt, LoRAConfig(rank=2))
    model = SonnetGPT(gpt)
    runtime.prepare(model)
    poems = [TokenizedSonnet([*range(i, i + 20), 100], 6) for i in range(8)]
    batch, _ = next(SonnetBatches(poems, 8, seed=0).epoch(0))
    factors = iter([1.0] * 20 + [1e38])
    trainer = Trainer(
        model.train(),
        lambda m, b: sonnet_loss(m, b) * next(factors),
        adamw(model, FitConfig(lr=0.01)),
        FitConfig(lr=0.01),
        1,
        runtime,
    )
    losses = []
    for _ in range(20):
        losses.append(trainer.backward(batch).item())
        trainer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert gpt.gpt_layers[0].out_dense.weight.dtype == torch.float16
    assert {p.dtype for p in trainer.trainable} == {torch.float32}
    before, scale = [p.clone() for p in trainer.trainable], trainer.scaler.get_scale()
    trainer.backward(batch)
    trainer.step()
    assert trainer.scaler.get_scale() == scale / 2
    assert all(torch.equal(p, was) for p, was in zip(trainer.trainable, before, strict=True))


class ByGraphs(Runtime):
    """A CPU that trains as a GPU does."""

    trains_with_graphs = True


@pytest.mark.parametrize("grad_accum", [1, 3])
def test_training_by_graphs_is_training_without(gpt, recorder, grad_accum):
    """With batches of other lengths, a last one that is smaller, and weights of their losses."""
    made, config = recorder(), FitConfig(lr=0.01)
    add_lora(gpt, LoRAConfig(rank=2, dropout=0.0))
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 30, 70)
    data = TokenizedPairs(
        Pairs(None),
        labels=rng.integers(0, 2, len(lengths)),
        tokens=rng.integers(0, 101, lengths.sum()).astype(np.int32),
        starts=lengths.cumsum() - lengths,
        lengths=lengths,
    )
    before = {name: parameter.clone() for name, parameter in gpt.named_parameters()}
    results = []
    for runtime in (CPU, ByGraphs(torch.device("cpu"))):
        gpt.load_state_dict(before)
        model = ParaphraseGPT(gpt, (7, 40)).eval()  # no dropout
        trainer = Trainer(model, paraphrase_loss, adamw(model, config), config, 1, runtime)
        losses = []
        for number in range(2):
            batches = PairBatches(data, 4, seed=0).epoch(number)
            while group := list(islice(batches, grad_accum)):
                losses += [trainer.backward(batch, 1 / len(group)) for batch, _ in group]
                trainer.step()
        results.append([torch.stack(losses), *(p.detach().clone() for p in trainer.trainable)])
    assert 1 < made.n < made.n_replays
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, atol=5e-3)  # rounding, after AdamW


def test_what_is_recorded_nowhere_trains_without_graphs():
    cuda = torch.device("cuda")
    assert Runtime(cuda).trains_with_graphs
    assert Runtime(cuda, world_size=2).decodes_with_graphs
    assert not Runtime(cuda, world_size=2).trains_with_graphs
    assert not Runtime(torch.device("cpu")).decodes_in_fixed_shapes
    for flag in ("compile", "gradient_checkpointing", "deterministic", "no_graphs"):
        runtime = Runtime(cuda, config=RuntimeConfig(**{flag: True}))
        assert not runtime.trains_with_graphs
        assert runtime.decodes_with_graphs == (flag in ("compile", "gradient_checkpointing"))


@pytest.mark.parametrize(
    "loss_function",
    [
        lambda model, batch: squared_error(model, batch) * math.nan,
        lambda model, batch: (model(batch["input_ids"]) * 0).abs().sqrt().sum(),  # 0, slope nan
    ],
    ids=["loss", "gradient"],
)
def test_float16_ends_when_every_step_is_skipped(loss_function):
    model, config = weight_model(), FitConfig(epochs=1, save_every=20)
    with pytest.raises(UserError, match="step 40: all gradients overflow .* --precision fp32"):
        fit(
            model=model,
            loss_function=loss_function,
            optimizer=adamw(model, config),
            batches=Numbers([[1]] * 1000),
            evaluate=lambda: pytest.fail("the epoch ended"),
            stopper=EarlyStopper("loss", "min", EarlyStoppingConfig()),
            save_best=lambda record: pytest.fail("saved"),
            config=config,
            runtime=Runtime(torch.device("cpu"), torch.float16),
        )
