"""Finished runs side by side: groups, order, table, CSV, picture."""

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from finetune import compare
from finetune.run import RECORD, STATE, find_run
from modules.settings import UserError
from tests.conftest import ROOT

LORA, REFT = {"rank": 8}, {"rank": 4, "type": "loreft"}


def add_run(
    runs_dir: Path, digest: str, score: float, task: str = "paraphrase", reft: bool = False, **flags
) -> str:
    """Write a finished run's record, by default of LoRA on pairs; returns the run's name."""
    method, adapter = ("reft", REFT) if reft else ("lora", LORA)
    name = f"{method}-gpt2-3-0.0001-{adapter['rank']}-{task}-{digest}"
    final = {"dev_accuracy": score, "dev_macro_f1": score - 0.1, "dev_loss": 0.5}
    if task == "sonnet":
        final = {"val_loss": 4.4, "dev_loss": score, "dev_chrf": 41.7}
    arguments = {"lr": 1e-4, "epochs": 3, "seed": 1, "para_train": "data/quora-train.csv"}
    record = {"name": name, "method": method, "task": task, "model": "gpt2"}
    record |= {"arguments": arguments | flags, "adapter": adapter, "final": final}
    others = {k: v for k, v in flags.items() if k not in ("seed", "para_dev_out")}
    record |= {"recipe": repr((method, task, others)), "base": "0", "processes": 1}
    record |= {"predicted_with": {"greedy": False, "top_p": 0.9} if task == "sonnet" else {}}
    record |= {"trainable_parameters": 1327104, "train_seconds": 60.0, "peak_memory_mb": 400.0}
    (runs_dir / name).mkdir(parents=True)
    (runs_dir / name / RECORD).write_text(json.dumps(record))
    return name


@pytest.fixture
def run_compare(tmp_path, monkeypatch, capsys):
    """Run the command on the runs in `tmp_path`; gives what it prints."""

    def run(*argv: str | Path) -> str:
        command = ["compare", *map(str, argv), "--runs_dir", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", command)
        compare.main()
        return capsys.readouterr().out

    return run


def rows_of(text: str) -> list[list[str]]:
    """The cells of the lines that start with a number and hold no name."""
    return [
        line.split() for line in text.splitlines() if line[:1].isdigit() and "-gpt2-" not in line
    ]


def test_seeds_are_one_line_with_mean_and_deviation_and_the_best_comes_first(tmp_path, run_compare):
    for seed, score in enumerate((0.70, 0.72, 0.74)):
        add_run(tmp_path, f"00000{seed}", score, seed=seed, para_dev_out=f"{seed}.csv")
    best = add_run(tmp_path, "00000a", 0.73, reft=True)
    text = run_compare()
    best_scores, scores = ["0.730", "0.630", "0.500"], ["0.720±0.020", "0.620±0.020", "0.500±0.000"]
    assert rows_of(text) == [
        ["1", "1", "reft", "loreft", "4", "1,327,104", "0.0001", "3", *best_scores, "60", "400"],
        ["2", "3", "lora", "8", "1,327,104", "0.0001", "3", *scores, "60", "400"],
    ]
    assert f"1  {best}\n" in text
    assert "2  lora-gpt2-3-0.0001-8-paraphrase-{000000,000001,000002}\n" in text


@pytest.mark.parametrize(
    "flags", [{"weight_decay": 0.5}, {"para_train": "data/other.csv"}, {"limit_train": 10}]
)
def test_runs_of_another_recipe_are_no_group_and_say_what_differs(tmp_path, run_compare, flags):
    base = {"weight_decay": 0.1, "limit_train": None}
    add_run(tmp_path, "000001", 0.7, **base)
    add_run(tmp_path, "000002", 0.8, **base | flags | {"seed": 2})
    text = run_compare()
    assert [row[1] for row in rows_of(text)] == ["1", "1"]
    (name, value) = flags.popitem()
    assert f"-000002  {name}={Path(str(value)).name}\n" in text


def test_tasks_stand_apart_and_a_lower_loss_is_better(tmp_path, run_compare):
    add_run(tmp_path, "000001", 4.6, task="sonnet", reft=True)
    add_run(tmp_path, "000002", 4.5, task="sonnet")
    add_run(tmp_path, "000003", 0.7)
    pairs, poems = run_compare().split("sonnet, mean")
    assert [row[7] for row in rows_of(pairs)] == ["0.700"]
    assert [row[2] for row in rows_of(poems)] == ["lora", "reft"]
    assert "accuracy" not in poems
    assert "chrf" in poems


def test_another_column_orders_the_tasks_that_have_it(tmp_path, run_compare):
    add_run(tmp_path, "000001", 0.8)
    add_run(tmp_path, "000002", 0.7, reft=True)
    assert [row[2] for row in rows_of(run_compare("--by", "rank"))] == ["reft", "lora"]
    assert [row[2] for row in rows_of(run_compare("--by", "chrf"))] == ["lora", "reft"]


def test_csv_has_all_columns_of_all_groups(tmp_path, run_compare):
    names = [add_run(tmp_path, f"00000{seed}", 0.7 + seed / 10, seed=seed) for seed in (0, 1)]
    add_run(tmp_path, "00000a", 4.5, task="sonnet")
    run_compare("--csv", tmp_path / "new" / "runs.csv")
    pairs, poem = csv.DictReader(io.StringIO((tmp_path / "new" / "runs.csv").read_text()))
    assert pairs["runs"].split() == names
    assert [pairs[name] for name in ("task", "n", "method", "model", "rank", "lr", "epochs")] == (
        ["paraphrase", "2", "lora", "gpt2", "8", "0.0001", "3"]
    )
    assert float(pairs["accuracy"]) == pytest.approx(0.75)
    assert float(pairs["accuracy_sd"]) == pytest.approx(0.005**0.5)
    assert (pairs["val_loss"], pairs["seconds"], pairs["memory_mb"]) == ("", "60.0", "400.0")
    assert (poem["dev_loss"], poem["dev_loss_sd"], poem["chrf"]) == ("4.5", "", "41.7")


def test_the_picture_has_each_groups_score_with_its_deviation(tmp_path, run_compare, monkeypatch):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (figures.append(f), save(f, *a, **k)))
    for seed, score in enumerate((0.70, 0.72, 0.74)):
        add_run(tmp_path, f"00000{seed}", score, seed=seed)
    add_run(tmp_path, "00000a", 0.71, reft=True)
    add_run(tmp_path, "00000b", 4.5, task="sonnet")
    run_compare("--png", tmp_path / "runs.png")
    assert imread(tmp_path / "runs.png").shape[1] == 800
    pairs, poems = figures[0].axes
    labels = [label.get_text() for label in pairs.get_yticklabels()]
    assert labels == ["1  lora, rank 8, lr 0.0001", "2  reft loreft, rank 4, lr 0.0001"]
    assert [point.get_xydata().tolist() for point in pairs.lines if point.get_marker() == "o"] == (
        [[[pytest.approx(0.72), 1]], [[pytest.approx(0.71), 2]]]
    )
    (deviation,) = pairs.collections[0].get_segments()
    assert deviation[:, 0].tolist() == pytest.approx([0.70, 0.74])
    assert poems.get_title().startswith("sonnet: dev_loss")


