"""accelerate(): every faster way against the plain one it stands for."""

import os
import subprocess
import sys

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
    accelerate,
    prepacked,
)
from modules.lora import LoRAConfig, LoRALinear, add_lora
from modules.next_token_loss import NextTokenLoss
from modules.onednn import matmul, onednn_works, prefer_onednn
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
    monkeypatch.setattr(onednn, "prefer_onednn", prefer_onednn.__wrapped__)
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
    left_out = "not gpt2_size and not training_steps_are"  # slow; compares with them
    command = [sys.executable, "-m", "pytest", "-qx", "-n0", "-k", left_out, *CORE]
    env = os.environ | {"GPT2_ACCELERATE": "0"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


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
@pytest.mark.parametrize("centred", [False, True])
def test_the_chunked_loss_and_its_gradient_are_the_plain_ones(
    library, n, suppressed, centred, monkeypatch
):
    monkeypatch.setattr(kernels, "LOSS_CHUNK", 4)
    monkeypatch.setattr(kernels, "computes_in_tf32", lambda device: centred)
    h, weight = torch.randn(n, 6, requires_grad=True), torch.randn(50, 6) + 1
    targets, bias = torch.randint(0, 40, (n,)), torch.zeros(50)
    bias[40:] = -torch.inf if suppressed else 0.5
    losses = [loss(h, weight, targets, bias) for loss in (ChunkedNextTokenLoss(), NextTokenLoss())]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    gradients = [torch.autograd.grad(3 * loss, h)[0] for loss in losses]
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("enabled", [True, False])
def test_only_the_loss_may_be_in_tf32(enabled):
    with kernels.tf32(enabled):
        assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if enabled else "none")
    assert torch.backends.cuda.matmul.fp32_precision == "none"
    assert not kernels.computes_in_tf32(torch.device("cpu"))


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
            with torch.enable_grad():  # training meanwhile keeps to the weights
                assert layers[0](torch.randn(5, 32)).dtype == torch.float32
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
