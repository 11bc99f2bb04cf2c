"""Keys and values of the positions read so far, so that decoding reads each position once."""

import torch
from torch import Tensor


class LayerCache:
    """One layer's keys and values [B,H,size,D], allocated whole when the first ones come in."""

    def __init__(self, size: int):
        self.size = size
        self.length = 0
        self.keys = self.values = torch.empty(0)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add [B,H,T,D] of new positions; returns all so far, views of [B,H,length,D]."""
        start, self.length = self.length, self.length + keys.shape[2]
        if start == 0:
            B, H, _, D = keys.shape
            self.keys, self.values = (keys.new_empty(B, H, self.size, D) for _ in range(2))
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch alone."""
        self.keys, self.values = self.keys[rows], self.values[rows]


class KVCache:
    """The caches of all layers, for up to `size` positions."""

    def __init__(self, n_layer: int, size: int):
        self.layers = [LayerCache(size) for _ in range(n_layer)]

    @property
    def length(self) -> int:
        """Positions read so far."""
        return self.layers[0].length

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch alone."""
        for layer in self.layers:
            layer.keep(rows)
