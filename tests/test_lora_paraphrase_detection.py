"""The script end to end, as a person runs it."""

import json
import re
from functools import partial

import pytest
import torch

from datasets import read_pairs
from tests.conftest import ROOT, narrow_hf_model, run_script

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
    for name, labelled in (("dev", True), ("test", False)):
        pairs = read_pairs(ROOT / "data" / f"sample-pairs-{name}.csv", labelled, limit=40)
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
    for key in ("train_seconds", "examples_per_second", "tokens_per_second", "peak_memory_mb"):
        assert metrics[key] > 0
    assert "5,535,232 parameters, 147,456 of them trainable" in done.stdout
    assert re.search(r"dev accuracy +0\.\d{4}\n", done.stdout)


def test_the_checkpoint_holds_the_adapter_alone(finished):
    folder, _ = finished
    saved = torch.load(folder / NAME, weights_only=True)
    assert sum(tensor.numel() for tensor in saved["adapter"].values()) == 147_456
    assert saved["about"]["model"] == "gpt2-nano"


def test_the_same_seed_gives_the_same_run_and_predict_only_the_same_predictions(finished, tmp_path):
    folder, _ = finished
    run(tmp_path, *SHORT)
    first, second = (torch.load(d / NAME, weights_only=True)["adapter"] for d in (folder, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("dev.csv", "test.csv"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
        (tmp_path / name).unlink()
    metrics = (tmp_path / "lora-paraphrase-metrics.json").read_bytes()
    done = run(tmp_path, *SHORT, "--predict_only")
    assert "epoch 1" not in done.stdout
    for name in ("dev.csv", "test.csv"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert (tmp_path / "lora-paraphrase-metrics.json").read_bytes() == metrics


def test_a_real_vocabulary_and_a_model_of_ones_own(gpt2_tokenizer, tmp_path):
    folder = tmp_path / "my model"
    narrow_hf_model(vocab_size=50257, n_positions=128).save_pretrained(folder)
    gpt2_tokenizer.save_pretrained(folder)
    flags = "--demo --limit_train 24 --limit_dev 12 --epochs 1 --lora_layers 1"
    flags += " --lora_targets query value --grad_accum 2 --grad_clip 1 --lr_schedule cosine"
    run(tmp_path, "--model_path", folder, *flags.split(), "--precision", "bf16")
    saved = torch.load(tmp_path / "lora-my model-1-0.002-8-paraphrase.pt", weights_only=True)
    assert saved["adapter"].keys() == {
        f"gpt.gpt_layers.1.self_attention.qkv.lora_{matrix}" for matrix in "AB"
    }


@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [
        (["--lr", "0"], 2, "'0' is not a number above 0"),
        (["--batch_size", "0"], 2, "'0' is not a whole number of 1 or more"),
        (["--lora_dropout", "1"], 2, "'1' is not a number of 0 or more and below 1"),
        (["--lora_targets", "c_attn"], 2, "invalid choice: 'c_attn'"),
        (["--model_size", "gpt3"], 2, "invalid choice: 'gpt3'"),
        (["--demo", "--lora_layers", "4"], 1, "error: layer 4 is not one of the model's, 0 to 3"),
        (["--demo", "--precision", "fp16"], 1, "error: --precision fp16 needs a CUDA GPU"),
        (["--demo", "--predict_only"], 1, "does not exist: train first"),
        (["--demo", "--para_dev", "none.csv"], 1, "error: none.csv does not exist"),
        (["--model_size", "gpt2-nano"], 1, "quora-train.csv does not exist: see data/README.md"),
        (["--model_path", "."], 1, "holds no GPT-2 checkpoint: no config.json in it"),
        (["--model_path", "nowhere"], 1, "nowhere is neither a folder nor one of the models"),
    ],
)
def test_bad_input_gets_one_sentence(tmp_path, flags, code, sentence):
    done = run(tmp_path, *flags, check=False)
    assert done.returncode == code
    assert sentence in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
