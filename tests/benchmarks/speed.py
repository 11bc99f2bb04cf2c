"""Speed on this machine's CPU, compared with transformers + PEFT, in one session.

    python -m tests.benchmarks.speed --pairs data/quora-train.csv

This measures LoRA training, in steps on the same batches and in an epoch from the file to the last
step, with each process's peak memory; generation; and the time from the command to the first step.
Each peer is a separate process, and they take turns. The machine should be otherwise idle.
"""

import argparse
import contextlib
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from data.pairs import read_pairs
from finetune.arguments import DATA
from tests.benchmarks import generation, results, train_step
from tests.benchmarks.peers import Worker, find_model, matrix_rate, take_turns
from tests.benchmarks.results import Row
from tests.benchmarks.startup import repeated, seconds_to_first_step
from tests.benchmarks.train_step import OURS, PEFT, PLAIN_MODULES

SIZES = {"gpt2 size": ["--random", "gpt2"], "gpt2-nano": []}
STEPS = {("gpt2 size", "paraphrase"): 5, ("gpt2 size", "sonnet"): 3}  # per turn, else 50 or 12


def training_rows(pairs: Path, size: str, task: str, turns: int, limit: float) -> list[Row]:
    """A row for steps, and for pairs another row for an epoch."""
    steps = STEPS.get((size, task), 50 if task == "paraphrase" else 12)
    n = steps * (12 if task == "paraphrase" else 4)
    words = ["--task", task, "--pairs", str(pairs), "--steps", str(steps), "--n", str(n)]
    args = train_step.get_args(words + SIZES[size])
    folder, what, rows = find_model(args), ["step", "epoch"], []
    with contextlib.ExitStack() as stack:
        workers = {}
        for name in (OURS, PLAIN_MODULES, PEFT):
            workers[name] = Worker(train_step.make_peer, args, folder, name)
            stack.enter_context(contextlib.closing(workers[name]))
            workers[name].ask("step tokens")  # waits until it is ready
        for part in what if task == "paraphrase" else what[:1]:
            rates, columns = train_step.measure(workers, folder, part, turns, limit)
            if task == "sonnet":
                rates = columns["tokens/s"]
            title = f"{size}, {'pairs/s' if task == 'paraphrase' else 'tokens/s'}, {part}"
            rows.append(comparison(title, rates, columns["MiB at most"]))
    return rows


def comparison(title: str, rates: dict[str, float], memory: dict[str, float]) -> Row:
    """A row comparing this project, accelerated and not, with transformers + PEFT."""
    return {"LoRA": title} | rates | {
        "speedup": rates[OURS] / rates[PEFT],
        "speedup, plain modules": rates[PLAIN_MODULES] / rates[PEFT],
        "peak MiB": round(memory[OURS]),
        f"peak MiB, {PEFT}": round(memory[PEFT]),
    }  # fmt: skip


def generation_rows(size: str, turns: int) -> Row:
    """Tokens/s of this project and of `transformers.generate`."""
    folder = find_model(train_step.get_args(SIZES[size]))
    worker = Worker(generation.make_peers, folder, 128, False, "fp32")
    with contextlib.closing(worker):
        names = (generation.OURS, generation.THEIRS, generation.ONE_BY_ONE)
        rates = take_turns({name: partial(worker.ask, name) for name in names}, turns)
    ratio = rates[generation.OURS] / rates[generation.THEIRS]
    return {"12 poems, tokens/s": size} | rates | {"speedup": ratio}


def startup_rows(pairs: Path, n_long: int) -> list[Row]:
    """Seconds from the command to the end of the first step."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = {len(read_pairs(pairs, True).ids): pairs}
        files[n_long] = repeated(pairs, n_long, Path(folder))
        for size, words in SIZES.items():
            model = find_model(train_step.get_args(words))
            for n, path in files.items():
                seconds = seconds_to_first_step(path, model)
                rows.append({"time to first step": f"{size}, {n:,} pairs", "seconds": seconds})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=Path, default=DATA / "sample-pairs-train.csv")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--n_long", type=int, default=283_000, help="pairs in the long file")
    args = parser.parse_args()
    limit = matrix_rate(False, "fp32")
    more: dict[str, Any] = {"gflops of a large matrix product": limit / 1e9}
    rows: list[Row] = []
    for size in SIZES:
        for task in ("paraphrase", "sonnet"):
            rows += training_rows(args.pairs, size, task, args.turns, limit)
    results.save("speed-training", rows, **more)
    results.save("speed-generation", [generation_rows(size, args.turns) for size in SIZES])
    results.save("speed-start", startup_rows(args.pairs, args.n_long))


if __name__ == "__main__":
    main()
