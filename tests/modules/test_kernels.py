"""accelerate(): every faster way against the plain one it stands for."""

import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.sonnet_gpt import SonnetGPT
from modules import kernels, onednn
from modules.kernels import (
    AttentionMatmul,
    ByteDropout,
    ChunkedNextTokenLoss,
    FastLinear,
    FastLoRALinear,
    accelerate,
    drop,
    prepacked,
)
from modules.lora import LoRAConfig, LoRALinear, add_lora
from modules.next_token_loss import NextTokenLoss
from modules.onednn import add_matmul, matmul, onednn_leads, onednn_works
from tests.conftest import ROOT
from tests.models.test_gpt2 import with_unused_rows

prepacks = pytest.mark.skipif(not onednn_works(), reason="PyTorch has no oneDNN for this CPU")


def fast_linear(n_in: int, n_out: int, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(n_in, n_out, bias)
    layer.__class__ = FastLinear
    return layer


# What is swapped


def test_modules_are_swapped_and_keep_their_parameters(gpt):
    add_lora(gpt, LoRAConfig(layers=(0,)))
    model = SonnetGPT(gpt)
    before = dict(model.named_parameters())
    plain = {type(module) for module in model.modules()}
    accelerate(model)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is before[name] for name in before)
    assert {nn.Dropout, LoRALinear, NextTokenLoss} <= plain
    assert not {nn.Dropout, LoRALinear, NextTokenLoss} & {type(m) for m in model.modules()}


def test_the_switch_leaves_all_modules_plain(gpt, monkeypatch):
    monkeypatch.setenv("GPT2_ACCELERATE", "0")
    plain = [type(module) for module in gpt.modules()]
    accelerate(gpt)
    assert [type(module) for module in gpt.modules()] == plain


def break_onednn(monkeypatch):
    monkeypatch.setattr(onednn, "prepack", lambda weight, rows: weight + 1)


def remove_softmax_backward(monkeypatch):
    monkeypatch.setattr(torch.ops.aten, "_softmax_backward_data", None)


@prepacks
@pytest.mark.parametrize("fault", [break_onednn, remove_softmax_backward])
def test_an_operator_that_is_absent_or_wrong_is_left_out_with_a_line(
    gpt, monkeypatch, capsys, fault
):
    ids = torch.randint(0, 101, (3, 9))
    expected = gpt(ids)["last_token"].detach()
    fault(monkeypatch)
    uncached = kernels.attention_backward_works.__wrapped__
    monkeypatch.setattr(kernels, "attention_backward_works", uncached)
    for module in (kernels, onednn):
        monkeypatch.setattr(module, "onednn_works", onednn_works.__wrapped__)
    monkeypatch.setattr(onednn, "onednn_leads", onednn_leads.__wrapped__)
    accelerate(gpt)
    assert capsys.readouterr().out.count("running without") == 1
    assert torch.allclose(gpt(ids)["last_token"], expected, atol=1e-5)
    attention = gpt.gpt_layers[0].self_attention
    left_plain = attention.qkv if fault is break_onednn else attention
    assert not type(left_plain).__name__.startswith("Fast")


CORE = [
    "tests/models/test_gpt2.py",
    "tests/models/test_paraphrase_gpt.py",
    "tests/models/test_sonnet_gpt.py",
    "tests/finetune/test_loop.py",
    "tests/finetune/test_generation.py",
]


@pytest.mark.skipif(os.environ.get("GPT2_ACCELERATE") == "0", reason="this is that run")
def test_the_core_tests_pass_without_acceleration():
    left_out = "not gpt2_size and not fifty_steps"  # slow; a comparison with the plain modules
    command = [sys.executable, "-m", "pytest", "-qx", "-n0", "-k", left_out, *CORE]
    env = os.environ | {"GPT2_ACCELERATE": "0"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


# Matmuls


def matrix(layout: str, rows: int, columns: int) -> torch.Tensor:
    """Random numbers, in the rows x columns of one of several layouts."""
    if layout == "transposed":
        return torch.randn(columns, rows).T
    if layout == "strided":
        return torch.randn(rows, 2 * columns)[:, ::2]
    return torch.randn(rows, columns)


@pytest.mark.parametrize(
    "layouts", [("plain", "plain"), ("transposed", "strided"), ("strided", "transposed")]
)
def test_matmuls_are_those_of_f_linear(library, layouts):
    torch.manual_seed(0)
    x, W = matrix(layouts[0], 31, 17), matrix(layouts[1], 23, 17)
    b, y = torch.randn(23), torch.randn(31, 23)
    assert torch.allclose(matmul(x, W), F.linear(x, W), atol=1e-5)
    assert torch.allclose(matmul(x, W, b), F.linear(x, W, b), atol=1e-5)
    expected = y + F.linear(x, W)
    assert add_matmul(y, x, W) is y
    assert torch.allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize(
    "trains",
    [(False, False, False), (True, False, False), (True, True, True), (False, True, False)],
)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_a_linear_layer_are_those_of_f_linear(library, trains, bias):
    torch.manual_seed(0)
    layer, x = fast_linear(17, 23, bias), torch.randn(3, 7, 17, requires_grad=trains[0])
    layer.weight.requires_grad_(trains[1])
    if bias:
        layer.bias.requires_grad_(trains[2])
    y, expected = layer(x), F.linear(x, layer.weight, layer.bias)
    assert y.shape == (3, 7, 23)
    assert torch.allclose(y, expected, atol=1e-5)
    inputs = [t for t in (x, layer.weight, layer.bias) if t is not None and t.requires_grad]
    assert y.requires_grad == bool(inputs)
    if inputs:
        weighting = torch.randn(3, 7, 23)
        pairs = zip(
            *(torch.autograd.grad(out, inputs, weighting) for out in (y, expected)), strict=True
        )
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in pairs)


