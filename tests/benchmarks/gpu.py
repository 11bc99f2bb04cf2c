"""Correctness and speed of this project on one GPU, in under eight minutes.

    python -m tests.benchmarks.gpu
    python -m tests.benchmarks.gpu --tiny        # gpt2-nano on the CPU, to try this script

parity: loss and adapter gradients of a float32 training step without dropout, for every adapter and
task, compared with the plain modules on the CPU. Fails if they differ by more than TOLERANCE.
deterministic: training steps with dropout and `--deterministic`, run twice. Fails if they differ.
training: paraphrase steps at gpt2 size with small and large batches, and at gpt2-large size.
decoding: sonnets in one batch.

The weights are random. Training is compared with transformers + PEFT with a bf16 base, decoding
with `transformers.generate` with plain weights, as if LoRA were merged; all take turns. The tables
are Markdown, and the last line is JSON. If one part fails, the others still run.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.loop import FitConfig
from finetune.runtime import Runtime, RuntimeConfig
from finetune.runtime import start as start_runtime
from models.paraphrase_gpt import paraphrase_loss
from models.sonnet_gpt import sonnet_loss
from modules.adapters import trainable
from modules.lora import LoRAConfig
from modules.reft import TYPES, ReFTConfig
from tests.benchmarks import generation, results, train_step
from tests.benchmarks.peers import (
    Worker,
    find_model,
    make_trainer,
    matrix_rate,
    start,
    take_turns,
)
from tests.benchmarks.results import Row
from tests.benchmarks.train_step import LOREFT, NO_GRAPHS, OURS, PEFT

TOLERANCE = 1e-3
DIFFERENCES = ("difference", "of gradients, relative")
ADAPTERS = {"LoRA": LoRAConfig(rank=8)} | {name: ReFTConfig(name) for name in TYPES}
CASES = [(name, task) for task in ("paraphrase", "sonnet") for name in ADAPTERS]
LOSSES = {"paraphrase": paraphrase_loss, "sonnet": sonnet_loss}


@dataclass(frozen=True)
class Plan:
    """What to measure, on which device."""

    use_gpu: bool
    model: tuple[str, ...]  # flags of `add_model_arguments`
    large: tuple[str, ...]
    steps: dict[int, int]  # batch size -> steps per turn
    n_new: int  # new tokens per poem
    turns: int


FULL = Plan(
    use_gpu=True,
    model=("--random", "gpt2"),
    large=("--random", "gpt2-large"),
    steps={12: 50, 256: 9},
    n_new=128,
    turns=3,
)
TINY = Plan(use_gpu=False, model=(), large=(), steps={4: 1, 8: 1}, n_new=2, turns=1)


@cache
def folder_of(model: tuple[str, ...]) -> Path:
    """The checkpoint's folder; a random checkpoint is created only once."""
    return find_model(train_step.get_args(model))


# Correctness


def make_checks(
    plan: Plan, folder: Path, check: Callable[..., Row], precision: str, deterministic: bool
) -> dict[tuple[str, str], Callable[[], Row]]:
    """In a separate process: `check` for each of CASES."""
    runtime = start_runtime(
        RuntimeConfig(plan.use_gpu, precision, deterministic=deterministic), seed=0
    )
    return {(name, task): partial(check, folder, name, task, runtime) for name, task in CASES}


def check_rows(
    plan: Plan, folder: Path, check: Callable[..., Row], precision: str, deterministic: bool
) -> list[Row]:
    """A row for each of CASES."""
    worker = Worker(make_checks, plan, folder, check, precision, deterministic)
    with contextlib.closing(worker):
        return [worker.ask(case) for case in CASES]


def parity(folder: Path, name: str, task: str, runtime: Runtime) -> Row:
    """Difference between a step on the runtime's device and one with plain modules on the CPU."""
    batch = batch_of(folder, task)
    on_cpu = Runtime(torch.device("cpu"))
    plain = adapted_model(folder, name, task)
    loss, gradients = backward(plain, task, batch, on_cpu)
    model = adapted_model(folder, name, task)
    runtime.prepare(model)
    own_loss, own_gradients = backward(model, task, batch, runtime)
    differences = [
        float((own - gradient).norm() / gradient.norm())
        for own, gradient in zip(own_gradients, gradients, strict=True)
    ]
    return {
        "adapter": name,
        "task": task,
        "loss": loss,
        "difference": abs(own_loss - loss),
        "of gradients, relative": max(differences),
    }


def same_bits(folder: Path, name: str, task: str, runtime: Runtime) -> Row:
    """Whether three training steps with dropout give the same adapter when they are repeated."""
    results = []
    for _ in range(2):
        model = adapted_model(folder, name, task).train()
        runtime.prepare(model)
        trainer = make_trainer(model, LOSSES[task], FitConfig(lr=1e-3), runtime)
        for _ in range(3):
            trainer.backward(batch_of(folder, task))
            trainer.step()
        results.append([parameter.detach().cpu() for parameter in trainer.trainable])
    is_same = all(map(torch.equal, *results))
    return {"adapter": name, "task": task, "same bits": "yes" if is_same else "no"}


