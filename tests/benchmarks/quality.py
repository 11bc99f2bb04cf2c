"""Dev accuracy after the same training: this project compared with PEFT and with pyreft.

    python -m tests.benchmarks.quality --train data/quora-train.csv --dev data/quora-dev.csv
    python -m tests.benchmarks.quality --method loreft --seeds 1 2 3 --limit_train 6000 ...

gpt2-nano, batches of 12, a constant learning rate, AdamW. Ours is the script itself. The peer is a
plain loop over shuffled, padded batches: transformers + PEFT for `lora`, and pyreft's intervention
at the hook points of our model for `loreft`. Finished runs are kept in the result file, so that a
stopped benchmark resumes where it left off.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.pairs import read_pairs
from datasets import answer_ids, make_prompt
from finetune.arguments import DATA
from models.gpt2 import GPT2Model
from models.paraphrase_gpt import ParaphraseGPT
from models.pretrained import BUNDLED
from models.tokenizer import load_tokenizer
from tests.benchmarks import results
from tests.benchmarks.results import Row
from tests.benchmarks.train_step import PeftParaphrase
from tests.conftest import ROOT, pyreft_interventions

BATCH_SIZE = 12
LOREFT = "--reft_type loreft --reft_rank 8 --reft_locations attention"
METHODS = {  # name -> script, its flags, name of the peer, weight decay
    "lora": ("lora", "--lora_rank 8", "transformers + PEFT", 0.01),
    # Weight decay moves the diagonal of PyTorch's Householder parametrization, which pyreft uses,
    # away from 1, and the parametrization's cast to int then makes R zero.
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
    """pyreft's LoReFT at a hook point of a GPT2Layer, initialized like ours: W = R, b = 0."""

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
    """The other library's cloze classifier, with the same `forward` as ParaphraseGPT."""
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
    """Padded batches of pairs, as in the course's code."""
    tokenizer = load_tokenizer(BUNDLED)
    tokenizer.pad_token = tokenizer.eos_token
    pairs = read_pairs(path, has_labels=True, limit=limit)
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
    """The fraction of pairs that are classified correctly."""
    model.eval()
    right = [
        (model(batch["input_ids"], batch["attention_mask"]).argmax(1) == batch["labels"])
        for batch in batches
    ]
    return torch.cat(right).float().mean().item()


def rows_of(found: dict[str, list[list[float]]], peer: str) -> list[Row]:
    """A row per epoch: means, standard deviations, and the difference in standard errors."""
    rows = []
    for epoch, _ in enumerate(found[OURS][0]):
        values = {name: [run[epoch] for run in runs] for name, runs in found.items()}
        means = {name: statistics.mean(v) for name, v in values.items()}
        error = sum(statistics.variance(v) / len(v) for v in values.values()) ** 0.5
        row: Row = {"dev accuracy after": f"epoch {epoch + 1}"}
        row |= {name: [means[name], statistics.stdev(v)] for name, v in values.items()}
        difference = (means[OURS] - means[peer]) / error
        rows.append(row | {"difference": f"{difference:+.1f} standard errors"})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--train", type=Path, default=DATA / "quora-train.csv")
    parser.add_argument("--dev", type=Path, default=DATA / "quora-dev.csv")
    parser.add_argument("--limit_train", type=int, default=10**9)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    args = parser.parse_args()
    name, peer = f"quality-{args.method}", METHODS[args.method][2]
    runs = results.load(name).get("runs", {})
    found: dict[str, list[list[float]]] = {OURS: [], peer: []}
    for seed in args.seeds:
        for side, run in ((OURS, our_run), (peer, peer_run)):
            settings = f"lr {args.lr:g}, {args.epochs} epochs, limit {args.limit_train}"
            key = f"{side}, {settings}, seed {seed}"
            if key not in runs:
                runs[key] = run(args, seed)
                results.save(name, [], runs=runs)
                print(key, runs[key], flush=True)
            found[side].append(runs[key])
    n = {"train": len(read_pairs(args.train, has_labels=True, limit=args.limit_train).ids)}
    n["dev"] = len(read_pairs(args.dev, has_labels=True).ids)
    results.save(name, rows_of(found, peer), examples=n, seeds=args.seeds, runs=runs)


if __name__ == "__main__":
    main()
