"""The cache gives back what was put in, for the rows that are kept."""

import torch

from modules.kv_cache import KVCache
from modules.padding import TokenLayout


def test_rows_of_different_lengths_come_back_in_order_for_the_rows_kept():
    lengths, n_new = [3, 1, 2], 2
    keys, values = torch.randn(2, 3, 2, 5, 4)  # [B,H,T,D] each
    cache = KVCache(n_layer=2, n_rows=3, size=8)
    mask = (torch.arange(3) < torch.tensor(lengths)[:, None]).long()
    layout = TokenLayout.of(mask, mask, cached=cache.lengths)
    for layer in cache.layers:
        layer.append(keys[:, :, :3], values[:, :, :3], layout)
    cache.advance(layout)
    storage = cache.layers[1].keys.data_ptr()
    for step in range(n_new):
        layout = TokenLayout.of(mask[:, :1], cached=cache.lengths)
        new = slice(3 + step, 4 + step)
        for layer in cache.layers:
            all_keys, all_values = layer.append(keys[:, :, new], values[:, :, new], layout)
        cache.advance(layout)
    assert cache.layers[1].keys.data_ptr() == storage  # nothing was allocated anew
    assert cache.lengths.tolist() == [5, 3, 4]
    for row, n in enumerate(lengths):
        for found, given in ((all_keys, keys), (all_values, values)):
            expected = torch.cat([given[row, :, :n], given[row, :, 3:]], 1)
            assert torch.equal(found[row, :, : n + n_new], expected)
    kept = cache.layers[1].keys[[2, 1]].clone()
    cache.keep(torch.tensor([2, 1]))
    assert torch.equal(cache.layers[1].keys, kept)
    assert (cache.lengths.tolist(), cache.longest) == ([4, 3], 4)
