"""LoRA, ReFT and fine-tuning of all weights, each at its best learning rate.

    python -m tests.benchmarks.methods paraphrase --train FILE --dev FILE
    python -m tests.benchmarks.methods sonnet

This runs the scripts with gpt2-nano. Every method gets the same search: four learning rates with
one seed, the best chosen on a validation split of the training data, and further rates if the best
is the smallest or the largest. Each method then runs with other seeds at its best rate. The best
epoch of a run is also chosen on the validation split, and the dev data are used only once.

Finished runs are kept in the result file, so that a stopped benchmark resumes where it left off.
"""

import argparse
import csv
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from data.pairs import Pairs, read_pairs
from data.sonnets import Sonnet, read_sonnets, split_sonnets
from finetune.arguments import DATA
from finetune.metrics import chrf, sonnet_form
from tests.benchmarks import overlap, results
from tests.benchmarks.results import Row, cell
from tests.conftest import ROOT

RATES = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
FIRST_RATES = RATES[3:7]
FULL = "all weights"
SEARCH_SEED, SEEDS = 11711, [1, 2, 3, 4, 5]
# The original project trains ReFT with rank 4 after attention. With rank 36 it has as many
# parameters as LoRA with rank 4.
METHODS = {  # name -> script and flags
    "LoRA, rank 8": "lora --lora_rank 8",
    "LoRA, rank 4": "lora --lora_rank 4",
    "ReFT adapter, rank 36": "reft --reft_type adapter --reft_rank 36",
    "LoReFT, rank 36": "reft --reft_type loreft --reft_rank 36",
    "ReFT adapter, rank 4": "reft --reft_type adapter --reft_rank 4",
    "LoReFT, rank 4": "reft --reft_type loreft --reft_rank 4",
    "DiReFT, rank 4": "reft --reft_type direft --reft_rank 4",
    FULL: "full --lora_rank 4",  # the rank only names the run
}
SCRIPTS = {"paraphrase": "paraphrase_detection", "sonnet": "sonnet_generation"}
COMMON = (
    "--model_size gpt2-nano --lr_schedule linear --warmup_ratio 0.1 --early_stopping_patience 0"
)
SETTINGS = {"paraphrase": "--epochs 3 --batch_size 12", "sonnet": "--epochs 4 --temperature 0.9"}
CHOSEN_BY = {"paraphrase": ("validation accuracy", max), "sonnet": ("validation loss", min)}


