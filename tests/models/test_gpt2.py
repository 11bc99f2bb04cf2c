"""GPT2Model against `transformers`' GPT2Model in float32."""

import pytest
import torch
import transformers

from models.gpt2 import LENGTH_STEP, SIZES, GPT2Config, GPT2Model
from models.pretrained import load_gpt2
from modules import linear
from modules.kv_cache import KVCache
from modules.linear import can_pack
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
        ours = gpt(ids, mask if padding != "none" else None, positions)
        logits = gpt.hidden_state_to_token(ours["last_hidden_state"])
    real = mask.bool()
    difference = (theirs.hidden_states[-1] - ours["last_hidden_state"])[real].abs().max()
    assert difference < 1e-4
    assert torch.equal(theirs.logits[real].argmax(-1), logits[real].argmax(-1))
    last = length - 1 - mask.flip(1).argmax(1)
    expected = ours["last_hidden_state"][torch.arange(n_rows), last]
    assert torch.equal(ours["last_token"], expected)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("n_head", HEADS)
def test_hidden_states_equal_transformers_for_every_head_count(n_head, padding, tmp_path):
    hf = narrow_hf_model(n_head)
    hf.save_pretrained(tmp_path)
    gpt = load_gpt2(tmp_path).eval()
    assert_same(hf, gpt, 17, padding)
    assert_same(hf, gpt, 1, "none")


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    torch.manual_seed(1)
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(initializer_range=0.04)).eval()
    folder = tmp_path_factory.mktemp("full")
    hf.save_pretrained(folder)
    return hf, load_gpt2(folder).eval()


@pytest.mark.parametrize(
    ("length", "padding", "n_rows"),
    [(1, "none", 2), (24, "none", 2), (24, "right", 3), (24, "left", 3), (1024, "none", 1)],
)
def test_hidden_states_equal_transformers_at_gpt2_size(full_size, length, padding, n_rows):
    assert_same(*full_size, length, padding, n_rows)


def test_left_padding_finds_its_positions_by_itself(gpt):
    ids = torch.randint(0, 101, (3, 9))
    mask = masks("left", 3, 9)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        given, found = gpt(ids, mask, positions), gpt(ids, mask)
    assert torch.equal(given["last_token"], found["last_token"])


@pytest.mark.parametrize("padding", ["right", "left"])
def test_padding_does_not_leak(gpt, padding):
    ids, mask = torch.randint(0, 101, (3, 9)), masks(padding, 3, 9)
    other = torch.where(mask.bool(), ids, (ids + 50) % 101)
    with torch.no_grad():
        assert torch.equal(gpt(ids, mask)["last_token"], gpt(other, mask)["last_token"])


def test_a_mask_known_to_pad_on_the_right_gives_the_same(gpt):
    ids, mask = torch.randint(0, 101, (3, 9)), masks("right", 3, 9)
    with torch.no_grad():
        found, told = gpt(ids, mask), gpt(ids, mask, right_padded=True)
    assert torch.equal(found["last_token"], told["last_token"])


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


