"""Keys and values of past positions, cached so that decoding processes each position once."""

import torch
from torch import Tensor

from modules.padding import TokenLayout


class LayerCache:
    """One layer's keys and values [2,B,H,size,D]; a row's first token is in slot 0."""

    def __init__(self, cache: "KVCache"):
        self.cache = cache
        self.kv = torch.empty(0)

    def append(self, kv: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """Append the keys and values [N,2,H,D] of new tokens to their rows.

        Returns the keys and values [B,H,S,D] of the slots that the new tokens may attend to.
        """
        B, T = layout.shape
        if not self.kv.numel():  # zeros: attention multiplies unused slots by 0
            _, two, H, D = kv.shape
            self.kv = kv.new_zeros(two, B, H, self.cache.size, D)
        self.kv[:, layout.row, :, layout.position] = kv
        keys, values = self.kv[:, :, :, : self.cache.n_slots(T)]
        return keys, values


class KVCache:
    """The caches of all layers, for `n_rows` rows of up to `size` positions.

    With `fixed_shapes`, which CUDA graphs need, attention spans all `size` slots after the prompts.
    """

    def __init__(
        self,
        n_layer: int,
        n_rows: int,
        size: int,
        device: torch.device | str = "cpu",
        fixed_shapes: bool = False,
    ):
        self.size, self.fixed_shapes = size, fixed_shapes
        self.layers = [LayerCache(self) for _ in range(n_layer)]
        self.lengths = torch.zeros(n_rows, dtype=torch.long, device=device)  # [B], cached tokens
        self.longest = 0  # at least max(lengths); in fixed shapes it only matters whether it is 0

    def n_slots(self, n_new: int) -> int:
        """S, the number of slots that attention spans when each row gets up to `n_new` tokens."""
        return self.size if self.fixed_shapes and self.longest else self.longest + n_new

    def advance(self, layout: TokenLayout) -> None:
        """Count the tokens of `layout` as cached, once every layer has appended them."""
        self.lengths = self.lengths + layout.lengths
        self.longest += layout.shape[1]

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows of the batch."""
        self.lengths = self.lengths[rows]
        self.longest = int(self.lengths.max()) if len(rows) else 0
        for layer in self.layers:
            layer.kv = layer.kv[:, rows]
