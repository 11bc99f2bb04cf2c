"""Both ReFT scripts end to end."""

import json
import shutil

import pytest
import torch

from data.sonnets import read_sonnets
from finetune.checkpoint import load_adapter
from finetune.runtime import Runtime
from modules.settings import UserError
from tests.scripts import ROOT, run_folder, run_script

PARAPHRASE, SONNET = "reft_paraphrase_detection.py", "reft_sonnet_generation.py"
NAME = "reft-gpt2-nano-1-0.002-3-sonnet.pt"
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
    # layers, locations, matrices, rank, width
    assert metrics["trainable_parameters"] == 4 * 2 * 2 * 16 * 256
    arguments = metrics["arguments"]
    assert (arguments["batch_size"], arguments["reft_rank"]) == (8, 16)
    assert "65,536 of them trainable" in done.stdout


def test_sonnet_run_trains_the_layers_listed_and_continues_with_the_cache(sonnet):
    folder, _ = sonnet
    given = read_sonnets(ROOT / "data" / "sonnets_held_out.txt", 2)
    poems = read_sonnets(folder / "poems.txt")
    assert [poem.lines[:3] for poem in poems] == [s.lines for s in given]
    metrics = json.loads((folder / "reft-sonnet-metrics.json").read_text())
    assert metrics["trainable_parameters"] == 2 * (2 * 3 * 256 + 3)
    assert metrics["arguments"]["reft_dropout"] == 0.1
    saved = torch.load(run_folder(folder) / NAME, weights_only=True)
    assert {name.split(".")[2] for name in saved["adapter"]} == {"0", "3"}
    assert metrics["adapter"]["positions"] == "f2+l3"


def test_predict_only_repeats_the_poems(sonnet):
    folder, _ = sonnet
    poems = (folder / "poems.txt").read_bytes()
    (folder / "poems.txt").unlink()
    run_script(SONNET, folder, *POEMS, *LOREFT, "--predict_only")
    assert (folder / "poems.txt").read_bytes() == poems


def test_an_adapter_is_not_accepted_on_another_base_of_the_same_name(paraphrase, tmp_path):
    folder, _ = paraphrase
    model = tmp_path / "checkpoint-500"
    shutil.copytree(ROOT / "models" / "gpt2-nano", model)
    flags = [*SHORT, "--model_path", model]
    run_script(PARAPHRASE, tmp_path, *flags)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attn_pdrop": 0.2}))
    done = run_script(PARAPHRASE, tmp_path, *flags, "--predict_only", check=False)
    assert done.returncode == 1
    assert "does not exist: train first, with the same command" in done.stderr.splitlines()[-1]
    other = run_folder(tmp_path) / "reft-checkpoint-500-1-0.002-16-paraphrase.pt"
    with pytest.raises(UserError, match="has base [0-9a-f]+, but this run has 0"):
        load_adapter(other, torch.nn.Module(), {"base": "0"}, Runtime(torch.device("cpu")))
