"""LoRA in a few large operations, which `accelerate` substitutes for `LoRALinear`."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modules.byte_dropout import drop, drop_gradient
from modules.lora import LoRALinear
from modules.onednn import add_matmul, agrees, matmul, prepacked_linear
from modules.padding import autocast_dtype


class FastLoRALinear(LoRALinear):
    """W x + b + (alpha/r) B A dropout(x) as one autograd function."""

    prepacked: Tensor | None = None
    cast: tuple[Tensor, Tensor] | None = None  # A and B in autocast's dtype, during a forward

    def forward(self, x: Tensor) -> Tensor:
        if self.prepacked is not None and not torch.is_grad_enabled():
            return prepacked_linear(x, self.prepacked, self.bias)
        if self.merged or self.weight.requires_grad or self.bias.requires_grad:
            return super().forward(x)
        dtype = autocast_dtype(x.device) or x.dtype
        tensors = (x, self.weight, self.bias, *(self.cast or (self.lora_A, self.lora_B)))
        x, W, b, A, B = (tensor.to(dtype) for tensor in tensors)
        p = self.dropout.p if self.dropout.training else 0.0
        y = LoRAMatmul.apply(x.flatten(0, -2), W, b, A, B, self.scale, p, self.parts)
        return y.view(*x.shape[:-1], -1)


class LoRAMatmul(torch.autograd.Function):
    """W x + b + scale B A dropout(x) for x [N,in], with gradients for x, A [nR,in] and B [nO,R].

    n parts of a fused layer, each O wide, are adapted. Saves dropout(x) unscaled, its mask and
    A times it. Scaling and adding happen inside the matmuls, not in extra passes over memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor,
        A: Tensor,
        B: Tensor,
        scale: float,
        p: float,
        parts: tuple[bool, ...],
    ) -> Tensor:
        dropped, mask, left = drop(x, p) if p else (x, None, 1.0)
        z = matmul(dropped, A)  # [N,nR]
        ctx.scale, ctx.p, ctx.parts = scale * left, p, parts
        ctx.save_for_backward(dropped, mask, z, W, A, B)
        y = matmul(x, W, b)
        z, B = _split(z, sum(parts)), B.unflatten(0, (sum(parts), -1))  # [n,N,R], [n,O,R]
        _adapted(y, parts).baddbmm_(z, B.mT, alpha=ctx.scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        dropped, mask, z, W, A, B = ctx.saved_tensors
        n, rows = sum(ctx.parts), _adapted(grad, ctx.parts)  # [n,N,O]
        grad_z = scaled_bmm(B.unflatten(0, (n, -1)).mT, rows.mT, ctx.scale).flatten(0, 1)  # [nR,N]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = matmul(grad_z.T, A.T)
            if ctx.p:
                grad_x = drop_gradient(grad_x, mask, ctx.p)
            add_matmul(grad_x, grad, W.T)
        grad_A = matmul(grad_z, dropped.T)
        grad_B = scaled_bmm(rows.mT, _split(z, n), ctx.scale).flatten(0, 1)
        return grad_x, None, None, grad_A, grad_B, None, None, None


def scaled_bmm(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """scale * (x @ y), [n,I,J], for x [n,I,K] and y [n,K,J]."""
    if x.device.type != "cpu":
        return x.new_empty(*x.shape[:2], y.shape[2]).baddbmm_(x, y, beta=0, alpha=scale)
    if x.shape[1] > y.shape[2]:  # MKL takes four times as long for few columns as for few rows
        return scaled_bmm(y.mT, x.mT, scale).mT
    return torch.stack([matmul(a, b.T) for a, b in zip(x, y, strict=True)]).mul_(scale)


def _split(x: Tensor, n: int) -> Tensor:
    """[N,nK] -> [n,N,K], a view."""
    return x.unflatten(1, (n, -1)).transpose(0, 1)


def _adapted(y: Tensor, parts: tuple[bool, ...]) -> Tensor:
    """The adapted parts of [N,out] as a view [n,N,O]; any subset of three is evenly spaced."""
    first, *more = (i for i, adapted in enumerate(parts) if adapted)
    step = more[0] - first if more else 1
    return _split(y, len(parts))[first : first + step * sum(parts) : step]


@cache
def lora_matmul_works(device: torch.device) -> bool:
    """True if `LoRAMatmul`, which writes into views, is correct here, gradients included."""

    def numbers(rows: int, columns: int) -> Tensor:
        return torch.arange(float(rows * columns), device=device).view(rows, columns) / 32

    x, W, b, A, B = numbers(5, 4), numbers(6, 4), numbers(1, 6)[0], numbers(4, 4), numbers(4, 2)

    def fast(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return LoRAMatmul.apply(x, W, b, A, B, 0.5, 0.0, (True, False, True))

    def plain(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        z, y = F.linear(x, A), F.linear(x, W, b)  # [5,2R], [5,6]
        first, last = F.linear(z[:, :2], B[:2]), F.linear(z[:, 2:], B[2:])
        return y + 0.5 * torch.cat([first, torch.zeros_like(first), last], 1)

    def result(function: Callable[..., Tensor]) -> Tensor:
        inputs = [tensor.clone().requires_grad_() for tensor in (x, A, B)]
        with torch.enable_grad():
            y = function(*inputs)
            gradients = torch.autograd.grad(y.square().sum(), inputs)
        return torch.cat([tensor.detach().flatten() for tensor in (y, *gradients)])

    return agrees("the custom LoRA backward", lambda: result(fast), lambda: result(plain))


# A single cast for all adapters


class CastAll(torch.autograd.Function):
    """Casts all tensors to `dtype` in one kernel, and their gradients back in one kernel.

    Casting each LoRA matrix of gpt2 by itself would launch 96 kernels, and as many in the backward.
    """

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        return _cast(tensors, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        return None, *_cast(grads, ctx.dtype)


def _cast(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    copies = tuple(torch.empty_like(tensor, dtype=dtype) for tensor in tensors)
    torch._foreach_copy_(copies, tensors)
    return copies


def cast_adapters_at_once(model: nn.Module) -> None:
    """Under autocast, cast all A and B together at the start of each forward of the model's GPT-2.

    The copies are dropped at the end of the forward, so they are never stale.
    """
    gpt = getattr(model, "gpt", model)
    layers = [layer for layer in gpt.modules() if isinstance(layer, LoRALinear)]

    def before(gpt: nn.Module, args: Any) -> None:
        dtype = autocast_dtype(layers[0].weight.device)
        if dtype is not None and layers[0].prepacked is None:
            matrices = [matrix for layer in layers for matrix in (layer.lora_A, layer.lora_B)]
            copies = iter(CastAll.apply(dtype, *matrices))
            for layer, A, B in zip(layers, copies, copies, strict=True):
                layer.cast = A, B

    def after(gpt: nn.Module, args: Any, output: Any) -> None:
        for layer in layers:
            layer.cast = None

    gpt.register_forward_pre_hook(before)
    gpt.register_forward_hook(after, always_call=True)
