"""Keys and values of the positions read so far, so that decoding reads each position once."""

import torch
from torch import Tensor

from modules.padding import TokenLayout


class LayerCache:
    """One layer's keys and values [B,H,size,D]; a row's first token is at slot 0."""

    def __init__(self, cache: "KVCache"):
        self.cache = cache
        self.keys = self.values = torch.empty(0)

    def append(self, keys: Tensor, values: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """Put [B,H,T,D] of new tokens behind each row's own; returns all, [B,H,longest + T,D]."""
        B, H, T, D = keys.shape
        if not self.keys.numel():  # zeros, since weights of 0 are multiplied with what is unused
            self.keys, self.values = (keys.new_zeros(B, H, self.cache.size, D) for _ in range(2))
        row, slot = layout.row, layout.position
        self.keys[row, :, slot] = layout.to_tokens(keys.transpose(1, 2))  # [N,H,D]
        self.values[row, :, slot] = layout.to_tokens(values.transpose(1, 2))
        S = self.cache.longest + T
        return self.keys[:, :, :S], self.values[:, :, :S]


class KVCache:
    """The caches of all layers, for up to `size` positions of `n_rows` rows."""

    def __init__(self, n_layer: int, n_rows: int, size: int, device: torch.device | str = "cpu"):
        self.size = size
        self.layers = [LayerCache(self) for _ in range(n_layer)]
        self.lengths = torch.zeros(n_rows, dtype=torch.long, device=device)  # [B], tokens read
        self.longest = 0  # the largest of `lengths`, or a little more

    def advance(self, layout: TokenLayout) -> None:
        """Count the tokens that every layer has appended."""
        self.lengths = self.lengths + layout.lengths
        self.longest += layout.shape[1]

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows of the batch."""
        self.lengths = self.lengths[rows]
        self.longest = int(self.lengths.max()) if len(rows) else 0
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
