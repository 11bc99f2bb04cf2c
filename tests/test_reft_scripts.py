"""Both ReFT scripts end to end, and checkpoints that are read by the wrong run."""

import json
import shutil

import pytest
import torch

from data.sonnets import read_sonnets
from tests.conftest import ROOT, run_script

PARAPHRASE, SONNET = "reft_paraphrase_detection.py", "reft_sonnet_generation.py"
SHORT = ["--demo", "--limit_train", "48", "--limit_dev", "12", "--epochs", "1", "--lr", "0.002"]
POEMS = [
    "--demo",
    "--limit_train",
    "12",
    "--limit_dev",
    "2",
    "--epochs",
    "1",
    "--lr",
    "0.002",
    "--max_lines",
    "5",
]
LOREFT = [
    "--reft_type",
    "loreft",
    "--reft_layers",
    "0",
    "3",
    "--reft_positions",
    "f2+l3",
    "--reft_rank",
    "3",
]


@pytest.fixture(scope="module")
def paraphrase(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paraphrase")
    return folder, run_script(PARAPHRASE, folder, *SHORT)


@pytest.fixture(scope="module")
def sonnet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sonnet")
    return folder, run_script(SONNET, folder, *POEMS, *LOREFT)


def test_paraphrase_run_writes_its_own_files(paraphrase):
    folder, done = paraphrase
    assert len((folder / "dev.csv").read_text().splitlines()) == 13
    assert len((folder / "test.csv").read_text().splitlines()) == 13
    metrics = json.loads((folder / "reft-paraphrase-metrics.json").read_text())
    assert metrics["trainable_parameters"] == 4 * 2 * 2 * 4 * 256  # layers, places, W, rank, width
    arguments = metrics["arguments"]
    assert (arguments["batch_size"], arguments["reft_rank"], arguments["reft_dropout"]) == (8, 4, 0)
    assert "16,384 of them trainable" in done.stdout


def test_sonnet_run_trains_the_layers_listed_and_continues_with_the_cache(sonnet):
    folder, _ = sonnet
    given = read_sonnets(ROOT / "data" / "sonnets_held_out.txt", 2)
    poems = read_sonnets(folder / "poems.txt")
    assert [poem.lines[:3] for poem in poems] == [s.lines for s in given]
    metrics = json.loads((folder / "reft-sonnet-metrics.json").read_text())
    assert metrics["trainable_parameters"] == 2 * 2 * (2 * 3 * 256 + 3)
    assert metrics["arguments"]["reft_dropout"] == 0.1
    saved = torch.load(folder / "reft-gpt2-nano-1-0.002-3-sonnet.pt", weights_only=True)
    assert {name.split(".")[2] for name in saved["adapter"]} == {"0", "3"}
    assert saved["about"]["positions"] == "f2+l3"


def test_predict_only_repeats_the_poems(sonnet, tmp_path):
    folder, _ = sonnet
    name = "reft-gpt2-nano-1-0.002-3-sonnet.pt"
    (tmp_path / name).write_bytes((folder / name).read_bytes())
    run_script(SONNET, tmp_path, *POEMS, *LOREFT, "--predict_only")
    assert (tmp_path / "poems.txt").read_bytes() == (folder / "poems.txt").read_bytes()


CHECKPOINT = "reft-gpt2-nano-1-0.002-4-paraphrase.pt"


@pytest.mark.parametrize(
    ("script", "flags", "name", "sentence"),
    [
        (
            "lora_paraphrase_detection.py",
            ["--lora_rank", "4"],
            "lora-gpt2-nano-1-0.002-4-paraphrase.pt",
            "has method reft, this run has lora",
        ),
        (
            SONNET,
            [],
            "reft-gpt2-nano-1-0.002-4-sonnet.pt",
            "has task paraphrase, this run has sonnet",
        ),
        (
            PARAPHRASE,
            ["--reft_rank", "8"],
            "reft-gpt2-nano-1-0.002-8-paraphrase.pt",
            "has rank 4, this run has 8",
        ),
        (
            PARAPHRASE,
            ["--reft_layers", "1", "2"],
            CHECKPOINT,
            "has layers None, this run has (1, 2)",
        ),
        (
            PARAPHRASE,
            ["--reft_type", "direft"],
            CHECKPOINT,
            "has type adapter, this run has direft",
        ),
        (
            PARAPHRASE,
            ["--reft_positions", "l4"],
            CHECKPOINT,
            "has positions all, this run has l4",
        ),
    ],
)
def test_a_checkpoint_of_another_run_names_both_sides(
    paraphrase, tmp_path, script, flags, name, sentence
):
    folder, _ = paraphrase
    (tmp_path / name).write_bytes((folder / CHECKPOINT).read_bytes())
    done = run_script(script, tmp_path, *SHORT, *flags, "--predict_only", check=False)
    assert done.returncode == 1
    assert sentence in done.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_checkpoint_of_another_model_names_both_sides(paraphrase, tmp_path):
    folder, _ = paraphrase
    copied = tmp_path / "copy"
    shutil.copytree(ROOT / "models" / "gpt2-nano", copied)
    name = "reft-copy-1-0.002-4-paraphrase.pt"
    (tmp_path / name).write_bytes((folder / CHECKPOINT).read_bytes())
    flags = [*SHORT, "--model_path", copied, "--predict_only"]
    done = run_script(PARAPHRASE, tmp_path, *flags, check=False)
    assert done.stderr.splitlines()[-1].endswith("has model gpt2-nano, this run has copy")
