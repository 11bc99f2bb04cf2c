"""The fast LoRA against its formula, and one cast of all adapters against one for each."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modules import lora_kernels
from modules.adapters import trainable
from modules.byte_dropout import ByteDropout
from modules.kernels import accelerate
from modules.lora import LoRAConfig, LoRALinear, add_lora
from modules.lora_kernels import FastLoRALinear

IDS = torch.tensor([[5, 99, 0, 42, 7], [1, 2, 3, 4, 5]])


PARTS = [(True,), *itertools.product([False, True], repeat=3)]
PARTS.remove((False, False, False))


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_the_backward_of_lora_is_the_formulas_with_the_mask_of_the_forward(library, parts, p):
    torch.manual_seed(0)
    lora = LoRALinear(nn.Linear(6, 12), LoRAConfig(rank=2, alpha=6, dropout=p), parts)
    nn.init.normal_(lora.lora_B)
    lora.weight.requires_grad_(False)
    lora.bias.requires_grad_(False)
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


def test_weights_that_train_get_their_gradient(gpt):
    add_lora(gpt, LoRAConfig(rank=2, dropout=0.0))
    gpt.requires_grad_(True)
    states = gpt(IDS)["last_hidden_state"]
    expected = torch.autograd.grad(states.square().sum(), list(gpt.gpt_layers.parameters()))
    accelerate(gpt.train(False))
    states = gpt(IDS)["last_hidden_state"]
    found = torch.autograd.grad(states.square().sum(), list(gpt.gpt_layers.parameters()))
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(expected, found, strict=True))


def test_a_second_derivative_is_refused(gpt):
    add_lora(gpt, LoRAConfig(rank=2))
    accelerate(gpt)
    adapter = trainable(gpt)
    loss = gpt(IDS)["last_hidden_state"].square().sum()
    first = torch.autograd.grad(loss, adapter, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(grad.square().sum() for grad in first).backward()


def test_nothing_is_kept_or_computed_for_an_input_without_gradient(gpt, monkeypatch):
    add_lora(gpt, LoRAConfig(targets=("out_dense",), layers=(2,)))
    accelerate(gpt)
    gradients, backward = [], lora_kernels.LoRAMatmul.backward

    def spy(ctx, grad):
        gradients.append(backward(ctx, grad))
        return gradients[-1]

    monkeypatch.setattr(lora_kernels.LoRAMatmul, "backward", spy)
    gpt(torch.randint(0, 101, (2, 5)))["last_hidden_state"].sum().backward()
    assert [grads[0] for grads in gradients] == [None]


@pytest.mark.parametrize("sizes", [(3, 40, 5), (5, 3, 40), (1, 4, 4)])
def test_matmuls_of_either_shape_are_scaled(library, sizes):
    rows, inner, columns = sizes
    x, y = torch.randn(2, rows, inner), torch.randn(2, inner, columns)
    assert torch.allclose(lora_kernels.scaled_bmm(x, y, 0.3), 0.3 * x @ y, atol=1e-5)


def test_the_fast_way_is_checked_on_a_device(monkeypatch, capsys):
    check, right = lora_kernels.lora_matmul_works.__wrapped__, lora_kernels.scaled_bmm
    assert check(torch.device("cpu"))
    monkeypatch.setattr(lora_kernels, "scaled_bmm", lambda x, y, scale: right(x, y, 1.0))
    assert not check(torch.device("cpu"))
    assert "running without the custom LoRA backward" in capsys.readouterr().out


class Casts(TorchDispatchMode):
    """Counts casts of many tensors by one kernel, and casts of adapters one by one."""

    def __init__(self, gpt):
        super().__init__()
        self.together = self.single = 0
        self.shapes = {p.shape for p in gpt.parameters() if p.requires_grad}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.together += func is torch.ops.aten._foreach_copy_.default
        self.single += func is torch.ops.aten._to_copy.default and args[0].shape in self.shapes
        return func(*args, **kwargs or {})


def accelerated_lora(gpt, checkpointing=False):
    add_lora(gpt, LoRAConfig(rank=3, dropout=0.0))
    for layer in (module for module in gpt.modules() if isinstance(module, LoRALinear)):
        nn.init.normal_(layer.lora_B, std=0.1)
    gpt.gradient_checkpointing = checkpointing
    accelerate(gpt)
    return gpt


def gradients_under_autocast(gpt):
    with torch.autocast("cpu", torch.bfloat16):
        loss = gpt(IDS)["last_hidden_state"].square().mean()
    return torch.autograd.grad(loss, [p for p in gpt.parameters() if p.requires_grad])


def test_a_step_under_autocast_casts_all_adapters_at_once_and_back(gpt):
    accelerated_lora(gpt)
    with Casts(gpt) as casts:
        gradients = gradients_under_autocast(gpt)
    assert (casts.together, casts.single) == (2, 0)
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_a_cast_in_each_layer(gpt, checkpointing):
    accelerated_lora(gpt, checkpointing)
    at_once = gradients_under_autocast(gpt)
    gpt._forward_pre_hooks.clear()
    with Casts(gpt) as casts:
        in_each_layer = gradients_under_autocast(gpt)
    assert casts.together == 0
    assert casts.single > 0
    assert all(map(torch.equal, at_once, in_each_layer))


def test_no_cast_is_left_after_a_forward_so_none_can_be_of_other_weights(gpt):
    layers = [m for m in accelerated_lora(gpt).modules() if isinstance(m, FastLoRALinear)]
    with torch.autocast("cpu", torch.bfloat16):
        gpt(IDS)
        assert {layer.cast for layer in layers} == {None}
        with pytest.raises(ValueError, match="positions"):
            gpt(torch.zeros(1, 65, dtype=torch.long))
    assert {layer.cast for layer in layers} == {None}


def test_without_autocast_nothing_is_cast(gpt):
    with Casts(accelerated_lora(gpt)) as casts:
        gpt(IDS)["last_hidden_state"].sum().backward()
    assert (casts.together, casts.single) == (0, 0)
