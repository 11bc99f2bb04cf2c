"""Pretraining from plain text: documents, orthogonal updates, a checkpoint that loads."""

import json
import math
import re
import subprocess
import sys
from itertools import islice

import pytest
import torch
import transformers

from models.gpt2 import GPT2Model
from models.pretrain import Recipe, orthogonalize, random_windows, read_text
from models.tokenizer import load_tokenizer
from modules.settings import UserError
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    sonnets = (ROOT / "data" / "sonnets.txt").read_text(encoding="utf-8")
    (folder / "a.txt").write_text(sonnets * 6, encoding="utf-8")
    return folder


def test_every_document_is_in_one_part_and_none_is_lost(text_folder):
    train, held_out = read_text(text_folder)
    assert len(held_out) == 1
    parts = [*train[:50], *held_out, *train[50:]]
    assert "".join(parts) == (text_folder / "a.txt").read_text(encoding="utf-8")
    assert all(part.endswith("\n\n") for part in parts[:-1])


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(UserError, match="needs \\*.txt files of 500,000 characters"):
        read_text(tmp_path)


def test_text_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("Liebe für alle".encode("latin-1"))
    with pytest.raises(UserError, match="a.txt is not UTF-8 text"):
        read_text(tmp_path)


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32)])
def test_an_update_has_singular_values_near_one_and_keeps_its_directions(shape):
    torch.manual_seed(0)
    g = torch.randn(shape)
    update = orthogonalize(g)
    assert update.shape == shape
    values = torch.linalg.svdvals(update)
    assert 0.5 < values.min() <= values.max() < 1.3
    U, _, Vh = torch.linalg.svd(g, full_matrices=False)
    inner = U.T @ update @ Vh.T
    assert (inner - inner.diag().diag()).abs().max() < 1e-3


def test_an_epoch_of_windows_shows_no_token_twice_and_the_next_has_other_windows():
    windows = random_windows(torch.arange(1000), context=10, batch_size=4, seed=0)
    first, second = (torch.cat(list(islice(windows, 24))) for _ in range(2))
    for rows in (first, second):
        assert rows.shape == (96, 11)
        assert len(rows[:, :-1].unique()) == 960
        assert (rows.diff() == 1).all()
    assert not set(first[:, 0].tolist()) & set(second[:, 0].tolist())


def run(*words):
    command = [sys.executable, "-m", "models.pretrain", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lr": 0.0}, "Recipe.lr: 0 is not a number above 0"),
        ({"vocab_size": 299}, "vocab_size: 299 is not a whole number of 300 or more"),
        ({"model_size": "gpt3"}, "model_size: 'gpt3' is not one of gpt2, "),
    ],
)
def test_a_recipe_of_values_that_are_not_allowed_is_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        Recipe(**settings)


def test_windows_longer_than_the_text_are_refused_in_one_sentence(text_folder, tmp_path):
    done = run("--text", text_folder, "--out", tmp_path / "out", "--context", 9000)
    assert done.returncode == 1
    assert re.fullmatch("error: .* too little text for this --batch_s.*\n", done.stderr)


def test_the_command_writes_a_checkpoint_that_transformers_loads(text_folder, tmp_path):
    flags = "--steps 12 --warmup_steps 3 --context 32 --vocab_size 400 --batch_size 4"
    done = run("--text", text_folder, "--out", tmp_path, *flags.split())
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "pretraining.json").read_text())
    assert record["recipe"]["steps"] == 12
    assert record["held_out_nats_per_token"] < math.log(400) - 0.5
    assert 1 < record["held_out_bits_per_byte"] < 8
    gpt = GPT2Model.from_pretrained(tmp_path).eval()
    hf = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == gpt.config.vocab_size == 400
    assert tokenizer.eos_token_id == hf.config.eos_token_id == 399
    ids = tokenizer("From fairest creatures we desire increase", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours = gpt.hidden_state_to_token(gpt(ids)["last_hidden_state"])
        assert torch.allclose(ours, hf(ids).logits, atol=1e-4)
