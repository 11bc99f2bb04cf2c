"""Dev accuracy after the same training: this project beside PEFT, and beside pyreft.

    python -m tests.benchmarks.quality --train data/quora-train.csv --dev data/quora-dev.csv
    python -m tests.benchmarks.quality --method loreft --seeds 1 2 3 --limit_train 6000 ...

gpt2-nano, batches of 12, a constant learning rate, AdamW. Ours is the script itself. The peer is a
plain loop over shuffled, padded batches: transformers + PEFT for `lora`, and for `loreft` pyreft's
intervention at the hook points of our model. Each run's result is a line of the file --results;
runs found there are not made again. Prints mean and deviation, and the difference of the means in
standard errors.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.pairs import read_pairs
from datasets import answer_ids, make_prompt
from models.gpt2 import GPT2Model
from models.paraphrase_gpt import ParaphraseGPT
from models.pretrained import BUNDLED, load_tokenizer
from tests.benchmarks.train_step import PeftParaphrase
from tests.conftest import ROOT, pyreft_interventions

BATCH_SIZE = 12
LOREFT = "--reft_type loreft --reft_rank 8 --reft_locations attention"
METHODS = {  # name -> script, its flags, name of the peer, weight decay
    "lora": ("lora", "--lora_rank 8", "transformers + PEFT", 0.01),
    # Weight decay moves the diagonal of PyTorch's Householder parametrization, which pyreft uses,
    # off 1, and the cast to int in it then makes R zero.
    "loreft": ("reft", LOREFT, "pyreft", 0.0),
}
OURS = "this project"


def our_run(args: argparse.Namespace, seed: int) -> list[float]:
    """Dev accuracy after each epoch of the script."""
    kind, flags, _, weight_decay = METHODS[args.method]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, ROOT / f"{kind}_paraphrase_detection.py", "--model_size", "gpt2-nano",
            "--para_train", args.train, "--para_dev", args.dev, "--para_test", args.dev,
            "--limit_train", args.limit_train, "--batch_size", BATCH_SIZE, "--lr", args.lr,
            "--epochs", args.epochs, "--seed", seed, "--weight_decay", weight_decay, *flags.split(),
            "--para_dev_out", f"{folder}/dev.csv", "--para_test_out", f"{folder}/test.csv",
            "--runs_dir", folder,
        ]  # fmt: skip
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
        metrics = json.loads((Path(folder) / f"{kind}-paraphrase-metrics.json").read_text())
    return [record["dev_accuracy"] for record in metrics["history"]]


class PyreftHook(nn.Module):
    """pyreft's LoReFT at a hook point of a GPT2Layer, from the same start as ours: W = R, b = 0."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        loreft = pyreft_interventions().LoreftIntervention
        self.intervention = loreft(
            embed_dim=width, low_rank_dimension=rank, dtype=torch.float32, dropout=0.0
        )
        with torch.no_grad():
            self.intervention.learned_source.weight.copy_(self.intervention.rotate_layer.weight.T)
            self.intervention.learned_source.bias.zero_()

    def forward(self, h: Tensor, intervened: Tensor | None = None) -> Tensor:
        return self.intervention(h)


def make_peer(method: str) -> nn.Module:
    """The cloze classifier of the other library; `forward` as ParaphraseGPT's."""
    answers = answer_ids(load_tokenizer(BUNDLED))
    if method == "lora":
        return PeftParaphrase(BUNDLED, answers, rank=8)
    gpt = GPT2Model.from_pretrained(BUNDLED)
    gpt.requires_grad_(False)
    for layer in gpt.gpt_layers:
        layer.after_attention = PyreftHook(gpt.config.n_embd, rank=8)
    return ParaphraseGPT(gpt, answers)


