"""The script end to end, as a person runs it."""

import json
import re
from functools import partial
from pathlib import Path

import markupsafe
import peft
import pytest
import torch
import transformers
from matplotlib.image import imread

from data.pairs import read_pairs
from datasets import answer_ids, make_prompt
from finetune.arguments import project_path
from models.pretrained import BUNDLED
from models.tokenizer import load_tokenizer
from modules.lora import TARGETS
from tests.conftest import narrow_hf_model
from tests.scripts import ROOT, run_folder, run_script

SHORT = ["--demo", "--limit_train", "96", "--limit_dev", "40", "--epochs", "2"]
NAME = "lora-gpt2-nano-2-0.002-8-paraphrase.pt"


run = partial(run_script, "lora_paraphrase_detection.py")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, run(folder, *SHORT)


def predictions(path):
    header, *lines = path.read_text().splitlines()
    assert header == "id \t Predicted_Is_Paraphrase "
    return [re.fullmatch(r"(.+), ([01]) ", line).groups() for line in lines]


def test_predictions_are_written_in_the_order_of_the_file(finished):
    folder, _ = finished
    for name, has_labels in (("dev", True), ("test", False)):
        pairs = read_pairs(ROOT / "data" / f"sample-pairs-{name}.csv", has_labels, limit=40)
        assert [pair_id for pair_id, _ in predictions(folder / f"{name}.csv")] == pairs.ids


def test_metrics_agree_with_the_predictions(finished):
    folder, done = finished
    metrics = json.loads((folder / "lora-paraphrase-metrics.json").read_text())
    pairs = read_pairs(ROOT / "data" / "sample-pairs-dev.csv", True, limit=40)
    answers = [int(answer) for _, answer in predictions(folder / "dev.csv")]
    right = sum(a == b for a, b in zip(answers, pairs.labels, strict=True))
    assert metrics["final"]["dev_accuracy"] == right / 40
    assert metrics["final"]["dev_accuracy"] == max(r["dev_accuracy"] for r in metrics["history"])
    assert [record["epoch"] for record in metrics["history"]] == [1, 2]
    assert metrics["trainable_parameters"] == 147_456
    assert metrics["total_parameters"] == 5_387_776 + 147_456
    assert metrics["arguments"]["lr"] == 0.002
    assert metrics["adapter"]["targets"] == list(TARGETS)
    assert imread(folder / "lora-paraphrase-report.png").shape[1] == 800
    page = (folder / "lora-paraphrase-report.html").read_text()
    assert str(markupsafe.escape(pairs.first[0])) in page
    for key in ("train_seconds", "examples_per_second", "tokens_per_second", "peak_memory_mb"):
        assert metrics[key] > 0
    assert "5,535,232 parameters, 147,456 of them trainable" in done.stdout
    assert re.search(r"dev accuracy +0\.\d{4}\n", done.stdout)


def test_the_checkpoint_holds_the_adapter_alone(finished):
    folder, _ = finished
    saved = torch.load(run_folder(folder) / NAME, weights_only=True)
    assert sum(tensor.numel() for tensor in saved["adapter"].values()) == 147_456
    assert saved["about"]["model"] == "gpt2-nano"


