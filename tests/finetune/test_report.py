"""The picture and the logs of a run."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datasets import TokenizedPairs
from finetune.metrics import surest_mistakes
from finetune.report import tensorboard_log, write_report
from finetune.runtime import Runtime

CPU = Runtime(torch.device("cpu"))
HISTORY = [
    {"epoch": 1, "train_loss": 0.7, "dev_loss": 0.65, "dev_accuracy": 0.6, "is_best": True},
    {"epoch": 2, "train_loss": 0.5, "dev_loss": 0.55, "dev_accuracy": 0.75, "is_best": True},
    {"epoch": 3, "train_loss": 0.4, "dev_loss": 0.60, "dev_accuracy": 0.7, "is_best": False},
]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, to look into."""
    figures, save = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_a_report_shows_curves_the_best_epoch_and_the_counts(tmp_path, drawn):
    path = tmp_path / "lora-paraphrase-report.png"
    answers = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 1, 1, 1])
    write_report(path, HISTORY, {"dev_accuracy": "accuracy"}, "dev_accuracy", answers)
    picture = imread(path)
    assert picture.shape[1] == 800
    assert 20 < len(np.unique((picture * 255).astype(int).reshape(-1, 4), axis=0))
    losses, metric, counts = drawn[0].axes
    training, dev, best = (line.get_ydata() for line in losses.lines)
    assert (list(training), list(dev), best[0]) == ([0.7, 0.5, 0.4], [0.65, 0.55, 0.6], 0)
    assert [text.get_text() for text in losses.legend_.texts] == ["training", "dev"]
    star = metric.lines[-1]
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([2], [0.75])
    assert metric.legend_.texts[-1].get_text() == "best: 0.75"
    shown = [text.get_text() for text in counts.texts]
    assert shown == ["2\n67%", "1\n33%", "0\n0%", "3\n100%"]


def test_a_run_of_one_epoch_has_a_report_too(tmp_path, drawn):
    history = [{"epoch": 1, "train_loss": 4.5, "val_loss": 4.4, "dev_chrf": 41.0, "is_best": True}]
    write_report(tmp_path / "a-report.png", history, {"dev_chrf": "dev chrF"}, "val_loss")
    losses, metric = drawn[0].axes
    assert list(losses.lines[-1].get_ydata()) == [4.4]
    low, high = losses.get_xlim()
    assert [tick for tick in losses.get_xticks() if low < tick < high] == [1]
    assert drawn[0].get_suptitle() == "a, 1 epoch"
    assert [text.get_text() for text in metric.legend_.texts] == ["dev chrF"]


def test_the_surest_mistakes_come_first_with_what_the_model_read(nano_tokenizer):
    texts = ["one two", "three", "four five six", "seven"]
    rows = [nano_tokenizer(text)["input_ids"] for text in texts]
    lengths = np.array([len(row) for row in rows])
    tokens = np.array([token for row in rows for token in row], dtype=np.int32)
    data = TokenizedPairs(
        list("abcd"), np.array([0, 1, 1, 0]), tokens, lengths.cumsum() - lengths, lengths, 0
    )
    logits = torch.tensor([[3.0, 0], [1.0, 0], [2.0, 0], [0, 0.5]])
    mistakes = surest_mistakes(logits, data, nano_tokenizer)
    assert [(m["id"], m["prompt"]) for m in mistakes] == [
        ("c", "four five six"),
        ("b", "three"),
        ("d", "seven"),
    ]
    assert (mistakes[0]["label"], mistakes[0]["predicted"]) == ("yes", "no")
    assert mistakes[0]["probability"] == pytest.approx(0.8808)
    assert surest_mistakes(logits, data, nano_tokenizer, n=1) == mistakes[:1]


def test_tensorboard_reads_the_logs(tmp_path):
    log = tensorboard_log(tmp_path, "run", CPU)
    log({"dev_loss": 0.5}, 10)
    log({"dev_loss": 0.25}, 20)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("dev_loss")] == [(10, 0.5), (20, 0.25)]


@pytest.mark.parametrize(("folder", "rank"), [(None, 0), ("logs", 1)])
def test_without_the_flag_and_in_other_processes_nothing_is_logged(tmp_path, folder, rank):
    runtime = Runtime(torch.device("cpu"), rank=rank, world_size=2)
    log = tensorboard_log(folder and tmp_path / folder, "run", runtime)
    log({"dev_loss": 0.5}, 10)
    assert not list(tmp_path.iterdir())


def test_logs_that_cannot_be_written_end_the_logs_alone(tmp_path, capsys):
    (tmp_path / "file").touch()
    log = tensorboard_log(tmp_path / "file", "run", CPU)
    for step in (10, 20):
        log({"dev_loss": 0.5}, step)
    assert capsys.readouterr().out.count(f"no more logs: {tmp_path}/file cannot be written: ") == 1


def test_a_run_that_goes_on_takes_back_what_it_logged_after_its_save(tmp_path):
    for steps in ((10, 20, 30), (20, 30)):
        log = tensorboard_log(tmp_path, "run", CPU)
        for step in steps:
            log({"dev_loss": 1 / step}, step)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in events.Scalars("dev_loss")] == [10, 20, 30]
