"""The files that a run writes for people."""

import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finetune.outputs import (
    TensorBoardLog,
    write_metrics,
    write_paraphrase_predictions,
    write_report,
)
from finetune.progress import Fitted
from modules.lora import LoRAConfig

HISTORY = [
    {
        "epoch": epoch,
        "train_loss": train_loss,
        "dev_loss": dev_loss,
        "dev_accuracy": accuracy,
        "dev_macro_f1": accuracy - 0.1,
        "is_best": is_best,
    }
    for epoch, train_loss, dev_loss, accuracy, is_best in (
        (1, 0.7, 0.65, 0.6, True),
        (2, 0.5, 0.55, 0.75, True),
        (3, 0.4, 0.60, 0.7, False),
    )
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
    counts = np.array([[2, 1], [0, 3]])
    write_report(path, HISTORY, {"dev_accuracy": "accuracy"}, "dev_accuracy", counts)
    picture = imread(path)
    assert picture.shape[1] == 800
    assert 20 < len(np.unique((picture * 255).astype(int).reshape(-1, 4), axis=0))
    losses, metric, counts = drawn[0].axes
    training, dev, best = (line.get_ydata() for line in losses.lines)
    assert (list(training), list(dev), best[0]) == ([0.7, 0.5, 0.4], [0.65, 0.55, 0.6], 0)
    assert [text.get_text() for text in losses.legend_.texts] == ["training", "dev"]
    (star,) = (line for line in metric.lines if line.get_marker() == "*")
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


def test_tensorboard_reads_the_logs(tmp_path):
    log = TensorBoardLog(tmp_path, "run")
    log({"dev_loss": 0.5}, 10)
    log({"dev_loss": 0.25}, 20)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("dev_loss")] == [(10, 0.5), (20, 0.25)]


def test_without_a_folder_nothing_is_logged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    TensorBoardLog(None, "run")({"dev_loss": 0.5}, 10)
    assert not list(tmp_path.iterdir())


def test_logs_that_cannot_be_written_end_the_logs_alone(tmp_path, capsys):
    (tmp_path / "file").touch()
    log = TensorBoardLog(tmp_path / "file", "run")
    for step in (10, 20):
        log({"dev_loss": 0.5}, step)
    sentence = f"no more logs: {tmp_path}/file/run cannot be written: "
    assert capsys.readouterr().out.count(sentence) == 1


def test_a_resumed_run_purges_what_it_logged_after_its_save(tmp_path):
    for steps in ((10, 20, 30), (20, 30)):
        log = TensorBoardLog(tmp_path, "run")
        for step in steps:
            log({"dev_loss": 1 / step}, step)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in events.Scalars("dev_loss")] == [10, 20, 30]


def test_prediction_file_is_the_courses_byte_for_byte(tmp_path):
    path = tmp_path / "out.csv"
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    write_paraphrase_predictions(path, ["b 1", "a"], logits)
    assert path.read_bytes() == b"id \t Predicted_Is_Paraphrase \nb 1, 1 \na, 0 \n"


def test_metrics_file_is_json_with_versions(tmp_path):
    path = tmp_path / "metrics.json"
    fitted = Fitted([{"epoch": 1}], {"train_seconds": 2})
    write_metrics(
        path, {"lr": 0.1, "out": path}, LoRAConfig(rank=3), fitted, {"loss": 0.5}, extra=[1]
    )
    metrics = json.loads(path.read_text())
    assert metrics["arguments"] == {"lr": 0.1, "out": str(path)}
    assert metrics["final"] == {"loss": 0.5}
    assert metrics["train_seconds"] == 2
    assert metrics["adapter"]["rank"] == 3
    assert metrics["extra"] == [1]
    assert metrics["versions"]["torch"] == torch.__version__