class Data:
    """The files of a task's runs, in a temporary folder."""

    def __init__(self, task: str, train: Path, dev: Path, n_train: int | None, folder: Path):
        self.task, self.folder = task, folder
        if task == "paraphrase":
            self.dev = read_pairs(dev, has_labels=True)
            pairs = read_pairs(train, has_labels=True)
            order = random.Random(0).sample(range(len(pairs.ids)), len(pairs.ids))
            validation, rest = order[: len(order) // 10], order[len(order) // 10 :]
            self.validation = write_pairs(folder / "validation.csv", pairs, validation)
            self.train = write_pairs(folder / "train.csv", pairs, rest[:n_train])
            files = {"para_train": self.train.path, "para_dev": self.validation.path}
            files |= {"para_test": write_pairs(folder / "dev.csv", self.dev).path}
            files |= {name: folder / name for name in ("para_dev_out", "para_test_out")}
        else:
            # Continue the dev poems in place of the held-out ones, whose endings are unknown.
            files = {"held_out_sonnet_path": DATA / "sonnets_held_out_dev.txt"}
            files |= {"sonnet_out": folder / "sonnets.txt"}
        self.flags = [str(word) for name, path in files.items() for word in (f"--{name}", path)]

    def about(self) -> dict[str, int]:
        """The number of examples in each split."""
        if self.task == "sonnet":
            train, validation = split_sonnets(read_sonnets(DATA / "sonnets.txt"), seed=0)
            dev = read_sonnets(DATA / "sonnets_held_out_dev.txt")
            return {"training": len(train), "validation": len(validation), "dev": len(dev)}
        splits = {"training": self.train, "validation": self.validation, "dev": self.dev}
        return {name: len(pairs.ids) for name, pairs in splits.items()}


def write_pairs(path: Path, pairs: Pairs, rows: list[int] | None = None) -> Pairs:
    """Write the pairs at `rows` [all] to a file in the course's format; returns them."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["id", "sentence1", "sentence2", "is_duplicate"])
        for i in range(len(pairs.ids)) if rows is None else rows:
            writer.writerow([pairs.ids[i], pairs.first[i], pairs.second[i], float(pairs.labels[i])])
    return read_pairs(path, has_labels=True)


def one_run(data: Data, method: str, lr: float, seed: int) -> dict[str, Any]:
    """Run the method's script; returns its number of parameters, time and scores."""
    kind, *flags = METHODS[method].split()
    flags += [*COMMON.split(), *SETTINGS[data.task].split(), *data.flags]
    flags += ["--lr", str(lr), "--seed", str(seed)]
    program = [f"{ROOT}/{kind}_{SCRIPTS[data.task]}.py"]
    if kind == "full":
        program = ["-m", "tests.benchmarks.full", f"lora_{SCRIPTS[data.task]}"]
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, *program, *flags, "--runs_dir", runs]
        subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    (path,) = data.folder.glob("*-metrics.json")
    metrics = json.loads(path.read_text())
    path.unlink()
    final = metrics["final"]
    found = {"parameters": metrics["trainable_parameters"], "seconds": metrics["train_seconds"]}
    if data.task == "paraphrase":
        predictions = read_predictions(data.folder / "para_test_out")
        return found | {
            "validation accuracy": final["dev_accuracy"],
            "dev accuracy": float(np.mean(predictions == np.array(data.dev.labels))),
        }
    poems = read_sonnets(data.folder / "sonnets.txt")
    return found | {
        "validation loss": final["val_loss"],
        "dev loss": final["dev_loss"],
        "chrF": final["dev_chrf"],
        "form": {key: final[key] for key in final["shakespeare"]},
        "poems": [list(poem.lines) for poem in poems],
    }


