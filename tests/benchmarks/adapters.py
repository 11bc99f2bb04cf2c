"""Speed of training steps with ReFT's interventions compared with LoRA, on sonnets.

    python -m tests.benchmarks.adapters --random gpt2

All take turns on the same batches, with the sonnet scripts' ranks and dropout. LoReFT is measured
three times: as is, without keeping R orthonormal, and with R made orthonormal in every forward pass
by PyTorch's own parametrization (Householder reflections).
"""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

from torch import nn

from data.sonnets import read_sonnets
from datasets import SonnetBatches, tokenize_sonnets
from finetune.arguments import DATA
from finetune.loop import FitConfig
from finetune.runtime import Runtime
from models.gpt2 import GPT2Model
from models.pretrained import BUNDLED
from models.sonnet_gpt import SonnetGPT, sonnet_loss
from models.tokenizer import load_tokenizer
from modules.lora import LoRAConfig, add_lora
from modules.reft import INTERVENTIONS, LoReFT, ReFTConfig, add_reft
from tests.benchmarks.peers import (
    add_model_arguments,
    find_model,
    make_trainer,
    report,
    start,
    synchronize,
    take_turns,
)

LORA = "LoRA, rank 4"
FREE, PARAMETRIZED = "loreft, R free", "loreft, R parametrized"


def make_model(folder: Path, name: str) -> nn.Module:
    """GPT-2 with the adapter called `name`."""
    gpt = GPT2Model.from_pretrained(folder)
    if name == LORA:
        add_lora(gpt, LoRAConfig(rank=4))
        return SonnetGPT(gpt)
    add_reft(gpt, ReFTConfig(name.split(",")[0], dropout=0.1))
    if name == PARAMETRIZED:
        for module in gpt.modules():
            if isinstance(module, LoReFT):
                nn.utils.parametrizations.orthogonal(
                    module, "reft_R", orthogonal_map="householder", use_trivialization=False
                )
    return SonnetGPT(gpt)


def make_turn(model: nn.Module, name: str, batches: list, runtime: Runtime) -> Callable[[], float]:
    """A function that trains on all batches and returns targets per second."""
    runtime.prepare(model)
    trainer = make_trainer(model.train(), sonnet_loss, FitConfig(), runtime)
    is_free = name in (FREE, PARAMETRIZED)
    after_step = mock.patch("finetune.loop.orthonormalize") if is_free else nullcontext()

    def turn() -> float:
        started = time.perf_counter()
        with after_step:
            for batch in batches:
                trainer.backward(batch, 1)
                trainer.step()
        synchronize(runtime.device)
        return sum(len(b["targets"]) for b in batches) / (time.perf_counter() - started)

    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--n", type=int, default=16, help="poems per turn")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    runtime = start(args.use_gpu, args.precision)
    folder = find_model(args)
    poems = tokenize_sonnets(read_sonnets(DATA / "sonnets.txt"), load_tokenizer(BUNDLED), 512)
    batches = [batch for batch, _ in SonnetBatches(poems[: args.n], 4, seed=0).epoch(0)]
    names = [LORA, *INTERVENTIONS, FREE, PARAMETRIZED]
    turns = {name: make_turn(make_model(folder, name), name, batches, runtime) for name in names}
    report(take_turns(turns, args.turns), "tokens/s", LORA)


if __name__ == "__main__":
    main()
