"""Gradient checkpointing and the estimate of a step's memory."""

import pytest
import torch
from torch import nn

from datasets import PairBatches, SonnetBatches, TokenizedSonnet, read_pairs, tokenize_pairs
from finetune.loop import FitConfig, Updater
from finetune.memory import kept_for_backward, step_memory
from finetune.runtime import LESS_MEMORY, Runtime, run
from models.paraphrase_gpt import ParaphraseGPT, paraphrase_loss
from models.pretrained import load_gpt2
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
    gpt = load_gpt2(folder)
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


def test_checkpointing_keeps_less_and_the_estimate_knows(folder):
    sizes, torch_states = {}, []
    for checkpointing in (False, True):
        gpt = load_gpt2(folder)
        add_lora(gpt, LoRAConfig(rank=2))
        gpt.gradient_checkpointing = checkpointing
        model = SonnetGPT(gpt)
        batch = SonnetBatches(POEMS, 1, seed=0).longest()
        state = torch.get_rng_state()
        sizes[checkpointing] = step_memory(model, sonnet_loss, batch, 10, CPU)
        torch_states.append(torch.equal(torch.get_rng_state(), state))
        assert gpt.gradient_checkpointing is checkpointing
    assert sizes[True] < 0.7 * sizes[False]
    assert all(torch_states)


def test_what_is_kept_is_counted_once_and_without_the_parameters():
    W, x = nn.Parameter(torch.randn(8, 16)), torch.randn(4, 16)

    def compute():
        y = x @ W.T  # keeps x, and W, which is no one's to count
        return (y.exp() * y).sum()  # keeps y once, and its exponential twice

    assert kept_for_backward(compute, [W]) == 4 * (4 * 16 + 4 * 8 + 4 * 8)


def test_the_estimate_grows_with_rows_and_is_what_a_whole_batch_keeps(nano_tokenizer):
    gpt = load_gpt2(ROOT / "models" / "gpt2-nano")
    add_lora(gpt, LoRAConfig(rank=2))
    model = ParaphraseGPT(gpt, (2, 3)).train()
    pairs = read_pairs(ROOT / "data" / "sample-pairs-train.csv", labelled=True, limit=64)
    data = tokenize_pairs(pairs, nano_tokenizer, 512)
    longest = PairBatches(data, 8, seed=0).longest()
    estimates = [step_memory(model, paraphrase_loss, longest, n, CPU) for n in (1, 9)]
    rows = {name: tensor.repeat_interleave(8, 0) for name, tensor in longest.items()}
    kept = kept_for_backward(lambda: paraphrase_loss(model, rows), list(model.parameters()))
    blocks = len(gpt.gpt_layers)
    assert estimates[1] - estimates[0] == pytest.approx(kept * (1 + 1 / blocks), rel=0.02)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_to_lower(error):
    def main():
        raise error

    with pytest.raises(SystemExit, match="error: out of memory: lower --batch_size") as stopped:
        run(main)
    assert LESS_MEMORY in str(stopped.value)


def test_other_runtime_errors_are_not_hidden():
    def main():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        run(main)
