"""The small parts of a run: early stopping, files, checkpoints, runtime, metrics, predictions."""

import argparse
import json
import math
import os

import numpy as np
import pytest
import torch

from datasets import TokenizedPairs
from finetune.arguments import number, whole
from finetune.checkpoint import AdapterCheckpoint
from finetune.early_stopping import EarlyStopper, EarlyStoppingConfig
from finetune.files import replacing, write_text
from finetune.loop import Fitted
from finetune.metrics import paraphrase_logits, paraphrase_metrics
from finetune.predictions import write_metrics, write_paraphrase_predictions
from finetune.runtime import RunError, Runtime, make_runtime, seed_everything
from models.paraphrase_gpt import ParaphraseGPT
from models.pretrained import CheckpointError
from modules.kernels import accelerate
from modules.lora import LoRAConfig, add_lora
from tests.conftest import Evil

CPU = Runtime(torch.device("cpu"))


def stopper(mode="max", patience=2, min_improvement=0.01):
    return EarlyStopper("x", mode, EarlyStoppingConfig(patience, min_improvement))


def test_best_is_any_gain_and_waiting_ends_with_a_real_one():
    s = stopper()
    assert s.update({"x": 0.5})
    assert s.update({"x": 0.506})  # better, so best; too little to count as progress
    assert not s.should_stop
    assert s.update({"x": 0.512})  # two small gains make a real one
    assert not s.update({"x": 0.512})
    assert not s.should_stop
    assert not s.update({"x": 0.4})
    assert s.should_stop


def test_less_is_better_where_it_is():
    s = stopper("min", patience=1)
    assert s.update({"x": 2.0})
    assert s.update({"x": 1.0})
    assert not s.update({"x": 1.5})
    assert s.should_stop


def test_nan_is_never_best():
    s = stopper()
    assert not s.update({"x": math.nan})
    assert s.update({"x": 0.1})


def test_patience_0_never_stops():
    s = stopper(patience=0)
    for _ in range(50):
        s.update({"x": 0.1})
    assert not s.should_stop


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_text(path, "first\n")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert path.read_text() == "first\n"
    assert os.listdir(path.parent) == ["file.txt"]


@pytest.fixture
def lora_gpt(gpt):
    add_lora(gpt, LoRAConfig(rank=2))
    return gpt


def test_an_adapter_checkpoint_comes_back(lora_gpt, tmp_path):
    path = tmp_path / "a.pt"
    checkpoint = AdapterCheckpoint(path, lora_gpt, {"method": "lora", "rank": 2}, CPU)
    checkpoint.save({"epoch": 3})
    before = {n: p.clone() for n, p in lora_gpt.named_parameters()}
    with torch.no_grad():
        for name, parameter in lora_gpt.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    assert checkpoint.load()["epoch"] == 3
    assert all(torch.equal(p, before[n]) for n, p in lora_gpt.named_parameters())
    assert torch.load(path, weights_only=True).keys() == {"about", "adapter"}
    assert path.stat().st_size < 60_000  # the adapter alone, not the model


def test_checkpoints_that_do_not_fit_are_refused_in_one_sentence(lora_gpt, tmp_path):
    path = tmp_path / "a.pt"
    AdapterCheckpoint(path, lora_gpt, {"rank": 2}, CPU).save({})
    with pytest.raises(CheckpointError, match=r"a.pt has rank 2, this run has 8"):
        AdapterCheckpoint(path, lora_gpt, {"rank": 8}, CPU).load()
    with pytest.raises(CheckpointError, match="none.pt does not exist: train first"):
        AdapterCheckpoint(tmp_path / "none.pt", lora_gpt, {}, CPU).load()
    for content in (
        {"about": Evil(tmp_path / "harm")},
        {"about": {}},
        [1],
        {"about": {}, "adapter": {}},
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=r"a\.pt") as error:
            AdapterCheckpoint(path, lora_gpt, {}, CPU).load()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "harm").exists()
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="is damaged or was not written by torch.save$"):
        AdapterCheckpoint(path, lora_gpt, {}, CPU).load()


def test_devices_and_precisions(monkeypatch):
    assert make_runtime(False, "auto").autocast_dtype is None
    assert make_runtime(False, "bf16").autocast_dtype == torch.bfloat16
    with pytest.raises(RunError, match="--precision fp16 needs a CUDA GPU, this run is on cpu"):
        make_runtime(False, "fp16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(RunError, match="neither a CUDA GPU nor Apple's MPS"):
        make_runtime(True, "auto")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert make_runtime(True, "auto").device.type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for native, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: native)  # noqa: B023
        assert make_runtime(True, "auto").autocast_dtype == expected
        assert make_runtime(True, "auto").device.type == "cuda"