@pytest.mark.parametrize("n", [1, 8, 9, 64])
@pytest.mark.parametrize("reft", [False, True])
@pytest.mark.parametrize("last_only", [False, True])
def test_lengths_rounded_for_onednn_change_nothing(gpt, library, n, reft, last_only):
    trained = with_adapters(gpt, reft)
    ids, widths = torch.randint(0, 101, (3, n)), []
    gpt.gpt_layers[0].register_forward_hook(lambda layer, inputs, h: widths.append(h.shape[1]))
    found = gpt(ids, last_only=last_only)["last_token"]
    weighting = torch.randn(3, 32)
    gradients = torch.autograd.grad((found * weighting).sum(), trained)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "onednn_leads", lambda: False)
        expected = gpt(ids)
    assert widths == [-(-n // LENGTH_STEP) * LENGTH_STEP if library == "oneDNN" else n, n]
    assert expected["last_hidden_state"].shape == (3, n, 32)
    assert torch.allclose(found, expected["last_token"], atol=1e-4)
    pairs = zip(
        gradients,
        torch.autograd.grad((expected["last_token"] * weighting).sum(), trained),
        strict=True,
    )
    assert all(torch.allclose(a, b, atol=1e-3 * b.abs().max() + 1e-6) for a, b in pairs)


def test_the_last_token_alone_fills_a_cache_as_usual(gpt):
    ids = torch.randint(0, 101, (2, 7))
    caches = KVCache(3, 9), KVCache(3, 9)
    with torch.no_grad():
        for cache, last_only in zip(caches, (False, True), strict=True):
            gpt(ids, cache=cache, last_only=last_only)
            state = gpt(ids[:, :1], cache=cache, last_only=last_only)["last_token"]
            assert torch.allclose(
                state, gpt(torch.cat([ids, ids[:, :1]], 1))["last_token"], atol=1e-5
            )


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_attention_with_dropout_is_the_same_attention(gpt, padding):
    ids, mask = torch.randint(0, 101, (3, 9)), masks(padding, 3, 9)
    with torch.no_grad():
        expected = gpt(ids, mask)["last_hidden_state"]
        for layer in gpt.gpt_layers:
            layer.self_attention.train()
            layer.self_attention.dropout.p = 1e-9  # no byte of 256 is dropped
        found = gpt(ids, mask)["last_hidden_state"]
    assert not torch.equal(found, expected)  # another way, so other rounding
    assert torch.allclose(found[mask.bool()], expected[mask.bool()], atol=1e-5)


def test_packed_weights_change_nothing_but_rounding(gpt):
    add_lora(gpt, LoRAConfig())
    ids = torch.randint(0, 101, (3, 9))
    with torch.no_grad():
        expected = gpt.hidden_state_to_token(gpt(ids)["last_hidden_state"])
        with gpt.packed(3, torch.float32):
            found = gpt.hidden_state_to_token(gpt(ids)["last_hidden_state"])
    assert torch.allclose(found, expected, atol=1e-4)
    assert gpt.packed_head is None


@pytest.mark.skipif(not can_pack(torch.ones(1)), reason="packed weights are for oneDNN")
def test_packed_logits_in_bfloat16_are_exact_but_for_what_tells_tokens_apart(gpt):
    """gpt2's logits are about -100, where bfloat16 numbers are half a nat apart."""
    with torch.no_grad():
        h = gpt(torch.randint(0, 101, (3, 9)))["last_hidden_state"]
        common = torch.linalg.lstsq(h.flatten(0, 1), torch.full((27, 1), -100.0)).solution[:, 0]
        gpt.word_embedding.weight += common
        exact = gpt.hidden_state_to_token(h)
        plain = h.bfloat16() @ gpt.word_embedding.weight.bfloat16().T
        with gpt.packed(3, torch.bfloat16):
            packed = gpt.hidden_state_to_token(h)
    assert -110 < exact.mean() < -90
    assert packed.dtype == torch.float32
    assert (packed - exact).abs().max() < 0.1 * (plain - exact).abs().max()


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
    with pytest.raises(ValueError, match="65 tokens given, the model has 64 positions"):
        gpt(torch.zeros(1, 65, dtype=torch.long))
    cache = KVCache(3, size=80)
    gpt(torch.zeros(1, 60, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="65 tokens given, the model has 64 positions"):
        gpt(torch.zeros(1, 5, dtype=torch.long), cache=cache)


@pytest.mark.parametrize("mask_given", [False, True])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cuts", [(9, 10, 11, 12), (1, 2, 12), (4, 9, 12)])
def test_reading_in_parts_with_a_cache_equals_reading_all(gpt, cuts, padding, mask_given):
    ids, mask = torch.randint(0, 101, (3, 12)), masks(padding, 3, 12)
    given = mask if mask_given or padding == "left" else None
    cache, parts, start = KVCache(3, size=20), [], 0
    with torch.no_grad():
        whole = gpt(ids, given)["last_hidden_state"]
        for end in cuts:
            part = None if given is None else given[:, :end]
            out = gpt(ids[:, start:end], part, cache=cache)
            parts.append(out["last_hidden_state"])
            start = end
    assert torch.equal(out["last_token"], parts[-1][:, -1])
    real = mask.bool()
    assert torch.allclose(torch.cat(parts, 1)[real], whole[real], atol=1e-5)


def test_logits_are_float32_and_exact_under_autocast(gpt):
    h = 100 * torch.randn(4, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = gpt.hidden_state_to_token(h)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, h @ gpt.word_embedding.weight.T, atol=1e-3)


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
