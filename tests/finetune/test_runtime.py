"""Devices, precisions and random generators."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune import runtime as runtime_module
from finetune.runtime import Runtime, RuntimeConfig, seed_everything
from models.paraphrase_gpt import ParaphraseGPT
from modules.kernels import accelerate
from modules.lora import LoRAConfig, add_lora
from modules.settings import UserError
from tests.scripts import ROOT


def start(use_gpu: bool, precision: str, deterministic: bool = False) -> Runtime:
    config = RuntimeConfig(use_gpu, precision, deterministic=deterministic)
    return runtime_module.start(config, seed=0)


@pytest.fixture
def cuda(monkeypatch):
    """PyTorch as if there were two GPUs; what a run switches is switched back."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_cudnn_sdp(True)


def test_precisions_and_devices_without_a_cuda_gpu(monkeypatch):
    assert start(False, "auto").autocast_dtype is None
    assert start(False, "bf16").autocast_dtype == torch.bfloat16
    with pytest.raises(UserError, match="--precision fp16 needs a CUDA GPU, but .* on cpu"):
        start(False, "fp16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="neither a CUDA GPU nor Apple's MPS"):
        start(True, "auto")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert start(True, "auto").device.type == "mps"
    with pytest.raises(UserError, match="--deterministic: .* not on MPS"):
        start(True, "auto", deterministic=True)


@pytest.mark.parametrize(
    ("is_native", "expected"), [(True, torch.bfloat16), (False, torch.float16)]
)
def test_on_cuda_the_precision_is_one_that_the_gpu_computes_itself(
    cuda, monkeypatch, is_native, expected
):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: is_native)
    runtime = start(True, "auto")
    assert (runtime.device.type, runtime.autocast_dtype) == ("cuda", expected)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_is_strict_on_cuda_and_changes_nothing_on_a_cpu(cuda):
    start(False, "fp32", deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()
    start(True, "fp32", deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_usable_memory_is_what_is_free_and_what_the_run_has_reserved(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**30, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**30)
    assert Runtime(torch.device("cuda", 0)).usable_memory_mb() == 4096


def test_frozen_matrices_in_bfloat16_change_no_result(gpt, capsys):
    """Autocast rounds them so in every forward; adapters, norms and embeddings stay float32."""
    add_lora(gpt, LoRAConfig(dropout=0.0))
    torch.manual_seed(0)
    trained = [p for p in gpt.parameters() if p.requires_grad]
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.1)
    accelerate(gpt)
    model, ids = ParaphraseGPT(gpt, (7, 40)), torch.randint(0, 101, (3, 9))
    runtime = start(False, "bf16")

    def results() -> list[torch.Tensor]:
        with runtime.autocast():
            logits = model(ids, torch.ones_like(ids))
        return [logits, *torch.autograd.grad(logits.square().sum(), trained)]

    before = results()
    runtime.prepare(model)
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


def test_more_processes_than_gpus_are_refused(cuda, monkeypatch):
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--nproc_per_node is more than the 2 GPUs of this machine"):
        start(True, "bf16")


@pytest.mark.parametrize("has_driver", [True, False])
def test_a_driver_that_pytorch_cannot_use_is_named(monkeypatch, has_driver):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if has_driver else None)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    sentence = (
        "there is an NVIDIA driver, but it is too old" if has_driver else "finds neither a CUDA"
    )
    with pytest.raises(UserError, match=sentence):
        start(True, "auto")


def test_compile_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    runtime = Runtime(torch.device("cpu"), config=RuntimeConfig(compile=True))
    with pytest.raises(UserError, match="--compile needs a C.. compiler, but there is neither"):
        runtime.prepare(torch.nn.Linear(2, 2))


def test_windows_is_refused_in_a_sentence():
    code = "import sys; sys.platform = 'win32'; import finetune.arguments"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == ("error: this project runs on Linux and macOS, and on Windows in WSL 2\n")