def padded_batches(
    path: Path, limit: int, shuffle: bool
) -> torch.utils.data.DataLoader[dict[str, Tensor]]:
    """Batches of pairs as course code makes them."""
    tokenizer = load_tokenizer(BUNDLED)
    tokenizer.pad_token = tokenizer.eos_token
    pairs = read_pairs(path, labelled=True, limit=limit)
    rows = list(zip(pairs.first, pairs.second, pairs.labels, strict=True))

    def collate(batch: list[tuple[str, str, int]]) -> dict[str, Tensor]:
        prompts = [make_prompt(first, second) for first, second, _ in batch]
        tokens = tokenizer(prompts, padding=True, return_tensors="pt")
        return {**tokens, "labels": torch.tensor([label for *_, label in batch])}

    return torch.utils.data.DataLoader(rows, BATCH_SIZE, shuffle, collate_fn=collate)


def peer_run(args: argparse.Namespace, seed: int) -> list[float]:
    """Dev accuracy of the peer after each epoch of a plain training loop."""
    torch.manual_seed(seed)
    model = make_peer(args.method)
    trainable = [p for p in model.parameters() if p.requires_grad]
    weight_decay = METHODS[args.method][3]
    optimizer = torch.optim.AdamW(
        trainable, lr=args.lr, weight_decay=weight_decay, eps=1e-6, fused=True
    )
    train = padded_batches(args.train, args.limit_train, shuffle=True)
    dev = padded_batches(args.dev, 10**9, shuffle=False)
    accuracies = []
    for _ in range(args.epochs):
        model.train()
        for batch in train:
            logits = model(batch["input_ids"], batch["attention_mask"])
            F.cross_entropy(logits, batch["labels"]).backward()
            optimizer.step()
            optimizer.zero_grad()
        accuracies.append(accuracy(model, dev))
    return accuracies


@torch.inference_mode()
def accuracy(model: nn.Module, batches: Iterator[dict[str, Tensor]]) -> float:
    """Share of the pairs that are answered as labelled."""
    model.eval()
    right = [
        (model(batch["input_ids"], batch["attention_mask"]).argmax(1) == batch["labels"])
        for batch in batches
    ]
    return torch.cat(right).float().mean().item()


def summarize(results: dict[str, list[list[float]]], peer: str) -> None:
    """Mean, deviation and difference after each epoch."""
    for epoch, _ in enumerate(results[OURS][0]):
        values = {name: [run[epoch] for run in runs] for name, runs in results.items()}
        means = {name: statistics.mean(v) for name, v in values.items()}
        for name, v in values.items():
            deviation = statistics.stdev(v) if len(v) > 1 else 0.0
            runs = " ".join(f"{x:.4f}" for x in v)
            print(f"epoch {epoch + 1}  {name:<20} {means[name]:.4f} +- {deviation:.4f}  ({runs})")
        if all(len(v) > 1 for v in values.values()):
            error = sum(statistics.variance(v) / len(v) for v in values.values()) ** 0.5
            difference = means[OURS] - means[peer]
            print(f"epoch {epoch + 1}  difference {difference:+.4f}, {difference / error:+.2f} "
                  "standard errors")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--dev", type=Path, required=True)
    parser.add_argument("--limit_train", type=int, default=10**9)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--results", type=Path, help="a file of one JSON object a line")
    parser.add_argument("--sides", choices=["ours", "peer"], nargs="+", default=["ours", "peer"])
    args = parser.parse_args()
    peer = METHODS[args.method][2]
    sides = {"ours": (OURS, our_run), "peer": (peer, peer_run)}
    lines = args.results.read_text().splitlines() if args.results and args.results.exists() else []
    done = [json.loads(line) for line in lines]
    results = {name: [] for name, _ in sides.values()}
    for seed in args.seeds:
        for name, run in (sides[side] for side in args.sides):
            key = [args.method, name, seed, args.epochs, args.lr, args.limit_train]
            found = next((r for r in done if r["key"] == key), None)
            started = time.perf_counter()
            accuracies = found["dev_accuracy"] if found else run(args, seed)
            results[name].append(accuracies)
            if not found:
                record = {"key": key, "dev_accuracy": accuracies}
                record["seconds"] = round(time.perf_counter() - started)
                print(json.dumps(record), flush=True)
                if args.results:
                    with args.results.open("a") as file:
                        file.write(json.dumps(record) + "\n")
    if all(results.values()):
        summarize(results, peer)


if __name__ == "__main__":
    main()
