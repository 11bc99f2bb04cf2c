"""Dropout whose mask is cheap to draw on a CPU."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dropout(nn.Module):
    """y = x * mask / (1 - p), each element of the mask 0 with probability p.

    On a CPU p is rounded to a 256th, and the scale is exact for the rounded p.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return _Drop.apply(x, self.p) if x.device.type == "cpu" else F.dropout(x, self.p)


def drop(x: Tensor, p: float) -> tuple[Tensor, Tensor, float]:
    """y, its mask, and the scale that is missing: y * scale is x after dropout.

    On a CPU the mask is cut as bytes from 64-bit random words: a fifteenth of the time in which
    `F.dropout` draws a number for each element.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return *torch.native_dropout(x, p, True), 1.0
    n_dropped = min(255, round(256 * p))  # of the 256 values of a byte
    seed = int(torch.randint(2**62, ()))  # so that PyTorch's generator decides it all
    words = np.random.SFC64(seed).random_raw(math.ceil(x.numel() / 8))
    mask = torch.from_numpy(words).view(torch.uint8)[: x.numel()].view(x.shape)
    mask.ge_(n_dropped)  # in place: the comparison to a tensor of bool is 15 times slower
    return mask.to(x.dtype).mul_(x), mask, 256 / (256 - n_dropped)


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
