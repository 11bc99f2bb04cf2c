"""The script end to end, as a person runs it."""

import json
import re
import shutil
from functools import partial

import pytest

from data.sonnets import read_sonnets
from finetune.metrics import chrf
from tests.conftest import narrow_hf_model
from tests.scripts import ROOT, run_script

SHORT = ["--demo", "--limit_train", "30", "--limit_dev", "4", "--epochs", "2"]
NAME = "lora-gpt2-nano-2-0.002-4-sonnet.pt"
OUT = "poems.txt"


run = partial(run_script, "lora_sonnet_generation.py")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, run(folder, *SHORT)


def test_poems_of_14_lines_go_on_from_the_given_ones(finished):
    folder, _ = finished
    given = read_sonnets(ROOT / "data" / "sonnets_held_out.txt", 4)
    poems = read_sonnets(folder / OUT)
    assert [poem.number for poem in poems] == [sonnet.number for sonnet in given]
    assert [poem.lines[:3] for poem in poems] == [sonnet.lines for sonnet in given]
    assert {len(poem.lines) for poem in poems} == {14}


def test_metrics_tell_loss_chrf_and_form(finished):
    folder, done = finished
    metrics = json.loads((folder / "lora-sonnet-metrics.json").read_text())
    final, history = metrics["final"], metrics["history"]
    assert final["val_loss"] == min(record["val_loss"] for record in history)
    assert final["val_loss"] < final["val_loss_before_training"]
    best = next(record for record in history if record["val_loss"] == final["val_loss"])
    assert final["dev_chrf"] == best["dev_chrf"]
    form = {"share_of_14_lines", "syllables_per_line", "rhyming_pairs", "longest_copied_run"}
    assert form <= final.keys()
    assert final["shakespeare"].keys() == form
    assert final["shakespeare"]["rhyming_pairs"] > 0.7
    assert metrics["trainable_parameters"] == 73_728
    for value in (final["val_loss_before_training"], final["val_loss"], final["dev_chrf"]):
        assert f"  {value:.4f}\n" in done.stdout
    assert re.search(r"rhyming pairs +[\d.e-]+ \(Shakespeare 0\.\d+\)", done.stdout)


def test_two_dev_poems_are_shown_whenever_an_epoch_is_the_best(finished):
    _, done = finished
    lines = done.stdout.splitlines()
    for sonnet in read_sonnets(ROOT / "data" / "sonnets_held_out_dev.txt", 2):
        assert lines.count(str(sonnet.number)) == done.stdout.count("(best)") > 0
        assert lines[lines.index(str(sonnet.number)) + 1] == sonnet.lines[0]


def test_predict_only_takes_other_decoding_flags_and_records_them(finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    poems = (folder / OUT).read_bytes()
    flags = "--greedy --max_lines 5 --repetition_penalty 1.2 --no_repeat_ngram_size 4"
    done = run(tmp_path, *SHORT, "--predict_only", *flags.split())
    assert "epoch 1" not in done.stdout
    assert {len(poem.lines) for poem in read_sonnets(tmp_path / OUT)} == {5}
    metrics = json.loads((tmp_path / "lora-sonnet-metrics.json").read_text())
    assert metrics["predicted_with"]["max_lines"] == 5
    assert metrics["arguments"]["max_lines"] == 14
    assert len(metrics["history"]) == 2
    run(tmp_path, *SHORT, "--predict_only", "--num_samples", "3")
    assert (tmp_path / OUT).read_bytes() == poems
    samples = read_sonnets(tmp_path / "poems_samples.txt")
    poems = read_sonnets(tmp_path / OUT)
    assert [poem.number for poem in samples] == [poem.number for poem in poems for _ in range(3)]
    assert samples[::3] == poems
    assert len({poem.lines for poem in samples}) == 12
    assert chrf(samples[::3], poems) == 100


def test_a_real_vocabulary_and_bfloat16(gpt2_tokenizer, tmp_path):
    folder = tmp_path / "model"
    narrow_hf_model(vocab_size=50257, n_positions=128).save_pretrained(folder)
    gpt2_tokenizer.save_pretrained(folder)
    flags = "--demo --limit_train 6 --limit_dev 2 --epochs 1 --precision bf16 --grad_accum 2"
    run(tmp_path, "--model_path", folder, *flags.split())
    given = read_sonnets(ROOT / "data" / "sonnets_held_out.txt", 2)
    assert [poem.lines[:3] for poem in read_sonnets(tmp_path / OUT)] == [s.lines for s in given]
