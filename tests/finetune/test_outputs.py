"""Predictions in the course's formats, the final table, logs."""

from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.sonnets import Sonnet
from finetune.outputs import TensorBoardLog, format_predictions, format_sonnets, format_table


def test_predictions_are_the_courses_byte_for_byte():
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    text = "id \t Predicted_Is_Paraphrase \nb 1, 1 \na, 0 \n"
    assert format_predictions(["b 1", "a"], logits) == text


def test_sonnets_are_the_courses_byte_for_byte():
    text = format_sonnets([Sonnet(132, ("a", "b")), Sonnet(7, ("c",))])
    assert text == "--Generated Sonnets-- \n\n\n132\na\nb\n\n\n7\nc\n\n"


def test_the_final_table_has_a_line_for_each_result_and_file():
    record = {
        "name": "lora-x",
        "history": [{"epoch": 1, "is_best": True}, {"epoch": 2, "is_best": False}],
        "final": {"val_loss": 4.5, "rhyming_pairs": 0.05, "shakespeare": {"rhyming_pairs": 0.75}},
        "trainable_parameters": 1327104,
        "train_seconds": 12.34,
    }
    assert format_table(record, {"report": Path("a.html")}).splitlines() == [
        "run                   lora-x",
        "best epoch            1",
        "val loss              4.5000",
        "rhyming pairs         0.05 (Shakespeare 0.75)",
        "trainable parameters  1,327,104",
        "train seconds         12.3",
        "report                a.html",
    ]


def test_tensorboard_reads_the_logs(tmp_path):
    log = TensorBoardLog(tmp_path)
    log({"dev_loss": 0.5}, 10)
    log({"dev_loss": 0.25}, 20)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("dev_loss")] == [(10, 0.5), (20, 0.25)]


def test_without_a_folder_nothing_is_logged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    TensorBoardLog(None)({"dev_loss": 0.5}, 10)
    assert not list(tmp_path.iterdir())


def test_logs_that_cannot_be_written_end_the_logs_alone(tmp_path, capsys):
    (tmp_path / "file").touch()
    log = TensorBoardLog(tmp_path / "file")
    for step in (10, 20):
        log({"dev_loss": 0.5}, step)
    sentence = f"no more logs: {tmp_path}/file cannot be written: "
    assert capsys.readouterr().out.count(sentence) == 1


def test_a_resumed_run_purges_what_it_logged_after_its_save(tmp_path):
    for steps in ((10, 20, 30), (20, 30)):
        log = TensorBoardLog(tmp_path)
        for step in steps:
            log({"dev_loss": 1 / step}, step)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("dev_loss")] == [10, 20, 30]