def batch_of(folder: Path, task: str) -> dict[str, Tensor]:
    """Four examples of the bundled data."""
    words = ["--task", task, "--batch_size", "4", "--steps", "1"]
    return train_step.same_batches(train_step.get_args(words), folder)[0]


def adapted_model(folder: Path, name: str, task: str) -> nn.Module:
    """A model whose adapter is not the identity, so that all its parameters have a gradient."""
    torch.manual_seed(0)
    model = train_step.our_model(folder, task, ADAPTERS[name])
    for parameter in trainable(model):
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def backward(
    model: nn.Module, task: str, batch: dict[str, Tensor], runtime: Runtime
) -> tuple[float, list[Tensor]]:
    """The loss of a batch and the gradients of the adapter."""
    trainer = make_trainer(model, LOSSES[task], FitConfig(), runtime)
    for _ in range(2):  # the second may be a CUDA graph
        trainer.optimizer.zero_grad()
        loss = trainer.backward(batch)
    return float(loss), [parameter.grad.cpu() for parameter in trainer.trainable]


def wrong(rows: Iterable[Row]) -> list[Row]:
    """Rows that are not reproducible, or whose difference exceeds TOLERANCE or is NaN."""
    return [
        row
        for row in rows
        if row.get("same bits") == "no"
        or not all(row.get(column, 0) <= TOLERANCE for column in DIFFERENCES)
    ]


# Speed


def training_rows(
    plan: Plan, model: tuple[str, ...], batch_size: int, names: list[str], limit: float
) -> list[Row]:
    """A row for each peer; `limit` is the device's matmul rate in FLOP/s."""
    n_steps = plan.steps[batch_size]
    words = ["--batch_size", str(batch_size), "--steps", str(n_steps)]
    words += ["--n", str(batch_size * n_steps), *["--use_gpu"] * plan.use_gpu]
    args, folder = train_step.get_args(words), folder_of(model)
    with contextlib.ExitStack() as stack:
        workers = {name: Worker(train_step.make_peer, args, folder, name) for name in names}
        for worker in workers.values():
            stack.enter_context(contextlib.closing(worker))
        rates, columns = train_step.measure(workers, folder, "step", plan.turns, limit)
    return [
        {"peer": name, "pairs/s": rates[name], f"x {PEFT}": rates[name] / rates[PEFT]}
        | {column: values[name] for column, values in columns.items()}
        for name in names
    ]


def decoding_rows(plan: Plan, folder: Path) -> list[Row]:
    """A row for this project and one for `transformers.generate`."""
    worker = Worker(generation.make_peers, folder, plan.n_new, plan.use_gpu, "auto")
    with contextlib.closing(worker):
        names = (generation.OURS, generation.NO_GRAPHS, generation.THEIRS)
        rates = take_turns({name: partial(worker.ask, name) for name in names}, plan.turns)
    theirs = rates[generation.THEIRS]
    return [
        {"peer": name, "tokens/s": rate, "x generate": rate / theirs}
        for name, rate in rates.items()
    ]


# All parts


def about(plan: Plan) -> dict[str, Any]:
    """Date, device, precision and versions."""
    runtime = start(plan.use_gpu, "auto")
    precision = str(runtime.autocast_dtype or torch.float32)
    more = {"device": runtime.device_name, "precision": precision, "cuda": torch.version.cuda}
    return results.about() | more


def parts(plan: Plan) -> dict[str, Callable[[], list[Row]]]:
    """The parts by title."""
    folder, limit = folder_of(plan.model), matrix_rate(plan.use_gpu, "auto")
    train = partial(training_rows, plan, limit=limit)
    small, *_ = plan.steps
    check = partial(check_rows, plan, folder)
    found = {
        "Parity with the CPU, float32": partial(
            check, check=parity, precision="fp32", deterministic=False
        ),
        "Deterministic": partial(check, check=same_bits, precision="auto", deterministic=True),
    }
    for size in plan.steps:
        names = [OURS, NO_GRAPHS, LOREFT, PEFT]
        found[f"Training, batch {size}"] = partial(train, plan.model, size, names)
    found["Decoding"] = partial(decoding_rows, plan, folder)
    found[f"Training gpt2-large, batch {small}"] = partial(train, plan.large, small, [OURS, PEFT])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="gpt2-nano on the CPU, as a test")
    plan = TINY if parser.parse_args().tiny else FULL
    found, failed = {"about": about(plan)}, []
    for title, measure in parts(plan).items():
        print(f"\n{title}\n", flush=True)
        try:
            rows = measure()
        except (EOFError, ConnectionError):  # its process died with a traceback
            failed.append(title)
            continue
        print(results.markdown(rows), flush=True)
        found[title] = rows
        failed += [title] if wrong(rows) else []
    print(f"\n{json.dumps(found)}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
