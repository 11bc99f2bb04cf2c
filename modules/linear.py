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


def pack(weight: Tensor, rows: int) -> Tensor | None:
    """A copy of a weight in oneDNN's blocks, for products with about `rows` rows.

    None where oneDNN is not the way to go. Twelve rows through all of gpt2's matrices, its head
    included, take 35 ms that way on two AVX-512 cores, and 77 by F.linear.
    """
    vectors = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    if weight.device.type != "cpu" or not vectors or not torch.backends.mkldnn.is_available():
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b with a packed W, in its type."""
    x = x.to(packed.dtype)
    bias = bias if bias is None else bias.to(packed.dtype)
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


@contextmanager
def packed_layers(model: nn.Module, rows: int, dtype: torch.dtype) -> Iterator[None]:
    """Within, each linear layer works with a packed copy of its weight, adapters merged into it."""
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    try:
        for layer in layers:
            layer.packed = pack(layer.effective_weight().to(dtype), rows)
        yield
    finally:
        for layer in layers:
            layer.packed = None
