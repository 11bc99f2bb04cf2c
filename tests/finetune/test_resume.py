"""Stopping and resuming fit() itself, at every batch."""

import contextlib
import itertools
import math
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.pairs import Pairs
from datasets import PairBatches, TokenizedPairs
from finetune.checkpoint import ResumeFile, finite_adapter
from finetune.early_stopping import EarlyStopper, EarlyStoppingConfig
from finetune.ending import Interrupted
from finetune.loop import FitConfig, fit
from finetune.runtime import Runtime, seed_everything
from models.gpt2 import GPT2Model
from models.paraphrase_gpt import ParaphraseGPT, paraphrase_loss
from modules.lora import LoRAConfig, add_lora
from modules.reft import ReFTConfig, add_reft
from modules.settings import UserError
from tests.conftest import adamw

CPU = Runtime(torch.device("cpu"))
CONFIG = FitConfig(epochs=2, lr=0.01, grad_accum=3, lr_schedule="cosine", save_every=0)
ADAPTERS = {
    "lora": lambda gpt: add_lora(gpt, LoRAConfig(rank=2)),
    "reft": lambda gpt: add_reft(gpt, ReFTConfig(type="loreft", dropout=0.1)),
}


def pairs() -> TokenizedPairs:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 20, 31)
    ends = np.cumsum(lengths)
    tokens = rng.integers(0, 100, ends[-1]).astype(np.int32)
    labels = rng.integers(0, 2, 31)
    return TokenizedPairs(Pairs(None), tokens, ends - lengths, lengths, labels)


class Run:
    """A run of 16 batches in two epochs, to be started again and again."""

    def __init__(self, base, folder, adapter="lora", config=CONFIG, runtime=CPU, patience=0):
        self.base, self.path = base, folder / "run.resume.pt"
        self.adapter, self.config, self.runtime = ADAPTERS[adapter], config, runtime
        self.stopping = EarlyStoppingConfig(patience)
        self.saved = []  # records of best epochs

    def start(self, at_batch=lambda number, loss: loss, wanted=True):
        """`at_batch` is called with the number of a batch, from 1, and its loss."""
        seed_everything(1)
        gpt = GPT2Model.from_pretrained(self.base)
        self.adapter(gpt)
        self.model = ParaphraseGPT(gpt, (5, 6))
        numbers = itertools.count()

        def loss_function(model, batch):
            loss, number = paraphrase_loss(model, batch), next(numbers)
            return at_batch(number, loss) if number else loss  # 0 is the report of memory

        resume = ResumeFile.open(self.path, {"--lr": "0.01"}, wanted, self.runtime)
        fitted = fit(
            model=self.model,
            loss_function=loss_function,
            optimizer=adamw(self.model, self.config),
            batches=PairBatches(pairs(), 4, seed=0),
            evaluate=lambda: {"loss": sum(p.abs().sum().item() for p in self.trained().values())},
            stopper=EarlyStopper("loss", "min", self.stopping),
            save_best=self.saved.append,
            config=self.config,
            runtime=self.runtime,
            resume=resume,
        )
        return fitted.history, self.trained()

    def trained(self):
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}


def stop_at(which: int):
    def at_batch(number, loss):
        if number == which:
            signal.raise_signal(signal.SIGTERM)
        return loss

    return at_batch


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_run_stopped_at_any_batches_ends_as_if_it_had_not_been(hf_folder, tmp_path, adapter):
    expected, weights = Run(hf_folder, tmp_path / "whole", adapter).start()
    assert len(expected) == 2
    for first in range(1, 17):
        run = Run(hf_folder, tmp_path / str(first), adapter)
        with pytest.raises(Interrupted) as stop:
            run.start(stop_at(first))
        assert stop.value.signum == signal.SIGTERM
        with contextlib.suppress(Interrupted):
            run.start(stop_at(1))  # at once again, if a batch was left
        history, trained = run.start()
        assert history == expected
        assert all(torch.equal(trained[name], weights[name]) for name in weights)


