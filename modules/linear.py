"""A linear layer whose products the quicker library computes; its weight packed for decoding."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORTH_IT = 5_000_000  # multiplications; oneDNN keeps 0.6 MB for each shape of a product


class Linear(nn.Linear):
    """y = x W^T + b."""

    packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return packed_linear(x, self.packed, self.bias)
        if by_onednn(x):
            return OneDNNProduct.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def effective_weight(self) -> Tensor:
        """The [out,in] that the layer multiplies by."""
        return self.weight


def by_onednn(x: Tensor) -> bool:
    """Are products of this x quicker in oneDNN than in MKL, which F.linear calls?"""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and onednn_leads()
    )


@cache
def onednn_leads() -> bool:
    """MKL has AVX-512 code for Intel's CPUs alone, oneDNN for all.

    On two cores of an AMD EPYC (Zen 5) oneDNN makes 450 GFLOP/s in float32, MKL 200.
    """
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    is_amd = "AMD" in torch.cpu.get_capabilities().get("cpu_name", "")
    return has_avx512 and is_amd and torch.backends.mkldnn.is_available()


def product(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """x W^T + b by the quicker library. Autograd knows nothing of it."""
    if by_onednn(x) and x.numel() * len(W) >= WORTH_IT:
        return torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")
    return F.linear(x, W, b)


def add_product(y: Tensor, x: Tensor, W: Tensor) -> Tensor:
    """y + x W^T in place, of matrices."""
    if by_onednn(x) and y.numel() * x.shape[1] >= WORTH_IT:
        return y.add_(product(x, W))
    return y.addmm_(x, W.T)


class OneDNNProduct(torch.autograd.Function):
    """x W^T + b of x [...,in] with the gradients of all three."""

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, W)
        return product(x, W, b)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x, W), (needs_x, needs_W, needs_b) = ctx.saved_tensors, ctx.needs_input_grad
        rows = grad.flatten(0, -2)  # [N,out]
        grad_x = product(grad, W.T) if needs_x else None
        grad_W = product(rows.T, x.flatten(0, -2).T) if needs_W else None
        return grad_x, grad_W, rows.sum(0) if needs_b else None


def can_pack(weight: Tensor) -> bool:
    """Is oneDNN, which packed weights are for, the way to go where this weight is?"""
    vectors = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return weight.device.type == "cpu" and vectors and torch.backends.mkldnn.is_available()


def pack(weight: Tensor, rows: int) -> Tensor:
    """A copy of a weight in oneDNN's blocks, for products with about `rows` rows.

    Twelve rows through all of gpt2's matrices, its head included, take 35 ms that way on two
    AVX-512 cores, and 77 by F.linear.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b with a packed W, in its type."""
    x = x.to(packed.dtype)
    bias = bias if bias is None else bias.to(packed.dtype)
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


@contextmanager
def packed_layers(model: nn.Module, rows: int, dtype: torch.dtype) -> Iterator[None]:
    """Within, each linear layer works with a packed copy of its weight, adapters merged into it.

    Layers that nothing is gained for stay as they are.
    """
    layers = [m for m in model.modules() if isinstance(m, Linear) and can_pack(m.weight)]
    try:
        for layer in layers:
            layer.packed = pack(layer.effective_weight().to(dtype), rows)
        yield
    finally:
        for layer in layers:
            layer.packed = None
