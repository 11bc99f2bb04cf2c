"""Reading and writing checkpoints, whole and broken."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file, save_model

from models.config import SIZES, GPT2Config
from models.gpt2 import GPT2Model
from models.pretrained import (
    BUNDLED,
    find_checkpoint,
    fingerprint,
    load_config,
    save_gpt2,
)
from models.tokenizer import load_tokenizer
from modules.settings import UserError
from tests.conftest import ROOT, Evil

IDS = torch.tensor([[5, 99, 0, 42]])


def logits(gpt) -> torch.Tensor:
    with torch.no_grad():
        return gpt.hidden_state_to_token(gpt.eval()(IDS)["last_hidden_state"])


@pytest.fixture
def expected(hf_model):
    with torch.no_grad():
        return hf_model(IDS).logits


@pytest.mark.parametrize("names", ["base", "lm_head"])
@pytest.mark.parametrize("form", ["safetensors", "sharded", "bin"])
def test_every_form_of_a_checkpoint_loads(hf_model, tmp_path, expected, form, names):
    model = hf_model if names == "lm_head" else hf_model.transformer
    if form == "bin":
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        shard = "20KB" if form == "sharded" else "1GB"
        model.save_pretrained(tmp_path, max_shard_size=shard)
        assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (form == "sharded")
    assert torch.allclose(logits(GPT2Model.from_pretrained(tmp_path)), expected, atol=1e-5)


def test_the_masks_of_old_checkpoints_are_passed_over(hf_folder, tmp_path, expected, capsys):
    shutil.copytree(hf_folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.allclose(logits(GPT2Model.from_pretrained(tmp_path)), expected, atol=1e-5)
    assert capsys.readouterr().out == ""


TASK_HEADS = {
    "GPT2ForSequenceClassification": "score.weight",
    "GPT2ForTokenClassification": "classifier.bias, classifier.weight",
    "GPT2ForQuestionAnswering": "qa_outputs.bias, qa_outputs.weight",
    "GPT2DoubleHeadsModel": "multiple_choice_head.summary.bias, multiple_choice_head.summary.we",
}


@pytest.mark.parametrize("architecture", TASK_HEADS)
def test_a_task_head_is_left_out_and_named(hf_model, tmp_path, expected, capsys, architecture):
    model = getattr(transformers, architecture)(hf_model.config)
    model.transformer.load_state_dict(hf_model.transformer.state_dict())
    model.save_pretrained(tmp_path)
    assert torch.allclose(logits(GPT2Model.from_pretrained(tmp_path)), expected, atol=1e-5)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path}: ignored the task head, {TASK_HEADS[architecture]}")


def test_other_names_of_the_configuration_are_those_of_transformers(hf_folder, tmp_path):
    shutil.copytree(hf_folder, tmp_path, dirs_exist_ok=True)
    names = {f.name for f in fields(GPT2Config)}
    stored = json.loads((tmp_path / "config.json").read_text())
    for alias, name in transformers.GPT2Config.attribute_map.items():
        if name in names:
            stored[alias] = stored.pop(name)
    assert len(set(stored) & names) < len(names)
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert load_config(tmp_path) == load_config(hf_folder)


def test_the_output_embedding_may_stand_for_the_tied_one(hf_model, tmp_path, expected):
    hf_model.config.save_pretrained(tmp_path)
    save_model(hf_model, str(tmp_path / "model.safetensors"))
    assert "transformer.wte.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.allclose(logits(GPT2Model.from_pretrained(tmp_path)), expected, atol=1e-5)


def test_half_precision_files_load_as_float32(hf_model, tmp_path):
    hf_model.config.save_pretrained(tmp_path)
    state = {k: v.half() for k, v in hf_model.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert {p.dtype for p in GPT2Model.from_pretrained(tmp_path).parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_saved_loads_into_transformers(gpt, tmp_path, dtype):
    save_gpt2(gpt, tmp_path, eos_token_id=100, dtype=dtype)
    hf, report = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        theirs = hf.eval()(IDS).logits
    assert torch.allclose(theirs, logits(GPT2Model.from_pretrained(tmp_path)), atol=1e-4)


def rewrite(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BROKEN = {
    "missing h.1.mlp.c_fc.bias": lambda d: rewrite(
        d, lambda t: t.pop("transformer.h.1.mlp.c_fc.bias")
    ),
    "unexpected transformer.h.9.mlp.c_fc.bias": lambda d: rewrite(
        d, lambda t: t.update({"transformer.h.9.mlp.c_fc.bias": torch.zeros(2)})
    ),
    r"wte.weight is torch.float32 \[7, 32\], .* \[101, 32\]": lambda d: rewrite(
        d, lambda t: t.update({"transformer.wte.weight": torch.zeros(7, 32)})
    ),
    "c_attn.weight is torch.int64": lambda d: rewrite(
        d,
        lambda t: t.update({"transformer.h.0.attn.c_attn.weight": torch.zeros(32, 96).long()}),
    ),
    "wte.weight and lm_head.weight must be the same": lambda d: rewrite(
        d, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1})
    ),
    "activation_function is 'relu'": lambda d: edit_config(d, activation_function="relu"),
    "tie_word_embeddings is False": lambda d: edit_config(d, tie_word_embeddings=False),
    "model_type is 'llama'": lambda d: edit_config(d, model_type="llama"),
    "n_embd 32 is not a multiple of n_head": lambda d: edit_config(d, n_head=5),
    "is not JSON": lambda d: (d / "config.json").write_text("{"),
    "it has no config.json": lambda d: (d / "config.json").unlink(),
    "has no weights": lambda d: (d / "model.safetensors").unlink(),
    "model.safetensors cannot be read": lambda d: os.truncate(d / "model.safetensors", 999),
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_sentence(hf_folder, tmp_path, sentence):
    shutil.copytree(hf_folder, tmp_path, dirs_exist_ok=True)
    BROKEN[sentence](tmp_path)
    with pytest.raises(UserError, match=sentence) as error:
        GPT2Model.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_a_pickle_that_runs_code_is_refused(hf_model, tmp_path):
    hf_model.config.save_pretrained(tmp_path)
    torch.save({"wte.weight": Evil(tmp_path / "harm")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="mkdir, which could run code"):
        GPT2Model.from_pretrained(tmp_path)
    assert not (tmp_path / "harm").exists()


def run_offline(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code that finds no hub, in a process of its own: its client reads variables once."""
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    command, env = [sys.executable, "-c", code], os.environ | nowhere | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


