"""The GPU benchmark, with gpt2-nano on the CPU and all peers in this process."""

import itertools
import json
import math
import sys
from dataclasses import replace

import pytest
import torch

from finetune.runtime import Runtime
from models.pretrained import BUNDLED
from modules.adapters import trainable
from tests.benchmarks import gpu
from tests.benchmarks.peers import Worker

CPU = Runtime(torch.device("cpu"))


class InProcess:
    """A Worker without a process."""

    def __init__(self, make, *args):
        self.functions = make(*args)

    def ask(self, name):
        return self.functions[name]()

    def close(self):
        pass


@pytest.fixture
def run(monkeypatch, capsys):
    """Call `main`; returns its output: the tables, and the JSON of the last line."""
    monkeypatch.setattr(gpu, "Worker", InProcess)
    monkeypatch.setattr(gpu, "matrix_rate", lambda use_gpu, precision: 1e11)
    monkeypatch.setattr(gpu, "CASES", [("LoRA", "paraphrase"), ("loreft", "sonnet")])
    monkeypatch.setattr(gpu, "TINY", replace(gpu.TINY, steps={2: 1}))
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny"])

    def run() -> tuple[str, dict]:
        gpu.main()
        *tables, last = capsys.readouterr().out.splitlines()
        return "\n".join(tables), json.loads(last)

    return run


def test_all_parts_give_a_table_and_json(run):
    tables, results = run()
    assert results["about"]["device"] == "cpu"
    assert results["about"]["torch"] == torch.__version__
    parity, deterministic, *speed = list(results)[1:]
    assert (parity, deterministic) == ("Parity with the CPU, float32", "Deterministic")
    for checks in (parity, deterministic):
        assert [(row["adapter"], row["task"]) for row in results[checks]] == gpu.CASES
    assert max(row["of gradients, relative"] for row in results[parity]) > 0  # the modules differ
    assert speed == ["Training, batch 2", "Decoding", "Training gpt2-large, batch 2"]
    for title in speed:
        *_, reference = results[title]
        assert reference["peer"].startswith("transformers")
        assert f"| {reference['peer']} | " in tables
        assert all(row["tokens/s"] > 0 for row in results[title])


def test_another_gradient_than_the_cpu_s_is_found(monkeypatch):
    def prepare(self, model):
        trainable(model)[0].data.mul_(1.01)

    monkeypatch.setattr(Runtime, "prepare", prepare)
    rows = [gpu.parity(BUNDLED, *case, CPU) for case in (gpu.CASES[0], gpu.CASES[-1])]
    assert gpu.wrong(rows) == rows
    assert gpu.wrong([{"difference": math.nan, "of gradients, relative": 0.0}])


def test_a_step_that_gives_other_bits_the_second_time_is_found(monkeypatch):
    def prepare(self, model):
        trainable(model)[0].data.add_(1e-4 * next(numbers))

    numbers = itertools.count()
    monkeypatch.setattr(Runtime, "prepare", prepare)
    rows = [gpu.same_bits(BUNDLED, "loreft", "paraphrase", CPU)]
    assert gpu.wrong(rows) == rows


def test_a_part_whose_process_ends_leaves_the_others(run, monkeypatch, capsys):
    rows = [{"peer": "this project", "tokens/s": 12345.6}]
    parts = {"first": lambda: Worker(int, "no number").ask("rows"), "second": lambda: rows}
    monkeypatch.setattr(gpu, "parts", lambda plan: parts)
    with pytest.raises(SystemExit, match="failed: first"):
        run()
    printed = capsys.readouterr().out
    assert "| this project | 12,346 |" in printed
    assert json.loads(printed.splitlines()[-1])["second"] == rows