@pytest.mark.parametrize("save_every", [0, 1, 2])
def test_how_often_a_run_is_saved_changes_nothing(hf_folder, tmp_path, save_every):
    expected, weights = Run(hf_folder, tmp_path / "a").start()
    run = Run(hf_folder, tmp_path / "b", config=replace(CONFIG, save_every=save_every))
    history, trained = run.start()
    assert history == expected
    assert all(torch.equal(trained[name], weights[name]) for name in weights)
    saved = torch.load(run.path, weights_only=True)["state"]["ranks"][0]["progress"]
    assert (len(saved["history"]), saved["batches"]) == (2, 0)
    again, trained = run.start(lambda number, loss: pytest.fail("it had ended"))
    assert again == expected
    assert all(torch.equal(trained[name], weights[name]) for name in weights)


def test_a_resumed_run_stops_early_when_it_would_have(hf_folder, tmp_path, capsys):
    config = replace(CONFIG, epochs=9, grad_accum=4)
    expected, _ = Run(hf_folder, tmp_path / "a", config=config, patience=2).start()
    assert [record["is_best"] for record in expected] == [True, False, False]  # it only grows
    assert "stopped early: no gain of 0.01 in loss since epoch 1\n" in capsys.readouterr().out
    run = Run(hf_folder, tmp_path / "b", config=config, patience=2)
    with pytest.raises(Interrupted):
        run.start(stop_at(20))
    assert run.start()[0] == expected


def test_a_step_whose_loss_is_not_finite_is_named_and_nothing_of_it_kept(hf_folder, tmp_path):
    run = Run(hf_folder, tmp_path, config=replace(CONFIG, grad_accum=1, save_every=1))
    with pytest.raises(UserError, match=r"^step 11: the training loss is nan: try a lower --lr, "):
        run.start(lambda number, loss: loss * (math.nan if number == 11 else 1))
    assert [record["epoch"] for record in run.saved] == [1]
    saved = torch.load(run.path, weights_only=True)["state"]
    assert saved["ranks"][0]["progress"]["steps"] == 10
    assert all(tensor.isfinite().all() for tensor in saved["adapter"].values())


def test_weights_that_are_not_finite_are_not_saved(hf_folder, tmp_path):
    run = Run(hf_folder, tmp_path, config=replace(CONFIG, grad_accum=1, save_every=2))

    def spoil(number, loss):
        if number == 2:
            next(p for p in run.model.parameters() if p.requires_grad).data.fill_(math.inf)
        return loss

    with pytest.raises(UserError, match="has values that are no longer finite: try a lower"):
        run.start(spoil)
    assert not run.path.exists()
    assert not run.saved
    with pytest.raises(UserError):
        finite_adapter(run.model)


def test_float16_skips_what_overflows_and_counts_it(hf_folder, tmp_path):
    runtime = Runtime(torch.device("cpu"), torch.float16)
    config = replace(CONFIG, grad_accum=1)
    run = Run(hf_folder, tmp_path, config=config, runtime=runtime)
    history, weights = run.start(lambda n, loss: loss * (math.inf if n in (2, 3, 12) else 0.01))
    assert [record["skipped_steps"] for record in history] == [2, 3]
    assert all(math.isfinite(record["train_loss"]) for record in history)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    run = Run(hf_folder, tmp_path / "b", config=config, runtime=runtime)
    with pytest.raises(UserError, match="every loss of epoch 1 overflows"):
        run.start(lambda number, loss: loss * math.inf)


def test_a_resume_file_is_used_when_wanted_and_of_the_same_run_alone(hf_folder, tmp_path):
    run = Run(hf_folder, tmp_path)
    with pytest.raises(Interrupted):
        run.start(stop_at(5))
    with pytest.raises(UserError, match="is an unfinished run of this command: --resume resumes"):
        run.start(wanted=False)
    with pytest.raises(UserError, match="saved when --lr was 0.01, but now it is 0.02: use"):
        ResumeFile.open(run.path, {"--lr": "0.02"}, True, CPU)
    whole = torch.load(run.path, weights_only=True)
    state, own = whole["state"], whole["state"]["ranks"][0]
    for damaged in (
        {},
        state | {"ranks": []},
        state | {"ranks": [{}]},
        state | {"adapter": {}},
        state | {"optimizer": {}},
        state | {"ranks": [own | {"random": {}}]},
        state | {"ranks": [own | {"progress": own["progress"] | {"surprise": 1}}]},
    ):
        torch.save(whole | {"state": damaged}, run.path)
        with pytest.raises(UserError, match=r"run\.resume\.pt is damaged \(.*\): --overwrite"):
            run.start()
    torch.save([1], run.path)
    with pytest.raises(UserError, match="is not a resume file of this project"):
        run.start()