CACHED = {  # repository -> what it has beside config.json
    "models--gpt2": ["model.safetensors", "vocab.json", "merges.txt"],
    "models--openai-community--gpt2": ["pytorch_model.bin", "tokenizer.json"],
}


@pytest.mark.parametrize("repository", CACHED)
def test_a_model_in_the_hugging_face_cache_needs_no_network(
    hf_model, hf_folder, nano_tokenizer, tmp_path, repository
):
    everything = shutil.copytree(hf_folder, tmp_path / "everything")
    torch.save(hf_model.state_dict(), everything / "pytorch_model.bin")
    nano_tokenizer.save_pretrained(everything)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(BUNDLED / name, everything)
    snapshot = tmp_path / repository / "snapshots" / "0123"
    for path in (snapshot, tmp_path / repository / "refs"):
        path.mkdir(parents=True)
    (tmp_path / repository / "refs" / "main").write_text("0123")
    for name in ("config.json", *CACHED[repository]):
        shutil.copy(everything / name, snapshot)
    code = "from models.gpt2 import *; print(GPT2Model.from_pretrained('gpt2').config.n_embd)"
    unusable = {"HF_HUB_CACHE": str(tmp_path), "HTTPS_PROXY": "foo://bar"}
    done = run_offline(code, **unusable)
    assert done.stdout == "32\n", done.stderr
    (snapshot / name).unlink()
    assert "pass the folder of a GPT-2" in run_offline(code, **unusable).stderr


def test_gpt2_from_the_hub_equals_transformers():
    from huggingface_hub import HfApi
    from huggingface_hub.utils import httpx

    try:
        HfApi().model_info("gpt2", timeout=3)
    except (OSError, httpx.HTTPError) as error:
        pytest.skip(f"the Hugging Face hub does not answer: {error}")
    folder = find_checkpoint("gpt2")
    ids = load_tokenizer(folder)("The capital of France is", return_tensors="pt")["input_ids"]
    hf = transformers.GPT2LMHeadModel.from_pretrained("gpt2", dtype=torch.float32).eval()
    gpt = GPT2Model.from_pretrained(folder).eval()
    with torch.no_grad():
        ours = gpt.hidden_state_to_token(gpt(ids)["last_hidden_state"])
        assert torch.allclose(ours, hf(ids).logits, atol=1e-3)


@pytest.mark.parametrize("name", ["gpt3", "someone/model", "/no/such/folder"])
def test_an_unknown_name_is_refused_with_what_to_write_instead(name):
    with pytest.raises(
        UserError,
        match=f"^{name} is neither a folder nor one of the models gpt2, .* `hf download MODEL",
    ):
        find_checkpoint(name)


def test_a_path_is_a_folder_even_if_it_has_the_name_of_a_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("gpt2-nano") == BUNDLED
    with pytest.raises(UserError, match="^there is no folder gpt2-nano; for .* --model_size$"):
        find_checkpoint(Path("gpt2-nano"))
    for name in ("gpt2-nano", "gpt2"):
        Path(name).mkdir()
        assert find_checkpoint(Path(name)) == Path(name)


UNREACHABLE = {
    "no network": {},
    "SOCKS proxy": {"HTTPS_PROXY": "socks5://127.0.0.1:9", "HF_ENDPOINT": "https://hub.invalid"},
    "unknown proxy": {"HTTPS_PROXY": "foo://bar"},
    "malformed proxy": {"ALL_PROXY": "http://["},
    "malformed address": {"HF_ENDPOINT": "hub"},
    "offline by choice": {"HF_HUB_OFFLINE": "1"},
}


