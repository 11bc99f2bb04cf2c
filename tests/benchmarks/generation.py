"""Sampling speed in tokens per second: this project, transformers, and a loop without a cache.

    python -m tests.benchmarks.generation --random gpt2

All continue the same twelve sonnets by the same number of tokens at temperature 1.2 and top-p 0.9.
Ours has a LoRA adapter, as in a run; `transformers.generate` has plain weights, as if LoRA were
merged. Both use one batch. The loop is a naive implementation that continues one poem at a time and
runs the model on the whole text for every token; only a few of its tokens are timed.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from data.sonnets import read_sonnets
from datasets import tokenize_prompts
from finetune.arguments import DATA
from finetune.generation import LineCounter, Sequence, generate
from finetune.runtime import Runtime
from finetune.sampling import SamplingConfig
from models.gpt2 import GPT2Model
from models.pretrained import BUNDLED
from models.tokenizer import load_tokenizer
from modules.lora import LoRAConfig, add_lora
from tests.benchmarks.peers import (
    add_model_arguments,
    find_model,
    hf_model,
    report,
    start,
    synchronize,
    take_turns,
)

OURS, THEIRS = "this project, a batch", "transformers.generate, a batch"
NO_GRAPHS = "this project, no CUDA graphs"
ONE_BY_ONE = "no cache, one by one"
NO_LINES = LineCounter(frozenset(), str)
NEVER = -1  # an end of text that never occurs, so that all generate the same number of tokens
FLAGS = {"do_sample": True, "temperature": 1.2, "top_p": 0.9, "top_k": 0, "pad_token_id": 0}


def ours(folder: Path, prompts: list[list[int]], n_new: int, runtime: Runtime):
    """A function that continues all prompts in one batch with this project."""
    gpt = GPT2Model.from_pretrained(folder).eval()
    add_lora(gpt, LoRAConfig(rank=4))
    runtime.prepare(gpt)
    config = SamplingConfig(temperature=1.2, top_p=0.9, min_lines=0)

    def sample() -> None:
        sequences = [
            Sequence(prompt, (0, i), len(prompt) + n_new, NO_LINES)
            for i, prompt in enumerate(prompts)
        ]
        generate(gpt, sequences, NEVER, config, runtime)

    return sample


def theirs(model: nn.Module, prompts: list[list[int]], n_new: int, runtime: Runtime):
    """The same with `transformers.generate`."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    ids, mask = ids.to(runtime.device), mask.to(runtime.device)

    def sample() -> None:
        model.generate(
            ids, attention_mask=mask, max_new_tokens=n_new, min_new_tokens=n_new, **FLAGS
        )

    return sample


def without_cache(model: nn.Module, prompts: list[list[int]], n_new: int, runtime: Runtime):
    """Eight tokens in the middle of one text, where the cost per token is the text's average."""
    half = (prompts[0] + prompts[1] * (n_new // 2 // len(prompts[1]) + 1))[: n_new // 2]

    @torch.inference_mode()
    def sample() -> None:
        text = torch.tensor([prompts[0] + half], device=runtime.device)
        for _ in range(8):
            p, order = (model(text).logits[:, -1] / 1.2).softmax(1).sort(descending=True)
            p[p.cumsum(1) - p >= 0.9] = 0
            text = torch.cat([text, order.gather(1, p.multinomial(1))], 1)

    return sample


def make_peers(
    folder: Path, n_new: int, use_gpu: bool, precision: str
) -> dict[str, Callable[[], float]]:
    """For each peer, a function that returns its tokens/s."""
    runtime = start(use_gpu, precision)
    # In bf16 or fp16 the peers' weights have that type, as users would load them.
    dtype = runtime.autocast_dtype or torch.float32
    model = hf_model(folder, dtype).eval().to(runtime.device)
    sonnets = read_sonnets(DATA / "sonnets_held_out_dev.txt")
    prompts = tokenize_prompts(sonnets, load_tokenizer(BUNDLED), model.config.n_positions)

    def rate(sample, n_tokens: int) -> float:
        started = time.perf_counter()
        sample()
        synchronize(runtime.device)
        return n_tokens / (time.perf_counter() - started)

    n = len(prompts) * n_new
    settings = (prompts, n_new, runtime)
    without_graphs = (prompts, n_new, start(use_gpu, precision, no_graphs=True))
    return {
        OURS: partial(rate, ours(folder, *settings), n),
        NO_GRAPHS: partial(rate, ours(folder, *without_graphs), n),
        THEIRS: partial(rate, theirs(model, *settings), n),
        ONE_BY_ONE: partial(rate, without_cache(model, *settings), 8),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--n_new", type=int, default=128)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    peers = make_peers(find_model(args), args.n_new, args.use_gpu, args.precision)
    if not args.use_gpu:
        del peers[NO_GRAPHS]
    rates = take_turns(peers, args.turns)
    print(f"{rates[OURS] / rates[ONE_BY_ONE]:.1f} x the loop without a cache")
    report(rates, "tokens/s", THEIRS)


if __name__ == "__main__":
    main()
