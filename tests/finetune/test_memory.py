"""Gradient checkpointing, the report of a step's memory, and running out of it."""

import re

import pytest
import torch
from torch.distributed import DistBackendError

from datasets import SonnetBatches, TokenizedSonnet
from finetune.ending import run
from finetune.loop import FitConfig, Trainer, report_memory
from finetune.runtime import MEMORY_ADVICE, Runtime, RuntimeConfig
from models.gpt2 import GPT2Model
from models.sonnet_gpt import SonnetGPT, sonnet_loss
from modules.adapters import adapter_state
from modules.kernels import accelerate
from modules.lora import LoRAConfig, add_lora
from modules.reft import INTERVENTIONS, ReFTConfig, add_reft
from tests.conftest import adamw, narrow_hf_model

CPU = Runtime(torch.device("cpu"))
POEMS = [TokenizedSonnet(list(range(i, i + 20)) + [100], 6) for i in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with dropout in the base."""
    folder = tmp_path_factory.mktemp("model")
    narrow_hf_model().save_pretrained(folder)
    return folder


def train(folder, add, checkpointing, fast, loss=sonnet_loss, steps=3):
    torch.manual_seed(5)
    gpt = GPT2Model.from_pretrained(folder)
    add(gpt)
    gpt.gradient_checkpointing = checkpointing
    model = SonnetGPT(gpt).train()
    if fast:
        accelerate(model)
    start = adapter_state(model)
    config = FitConfig(lr=0.01)
    trainer = Trainer(model, loss, adamw(model, config), config, steps, CPU)
    losses = []
    for batch, _ in list(SonnetBatches(POEMS, 2, seed=0).epoch(0))[:steps]:
        losses.append(trainer.backward(batch).item())
        trainer.step()
    return losses, start, adapter_state(model)


ADAPTERS = {"lora": lambda gpt: add_lora(gpt, LoRAConfig(rank=2, dropout=0.2))} | {
    name: lambda gpt, name=name: add_reft(gpt, ReFTConfig(type=name, rank=2, dropout=0.2))
    for name in INTERVENTIONS
}


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", ADAPTERS)
def test_with_gradient_checkpointing_every_adapter_trains_just_as_without(folder, name, fast):
    plain, start, without = train(folder, ADAPTERS[name], checkpointing=False, fast=fast)
    again, _, with_it = train(folder, ADAPTERS[name], checkpointing=True, fast=fast)
    assert again == plain  # the same masks are drawn the second time
    assert all(torch.equal(with_it[key], without[key]) for key in without)
    assert not any(torch.equal(with_it[key], start[key]) for key in start)


def saved_bytes(folder, checkpointing) -> int:
    """Bytes that the forward of a step keeps for its backward."""
    gpt = GPT2Model.from_pretrained(folder)
    add_lora(gpt, LoRAConfig(rank=2))
    gpt.gradient_checkpointing = checkpointing
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = sonnet_loss(SonnetGPT(gpt).train(), SonnetBatches(POEMS, 8, seed=0).longest(8))
    assert loss.requires_grad
    return sum(kept.values()) - sum(p.nbytes for p in gpt.parameters() if not p.requires_grad)


def test_checkpointing_keeps_less_for_the_backward(folder):
    assert saved_bytes(folder, checkpointing=True) < 0.7 * saved_bytes(folder, checkpointing=False)


def test_the_report_of_memory_leaves_no_trace(folder, capsys):
    gpt = GPT2Model.from_pretrained(folder)
    add_lora(gpt, LoRAConfig(rank=2))
    model, config = SonnetGPT(gpt), FitConfig()
    trainer = Trainer(model, sonnet_loss, adamw(model, config), config, 4, CPU)
    before, state = adapter_state(model), torch.get_rng_state()
    report_memory(trainer, SonnetBatches(POEMS, 2, seed=0))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in adapter_state(model).items())
    printed = capsys.readouterr().out
    assert re.fullmatch(r"a training step takes up to [\d,]+ MB of memory\n", printed)


def test_on_a_gpu_the_report_names_the_memory_that_is_free(monkeypatch, capsys):
    class OnGPU(Runtime):
        """What is said of a GPU, computed on the CPU."""

        def to_device(self, batch):
            return batch

    for name, value in {"peak_memory_mb": 1234.5, "usable_memory_mb": 8000.0}.items():
        monkeypatch.setattr(OnGPU, name, lambda self, value=value: value)
    monkeypatch.setattr("finetune.loop.random_state", lambda device: {})
    monkeypatch.setattr("finetune.loop.set_random_state", lambda state, device: None)
    model = torch.nn.Linear(1, 1)
    trainer = Trainer(
        model,
        lambda model, batch: model(batch["input_ids"][:, :1].float()).sum(),
        adamw(model, FitConfig()),
        FitConfig(),
        4,
        OnGPU(torch.device("cuda", 0), config=RuntimeConfig(no_graphs=True)),
    )
    report_memory(trainer, SonnetBatches(POEMS, 2, seed=0))
    printed = capsys.readouterr().out
    assert (
        printed
        == "a training step takes up to 1,234 MB of memory, the GPU has 8,000 MB for this run\n"
    )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(h)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        DistBackendError("NCCL error: unhandled cuda error. Cuda failure 2 'out of memory'"),
        DistBackendError("NCCL error: unhandled system error. Failed to CUDA calloc 1048576 bytes"),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_to_lower(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run(main)
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: out of memory: {MEMORY_ADVICE}")


@pytest.mark.parametrize(
    "message",
    [
        "mat1 and mat2 shapes cannot be multiplied",
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm`",
    ],
)
def test_other_runtime_errors_are_not_hidden(message):
    def main():
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match=message):
        run(main)
