"""Gradient checkpointing and the estimate of a step's memory."""

import pytest
import torch
from torch import nn

from datasets import PairBatches, SonnetBatches, TokenizedSonnet, read_pairs, tokenize_pairs
from finetune.ending import run
from finetune.loop import FitConfig, Updater
from finetune.memory import LiveMemory, step_memory
from finetune.runtime import LESS_MEMORY, Runtime
from models.gpt2 import GPT2Model
from models.paraphrase_gpt import ParaphraseGPT, paraphrase_loss
from models.sonnet_gpt import SonnetGPT, sonnet_loss
from modules.adapters import adapter_state
from modules.lora import LoRAConfig, add_lora
from modules.reft import INTERVENTIONS, ReFTConfig, add_reft
from tests.conftest import ROOT, narrow_hf_model

CPU = Runtime(torch.device("cpu"))
POEMS = [TokenizedSonnet(list(range(i, i + 20)) + [100], 6) for i in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with dropout in the base."""
    folder = tmp_path_factory.mktemp("model")
    narrow_hf_model().save_pretrained(folder)
    return folder


def train(folder, add, checkpointing, loss=sonnet_loss, steps=3):
    torch.manual_seed(5)
    gpt = GPT2Model.from_pretrained(folder)
    add(gpt)
    gpt.gradient_checkpointing = checkpointing
    model = SonnetGPT(gpt).train()
    start = adapter_state(model)
    updater = Updater(model, loss, FitConfig(lr=0.01), steps, CPU)
    losses = []
    for batch, _ in list(SonnetBatches(POEMS, 2, seed=0).epoch(0))[:steps]:
        losses.append(updater.backward(batch).item())
        updater.step()
    return losses, start, adapter_state(model)


ADAPTERS = {"lora": lambda gpt: add_lora(gpt, LoRAConfig(rank=2, dropout=0.2))} | {
    name: lambda gpt, name=name: add_reft(gpt, ReFTConfig(type=name, rank=2, dropout=0.2))
    for name in INTERVENTIONS
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_with_gradient_checkpointing_every_adapter_trains_just_as_without(folder, name):
    plain, start, without = train(folder, ADAPTERS[name], checkpointing=False)
    again, _, with_it = train(folder, ADAPTERS[name], checkpointing=True)
    assert again == plain  # the same masks are drawn the second time
    assert all(torch.equal(with_it[key], without[key]) for key in without)
    assert not any(torch.equal(with_it[key], start[key]) for key in start)


def test_checkpointing_takes_less_and_the_estimate_leaves_no_trace(folder):
    sizes = {}
    for checkpointing in (False, True):
        gpt = GPT2Model.from_pretrained(folder)
        add_lora(gpt, LoRAConfig(rank=2))
        gpt.gradient_checkpointing = checkpointing
        model = SonnetGPT(gpt).eval()
        longest, state = SonnetBatches(POEMS, 1, seed=0).longest, torch.get_rng_state()
        sizes[checkpointing] = step_memory(model, sonnet_loss, longest, 50, CPU)
        assert torch.equal(torch.get_rng_state(), state)
        assert not model.training
        assert all(parameter.grad is None for parameter in model.parameters())
    assert sizes[True] < 0.7 * sizes[False]


def test_live_memory_follows_what_is_made_and_dropped():
    W = nn.Parameter(torch.zeros(1000))
    with LiveMemory([W]) as live:
        x = W.detach() + 1  # 4,000 bytes
        y = x[:10]  # the same memory
        z = torch.cat([x, x])  # 8,000 more
        del x
        assert live.now == 12_000
        del y, z
        assert live.now == 0
    assert live.peak == 12_000


def test_the_estimate_is_what_a_whole_batch_takes(nano_tokenizer):
    gpt = GPT2Model.from_pretrained(ROOT / "models" / "gpt2-nano")
    add_lora(gpt, LoRAConfig(rank=2))
    model = ParaphraseGPT(gpt, (2, 3)).train()
    pairs = read_pairs(ROOT / "data" / "sample-pairs-train.csv", labelled=True, limit=1)
    for column in (pairs.ids, pairs.first, pairs.second, pairs.labels):
        column *= 9
    batches = PairBatches(tokenize_pairs(pairs, nano_tokenizer, 512), 9, seed=0)
    estimate = step_memory(model, paraphrase_loss, batches.longest, 9, CPU)
    with LiveMemory(model.parameters()) as live:
        paraphrase_loss(model, batches.longest(9)).backward()
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    weights = sum(p.nbytes for p in model.parameters())
    assert live.peak > 10 * trained
    assert estimate == pytest.approx(weights + 2 * trained + live.peak, rel=0.01)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_to_lower(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run(main)
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: out of memory: {LESS_MEMORY}")


def test_other_runtime_errors_are_not_hidden():
    def main():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        run(main)
