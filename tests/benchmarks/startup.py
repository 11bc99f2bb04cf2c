"""Time before the first step: from a file of pairs to batches, and from a command to the step.

    python -m tests.benchmarks.startup --random gpt2 --pairs FILE --n 283000

A file of `n` pairs is made by repeating the given ones. A separate process reads, tokenizes and
batches it, and reports the time of each part and how much its peak memory grew. Then the script
runs on the given file and on the long one, each time until it reports the memory of a step.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from data.pairs import read_pairs
from datasets import PairBatches, tokenize_pairs
from finetune.arguments import DATA
from models.tokenizer import load_tokenizer
from tests.benchmarks.peers import Worker, add_model_arguments, find_model, start
from tests.conftest import ROOT


def repeated(pairs: Path, n: int, folder: Path) -> Path:
    """Write a file of `n` rows that repeats the usable rows of `pairs`."""
    rows = read_pairs(pairs, has_labels=True)
    rows = list(zip(rows.ids, rows.first, rows.second, rows.labels, strict=True))
    with open(folder / "pairs.csv", "w", encoding="utf-8") as file:
        file.write("id\tsentence1\tsentence2\tis_duplicate\n")
        for i in range(n):
            name, *questions, label = rows[i % len(rows)]
            quoted = [question.replace('"', '""') for question in questions]
            file.write(f'{i}-{name}\t"{quoted[0]}"\t"{quoted[1]}"\t{label}.0\n')
    return folder / "pairs.csv"


def make_reader(pairs: Path, folder: Path) -> dict[str, Callable[[], dict[str, float]]]:
    """In a separate process: seconds of each part, and growth of the peak memory in MiB."""
    tokenizer, memory = load_tokenizer(folder), start(False, "fp32").peak_memory_mb
    tokenizer.backend_tokenizer.encode("ready")

    def read() -> dict[str, float]:
        times, before = [time.perf_counter()], memory()
        rows = read_pairs(pairs, has_labels=True)
        times.append(time.perf_counter())
        data = tokenize_pairs(rows, tokenizer, 512)
        times.append(time.perf_counter())
        n = sum(len(batch["labels"]) for batch, _ in PairBatches(data, 12, seed=0).epoch(0))
        times.append(time.perf_counter())
        seconds = [b - a for a, b in zip(times, times[1:], strict=False)]
        names = ("read_seconds", "tokenize_seconds", "batch_seconds")
        return {"pairs": n, **dict(zip(names, seconds, strict=True)), "mib": memory() - before}

    return {"read": read}


def seconds_to_first_step(pairs: Path, model: Path, *flags: str) -> float:
    """Time from the command to the end of a first forward and backward pass."""
    with tempfile.TemporaryDirectory() as folder:
        data = ["--para_train", pairs, "--para_dev", pairs, "--para_test", pairs]
        out = ["--para_dev_out", f"{folder}/dev", "--para_test_out", f"{folder}/test"]
        command = [sys.executable, "-u", ROOT / "lora_paraphrase_detection.py", *data, *out]
        command += [
            "--model_path",
            model,
            "--runs_dir",
            folder,
            "--limit_dev",
            "1500",
            *flags,
        ]
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
            if not any("a training step takes" in line for line in run.stdout):
                raise SystemExit("the run ended before its first step")
            run.kill()
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--pairs", type=Path, default=DATA / "sample-pairs-train.csv")
    parser.add_argument("--n", type=int, default=283_000)
    args = parser.parse_args()
    model, flags = find_model(args), ["--use_gpu"] * args.use_gpu
    with tempfile.TemporaryDirectory() as folder:
        many = repeated(args.pairs, args.n, Path(folder))
        results = Worker(make_reader, many, model).ask("read")
        for name, pairs in (("file", args.pairs), ("long_file", many)):
            results[f"first_step_{name}_seconds"] = seconds_to_first_step(pairs, model, *flags)
    for name, value in results.items():
        print(f"{name:<32} {value:12,.1f}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
