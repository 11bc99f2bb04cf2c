"""Operations launched by a training step and by a decoded token, counted without a GPU.

    python -m tests.gpu.launches

The tests fail if a count exceeds that in docs/results/launches.json, which this script writes.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import results
from tests.conftest import ROOT
from tests.gpu.fake_cuda import build_stub

HF_TOKEN = "transformers: a token"
# Each row: what is counted, the name of our report in `dry_run`, and that of the peer's.
ROWS = [
    ("training step, 12 pairs, LoRA rank 8", "pairs, LoRA", "PEFT: pairs, LoRA"),
    ("training step, 12 pairs, ReFT adapter", "pairs, ReFT adapter", None),
    ("training step, 12 pairs, LoReFT", "pairs, LoReFT", None),
    ("training step, 4 poems, LoRA rank 8", "sonnets, LoRA", "PEFT: sonnets, LoRA"),
    ("training step, 4 poems, ReFT adapter", "sonnets, ReFT adapter", None),
    ("decoded token, 12 poems, LoRA", "a token, LoRA", HF_TOKEN),
    ("decoded token, 12 poems, LoReFT", "a token, LoReFT", None),
    ("decoded token, 12 poems, no adapter", "a token, no adapter", HF_TOKEN),
]
WHAT, OURS, THEIRS = "operations at gpt2 size, bf16", "this project", "transformers (+ PEFT)"


def can_run() -> bool:
    """A PyTorch without CUDA needs a compiler, to build a stub of its CUDA devices."""
    return torch.version.cuda is not None or compiler() is not None


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


def dry_run() -> dict[str, dict[str, Any]]:
    """The reports of `dry_run.main`, run in a process that loads the stub before PyTorch."""
    with tempfile.TemporaryDirectory() as folder:
        load = ""
        if torch.version.cuda is None:
            load = f"ctypes.CDLL({str(build_stub(compiler(), Path(folder)))!r})"
        program = f"import ctypes\n{load}\nfrom tests.gpu.dry_run import main\nmain()"
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    reports, rows = dry_run(), []
    for title, ours, theirs in ROWS:
        rows.append({WHAT: title, OURS: reports[ours]["launches"]})
        if theirs:
            rows[-1][THEIRS] = reports[theirs]["launches"]
    results.save("launches", rows)


if __name__ == "__main__":
    main()
