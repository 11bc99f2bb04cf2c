"""Pretraining from plain text: documents, orthogonal updates, a checkpoint that loads."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

from models.gpt2 import GPT2Model
from models.pretrain import orthogonalize, random_windows, read_text
from models.pretrained import load_tokenizer
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


def test_an_epoch_of_windows_shows_no_token_twice():
    tokens = np.arange(1000)
    rows = np.concatenate(list(random_windows(tokens, 10, 4, np.random.default_rng(0))))
    assert rows.shape[1] == 11
    assert len(np.unique(rows[:, :-1])) == rows[:, :-1].size >= 950
    assert (np.diff(rows, axis=1) == 1).all()


def test_the_command_writes_a_checkpoint_that_transformers_loads(text_folder, tmp_path):
    command = f"-m models.pretrain --text {text_folder} --out {tmp_path} --steps 60"
    command += " --warmup_steps 5 --context 32 --vocab_size 400 --batch_size 4"
    subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, check=True)
    record = json.loads((tmp_path / "pretraining.json").read_text())
    assert record["recipe"]["steps"] == 60
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