def test_the_same_seed_gives_the_same_run_and_predict_only_the_same_predictions(finished, tmp_path):
    folder, _ = finished
    run(tmp_path, *SHORT)
    first, second = (
        torch.load(run_folder(d) / NAME, weights_only=True)["adapter"] for d in (folder, tmp_path)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    shown = {name: (folder / name).read_bytes() for name in ("dev.csv", "test.csv")}
    for name, content in shown.items():
        assert (tmp_path / name).read_bytes() == content
        (tmp_path / name).unlink()
    metrics = (tmp_path / "lora-paraphrase-metrics.json").read_bytes()
    done = run(tmp_path, *SHORT, "--predict_only")
    assert "epoch 1" not in done.stdout
    for name, content in shown.items():
        assert (tmp_path / name).read_bytes() == content
    assert (tmp_path / "lora-paraphrase-metrics.json").read_bytes() == metrics


def test_a_real_vocabulary_and_a_model_of_ones_own(gpt2_tokenizer, tmp_path):
    folder = tmp_path / "my model"
    narrow_hf_model(vocab_size=50257, n_positions=128).save_pretrained(folder)
    gpt2_tokenizer.save_pretrained(folder)
    flags = "--demo --limit_train 24 --limit_dev 12 --epochs 1 --lora_layers 1"
    flags += " --lora_targets query value --grad_accum 2 --grad_clip 1 --lr_schedule cosine"
    run(tmp_path, "--model_path", folder, *flags.split(), "--precision", "bf16")
    saved = torch.load(
        run_folder(tmp_path) / "lora-my model-1-0.002-8-paraphrase.pt", weights_only=True
    )
    assert saved["adapter"].keys() == {
        f"gpt.gpt_layers.1.self_attention.qkv.lora_{matrix}" for matrix in "AB"
    }


def test_exports_are_what_was_trained_and_an_adapter_read_in_predicts_the_same(tmp_path):
    flags = [*SHORT, "--lora_rank", "2", "--limit_train", "300", "--gradient_checkpointing"]
    flags += ["--tensorboard"]
    run(tmp_path, *flags, "--export_peft", tmp_path / "a", "--export_merged", tmp_path / "m")
    assert len(list(run_folder(tmp_path).glob("events.out.*"))) == 1
    base = transformers.GPT2LMHeadModel.from_pretrained(BUNDLED, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()
    merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "m").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    answers = list(answer_ids(load_tokenizer(BUNDLED)))
    pairs = read_pairs(ROOT / "data" / "sample-pairs-dev.csv", True, limit=40)
    for i, (pair_id, answer) in enumerate(predictions(tmp_path / "dev.csv")):
        prompt = make_prompt(pairs.first[i], pairs.second[i])
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            first, second = (model(ids).logits[0, -1, answers] for model in (adapted, merged))
        assert (pair_id, int(answer)) == (pairs.ids[i], int(first.argmax()))
        assert torch.allclose(first, second, atol=1e-4)

    again = tmp_path / "again"
    again.mkdir()
    run(again, *SHORT, "--import_peft", tmp_path / "a", "--predict_only")
    for name in ("dev.csv", "test.csv"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()
    flags = [*SHORT, "--limit_train", "24", "--lr", "1e-7"]
    run(again, *flags, "--import_peft", tmp_path / "a")
    metrics = json.loads((again / "lora-paraphrase-metrics.json").read_text())
    was = json.loads((tmp_path / "lora-paraphrase-metrics.json").read_text())
    assert metrics["adapter"]["rank"] == 2
    assert metrics["final"]["dev_loss"] == pytest.approx(was["final"]["dev_loss"], abs=1e-3)

    flags = [*SHORT, "--limit_train", "60", "--import_peft", tmp_path / "a"]
    run(again, *flags)
    trained = (again / "lora-paraphrase-metrics.json").read_text()
    run(again, *flags, "--predict_only", "--export_peft", tmp_path / "b")
    predicted = (again / "lora-paraphrase-metrics.json").read_text()
    assert json.loads(predicted)["final"] == json.loads(trained)["final"]
    exported = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert exported[0] != exported[1]


def test_it_runs_where_hugging_faces_datasets_is_installed(tmp_path):
    site = tmp_path / "site"
    (site / "datasets").mkdir(parents=True)
    (site / "datasets" / "__init__.py").write_text("raise RuntimeError('the other datasets')")
    (site / "datasets-4.4.1.dist-info").mkdir()
    about = "Metadata-Version: 2.1\nName: datasets\nVersion: 4.4.1\n"
    (site / "datasets-4.4.1.dist-info" / "METADATA").write_text(about)
    flags = ["--demo", "--limit_train", "12", "--limit_dev", "8", "--epochs", "1"]
    run(tmp_path, *flags, env={"PYTHONPATH": str(site)})
    assert len(predictions(tmp_path / "dev.csv")) == 8


def test_files_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert project_path("data/sonnets.txt") == Path("data/sonnets.txt")
    monkeypatch.chdir(tmp_path)
    assert project_path("data/sonnets.txt").resolve() == ROOT / "data" / "sonnets.txt"
    done = run(tmp_path, "--help")
    default = str(project_path("predictions/lora-para-dev-output.csv"))
    assert default in "".join(done.stdout.split())  # however long the path, and so its lines


@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [
        (["--lora_ra", "3"], 2, "unknown flag --lora_ra: did you mean --lora_rank?"),
        (["--model_size", "gpt2-nano"], 1, "quora-train.csv does not exist: see data/README.md"),
    ],
)
def test_bad_input_gets_one_sentence(tmp_path, flags, code, sentence):
    done = run(tmp_path, *flags, check=False)
    assert done.returncode == code
    assert sentence in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