def test_frozen_matrices_in_bfloat16_change_no_result(gpt, capsys):
    """Autocast rounds them so in every forward; adapters, norms and embeddings stay float32."""
    add_lora(gpt, LoRAConfig(dropout=0.0))
    torch.manual_seed(0)
    trained = [p for p in gpt.parameters() if p.requires_grad]
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.1)
    accelerate(gpt)
    model, ids = ParaphraseGPT(gpt, (7, 40)), torch.randint(0, 101, (3, 9))
    runtime = make_runtime(False, "bf16")

    def results() -> list[torch.Tensor]:
        with runtime.autocast():
            logits = model(ids, torch.ones_like(ids))
        return [logits, *torch.autograd.grad(logits.square().sum(), trained)]

    before = results()
    runtime.prepare(model, compile=False)
    assert all(torch.equal(a, b) for a, b in zip(before, results(), strict=True))
    types = {name: p.dtype for name, p in gpt.named_parameters()}
    halved = {name for name, dtype in types.items() if dtype == torch.bfloat16}
    assert halved == {name for name in types if name.endswith(("qkv.weight", "qkv.bias"))} | {
        f"gpt_layers.{i}.{name}.{kind}"
        for i in range(3)
        for name in ("attention_dense", "interm_dense", "out_dense")
        for kind in ("weight", "bias")
    }
    assert "trainable, on cpu" in capsys.readouterr().out


def test_a_seed_fixes_all_generators():
    def draw():
        seed_everything(5)
        return torch.rand(1).item(), np.random.rand()

    assert draw() == draw()


def test_logits_are_in_the_order_of_the_file_and_without_dropout(gpt):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, 150)
    data = TokenizedPairs(
        ids=[str(i) for i in range(150)],
        labels=None,
        tokens=rng.integers(0, 100, lengths.sum()).astype(np.int32),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        shortened=0,
    )
    model = ParaphraseGPT(gpt, (7, 40)).train()
    logits = paraphrase_logits(model, data, make_runtime(False, "auto"), "test")
    model.eval()
    for row, (start, length) in enumerate(zip(data.starts, lengths, strict=True)):
        ids = torch.from_numpy(data.tokens[start : start + length]).long()[None]
        with torch.no_grad():
            expected = model(ids, torch.ones_like(ids))[0]
        assert torch.allclose(logits[row], expected, atol=1e-5)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match="--nproc_per_node is more than the 2 GPUs of this machine"):
        make_runtime(True, "bf16")


def test_paraphrase_metrics_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0], [2.0, 0.0]])
    metrics = paraphrase_metrics(logits, np.array([0, 1, 0, 0]))
    right, wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    assert metrics["dev_loss"] == pytest.approx((3 * right + wrong) / 4, rel=1e-5)
    assert metrics["dev_accuracy"] == 0.75
    assert metrics["dev_macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)


def test_prediction_file_is_the_courses_byte_for_byte(tmp_path):
    path = tmp_path / "out.csv"
    write_paraphrase_predictions(path, ["b 1", "a"], [1, 0])
    assert path.read_bytes() == b"id \t Predicted_Is_Paraphrase \nb 1, 1 \na, 0 \n"


def test_metrics_file_is_json_with_versions(tmp_path):
    path = tmp_path / "metrics.json"
    fitted = Fitted([{"epoch": 1}], {"train_seconds": 2})
    write_metrics(
        path, {"lr": 0.1, "out": path}, LoRAConfig(rank=3), fitted, {"loss": 0.5}, extra=[1]
    )
    metrics = json.loads(path.read_text())
    assert metrics["arguments"] == {"lr": 0.1, "out": str(path)}
    assert metrics["final"] == {"loss": 0.5}
    assert metrics["train_seconds"] == 2
    assert metrics["adapter"]["rank"] == 3
    assert metrics["extra"] == [1]
    assert metrics["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (whole(1), "3", ["0", "-1", "1.5", "x", ""]),
        (number(above=0), "1e-3", ["0", "-1", "nan", "inf", "x"]),
        (number(least=0, below=1), "0", ["1", "-0.1", "nan"]),
        (number(above=0, most=1), "1", ["0", "1.01", "inf"]),
    ],
)
def test_flag_types(kind, good, bad):
    assert kind(good) == float(good)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="is not a"):
            kind(text)
