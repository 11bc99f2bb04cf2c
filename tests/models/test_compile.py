"""--compile: one graph for batches of all lengths."""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from data.pairs import Pairs
from datasets import TokenizedPairs, TokenizedSonnet, pair_batch, sonnet_batch
from models.paraphrase_gpt import ParaphraseGPT, paraphrase_loss
from models.sonnet_gpt import SonnetGPT, sonnet_loss
from modules.lora import LoRAConfig, add_lora
from modules.reft import ReFTConfig, add_reft

ADDS = {
    "LoRA": lambda gpt: add_lora(gpt, LoRAConfig(rank=2)),
    "LoReFT": lambda gpt: add_reft(gpt, ReFTConfig("loreft", rank=2)),
    "ReFT at positions": lambda gpt: add_reft(gpt, ReFTConfig(rank=2, positions="f1+l2")),
}


def pairs(lengths: list[int]) -> dict[str, torch.Tensor]:
    data = TokenizedPairs(
        Pairs(None),
        labels=np.arange(len(lengths)) % 2,
        tokens=np.arange(sum(lengths), dtype=np.int32) % 101,
        starts=np.cumsum(lengths) - lengths,
        lengths=np.array(lengths),
    )
    return pair_batch(data, np.arange(len(lengths)))


def poems(lengths: list[int]) -> dict[str, torch.Tensor]:
    return sonnet_batch([TokenizedSonnet([*range(n)], 5) for n in lengths])


TASKS = {
    "pairs": (lambda gpt: ParaphraseGPT(gpt, (3, 4)), paraphrase_loss, pairs),
    "sonnets": (SonnetGPT, sonnet_loss, poems),
}


@pytest.mark.parametrize("adapter", ADDS)
@pytest.mark.parametrize("task", TASKS)
def test_four_lengths_are_one_graph_without_a_break(gpt, task, adapter):
    make_model, loss_function, make_batch = TASKS[task]
    ADDS[adapter](gpt)
    model = make_model(gpt)  # in evaluation, so no dropout differs
    batches = [make_batch([n, n - 2, n - 5, n - 6]) for n in (9, 14, 21, 33)]
    expected = [loss_function(model, batch).item() for batch in batches]
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounter()
    model.compile(backend=counter, dynamic=True)
    losses = []
    for batch in batches:
        losses.append(loss_function(model, batch))
        losses[-1].backward()
    assert counter.frame_count == counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-4)
