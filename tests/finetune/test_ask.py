"""Finished runs are asked from the command line and from Python."""

import io
import json
import shutil
import sys

import pytest

from data.pairs import read_pairs
from finetune import ask
from finetune.run import RECORD
from models.pretrained import BUNDLED
from modules.settings import UserError
from tests.scripts import ROOT, run_folder, run_script

PAIRS = ["--demo", "--limit_train", "60", "--limit_dev", "12", "--epochs", "1"]
POEMS = ["--demo", "--limit_train", "10", "--limit_dev", "2", "--epochs", "1", "--max_lines", "5"]
LINES = ["Shall I compare thee to a summer's day?", "Thou art more lovely,", "Rough winds do shake"]


@pytest.fixture(scope="module")
def pairs_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    run_script("reft_paraphrase_detection.py", folder, *PAIRS, "--reft_type", "loreft")
    return folder


@pytest.fixture(scope="module")
def poems_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("poems")
    run_script("lora_sonnet_generation.py", folder, *POEMS)
    return folder


def test_probabilities_are_those_of_the_runs_own_predictions(pairs_run):
    run = ask.load(run_folder(pairs_run))
    lines = (pairs_run / "dev.csv").read_text().splitlines()[1:]
    pairs = read_pairs(ROOT / "data" / "sample-pairs-dev.csv", True, limit=12)
    for line, first, second in zip(lines, pairs.first, pairs.second, strict=True):
        yes = run.probability(first, second)
        assert (yes > 0.5) == line.endswith(" 1 ")
        assert run.probability(first.upper(), f"  {second}") == pytest.approx(yes, abs=1e-6)
        assert run.answer(first, second) == (
            f"yes, {yes:.2f}" if yes > 0.5 else f"no, {1 - yes:.2f}"
        )


def test_the_same_lines_get_another_poem_each_time(poems_run):
    run = ask.load(str(run_folder(poems_run)), temperature=0.8)
    assert run.generator.config.temperature == 0.8
    poems = [run.write(LINES) for _ in range(3)]
    assert all(poem[:3] == LINES and len(poem) == 5 for poem in poems)
    assert len(set(map(tuple, poems))) == 3
    assert ask.load(run_folder(poems_run), temperature=0.8).write(LINES) == poems[0]
    assert ask.load(run_folder(poems_run), temperature=0.8, seed=5).write(LINES) != poems[0]
    for lines in (LINES[:2], [*LINES[:2], " "], ["132", *LINES[:2]]):
        with pytest.raises(UserError, match="a poem needs 3 lines to start from, none of them bl"):
            run.write(lines)
    with pytest.raises(UserError, match=r"SamplingConfig.top_p: 2 is not a number above 0"):
        ask.load(run_folder(poems_run), top_p=2)


def said(capsys, monkeypatch, runs, *argv: str, stdin: str = "") -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    capsys.readouterr()
    ask.main(ask.get_args(["--runs_dir", str(runs), *argv]))
    return capsys.readouterr().out


def test_questions_come_as_arguments_or_by_a_pipe(pairs_run, capsys, monkeypatch):
    runs, questions = pairs_run / "runs", ["How old are you?", "What is your age?"]
    answer = said(capsys, monkeypatch, runs, "reft-gpt2", *questions)
    assert answer == ask.load(run_folder(pairs_run)).answer(*questions) + "\n"
    two = "\n".join([*questions, "", *questions, ""])
    assert said(capsys, monkeypatch, runs, stdin=two) == answer * 2
    with pytest.raises(UserError, match="this run takes 2 lines at a time; left over: .'one'"):
        said(capsys, monkeypatch, runs, stdin="one")
    with pytest.raises(UserError, match="--seed are only for runs that write sonnets"):
        said(capsys, monkeypatch, runs, "--seed", "3", "reft-gpt2", *questions)