def test_unfinished_runs_are_named_below_the_table(tmp_path, run_compare):
    add_run(tmp_path, "000001", 0.7)
    begun, resumed = tmp_path / "lora-begun-00000e", tmp_path / add_run(tmp_path, "00000f", 0.9)
    begun.mkdir()
    for folder in (begun, resumed):
        (folder / STATE).touch()
    text = run_compare()
    assert len(rows_of(text)) == 1
    for folder in (begun, resumed):
        assert f"unfinished (repeat its command with --resume): {folder.name}\n" in text
    with pytest.raises(UserError, match="none of these runs can be compared"):
        run_compare("lora-begun")


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_damaged_run_is_left_out_with_a_line(tmp_path, run_compare):
    path = tmp_path / add_run(tmp_path, "00000b", 0.7) / RECORD
    path.write_text("{")
    with pytest.raises(UserError, match="none of these runs can be compared"):
        run_compare()
    add_run(tmp_path, "00000c", 0.8)
    text = run_compare()
    assert f"left out: {path} is not JSON" in text
    assert [row[1] for row in rows_of(text)] == ["1"]


def test_a_link_to_a_run_and_a_copy_of_it_do_not_count(tmp_path, run_compare):
    name = add_run(tmp_path, "000001", 0.7)
    (tmp_path / "latest").symlink_to(tmp_path / name)
    shutil.copytree(tmp_path / name, tmp_path / "copy")
    assert [row[1] for row in rows_of(run_compare())] == ["1"]
    assert [row[1] for row in rows_of(run_compare(name, tmp_path / "copy"))] == ["1"]
    edit(tmp_path / "copy" / RECORD, date="2026-01-01")  # trained again
    assert [row[1] for row in rows_of(run_compare())] == ["1"]
    edit(tmp_path / "copy" / RECORD, processes=2)
    assert [row[1] for row in rows_of(run_compare())] == ["1", "1"]


def test_seeds_share_a_line_only_if_all_else_is_the_same(tmp_path, run_compare):
    names = [add_run(tmp_path, f"00000{i}", 4.5, task="sonnet", seed=i) for i in range(5)]
    edit(tmp_path / names[0] / RECORD, predicted_with={"greedy": True, "top_p": 0.9})
    edit(tmp_path / names[1] / RECORD, processes=2)
    renamed = names[2].replace("gpt2", "my-gpt2")
    edit(tmp_path / names[2] / RECORD, model="my-gpt2", name=renamed)
    text = run_compare()
    assert sorted(row[1] for row in rows_of(text)) == ["1", "1", "1", "2"]
    assert f"{names[0]}  greedy=True  processes=1\n" in text
    assert f"{names[1]}  greedy=False  processes=2\n" in text
    assert f"{renamed}  greedy=False  processes=1\n" in text


def test_a_run_is_found_by_its_name_the_beginning_of_it_or_its_folder(tmp_path, run_compare):
    name = add_run(tmp_path, "000001", 0.7)
    other = add_run(tmp_path, "000002", 0.8, reft=True)
    longer = add_run(tmp_path, "000001-", 0.9)
    for run in (name, "reft", tmp_path / longer):
        assert len(rows_of(run_compare(run))) == 1
    assert f"1  {other}\n" in run_compare("reft-gpt2")
    assert len(rows_of(run_compare("reft", other, tmp_path / other, name))) == 2
    assert len(rows_of(run_compare("lora"))) == len(rows_of(run_compare(name, longer)))
    with pytest.raises(UserError, match=r"^'lora' begins the names of several runs: lora-gpt2-3-"):
        find_run("lora", tmp_path)
    with pytest.raises(UserError, match=f"^'gpt3' is not a run in {tmp_path}: lora-gpt2-3-"):
        run_compare("gpt3")


def test_without_a_finished_run_one_sentence_says_what_to_do(tmp_path, run_compare):
    sentence = f"^no finished run in {tmp_path}; train one first, for example with python lora_"
    with pytest.raises(UserError, match=sentence):
        run_compare()
    with pytest.raises(UserError, match=f"^'a' is not a run in {tmp_path}$"):
        run_compare("a")
    command = [sys.executable, "-m", "finetune.compare", "--runs_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: no finished run in ")
