"""Dropout whose mask costs little: on a CPU cut as bytes from random words, kept as bytes."""

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from modules.onednn import agrees


def drop(x: Tensor, p: float) -> tuple[Tensor, Tensor, float]:
    """y, its mask, and the scale that is missing: y * scale is x after dropout.

    On a CPU the mask is cut as bytes from 64-bit random words: a fifteenth of the time in which
    `F.dropout` draws a number for each element.
    """
    if x.device.type != "cpu":
        return *torch.native_dropout(x, p, True), 1.0
    n_dropped = min(255, round(256 * p))  # of the 256 values of a byte
    seed = int(torch.randint(2**62, ()))  # so that PyTorch's generator decides it all
    words = np.random.SFC64(seed).random_raw(math.ceil(x.numel() / 8))
    mask = torch.from_numpy(words).view(torch.uint8)[: x.numel()].view(x.shape)
    mask.ge_(n_dropped)  # in place: the comparison to a tensor of bool is 15 times slower
    return mask.to(x.dtype).mul_(x), mask, 256 / (256 - n_dropped)


@cache
def native_dropout_works(device: torch.device) -> bool:
    """Is `native_dropout`, by which `drop` works off a CPU, right in both directions?"""
    x = torch.ones(8, 8, device=device)

    def deviation() -> Tensor:
        y, mask = torch.native_dropout(x, 0.5, True)
        gradient = torch.ops.aten.native_dropout_backward(x, mask, 2.0)
        return torch.stack([y - gradient, y * (y - 2)])  # all are 0 or 2

    return agrees("its own LoRA backward", deviation, lambda: x.new_zeros(2, 8, 8))


def drop_gradient(grad: Tensor, mask: Tensor, p: float) -> Tensor:
    """The gradient of x from that of the y of `drop`."""
    if mask.dtype == torch.bool:
        return torch.ops.aten.native_dropout_backward(grad, mask, 1 / (1 - p))
    return mask.to(grad.dtype).mul_(grad)


class _Drop(torch.autograd.Function):
    """Saves a byte for each element."""

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
    """x * mask / (1 - p), p rounded to a 256th, and the scale exact for the rounded p."""

    def forward(self, x: Tensor) -> Tensor:
        return _Drop.apply(x, self.p) if self.training and self.p else x
