"""Readers of files from elsewhere, on whatever hypothesis makes of them."""

import csv
import io
import json
import os
from dataclasses import fields

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from data.pairs import Pairs, read_pairs
from data.sonnets import read_sonnets
from datasets import make_prompt, tokenize_pairs
from finetune.checkpoint import read_adapter
from finetune.peft_format import read_peft
from models.config import GPT2Config
from models.pretrained import load_config, read_tensors
from modules.settings import UserError

EXAMPLES = int(os.environ.get("EXAMPLES", 150))
fast = settings(
    deadline=None,
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
HEADER = "id\tsentence1\tsentence2\tis_duplicate\n"
# Text as UTF-8 can hold it, rich in what the readers look at.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
TEXT |= st.text(st.sampled_from('ab \t"\n\r\0,é0123'), max_size=30)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """`whole` cut short, or with some bytes changed, taken out or put in."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 8)))
        data[start:end] = draw(st.binary(max_size=8))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


def read(reader, *args, **options):
    """What the reader returns, or None where it refuses in one sentence."""
    try:
        return reader(*args, **options)
    except UserError as error:
        sentence = str(error)
    assert "\n" not in sentence
    assert str(args[0]) in sentence
    return None


@fast
@given(st.binary(max_size=200) | TEXT.map(str.encode), st.booleans())
@example(b'1\t"a\tb\t0\n2\ta\tb\t1\n', True)
@example(b"\xff\xfe", False)
def test_pairs_are_read_or_refused_and_every_line_is_accounted_for(tmp_path, content, headed):
    path = tmp_path / "x"
    path.write_bytes(HEADER.encode() * headed + content)
    pairs = read(read_pairs, path, has_labels=True)
    if pairs is None:
        return
    assert len(pairs.ids) == len(pairs.first) == len(pairs.second) == len(pairs.labels) > 0
    assert all(pairs.first + pairs.second)
    assert set(pairs.labels) <= {0, 1}
    left_out = sum(map(len, pairs.left_out.values()))
    assert len(pairs.ids) + left_out <= path.read_bytes().count(b"\n") + 1


QUESTION = TEXT.map(lambda text: text.replace("\0", "").replace("\t", " ").strip())
QUESTION = QUESTION.filter(lambda text: text and text.count("\n") + text.count("\r") < 3)


@fast
@given(st.lists(st.tuples(QUESTION, QUESTION, st.sampled_from("01")), min_size=1, max_size=5))
def test_pairs_that_csv_wrote_come_back(tmp_path, rows):
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerow(HEADER.split())
    writer.writerows([str(i), *row] for i, row in enumerate(rows))
    path = tmp_path / "x"
    path.write_bytes(buffer.getvalue().encode())
    pairs = read_pairs(path, has_labels=True)
    read = list(zip(pairs.ids, pairs.first, pairs.second, map(str, pairs.labels), strict=True))
    plain = [[text.replace("\r\n", "\n") for text in row] for row in rows]
    assert read == [(str(i), *row) for i, row in enumerate(plain)]


@fast
@given(QUESTION, QUESTION, st.integers(25, 60))
def test_a_prompt_fits_the_model_and_ends_with_the_cue(nano_tokenizer, tmp_path, first, second, n):
    pairs = Pairs(tmp_path, ["1"], [first], [second], [0])
    ids = tokenize_pairs(pairs, nano_tokenizer, n).tokens.tolist()
    assert len(ids) <= n
    text, whole = nano_tokenizer.decode(ids), make_prompt(first, second)
    assert text.endswith('Answer "yes" or "no": ')
    if len(nano_tokenizer.backend_tokenizer.encode(whole).ids) <= n:
        assert text == whole


@fast
@given(st.binary(max_size=200) | TEXT.map(str.encode) | TEXT.map(lambda t: f"1\n{t}".encode()))
def test_poems_are_read_or_refused(tmp_path, content):
    path = tmp_path / "x"
    path.write_bytes(content)
    poems = read(read_sonnets, path)
    assert poems is None or all(poem.lines and all(map(str.strip, poem.lines)) for poem in poems)
    assert poems != []


@fast
@given(st.dictionaries(st.sampled_from([f.name for f in fields(GPT2Config)]), JSON) | JSON)
def test_a_configuration_is_sound_or_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = read(load_config, tmp_path)
    if config is None:
        return
    assert all(type(getattr(config, f.name)) is f.type for f in fields(GPT2Config) if f.type is int)
    assert config.n_embd % config.n_head == 0


TENSORS = {"h.0.attn.c_attn.weight": torch.ones(4, 12), "wte.weight": torch.zeros(3, 4)}


@fast
@given(damaged(save(TENSORS)))
def test_damaged_safetensors_are_read_or_refused(tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    tensors = read(lambda path: list(read_tensors(path)), path) or []
    assert all(isinstance(tensor, torch.Tensor) for _, tensor in tensors)


def pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save({"about": {"rank": 2}, "adapter": {"lora_A": torch.ones(3)}}, buffer)
    return buffer.getvalue()


@fast
@given(damaged(pickled()) | st.binary(max_size=60))
def test_a_damaged_adapter_is_read_or_refused(tmp_path, data):
    path = tmp_path / "a.pt"
    path.write_bytes(data)
    about, state = read(read_adapter, path) or ({}, {})
    assert isinstance(about, dict)
    assert all(tensor.isfinite().all() for tensor in state.values())


KEY = "base_model.model.transformer.h.0.attn.c_attn.lora_{}.weight"
ABOUT = {"peft_type": "LORA", "lora_alpha": 16, "alpha_pattern": {"c_attn": 3}}


@fast
@given(
    st.dictionaries(st.sampled_from([*ABOUT, "bias", "use_rslora", "use_dora"]), JSON),
    damaged(save({KEY.format("A"): torch.ones(2, 4), KEY.format("B"): torch.ones(12, 2)})),
)
def test_a_damaged_peft_adapter_is_read_or_refused(tmp_path, changes, data):
    (tmp_path / "adapter_config.json").write_text(json.dumps(ABOUT | changes))
    (tmp_path / "adapter_model.safetensors").write_bytes(data)
    adapters = read(read_peft, tmp_path) or {}
    assert all(x.A.shape[0] == x.B.shape[1] for x in adapters.values())