@prepacks
def test_onednn_takes_large_float32_matmuls_and_no_others(monkeypatch):
    monkeypatch.setattr(onednn, "onednn_leads", lambda: True)
    counted = []
    monkeypatch.setattr(onednn.F, "linear", lambda x, *_: counted.append(len(x)))
    large, W = torch.randn(400, 200), torch.randn(100, 200)
    assert matmul(large, W) is not None
    matmul(large[:40], W)
    matmul(large.bfloat16(), W.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        matmul(large, W)
    assert counted == [40, 400, 400]


def test_onednn_leads_on_amds_cpus_with_avx512_alone(monkeypatch):
    works = onednn_works()

    def leads(name: str, capability: str) -> bool:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name})
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        return onednn_leads.__wrapped__()

    assert leads("AMD EPYC", "AVX512") == works
    assert not leads("AMD EPYC", "AVX2")
    assert not leads("Intel Xeon", "AVX512")


# Dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_and_scale_of_what_is_dropped(p):
    torch.manual_seed(0)
    y = ByteDropout(p)(torch.ones(400, 1001))
    share = round(256 * p) / 256
    assert (y == 0).float().mean().item() == pytest.approx(share, abs=0.003)
    assert y.max().item() == pytest.approx(1 / (1 - share))
    assert y.mean().item() == pytest.approx(1, abs=0.01)


def test_every_byte_of_a_word_is_random_by_itself():
    torch.manual_seed(0)
    dropped = (ByteDropout(0.5)(torch.ones(50_000, 8)) == 0).float()
    assert (dropped.mean(0) - 0.5).abs().max() < 0.01
    assert (torch.corrcoef(dropped.T) - torch.eye(8)).abs().max() < 0.02


def test_the_gradient_of_dropout_passes_the_same_mask():
    x = torch.ones(5, 77, requires_grad=True)
    y = ByteDropout(0.3)(x)
    y.sum().backward()
    assert torch.equal(x.grad, y)


def test_a_seed_fixes_the_mask_and_evaluation_has_none():
    x, dropout = torch.ones(9, 9), ByteDropout(0.5)
    torch.manual_seed(1)
    first = dropout(x)
    torch.manual_seed(1)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(dropout(x), first)
    assert dropout.eval()(x) is x
    assert ByteDropout(0.0)(x) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_and_the_scale_are_those_that_were_used(dtype):
    x = torch.randn(7, 33, dtype=dtype)
    y, mask, scale = drop(x, 0.25)
    assert torch.equal(y, x * mask)
    assert y.dtype == dtype
    assert set(mask.unique().tolist()) == {0, 1}
    assert scale == 256 / 192


def test_masks_follow_pytorchs_generator_and_nothing_else():
    x = torch.ones(300, 40)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    masks = [drop(x, 0.5)[1] for _ in range(3)]
    torch.set_rng_state(state)
    assert all(torch.equal(drop(x, 0.5)[1], mask) for mask in masks)
    agreement = (masks[0] == masks[1]).float().mean().item()
    assert agreement == pytest.approx(0.5, abs=0.02)


def test_native_dropout_is_checked_in_both_directions(monkeypatch, capsys):
    check = kernels.native_dropout_works.__wrapped__
    assert check(torch.device("cpu"))
    ops = mock.Mock(native_dropout_backward=lambda grad, mask, scale: grad * mask)  # no scale
    monkeypatch.setattr(kernels.torch.ops, "aten", ops)
    assert not check(torch.device("cpu"))
    assert "running without its own LoRA backward" in capsys.readouterr().out


