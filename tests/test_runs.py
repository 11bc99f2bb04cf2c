"""A person's evening: runs that differ in little, side by side, stopped, resumed, used again."""

import json
import re
import sys

import pytest
import torch

from finetune import ask, compare
from finetune.run import adapter_path, finished_runs
from tests.scripts import run_script, start_script, wait_until

SCRIPT = "lora_sonnet_generation.py"
FLAGS = "--demo --limit_train 24 --limit_dev 3 --epochs 2 --save_every 2 --max_new_tokens 40"
LINES = ["Shall I compare thee to a summer's day?", "Thou art more lovely,", "Rough winds do shake"]


@pytest.fixture(scope="module")
def evening(tmp_path_factory):
    """The folder that all runs wrote to, and the flags of each finished run by its folder."""
    folder = tmp_path_factory.mktemp("evening")

    def start(*flags: str):
        return start_script(SCRIPT, folder, *FLAGS.split(), *flags, out=folder / f"{flags}.log")

    for process in [start(), start("--seed", "2")]:  # at once
        process.join()
        assert process.exitcode == 0
    killed = start("--lora_rank", "2")
    wait_until(lambda: list(folder.glob("runs/*/resume.pt")), killed)
    killed.kill()
    killed.join()
    assert len(finished_runs(folder / "runs")) == 2
    run_script(SCRIPT, folder, *FLAGS.split(), "--lora_rank", "2", "--resume")
    run_script(SCRIPT, folder, *FLAGS.split(), "--limit_train", "12")
    decoding = ["--greedy", "--max_lines", "5"]
    run_script(SCRIPT, folder, *FLAGS.split(), "--seed", "2", "--predict_only", *decoding)
    records = [run / "run.json" for run in finished_runs(folder / "runs")]
    return folder, {path.parent: json.loads(path.read_text())["arguments"] for path in records}


def test_every_adapter_is_there_and_of_its_own_training(evening):
    _, runs = evening
    told = [(flags["seed"], flags["lora_rank"], flags["limit_train"]) for flags in runs.values()]
    assert sorted(told) == [(2, 4, 24), (11711, 2, 24), (11711, 4, 12), (11711, 4, 24)]
    adapters = [
        torch.load(adapter_path(run, run.name), weights_only=True)["adapter"] for run in runs
    ]
    sums = {float(sum(x.double().abs().sum() for x in adapter.values())) for adapter in adapters}
    assert len(sums) == 4


def test_the_shown_files_are_all_of_the_newest_prediction(evening):
    folder, runs = evening
    (seeded,) = (run for run, flags in runs.items() if flags["seed"] == 2)
    metrics = json.loads((folder / "lora-sonnet-metrics.json").read_text())
    assert metrics["name"] == seeded.name
    assert metrics["predicted_with"]["greedy"]
    assert not metrics["arguments"]["greedy"]
    assert seeded.name in (folder / "lora-sonnet-report.html").read_text()
    pictures = [folder / "lora-sonnet-report.png", seeded / "lora-sonnet-report.png"]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    poems = (folder / "poems.txt").read_bytes()
    same = [run for run in runs if (run / "lora_generated_sonnets.txt").read_bytes() == poems]
    assert same == [seeded]


def test_compare_lists_all_runs_and_how_they_differ(evening, monkeypatch, capsys):
    folder, runs = evening
    monkeypatch.setattr(sys, "argv", ["compare", "--runs_dir", str(folder / "runs")])
    compare.main()
    shown = capsys.readouterr().out
    digests = re.findall(r"[0-9a-f]{6}(?=[,}\s])", shown)
    assert {run.name[-6:] for run in runs} <= set(digests)
    counts = re.findall(r"^[0-9]+ +([0-9]+) +lora", shown, re.MULTILINE)
    assert counts == ["1", "1", "1", "1"]  # the other seed was last predicted greedily
    (seeded,) = (run for run, flags in runs.items() if flags["seed"] == 2)
    assert re.search(rf"{re.escape(seeded.name)}  .*greedy=True  max_lines=5", shown)


def test_every_run_can_be_asked(evening):
    _, runs = evening
    poems = [ask.load(run, greedy=False, temperature=1.0).write(LINES) for run in runs]
    assert all(poem[:3] == LINES for poem in poems)
    assert len(set(map(tuple, poems))) > 1
