"""LoRA against its formula and against PEFT."""

import peft
import pytest
import torch
from torch import nn

from models.config import SIZES, GPT2Config
from models.gpt2 import GPT2Model
from modules.adapters import adapter_state, count_parameters, load_adapter_state
from modules.kernels import accelerate
from modules.lora import (
    TARGETS,
    LoRAConfig,
    LoRALinear,
    add_lora,
    merge_lora,
    unmerge_lora,
)
from modules.settings import UserError
from tests.conftest import narrow_hf_model

IDS = torch.tensor([[5, 99, 0, 42, 7], [1, 2, 3, 4, 5]])


def randomize(model: nn.Module) -> None:
    """Give every adapter weight a value, as training would."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)


def states(gpt: nn.Module) -> torch.Tensor:
    return gpt(IDS)["last_hidden_state"]


def test_forward_is_the_formula():
    torch.manual_seed(0)
    linear = nn.Linear(6, 12)
    lora = LoRALinear(linear, LoRAConfig(rank=2, alpha=6, dropout=0.0), (True, False, True))
    randomize(lora)
    x = torch.randn(5, 4, 6)
    expected = x @ linear.weight.T + linear.bias
    (A_q, A_v), (B_q, B_v) = lora.lora_A.chunk(2), lora.lora_B.chunk(2)
    assert B_q.shape == (4, 2)
    expected[..., :4] += 6 / 2 * (x @ A_q.T @ B_q.T)
    expected[..., 8:] += 6 / 2 * (x @ A_v.T @ B_v.T)
    assert torch.allclose(lora(x), expected, atol=1e-6)


def test_dropout_is_on_the_adapters_input_only():
    torch.manual_seed(0)
    lora = LoRALinear(nn.Linear(6, 6), LoRAConfig(rank=2, dropout=0.5))
    x = torch.ones(2000, 6)
    assert torch.equal(lora(x), lora.eval()(x))  # B is 0: only the adapter could differ
    randomize(lora)
    with torch.no_grad():
        steady, plain = lora(x)[0], nn.functional.linear(x[0], lora.weight, lora.bias)
        dropped = lora.train()(x)
    assert dropped.std(0).min() > 0
    assert torch.allclose(dropped.mean(0) - plain, steady - plain, atol=0.15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fast", [False, True])
def test_autocast_computes_in_its_type_and_gives_float32_gradients(gpt, dtype, fast):
    add_lora(gpt, LoRAConfig(dropout=0.0))
    randomize(gpt)
    if fast:
        accelerate(gpt)
    exact = states(gpt)
    with torch.autocast("cpu", dtype):
        assert gpt.gpt_layers[0].interm_dense(torch.randn(3, 32)).dtype == dtype
        rounded = states(gpt)
    assert not torch.equal(rounded, exact)
    assert torch.allclose(rounded, exact, atol=0.1 * exact.abs().max().item())
    weights = [p for p in gpt.parameters() if p.requires_grad]
    pairs = zip(
        torch.autograd.grad(exact.square().mean(), weights),
        torch.autograd.grad(rounded.square().mean(), weights),
        strict=True,
    )
    for theirs, ours in pairs:
        assert ours.dtype == torch.float32
        assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.98


def test_a_fresh_adapter_is_the_identity(gpt):
    before = states(gpt)
    add_lora(gpt, LoRAConfig())
    assert torch.equal(states(gpt), before)


@pytest.mark.parametrize(("rank", "expected"), [(4, 663_552), (8, 1_327_104)])
def test_gpt2_has_as_many_trainable_parameters_as_it_should(rank, expected):
    width, layers, heads = SIZES["gpt2"]
    with torch.device("meta"):
        gpt = GPT2Model(GPT2Config(50257, 1024, width, layers, heads))
    add_lora(gpt, LoRAConfig(rank=rank))
    assert count_parameters(gpt) == (expected, 124_439_808 + expected)


@pytest.mark.parametrize("targets", [TARGETS, ("query", "value"), ("key",), ("out_dense",)])
def test_merging_changes_nothing_and_is_undone(gpt, targets):
    add_lora(gpt, LoRAConfig(targets=targets))
    randomize(gpt)
    weights = {name: p.clone() for name, p in gpt.named_parameters()}
    with torch.no_grad():
        apart = states(gpt)
        merge_lora(gpt)
        gpt.train().eval()  # merging is an explicit call, so switching modes leaves it alone
        merged = states(gpt)
        merge_lora(gpt)
        unmerge_lora(gpt)
        again = states(gpt)
    assert torch.allclose(
        gpt.hidden_state_to_token(apart), gpt.hidden_state_to_token(merged), atol=1e-4
    )
    assert torch.allclose(apart, again, atol=1e-4)
    assert all(torch.allclose(p, weights[name], atol=1e-6) for name, p in gpt.named_parameters())


def test_a_merged_adapter_is_neither_saved_nor_replaced_nor_added_to(gpt):
    add_lora(gpt, LoRAConfig(targets=("query",)))
    with pytest.raises(UserError, match="has a LoRA adapter already: merge it before adding"):
        add_lora(gpt, LoRAConfig(targets=("value",)))
    state = gpt.state_dict()
    merge_lora(gpt)
    for use in (gpt.state_dict, lambda: gpt.load_state_dict(state)):
        with pytest.raises(UserError, match="LoRA is merged: unmerge it before saving or loading"):
            use()
    with pytest.raises(UserError, match="LoRA is merged"):
        load_adapter_state(gpt, adapter_state(gpt))
    unmerge_lora(gpt)
    gpt.load_state_dict(state)


def test_merging_is_in_float32_even_under_autocast(gpt):
    add_lora(gpt, LoRAConfig())
    randomize(gpt)
    expected = gpt.gpt_layers[0].out_dense.effective_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gpt.gpt_layers[0].out_dense.effective_weight(), expected)


def test_targets_and_layers_choose_what_is_adapted(gpt):
    add_lora(gpt, LoRAConfig(targets=("value", "interm_dense"), layers=(2, 0)))
    names = {name for name, p in gpt.named_parameters() if p.requires_grad}
    assert names == {
        f"gpt_layers.{layer}.{module}.lora_{matrix}"
        for layer in (0, 2)
        for module in ("self_attention.qkv", "interm_dense")
        for matrix in "AB"
    }
    assert gpt.gpt_layers[0].self_attention.qkv.lora_B.shape == (32, 8)


def test_base_parameters_keep_their_names(gpt):
    before = {name for name, _ in gpt.named_parameters()}
    add_lora(gpt, LoRAConfig())
    after = {name for name, _ in gpt.named_parameters()}
    assert before < after
    assert all("lora_" in name for name in after - before)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"targets": ("c_attn",)}, "is not one of query, key, value, attention_dense"),
        ({"targets": ()}, "is not one of query"),
        ({"rank": 0}, "LoRAConfig.rank: 0 is not a whole number of 1 or more"),
        ({"dropout": 1.0}, "dropout: 1 is not a number of 0 or more and below 1"),
        ({"layers": (3,)}, "there is no block 3: the model has blocks 0 to 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(gpt, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        add_lora(gpt, LoRAConfig(**settings))


def test_outputs_and_gradients_equal_pefts(gpt):
    rank, alpha = 4, 16
    add_lora(gpt, LoRAConfig(rank=rank, alpha=alpha, dropout=0.0))
    randomize(gpt)
    theirs = peft.get_peft_model(
        narrow_hf_model(),
        peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=["c_attn", "c_proj", "c_fc"],
            rank_pattern={"c_attn": 3 * rank},  # three adapters side by side are one of rank 3r
            alpha_pattern={"c_attn": 3 * alpha},
            fan_in_fan_out=True,
        ),
    )
    places = {
        "self_attention.qkv": "attn.c_attn",
        "attention_dense": "attn.c_proj",
        "interm_dense": "mlp.c_fc",
        "out_dense": "mlp.c_proj",
    }
    pairs = [
        (layer.get_submodule(ours), block.get_submodule(name))
        for layer, block in zip(gpt.gpt_layers, theirs.base_model.model.transformer.h, strict=True)
        for ours, name in places.items()
    ]
    with torch.no_grad():
        for ours, other in pairs:
            other.lora_A["default"].weight.copy_(ours.lora_A)
            other.lora_B["default"].weight.copy_(
                torch.block_diag(*ours.lora_B.chunk(len(ours.parts)))
            )
    expected = theirs(IDS).logits
    logits = gpt.hidden_state_to_token(states(gpt))
    assert torch.allclose(logits, expected, atol=1e-4)
    assert not torch.allclose(logits, narrow_hf_model()(IDS).logits, atol=1e-1)

    weighting = torch.randn_like(logits)
    (logits * weighting).sum().backward()
    (expected * weighting).sum().backward()
    for ours, other in pairs:
        grad_A, grad_B = other.lora_A["default"].weight.grad, other.lora_B["default"].weight.grad
        n = len(ours.parts)
        blocks = [
            rows.chunk(n, dim=1)[i] for i, rows in enumerate(grad_B.chunk(n))
        ]  # PEFT's off-diagonal blocks are 0 in ours and stay so
        scale = grad_A.abs().max() + grad_B.abs().max()
        assert torch.allclose(ours.lora_A.grad, grad_A, atol=1e-5 * scale)
        assert torch.allclose(ours.lora_B.grad, torch.cat(blocks), atol=1e-5 * scale)