# LoRA


@pytest.mark.parametrize("parts", [(True,), (True, False, True)])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_the_backward_of_lora_is_the_formulas_with_the_mask_of_the_forward(library, parts, p):
    torch.manual_seed(0)
    lora = LoRALinear(nn.Linear(6, 12), LoRAConfig(rank=2, alpha=6, dropout=p), parts)
    nn.init.normal_(lora.lora_B)
    lora.weight.requires_grad_(False)
    x, weighting = torch.randn(5, 4, 6, requires_grad=True), torch.randn(5, 4, 12)
    lora.dropout.__class__ = ByteDropout
    inputs, results = [x, lora.lora_A, lora.lora_B], []
    for kind in (LoRALinear, FastLoRALinear):
        lora.__class__ = kind
        torch.manual_seed(1)
        y = lora(x)
        results.append((y, *torch.autograd.grad((y * weighting).sum(), inputs)))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*results, strict=True))
    assert lora.weight.grad is None


def test_nothing_is_kept_or_computed_for_an_input_without_gradient(gpt, monkeypatch):
    add_lora(gpt, LoRAConfig(targets=("out_dense",), layers=(2,)))
    accelerate(gpt)
    gradients, backward = [], kernels.LoRAMatmul.backward

    def spy(ctx, grad):
        gradients.append(backward(ctx, grad))
        return gradients[-1]

    monkeypatch.setattr(kernels.LoRAMatmul, "backward", spy)
    gpt(torch.randint(0, 101, (2, 5)))["last_hidden_state"].sum().backward()
    assert [grads[0] for grads in gradients] == [None]


# Attention


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("n_queries", [6, 1])
def test_attention_and_its_gradients_are_the_formulas(n_queries, p):
    torch.manual_seed(0)
    q = torch.randn(2, 3, n_queries, 4, requires_grad=True)
    k, v = (torch.randn(2, 3, 6, 4, requires_grad=True) for _ in range(2))
    bias = torch.randn(6, n_queries, 6).masked_fill(torch.rand(6, n_queries, 6) < 0.2, -torch.inf)
    weighting = torch.randn(q.shape)
    torch.manual_seed(1)
    found = AttentionMatmul.apply(q, k, v, bias, p)
    torch.manual_seed(1)
    scores = q @ k.mT / 4**0.5 + bias.unflatten(0, (2, 3))
    expected = ByteDropout(p)(scores.softmax(3)) @ v
    assert torch.allclose(found, expected, atol=1e-5)
    pairs = zip(
        *(torch.autograd.grad(y, (q, k, v), weighting) for y in (found, expected)), strict=True
    )
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_under_dropout_is_the_same_attention(gpt, padded):
    ids, mask = torch.randint(0, 101, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, 4:] = mask[2, 1:] = 0 if padded else 1
    with torch.no_grad():
        expected = gpt(ids, mask)["last_hidden_state"]
        accelerate(gpt)
        for layer in gpt.gpt_layers:
            layer.self_attention.train()
            layer.self_attention.dropout_p = 1e-9  # no byte of 256 is dropped
        found = gpt(ids, mask)["last_hidden_state"]
    assert not torch.equal(found, expected)  # another way, so other rounding
    assert torch.allclose(found, expected, atol=1e-5)


# The next-token loss


@pytest.mark.parametrize("n", [1, 4, 5, 11])
@pytest.mark.parametrize("suppressed", [False, True])
def test_the_chunked_loss_and_its_gradient_are_the_plain_ones(library, n, suppressed, monkeypatch):
    monkeypatch.setattr(kernels, "LOSS_CHUNK", 4)
    h, weight = torch.randn(n, 6, requires_grad=True), torch.randn(50, 6)
    targets, bias = torch.randint(0, 40, (n,)), torch.zeros(50)
    bias[40:] = -torch.inf if suppressed else 0.5
    losses = [loss(h, weight, targets, bias) for loss in (ChunkedNextTokenLoss(), NextTokenLoss())]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    gradients = [torch.autograd.grad(3 * loss, h)[0] for loss in losses]
    assert torch.allclose(*gradients, atol=1e-6)


def test_no_logits_of_more_than_a_chunk_exist(monkeypatch):
    monkeypatch.setattr(kernels, "LOSS_CHUNK", 4)
    shapes = []
    monkeypatch.setattr(kernels, "matmul", lambda x, *w: shapes.append(len(x)) or matmul(x, *w))
    targets = torch.zeros(10, dtype=torch.long)
    ChunkedNextTokenLoss()(torch.randn(10, 6), torch.randn(50, 6), targets)
    assert shapes == [4, 4, 2]


