"""The mean loss of an epoch, and the bars: what they write where no person looks."""

import io
import sys

import torch

from datasets import Share
from finetune import progress
from finetune.runtime import Runtime


def written(monkeypatch, seconds: float, is_terminal: bool) -> list[str]:
    """The lines that a bar of 1,000 steps, which take `seconds` in all, writes."""
    stderr = io.StringIO()
    stderr.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(progress.tqdm, "monitor_interval", 0)
    with progress.bar(total=1000, desc="epoch 1/3", unit="pair") as bar:
        start = bar._time()
        for step in range(1000):
            bar._time = lambda step=step: start + seconds * step / 1000
            bar.update()
            bar.set_postfix(loss="0.1234", refresh=False)
    return [line for line in stderr.getvalue().split("\r") if line]


def test_without_a_terminal_a_line_comes_every_30_seconds(monkeypatch):
    lines = written(monkeypatch, 200, is_terminal=False)
    assert 6 <= len(lines) <= 7
    assert all(len(line.rstrip("\n")) <= 80 for line in lines)
    assert "1000/1000" in lines[-1]


def test_without_a_terminal_what_takes_seconds_writes_nothing(monkeypatch):
    assert written(monkeypatch, 20, is_terminal=False) == []


def test_on_a_terminal_a_bar_moves(monkeypatch):
    assert len(written(monkeypatch, 20, is_terminal=True)) > 100


def test_the_mean_loss_is_that_of_all_targets():
    epoch, batch = progress.Progress(), {"attention_mask": torch.ones(2, 20)}
    for n_targets, loss in ((30, 1.0), (10, 5.0)):
        epoch.count(batch, Share(2, n_targets, 1.0), torch.tensor(loss))
    assert epoch.read_losses(skip_infinite=False) == 2.0
    assert epoch.mean_loss(Runtime(torch.device("cpu"))) == 2.0