def test_a_pipe_must_be_utf8_and_may_have_a_mark(pairs_run, capsys, monkeypatch):
    def pipe(content: bytes, *argv: str) -> str:
        stdin = io.TextIOWrapper(io.BytesIO(content), errors="surrogateescape")
        monkeypatch.setattr(sys, "stdin", stdin)
        ask.main(ask.get_args(["--runs_dir", str(pairs_run / "runs"), *argv]))
        return capsys.readouterr().out.splitlines()[-1]

    assert pipe(b"\xef\xbb\xbfOne?\nTwo?\n") == pipe(b"One?\nTwo?\n")
    with pytest.raises(UserError, match="the text is not UTF-8"):
        pipe(b"caf\xe9?\nTwo?\n")
    with pytest.raises(UserError, match="the text is not UTF-8"):
        pipe(b"", "reft-gpt2", "caf\udce9?", "Two?")


def test_a_run_is_asked_wherever_its_folder_and_its_base_are(pairs_run, tmp_path):
    expected = ask.load(run_folder(pairs_run)).probability("a", "b")
    shutil.copytree(run_folder(pairs_run), tmp_path / "best-run")
    (tmp_path / "link").symlink_to(tmp_path / "best-run")
    assert ask.load("link", runs_dir=tmp_path).probability("a", "b") == expected
    shutil.copytree(BUNDLED, tmp_path / "moved")
    record = json.loads((tmp_path / "best-run" / RECORD).read_text())
    record["arguments"] |= {"model_path": str(tmp_path / "gone"), "precision": "fp16"}
    (tmp_path / "best-run" / RECORD).write_text(json.dumps(record))
    with pytest.raises(UserError, match="gone is neither a folder"):
        ask.load(tmp_path / "best-run")
    moved = ask.load(tmp_path / "best-run", model_path=tmp_path / "moved")
    assert moved.probability("a", "b") == expected  # in float32, since fp16 needs a GPU


def test_a_temperature_ends_greedy_decoding(poems_run, tmp_path):
    shutil.copytree(run_folder(poems_run), tmp_path / "run")
    record = json.loads((tmp_path / "run" / RECORD).read_text())
    record["predicted_with"]["greedy"] = True
    (tmp_path / "run" / RECORD).write_text(json.dumps(record))
    assert ask.load(tmp_path / "run").generator.config.greedy
    assert not ask.load(tmp_path / "run", temperature=0.5).generator.config.greedy
    assert ask.load(tmp_path / "run", temperature=0.5, greedy=True).generator.config.greedy


def test_flags_may_stand_between_run_and_text(poems_run, capsys, monkeypatch):
    flags = [run_folder(poems_run).name, "--greedy", *LINES]
    assert said(capsys, monkeypatch, poems_run / "runs", *flags).splitlines()[:3] == LINES
    with pytest.raises(UserError, match="seed -1 is not a whole number of 0 or more"):
        ask.load(run_folder(poems_run), seed=-1)


def test_lines_by_a_pipe_become_a_poem(poems_run, capsys, monkeypatch):
    text = said(capsys, monkeypatch, poems_run / "runs", "--greedy", stdin="\n".join(LINES))
    assert text.splitlines()[:3] == LINES
    assert len(text.splitlines()) == 6  # a blank line behind the poem


def test_runs_that_cannot_be_asked_are_refused_by_name(pairs_run, tmp_path):
    with pytest.raises(UserError, match="no finished run in .*; train one"):
        ask.load(runs_dir=tmp_path)
    with pytest.raises(UserError, match="'lora' is not a run in .*: reft-gpt2-nano-1"):
        ask.load("lora", runs_dir=pairs_run / "runs")
    folder = tmp_path / run_folder(pairs_run).name
    shutil.copytree(run_folder(pairs_run), folder)
    (folder / "resume.pt").touch()
    with pytest.raises(UserError, match="is unfinished; repeat its command with --resume"):
        ask.load(folder)
    (folder / "resume.pt").unlink()
    base = tmp_path / "base"
    shutil.copytree(BUNDLED, base)
    record = json.loads((folder / RECORD).read_text())
    record["arguments"]["model_path"] = str(base)
    (folder / RECORD).write_text(json.dumps(record))
    assert 0 < ask.load(folder).probability("a", "b") < 1
    (base / "merges.txt").write_text((base / "merges.txt").read_text().rstrip() + "\nq z\n")
    with pytest.raises(
        UserError, match=r"base is no longer the checkpoint that reft-.* trained on"
    ):
        ask.load(folder)