def test_an_embedding_that_trains_gets_its_gradient():
    h, weight = torch.randn(2, 6), torch.randn(50, 6, requires_grad=True)
    ChunkedNextTokenLoss()(h, weight, torch.tensor([1, 2])).backward()
    assert weight.grad.abs().max() > 0


# Decoding with prepacked weights


@prepacks
@pytest.mark.parametrize("shape", [(1, 70), (12, 70), (3, 4, 70), (12, 1, 70), (900, 70)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_prepacked_layer_gives_what_f_linear_gives(shape, bias):
    layer, x = fast_linear(70, 130, bias), torch.randn(shape)
    expected = F.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        layer.prepacked = kernels.prepack(layer.weight, 12)
        out = layer(x)
    assert torch.allclose(out, expected, atol=1e-5)
    assert out.is_contiguous()


@prepacks
@pytest.mark.parametrize("merged", [False, True])
def test_a_prepacked_model_has_its_adapters_merged_and_keeps_its_weights(gpt, merged):
    torch.manual_seed(0)
    add_lora(gpt, LoRAConfig(rank=4, targets=("query", "value", "out_dense")))
    layers = [m for m in gpt.modules() if isinstance(m, LoRALinear)]
    for layer in layers:
        nn.init.normal_(layer.lora_B, std=0.1)
        if merged:
            layer.merge()
    accelerate(gpt)
    weights = {name: p.clone() for name, p in gpt.named_parameters()}
    ids = torch.randint(0, 101, (5, 9))
    with torch.no_grad():
        expected = gpt.hidden_state_to_token(gpt(ids)["last_hidden_state"])
        with prepacked(gpt, 5, torch.float32):
            assert all(layer.prepacked is not None for layer in layers)
            found = gpt.hidden_state_to_token(gpt(ids)["last_hidden_state"].flatten(0, 1))
        with prepacked(gpt, 5, torch.bfloat16):
            assert layers[0](torch.randn(5, 32)).dtype == torch.bfloat16
    assert torch.allclose(found.view(5, 9, -1), expected, atol=1e-4)
    assert all(torch.equal(p, weights[name]) for name, p in gpt.named_parameters())
    assert all(layer.prepacked is None for layer in layers)


@prepacks
def test_an_error_within_leaves_no_prepacked_weight_behind(gpt):
    accelerate(gpt)
    with pytest.raises(KeyError), prepacked(gpt, 2, torch.float32):
        raise KeyError
    assert "hidden_state_to_token" not in vars(gpt)
    assert gpt.gpt_layers[0].out_dense.prepacked is None


def test_a_model_that_is_not_accelerated_is_not_prepacked(gpt):
    with prepacked(gpt, 2, torch.bfloat16):
        assert "hidden_state_to_token" not in vars(gpt)


@prepacks
def test_prepacked_logits_in_bfloat16_round_only_what_tells_tokens_apart(gpt):
    """gpt2's logits are about -100, where bfloat16 numbers are half a nat apart."""
    accelerate(gpt)
    with torch.no_grad():
        h = gpt(torch.randint(0, 101, (3, 9)))["last_hidden_state"].flatten(0, 1)
        common = torch.linalg.lstsq(h, torch.full((27, 1), -100.0)).solution[:, 0]
        gpt.word_embedding.weight += common
        exact = gpt.hidden_state_to_token(h)
        plain = h.bfloat16() @ gpt.word_embedding.weight.bfloat16().T
        with prepacked(gpt, 3, torch.bfloat16):
            found = gpt.hidden_state_to_token(h)
    assert -110 < exact.mean() < -90
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 0.1 * (plain - exact).abs().max()


@prepacks
@pytest.mark.parametrize(
    ("dtype", "when", "tolerance"),
    [
        (torch.float32, "before", 1e-4),
        (torch.float32, "within", 1e-4),
        (torch.bfloat16, "before", 1e-2),
        (torch.bfloat16, "within", 1.0),  # the subtracted mean row is of all rows then
    ],
)
def test_suppressed_ids_have_probability_0_in_prepacked_logits(gpt, dtype, when, tolerance):
    padded, h = with_unused_rows(gpt), torch.randn(3, 32)
    h[:, 0] = 10  # as the model's own
    accelerate(gpt)
    accelerate(padded)
    if when == "within":
        padded.suppress_tokens(())
    with torch.no_grad(), prepacked(gpt, 3, dtype), prepacked(padded, 3, dtype):
        padded.suppress_tokens(range(101, 128))
        expected, found = gpt.hidden_state_to_token(h), padded.hidden_state_to_token(h)
    assert (found[:, 101:] == -torch.inf).all()
    assert torch.allclose(found[:, :101], expected, atol=tolerance)
