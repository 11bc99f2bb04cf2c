"""How many operations a training step and a decoded token launch, counted without a GPU.

    python -m tests.gpu.launches

The tests fail if a count is larger than in docs/results/launches.json, which this writes.
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
# Each row: what is counted, the report of ours, and the one of its peer in `dry_run`.
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
    """A PyTorch without CUDA needs a compiler, for a stub of its devices."""
    return torch.version.cuda is not None or compiler() is not None


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


def dry_run() -> dict[str, dict[str, Any]]:
    """What `dry_run.main` prints, in a process of its own: the stub is loaded before PyTorch."""
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
