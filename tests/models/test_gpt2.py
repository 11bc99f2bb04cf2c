"""GPT2Model against `transformers`' GPT2Model in float32."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from datasets import token_index
from models.config import SIZES, GPT2Config
from models.gpt2 import GPT2Model
from modules.kernels import accelerate
from modules.kv_cache import KVCache
from modules.lora import LoRAConfig, add_lora
from modules.reft import ReFTConfig, add_reft
from tests.conftest import narrow_hf_model

HEADS = sorted({n_head for _, _, n_head in SIZES.values()})


def masks(padding: str, n_rows: int, length: int) -> torch.Tensor:
    """Rows of different lengths down to one token, padded as asked."""
    mask = torch.ones(n_rows, length, dtype=torch.long)
    for row in range(n_rows if padding != "none" else 0):
        n_real = max(1, length - row * length // (n_rows - 1))
        if padding == "right":
            mask[row, n_real:] = 0
        elif padding == "left":
            mask[row, : length - n_real] = 0
    return mask


def assert_same(hf, gpt, length: int, padding: str, n_rows: int = 3) -> None:
    ids = torch.randint(0, hf.config.vocab_size, (n_rows, length))
    mask = masks(padding, n_rows, length)
    positions = (mask.cumsum(1) - 1).clamp(min=0) if padding == "left" else None
    with torch.no_grad():
        theirs = hf(ids, attention_mask=mask, position_ids=positions, output_hidden_states=True)
        ours = gpt(ids, mask if padding != "none" else None)
        logits = gpt.hidden_state_to_token(ours["last_hidden_state"])
    is_token = mask.bool()
    difference = (theirs.hidden_states[-1] - ours["last_hidden_state"])[is_token].abs().max()
    assert difference < 1e-4
    assert torch.equal(theirs.logits[is_token].argmax(-1), logits[is_token].argmax(-1))
    last = length - 1 - mask.flip(1).argmax(1)
    expected = ours["last_hidden_state"][torch.arange(n_rows), last]
    assert torch.equal(ours["last_token"], expected)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("n_head", HEADS)
def test_hidden_states_equal_transformers_for_every_head_count(n_head, padding, tmp_path):
    hf = narrow_hf_model(n_head)
    hf.save_pretrained(tmp_path)
    gpt = GPT2Model.from_pretrained(tmp_path).eval()
    assert_same(hf, gpt, 17, padding)
    accelerate(gpt)
    assert_same(hf, gpt, 17, padding)
    assert_same(hf, gpt, 1, "none")


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    torch.manual_seed(1)
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(initializer_range=0.04)).eval()
    folder = tmp_path_factory.mktemp("full")
    hf.save_pretrained(folder)
    return hf, GPT2Model.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    ("length", "padding", "n_rows"),
    [(1, "none", 2), (24, "none", 2), (24, "right", 3), (24, "left", 3), (1024, "none", 1)],
)
def test_hidden_states_equal_transformers_at_gpt2_size(full_size, length, padding, n_rows):
    assert_same(*full_size, length, padding, n_rows)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_padding_does_not_leak(gpt, padding):
    ids, mask = torch.randint(0, 101, (3, 9)), masks(padding, 3, 9)
    other = torch.where(mask.bool(), ids, (ids + 50) % 101)
    with torch.no_grad():
        assert torch.equal(gpt(ids, mask)["last_token"], gpt(other, mask)["last_token"])


@pytest.mark.parametrize("last_only", [False, True])
def test_a_token_index_with_some_padding_in_it_gives_the_same(gpt, last_only):
    ids, mask = torch.randint(0, 101, (3, 9)), masks("right", 3, 9)
    index = torch.from_numpy(token_index(mask.bool().numpy()))
    assert len(index) == 16 > mask.sum()
    with torch.no_grad():
        found, indexed = (gpt(ids, mask, i, last_only=last_only) for i in (None, index))
    assert torch.allclose(indexed["last_token"], found["last_token"], atol=1e-6)
    if not last_only:
        states = indexed["token_states"][: mask.sum()]
        assert torch.allclose(states, found["last_hidden_state"][mask.bool()], atol=1e-6)
        assert (found["last_hidden_state"][~mask.bool()] == 0).all()


def test_layers_see_the_tokens_and_no_padding(gpt):
    ids, mask, seen = torch.randint(0, 101, (3, 9)), masks("right", 3, 9), []
    gpt.gpt_layers[1].interm_dense.register_forward_hook(lambda m, x, y: seen.append(y.shape))
    with torch.no_grad():
        gpt(ids, mask)
    assert seen == [(int(mask.sum()), 128)]


def with_adapters(gpt: GPT2Model, reft: bool) -> list[torch.nn.Parameter]:
    """The weights of LoRA or ReFT, which gpt gets, with values as after training."""
    if reft:
        add_reft(gpt, ReFTConfig("nodireft", positions="f2+l1"))
    else:
        add_lora(gpt, LoRAConfig())
    torch.manual_seed(0)
    trained = [p for p in gpt.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.normal_(std=0.1)
    return trained


@pytest.mark.parametrize("reft", [False, True])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_the_last_token_alone_has_the_same_state_and_gradients(gpt, padding, reft):
    trained = with_adapters(gpt, reft)
    ids, mask = torch.randint(0, 101, (3, 9)), masks(padding, 3, 9)
    given = None if padding == "none" else mask
    whole, alone = gpt(ids, given), gpt(ids, given, last_only=True)
    assert alone.keys() == {"last_token"}
    assert torch.allclose(alone["last_token"], whole["last_token"], atol=1e-5)
    weighting = torch.randn(3, 32)
    pairs = zip(
        torch.autograd.grad((alone["last_token"] * weighting).sum(), trained),
        torch.autograd.grad((whole["last_token"] * weighting).sum(), trained),
        strict=True,
    )
    assert all(torch.allclose(a, b, atol=1e-4 * b.abs().max() + 1e-6) for a, b in pairs)


def test_the_last_token_alone_fills_a_cache_as_usual(gpt):
    ids = torch.randint(0, 101, (2, 7))
    caches = KVCache(3, 2, 9), KVCache(3, 2, 9)
    with torch.no_grad():
        for cache, last_only in zip(caches, (False, True), strict=True):
            gpt(ids, cache=cache, last_only=last_only)
            state = gpt(ids[:, :1], cache=cache, last_only=last_only)["last_token"]
            assert torch.allclose(
                state, gpt(torch.cat([ids, ids[:, :1]], 1))["last_token"], atol=1e-5
            )


def test_dropout_works_in_training_and_not_in_evaluation(gpt):
    ids = torch.randint(0, 101, (2, 9))
    with torch.no_grad():
        assert torch.equal(gpt(ids)["last_token"], gpt(ids)["last_token"])
        gpt.train()
        assert not torch.equal(gpt(ids)["last_token"], gpt(ids)["last_token"])


@pytest.mark.parametrize(
    "where", ["embed_dropout", "gpt_layers.1.dropout", "gpt_layers.1.self_attention"]
)
def test_each_dropout_is_in_use(gpt, where):
    gpt.get_submodule(where).train()
    ids = torch.randint(0, 101, (2, 9))
    with torch.no_grad():
        assert not torch.equal(gpt(ids)["last_token"], gpt(ids)["last_token"])


def test_more_tokens_than_positions_are_refused(gpt):
    with pytest.raises(ValueError, match="65 tokens given, but the model has 64 positions"):
        gpt(torch.zeros(1, 65, dtype=torch.long))
    cache = KVCache(3, 1, size=80)
    gpt(torch.zeros(1, 60, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="65 tokens given, but the model has 64 positions"):
        gpt(torch.zeros(1, 5, dtype=torch.long), cache=cache)


@pytest.mark.parametrize("mask_given", [False, True])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("cuts", [(9, 10, 11, 12), (1, 2, 12), (4, 9, 12)])
def test_reading_in_parts_with_a_cache_equals_reading_all(gpt, cuts, padding, mask_given):
    ids, mask = torch.randint(0, 101, (3, 12)), masks(padding, 3, 12)
    given = mask if mask_given or padding != "none" else None
    cache, parts, start = KVCache(3, 3, size=20), [], 0
    with torch.no_grad():
        whole = gpt(ids, given)["last_hidden_state"]
        for end in cuts:
            part = None if given is None else given[:, start:end]
            out = gpt(ids[:, start:end], part, cache=cache)
            parts.append(out["last_hidden_state"])
            start = end
    if padding != "right":
        assert torch.equal(out["last_token"], parts[-1][:, -1])
    real = mask.bool()
    assert torch.allclose(torch.cat(parts, 1)[real], whole[real], atol=1e-5)


def test_logits_are_float32_and_exact_under_autocast(gpt):
    h = 100 * torch.randn(4, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = gpt.hidden_state_to_token(h)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, h @ gpt.word_embedding.weight.T, atol=1e-3)


def with_unused_rows(gpt: GPT2Model) -> GPT2Model:
    """A copy of the model whose embedding ends in 27 rows of zeros, with their ids suppressed.

    The logits of both are moved to about -50, as gpt2's are, where a zero row would win.
    """
    with torch.no_grad():
        gpt.final_layer_norm.weight[0], gpt.final_layer_norm.bias[0] = 0, 10
        gpt.word_embedding.weight[:, 0] = -5
    padded = copy.deepcopy(gpt)
    padded.config = replace(gpt.config, vocab_size=128)
    rows = F.pad(gpt.word_embedding.weight.detach(), (0, 0, 0, 27))
    padded.word_embedding = nn.Embedding.from_pretrained(
        rows, freeze=not gpt.word_embedding.weight.requires_grad
    )
    padded.suppress_tokens(range(101, 128))
    return padded


@pytest.mark.parametrize("autocast", [False, True])
def test_suppressed_ids_have_probability_0_and_change_no_other_logit(gpt, autocast):
    padded, ids = with_unused_rows(gpt), torch.randint(0, 101, (3, 9))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, found = (m.hidden_state_to_token(m(ids)["last_token"]) for m in (gpt, padded))
        padded.suppress_tokens(())
        plain = padded.hidden_state_to_token(padded(ids)["last_token"])
    assert (found[:, 101:] == -torch.inf).all()
    assert torch.allclose(found[:, :101], expected, atol=1e-5)
    assert (plain.argmax(1) >= 101).all()


def test_what_is_suppressed_moves_with_the_model_and_is_not_saved(gpt):
    names = gpt.state_dict().keys()
    gpt.suppress_tokens([3, 100])
    assert gpt.state_dict().keys() == names
    assert gpt.logit_bias.isinf().nonzero().flatten().tolist() == [3, 100]
    assert gpt.to("meta").logit_bias.is_meta


def test_sizes_are_gpt2s():
    with torch.device("meta"):
        counts = {
            name: sum(
                p.numel()
                for p in GPT2Model(GPT2Config(50257, 1024, width, layers, heads)).parameters()
            )
            for name, (width, layers, heads) in SIZES.items()
            if name != "gpt2-nano"
        }
    assert counts == {
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
    }


def test_a_fresh_model_starts_as_gpt2_does():
    model = GPT2Model(GPT2Config(1000, 32, 64, 8, 4))
    assert model.word_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.gpt_layers[0].out_dense.weight.std().item() == pytest.approx(0.005, rel=0.05)
    assert model.gpt_layers[0].out_dense.bias.abs().sum() == 0
