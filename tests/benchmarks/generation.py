"""Tokens per second of sampling: this project, transformers, and a loop without a cache.

    python -m tests.benchmarks.generation --random gpt2

All continue the same twelve sonnets by the same number of tokens with temperature 1.2 and top-p
0.9: ours and `transformers.generate` in one batch, the last one by one, reading the whole text
again for every token, as a first implementation does (only a few tokens of it are timed).
"""

import argparse
import time

import torch

from datasets import read_sonnets, tokenize_prompts
from finetune.arguments import DATA
from finetune.runtime import make_runtime
from finetune.sampling import LineCounter, Row, SamplingConfig, generate
from models.pretrained import BUNDLED, load_gpt2, load_tokenizer
from tests.benchmarks.peers import (
    add_model_arguments,
    find_model,
    hf_model,
    report,
    synchronize,
    take_turns,
)

NO_LINES = LineCounter(frozenset(), str)
NEVER = -1  # an end of text that does not come, so that all make the same number of tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--n_new", type=int, default=128)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    runtime = make_runtime(args.use_gpu, args.precision)
    folder = find_model(args)
    ours, theirs = load_gpt2(folder).eval(), hf_model(folder).eval()
    ours.to(runtime.device), theirs.to(runtime.device)
    sonnets = read_sonnets(DATA / "sonnets_held_out_dev.txt")
    prompts = tokenize_prompts(sonnets, load_tokenizer(BUNDLED), ours.config.n_positions)
    config = SamplingConfig(temperature=1.2, top_p=0.9, min_lines=0)

    def sample_ours() -> None:
        rows = [Row(p, (0, i), len(p) + args.n_new, NO_LINES) for i, p in enumerate(prompts)]
        generate(ours, rows, NEVER, config, runtime)

    flags = {"do_sample": True, "temperature": 1.2, "top_p": 0.9, "top_k": 0, "pad_token_id": 0}
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=runtime.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    mask = mask.to(runtime.device)

    def sample_theirs(n_new: int = args.n_new) -> None:
        theirs.generate(
            ids, attention_mask=mask, max_new_tokens=n_new, min_new_tokens=n_new, **flags
        )

    @torch.inference_mode()
    def sample_without_cache(prompt: list[int], n_new: int) -> None:
        text = torch.tensor([prompt], device=runtime.device)
        for _ in range(n_new):
            logits = theirs(text).logits[:, -1] / 1.2
            p, order = logits.softmax(1).sort(descending=True)
            p[p.cumsum(1) - p >= 0.9] = 0
            text = torch.cat([text, order.gather(1, p.multinomial(1))], 1)

    def rate(sample, n_tokens: int) -> float:
        started = time.perf_counter()
        sample()
        synchronize(runtime.device)
        return n_tokens / (time.perf_counter() - started)

    def middle() -> None:  # half of the tokens' mean length, so a fair price for each
        half = prompts[0] + prompts[1] * (args.n_new // 2 // len(prompts[1]) + 1)
        sample_without_cache(half[: len(prompts[0]) + args.n_new // 2], 8)

    n = len(prompts) * args.n_new
    peers = {
        "this project, a batch": lambda: rate(sample_ours, n),
        "transformers.generate, a batch": lambda: rate(sample_theirs, n),
        "no cache, one by one": lambda: rate(middle, 8),
    }
    rates = take_turns(peers, args.turns)
    without = rates["this project, a batch"] / rates["no cache, one by one"]
    print(f"{without:.1f} x the loop without a cache")
    report(rates, "tokens/s", "transformers.generate, a batch")


if __name__ == "__main__":
    main()