@pytest.mark.parametrize("kind", UNREACHABLE)
def test_a_hub_out_of_reach_is_reported_within_seconds(tmp_path, kind):
    code = "from models.pretrained import *\ntry: find_checkpoint('gpt2')\n"
    code += "except UserError as error: print(error)"
    started = time.monotonic()
    done = run_offline(code, HF_HOME=str(tmp_path), **UNREACHABLE[kind])
    (line,) = done.stdout.splitlines()
    assert line.startswith("gpt2 is not in the Hugging Face cache and could not be fetched")
    assert "pass the folder of a GPT-2 checkpoint (--model_path)" in line
    assert time.monotonic() - started < 60  # the hub's own retries alone take 24 s a file


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    config = transformers.GPT2Config(n_layer=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    code = f"""
import re
from pathlib import Path
from models.gpt2 import GPT2Model
from models.pretrained import BUNDLED
def kib(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
GPT2Model.from_pretrained(BUNDLED)
before = kib("VmRSS")
model = GPT2Model.from_pretrained(Path({str(tmp_path)!r}))
weights = sum(p.numel() for p in model.parameters()) * 4 / 1024
print((kib("VmHWM") - before) / weights)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert float(done.stdout) < 1.3


def test_a_fingerprint_is_of_the_content_not_of_the_place(tmp_path):
    original = fingerprint(BUNDLED)
    copy = tmp_path / "other name"
    shutil.copytree(BUNDLED, copy)
    (copy / "README.md").write_text("another card")
    edit_config(copy, architectures=["GPT2Model"], transformers_version="4.0.0")
    assert fingerprint(copy) == original
    changes = {
        "config.json": lambda path: edit_config(copy, n_head=8),
        "model.safetensors": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\1"),
        "merges.txt": lambda path: path.write_text(path.read_text() + "\n"),
        "tokenizer_config.json": lambda path: path.write_text("{}"),
    }
    seen = {original}
    for name, change in changes.items():
        change(copy / name)
        seen.add(fingerprint(copy))
    assert len(seen) == 1 + len(changes)
    assert all(len(digest) == 64 for digest in seen)


def test_the_bundled_checkpoint_is_a_gpt2_for_transformers_too(nano_tokenizer):
    files = ["config.json", "model.safetensors", "vocab.json", "merges.txt", "README.md"]
    assert sum((BUNDLED / name).stat().st_size for name in files) <= 12_000_000
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) <= 12_000_000
    gpt = GPT2Model.from_pretrained(find_checkpoint("gpt2-nano")).eval()
    config = gpt.config
    assert (config.n_embd, config.n_layer, config.n_head) == SIZES["gpt2-nano"]
    hf, report = transformers.GPT2LMHeadModel.from_pretrained(
        BUNDLED, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    tokenizer = transformers.GPT2TokenizerFast.from_pretrained(BUNDLED)
    assert [len(tokenizer(word)["input_ids"]) for word in ("yes", "no")] == [1, 1]
    assert tokenizer.eos_token_id == hf.config.eos_token_id == config.vocab_size - 1
    ids = tokenizer("Shall I compare thee to a summer's day?\n", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        theirs = hf.eval()(ids).logits
        ours = gpt.hidden_state_to_token(gpt(ids)["last_hidden_state"])
    assert torch.allclose(theirs, ours, atol=1e-3)
    assert torch.equal(theirs.argmax(-1), ours.argmax(-1))


def test_the_bundled_checkpoint_is_as_good_as_its_card_says():
    """The opening of Keats's Endymion; weights that went wrong somewhere give 4 bits a byte."""
    gpt, tokenizer = GPT2Model.from_pretrained(BUNDLED).eval(), load_tokenizer(BUNDLED)
    text = (
        "A thing of beauty is a joy for ever:\nIts loveliness increases; it will never\n"
        "Pass into nothingness; but still will keep\nA bower quiet for us, and a sleep\n"
        "Full of sweet dreams, and health, and quiet breathing.\n"
    )
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        scores = gpt.hidden_state_to_token(gpt(ids)["last_hidden_state"])
    loss = torch.nn.functional.cross_entropy(scores[0, :-1], ids[0, 1:], reduction="sum")
    assert loss.item() / 0.6931 / len(text.encode()) < 2.6


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_is_named(tmp_path, name):
    transformers.GPT2Config().save_pretrained(tmp_path)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    with pytest.raises(UserError, match="a Git LFS pointer.* run git lfs pull"):
        GPT2Model.from_pretrained(tmp_path)


def test_tensors_that_are_not_dense_are_refused(hf_model, hf_folder, tmp_path):
    (tmp_path / "config.json").write_bytes((hf_folder / "config.json").read_bytes())
    state = hf_model.state_dict()
    state["transformer.wpe.weight"] = state["transformer.wpe.weight"].to_sparse()
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="transformer.wpe.weight is not a dense tensor"):
        GPT2Model.from_pretrained(tmp_path)
