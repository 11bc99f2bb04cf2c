"""Training with LoRA on all linear layers: this project, transformers + PEFT, and plain PyTorch.

    python -m tests.benchmarks.train_step --random gpt2 --pairs FILE
    python -m tests.benchmarks.train_step --task sonnet --random gpt2

Each is a separate process; they take turns. Dropout 0.1, AdamW, PEFT with sdpa attention and, in
bf16 or fp16, a base of that type, as users would load it.

paraphrase: rank 8, logits of the last position only. `step` trains on the same ten random batches;
`epoch` goes from the file to the last step, including reading and tokenizing.
sonnet: rank 4, the next-token loss, the same batches for both.

The limit is the rate of a large matmul; the percentage of it counts 4 FLOPs for each non-padding
token and parameter that is not an embedding.
"""

import argparse
import csv
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.pairs import read_pairs
from data.sonnets import read_sonnets
from datasets import (
    PairBatches,
    SonnetBatches,
    answer_ids,
    make_prompt,
    pair_batch,
    tokenize_pairs,
    tokenize_sonnets,
)
from finetune.arguments import DATA
from finetune.loop import FitConfig, Trainer
from finetune.runtime import Runtime
from models.gpt2 import GPT2Model
from models.paraphrase_gpt import ParaphraseGPT, paraphrase_loss
from models.sonnet_gpt import SonnetGPT, sonnet_loss
from models.tokenizer import load_tokenizer
from modules.kernels import SWITCH
from modules.lora import LoRAConfig, add_lora
from modules.reft import ReFTConfig, add_reft
from tests.benchmarks.peers import (
    Worker,
    add_model_arguments,
    find_model,
    make_trainer,
    matrix_rate,
    start,
    synchronize,
    table,
    take_turns,
    with_peft,
)
from tests.benchmarks.plain import PlainParaphrase

Batch = dict[str, Tensor]
OURS, PEFT, PLAIN = "this project", "transformers + PEFT", "plain PyTorch"
LOREFT, NO_GRAPHS = "this project, LoReFT", "this project, no CUDA graphs"
PLAIN_MODULES = "this project, plain modules"


