"""Dropout with a cheap mask: on a CPU, random 64-bit words are cut into bytes, one per element."""

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from modules.onednn import agrees


def drop(x: Tensor, p: float) -> tuple[Tensor, Tensor, float]:
    """Unscaled dropout of x: y, its mask, and the scale such that y * scale is dropout(x).

    On a CPU, the mask comes from the bytes of random 64-bit words, unless p is near 0 or 1.
    `F.dropout`, which draws a random number for every element, takes fifteen times as long.
    """
    n_dropped = round(256 * p)  # out of the 256 values of a byte
    if x.device.type != "cpu" or not 4 <= n_dropped <= 252:
        return *torch.native_dropout(x, p, True), 1.0
    seed = int(torch.randint(2**62, ()))  # so that PyTorch's seed determines the mask
    words = np.random.SFC64(seed).random_raw(math.ceil(x.numel() / 8))
    mask = torch.from_numpy(words).view(torch.uint8)[: x.numel()].view(x.shape)
    mask.ge_(n_dropped)  # in place: a comparison that returns a bool tensor is 15x slower
    return mask.to(x.dtype).mul_(x), mask, 256 / (256 - n_dropped)


@cache
def native_dropout_works(device: torch.device) -> bool:
    """True if `native_dropout`, which `drop` uses off the CPU, is correct forward and backward."""
    x = torch.ones(8, 8, device=device)

    def deviation() -> Tensor:
        y, mask = torch.native_dropout(x, 0.5, True)
        gradient = torch.ops.aten.native_dropout_backward(x, mask, 2.0)
        return torch.stack([y - gradient, y * (y - 2)])  # every y is 0 or 2

    return agrees("the custom LoRA backward", deviation, lambda: x.new_zeros(2, 8, 8))


def drop_gradient(grad: Tensor, mask: Tensor, p: float) -> Tensor:
    """The gradient with respect to the x of `drop`, given that of its y."""
    if mask.dtype == torch.bool:
        scale = 1 / (1 - p) if p < 1 else 0.0
        return torch.ops.aten.native_dropout_backward(grad, mask, scale)
    return mask.to(grad.dtype).mul_(grad)


class _Drop(torch.autograd.Function):
    """Saves one byte per element for the backward."""

    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        y, mask, ctx.scale = drop(x, p)
        ctx.p = p
        ctx.save_for_backward(mask)
        return y.mul_(ctx.scale)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return drop_gradient(grad, ctx.saved_tensors[0], ctx.p).mul_(ctx.scale), None


class ByteDropout(nn.Dropout):
    """x * mask / (1 - p); unless near 0 or 1, p is a multiple of 1/256 in mask and scale."""

    def forward(self, x: Tensor) -> Tensor:
        return _Drop.apply(x, self.p) if self.training and self.p else x
