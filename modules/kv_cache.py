"""Keys and values of the positions read so far, so that decoding reads each position once."""

import torch
from torch import Tensor

from modules.padding import TokenLayout


class LayerCache:
    """One layer's keys and values [2,B,H,size,D]; a row's first token is at slot 0."""

    def __init__(self, cache: "KVCache"):
        self.cache = cache
        self.kv = torch.empty(0)

    def append(self, kv: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """Put keys and values [N,2,H,D] of new tokens behind each row's own.

        Returns keys and values [B,H,S,D] of the slots that the new tokens may attend to.
        """
        B, T = layout.shape
        if not self.kv.numel():  # zeros, since weights of 0 are multiplied with what is unused
            _, two, H, D = kv.shape
            self.kv = kv.new_zeros(two, B, H, self.cache.size, D)
        self.kv[:, layout.row, :, layout.position] = kv
        keys, values = self.kv[:, :, :, : self.cache.n_slots(T)]
        return keys, values


class KVCache:
    """The caches of all layers, for up to `size` positions of `n_rows` rows.

    With `fixed_shapes`, as a CUDA graph needs them, all slots count once the prompts are read.
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
        self.lengths = torch.zeros(n_rows, dtype=torch.long, device=device)  # [B], tokens read
        self.longest = 0  # the largest of `lengths`, or a little more

    def n_slots(self, n_new: int) -> int:
        """The slots that attention reads while `n_new` tokens a row are read."""
        return self.size if self.fixed_shapes and self.longest else self.longest + n_new

    def advance(self, layout: TokenLayout) -> None:
        """Count the tokens that every layer has appended."""
        self.lengths = self.lengths + layout.lengths
        self.longest += layout.shape[1]

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows of the batch."""
        self.lengths = self.lengths[rows]
        self.longest = int(self.lengths.max()) if len(rows) else 0
        for layer in self.layers:
            layer.kv = layer.kv[:, rows]