def read_predictions(path: Path) -> np.ndarray:
    """The classes of a prediction file."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return np.array([int(line.rpartition(",")[2]) for line in lines])


class Runs:
    """The runs of a result file, which is rewritten after each new run."""

    def __init__(self, name: str, data: Data):
        self.name, self.data = name, data
        self.runs: dict[str, dict[str, Any]] = results.load(name).get("runs", {})

    def get(self, method: str, lr: float, seed: int) -> dict[str, Any]:
        """The stored run, or a new one."""
        key = f"{method}, lr {lr:g}, seed {seed}"
        if key not in self.runs:
            self.runs[key] = one_run(self.data, method, lr, seed)
            results.save(self.name, [], runs=self.runs)
            shown = {name: v for name, v in self.runs[key].items() if isinstance(v, float)}
            print(key, shown, flush=True)
        return self.runs[key]

    def best_rate(self, method: str) -> float:
        """The best rate; the search continues while the best is at the edge of those tried."""
        metric, best_of = CHOSEN_BY[self.data.task]
        first, last = RATES.index(FIRST_RATES[0]), RATES.index(FIRST_RATES[-1])
        while True:
            tried = {lr: self.get(method, lr, SEARCH_SEED) for lr in RATES[first : last + 1]}
            best = best_of(tried, key=lambda lr: tried[lr][metric])
            if best == RATES[first] and first > 0:
                first -= 1
            elif best == RATES[last] and last < len(RATES) - 1:
                last += 1
            else:
                return best


def row(method: str, lr: float, runs: list[dict[str, Any]]) -> Row:
    """Means and standard deviations over the seeds."""
    found: Row = {"method": method, "parameters": runs[0]["parameters"], "lr": f"{lr:g}"}
    for name, value in runs[0].items():
        if isinstance(value, float) and name != "seconds":
            values = [run[name] for run in runs]
            found[name] = [statistics.mean(values), statistics.stdev(values)]
    if "form" in runs[0]:
        found |= form_of([run["form"] for run in runs])
    return found


def form_of(forms: list[dict[str, float]]) -> Row:
    """Means of the form metrics; all poems have 14 lines unless the context is too short."""
    names = ("syllables_per_line", "rhyming_pairs", "longest_copied_run")
    return {n.replace("_", " "): statistics.mean(float(form[n]) for form in forms) for n in names}


def add_gaps(rows: list[Row], column: str, n: int, best_of: Any) -> Row:
    """Add each row's distance from the best adapter, in standard errors of the difference over n
    seeds, and return that adapter's row.
    """
    best = best_of((row for row in rows if row["method"] != FULL), key=lambda row: row[column][0])
    for each in rows:
        gap = ""
        if each is not best:
            error = ((each[column][1] ** 2 + best[column][1] ** 2) / n) ** 0.5
            gap = f"{abs(each[column][0] - best[column][0]) / error:.1f} s.e."
            if best_of(each, best, key=lambda row: row[column][0]) is each:
                gap += " ahead"
        each["gap to the best adapter"] = gap
    return best


def baselines(data: Data) -> list[Row]:
    """Baselines that need no language model."""
    labels = np.array(data.dev.labels)
    overlaps = overlap.predict(data.train, data.dev)
    return [
        {"method": "word-overlap classifier", "dev accuracy": float(np.mean(overlaps == labels))},
        {"method": 'always "no"', "dev accuracy": float(np.mean(labels == 0))},
    ]


def chosen_poems(method: str, runs: list[dict[str, Any]]) -> dict[str, str]:
    """The best and the median of all dev poems of a method, ranked by their own chrF."""
    gold = read_sonnets(DATA / "TRUE_sonnets_held_out_dev.txt")
    scored = [
        (chrf([Sonnet(true.number, tuple(lines))], [true]), lines)
        for run in runs
        for true, lines in zip(gold, run["poems"], strict=True)
    ]
    scored.sort(key=lambda pair: pair[0])
    chosen = {"highest": scored[-1], "median": scored[len(scored) // 2]}
    n = len(scored)
    return {
        f"Of {n} dev poems by {method}, the one with the {rank} chrF ({cell(score)})": "\n".join(
            text
        )
        for rank, (score, text) in chosen.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=SCRIPTS)
    parser.add_argument("--train", type=Path, default=DATA / "quora-train.csv")
    parser.add_argument("--dev", type=Path, default=DATA / "quora-dev.csv")
    parser.add_argument("--n_train", type=int, help="training pairs [all but the validation pairs]")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--name", help="name of the result file [TASK-methods]")
    args = parser.parse_args()
    name, (metric, best_of) = args.name or f"{args.task}-methods", CHOSEN_BY[args.task]
    with tempfile.TemporaryDirectory() as folder:
        data = Data(args.task, args.train, args.dev, args.n_train, Path(folder))
        runs, rows, by_method = Runs(name, data), [], {}
        for method in args.methods:
            lr = runs.best_rate(method)
            by_method[method] = [runs.get(method, lr, seed) for seed in args.seeds]
            rows.append(row(method, lr, by_method[method]))
        column = metric.replace("validation", "dev")
        best = add_gaps(rows, column, len(args.seeds), best_of)["method"]
        more: dict[str, Any] = {"examples": data.about(), "seeds": args.seeds, "runs": runs.runs}
        if args.task == "paraphrase":
            rows += baselines(data)
        else:
            more["texts"] = chosen_poems(best, by_method[best])
            gold, train = (
                read_sonnets(DATA / f"{part}sonnets{rest}.txt")
                for part, rest in (("TRUE_", "_held_out_dev"), ("", ""))
            )
            rows.append({"method": "Shakespeare"} | form_of([sonnet_form(gold, train)]))
        results.save(name, rows, **more)


if __name__ == "__main__":
    main()