class PeftParaphrase(nn.Module):
    """Hugging Face's GPT-2 with PEFT's LoRA and the same cloze head."""

    def __init__(
        self,
        folder: Path,
        answers: tuple[int, int],
        rank: int,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.model, self.answers = with_peft(folder, rank, dtype), list(answers)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_index: Tensor | None = None
    ) -> Tensor:
        gpt = self.model.base_model.model
        h = gpt.transformer(input_ids, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.sum(1) - 1
        return gpt.lm_head(h[torch.arange(len(h), device=h.device), last])[:, self.answers]


class PeftSonnet(nn.Module):
    """Hugging Face's GPT-2 with PEFT's LoRA and the usual language-model loss."""

    def __init__(self, folder: Path, rank: int, dtype: torch.dtype):
        super().__init__()
        self.model = with_peft(folder, rank, dtype)

    def forward(self, input_ids, attention_mask, token_index, prompt_lengths, targets) -> Tensor:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        states = logits.flatten(0, 1)[token_index[: len(targets)]]
        return F.cross_entropy(states.float(), targets)


def our_model(folder: Path, task: str, adapter: LoRAConfig | ReFTConfig) -> nn.Module:
    """This project's model with an adapter."""
    gpt = GPT2Model.from_pretrained(folder)
    (add_lora if isinstance(adapter, LoRAConfig) else add_reft)(gpt, adapter)
    if task == "sonnet":
        return SonnetGPT(gpt)
    return ParaphraseGPT(gpt, answer_ids(load_tokenizer(folder)))


def make_model(args: argparse.Namespace, folder: Path, name: str, dtype: torch.dtype) -> nn.Module:
    """The model of the peer called `name`; PEFT's base model has type `dtype`."""
    if name == PEFT and args.task == "sonnet":
        return PeftSonnet(folder, args.rank, dtype)
    if name == PEFT:
        return PeftParaphrase(folder, answer_ids(load_tokenizer(folder)), args.rank, dtype)
    adapter = ReFTConfig("loreft") if name == LOREFT else LoRAConfig(rank=args.rank)
    model = our_model(folder, args.task, adapter)
    return PlainParaphrase(model.gpt, model.answer_ids.tolist()) if name == PLAIN else model


def same_batches(args: argparse.Namespace, folder: Path) -> list[Batch]:
    """The batches that all peers train on, at most `--steps` of them."""
    n = min(args.n, args.steps * args.batch_size)
    tokenizer = load_tokenizer(folder)
    if args.task == "sonnet":
        poems = tokenize_sonnets(read_sonnets(DATA / "sonnets.txt"), tokenizer, 512)
        return [batch for batch, _ in SonnetBatches(poems[:n], args.batch_size, seed=0).epoch(0)]
    if args.length:
        ids = torch.randint(0, len(tokenizer), (n, args.length))
        index = torch.arange(args.batch_size * args.length)
        return [
            {
                "input_ids": part,
                "attention_mask": torch.ones_like(part),
                "token_index": index,
                "labels": part[:, 0] % 2,
            }
            for part in ids.split(args.batch_size)
        ]
    data = tokenize_pairs(read_pairs(args.pairs, has_labels=True, limit=n), tokenizer, 512)
    order = np.random.default_rng(0).permutation(len(data))
    return [pair_batch(data, rows) for rows in np.split(order, len(data) // args.batch_size)]


def our_epoch(args: argparse.Namespace, folder: Path) -> Iterator[Batch]:
    """From the file to batches, as in a run."""
    pairs = read_pairs(args.pairs, has_labels=True, limit=args.n)
    data = tokenize_pairs(pairs, load_tokenizer(folder), 512)
    return (batch for batch, _ in PairBatches(data, args.batch_size, seed=0).epoch(0))


def usual_epoch(args: argparse.Namespace, folder: Path) -> Iterator[Batch]:
    """From the file to batches, as in the course's code and the tokenizer's documentation."""
    tokenizer = load_tokenizer(folder)
    tokenizer.pad_token = tokenizer.eos_token
    with open(args.pairs, encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        rows = list(itertools.islice((r for r in rows if r["is_duplicate"]), args.n))

    def collate(batch: list[dict[str, str]]) -> Batch:
        prompts = [make_prompt(row["sentence1"], row["sentence2"]) for row in batch]
        tokens = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
        labels = torch.tensor([int(float(row["is_duplicate"])) for row in batch])
        return {**tokens, "labels": labels}

    return iter(
        torch.utils.data.DataLoader(rows, args.batch_size, shuffle=True, collate_fn=collate)
    )


def make_peer(args: argparse.Namespace, folder: Path, name: str) -> dict[str, Callable]:
    """In a separate process: the functions of the peer called `name`, with rates in examples/s."""
    own = name in (OURS, NO_GRAPHS, LOREFT, PLAIN_MODULES)
    if name == PLAIN_MODULES:
        os.environ[SWITCH] = "0"
    flags = {
        "compile": args.compile and own,
        "gradient_checkpointing": args.gradient_checkpointing and own,
        "no_graphs": name == NO_GRAPHS or not own,
    }
    runtime = start(args.use_gpu, args.precision, **flags)
    model = make_model(args, folder, name, runtime.autocast_dtype or torch.float32)
    if own:
        model.gpt.gradient_checkpointing = args.gradient_checkpointing
        runtime.prepare(model)
    model.to(runtime.device).train()
    loss = sonnet_loss if args.task == "sonnet" else paraphrase_loss
    trainer = make_trainer(model, loss, FitConfig(lr=1e-4, weight_decay=0.0), runtime)
    batches = same_batches(args, folder)

    def train(make_batches: Callable[[], Iterator[Batch]]) -> float:
        started, n = time.perf_counter(), 0
        for batch in make_batches():
            trainer.backward(batch, 1)
            trainer.step()
            n += len(batch["input_ids"])
        synchronize(runtime.device)
        return n / (time.perf_counter() - started)

    load = our_epoch if own else usual_epoch
    return {
        "step": lambda: train(lambda: batches),
        "epoch": lambda: train(lambda: load(args, folder)),
        "memory": runtime.peak_memory_mb,
        "step tokens": lambda: mean_length(batches),
        "epoch tokens": lambda: mean_length(list(our_epoch(args, folder))),
        "profile": lambda: profile(batches[:5], trainer, runtime),
    }


def mean_length(batches: list[Batch]) -> float:
    """Mean number of non-padding tokens per example."""
    masks = [batch["attention_mask"] for batch in batches]
    return sum(int(mask.sum()) for mask in masks) / sum(map(len, masks))


def profile(batches: list[Batch], trainer: Trainer, runtime: Runtime) -> str:
    """A profile of one training step per batch."""
    with torch.profiler.profile() as profiler:
        for batch in batches:
            trainer.backward(batch, 1)
            trainer.step()
        synchronize(runtime.device)
    by = "self_cuda_time_total" if runtime.device.type == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=40)


def get_args(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--task", choices=["paraphrase", "sonnet"], default="paraphrase")
    parser.add_argument("--pairs", default=DATA / "sample-pairs-train.csv")
    parser.add_argument("--n", type=int, help="pairs per epoch (600), poems per turn (40)")
    parser.add_argument("--steps", type=int, default=10, help="batches per turn")
    parser.add_argument("--batch_size", type=int, help="examples per batch (12 pairs, 4 poems)")
    parser.add_argument("--rank", type=int, help="LoRA rank (8, 4 for sonnets)")
    parser.add_argument("--length", type=int, help="random prompts of LENGTH tokens, steps only")
    parser.add_argument("--turns", type=int, default=3, help="turns of steps; an epoch has one")
    parser.add_argument("--compile", action="store_true", help="torch.compile our model")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="for our model only")
    parser.add_argument("--alone", action="store_true", help="measure only this project")
    parser.add_argument("--profile", action="store_true", help="end with a profile of our model")
    args = parser.parse_args(words)
    sonnet = args.task == "sonnet"
    args.batch_size = args.batch_size or (4 if sonnet else 12)
    args.rank = args.rank or (4 if sonnet else 8)
    args.n = args.n or (40 if sonnet else 600)
    args.n -= args.n % args.batch_size
    return args


def measure(
    workers: dict[str, Worker], folder: Path, what: str, turns: int, limit: float
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Examples/s of all peers, measured in turns, and the columns derived from them.

    `limit` is the machine's matmul rate in FLOP/s.
    """
    peers = {name: (lambda w=worker: w.ask(what)) for name, worker in workers.items()}
    rates = take_turns(peers, turns) if what == "step" else {n: f() for n, f in peers.items()}
    tokens = workers[OURS].ask(f"{what} tokens")
    tokens_per_second = {name: rate * tokens for name, rate in rates.items()}
    parameters = sum(p.numel() for p in GPT2Model.from_pretrained(folder).gpt_layers.parameters())
    return rates, {
        "tokens/s": tokens_per_second,
        "% of the limit": {
            name: 400 * parameters * rate / limit for name, rate in tokens_per_second.items()
        },
        "MiB at most": {name: worker.ask("memory") for name, worker in workers.items()},
    }


def main() -> None:
    args = get_args()
    folder = find_model(args)
    names = [OURS] if args.alone else [OURS, PEFT] + [PLAIN] * (args.task == "paraphrase")
    workers = {name: Worker(make_peer, args, folder, name) for name in names}
    for worker in workers.values():
        worker.ask("step tokens")  # waits until it is ready
    limit = matrix_rate(args.use_gpu, args.precision)
    results = {"gflops_limit": limit / 1e9}
    print(f"{limit / 1e9:,.0f} GFLOP/s in a large matrix product")
    for what in ["step"] + ["epoch"] * (args.task == "paraphrase" and not args.length):
        rates, columns = measure(workers, folder, what, args.turns, limit)
        print(f"{what}, {workers[OURS].ask(f'{what} tokens'):.1f} tokens an example")
        reference = PEFT if PEFT in rates else OURS
        results[what] = table(rates, "examples/s", reference, **columns)
    if args.profile:
        print(workers[OURS].ask("profile"))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
