"""The cache gives back what was put in, for the rows that are kept."""

import torch

from modules.kv_cache import KVCache
from modules.padding import TokenLayout


def test_rows_of_different_lengths_come_back_in_order_for_the_rows_kept():
    lengths, n_new = [3, 1, 2], 2
    kv = torch.randn(3, 5, 2, 2, 4)  # [B,T,2,H,D]
    cache = KVCache(n_layer=2, n_rows=3, size=8)
    mask = (torch.arange(3) < torch.tensor(lengths)[:, None]).long()
    layout = TokenLayout.of(mask, mask, cached=cache.lengths)
    for layer in cache.layers:
        layer.append(kv[:, :3][mask.bool()], layout)
    cache.advance(layout)
    storage = cache.layers[1].kv.data_ptr()
    for step in range(n_new):
        layout = TokenLayout.of(mask[:, :1], cached=cache.lengths)
        for layer in cache.layers:
            found = torch.stack(layer.append(kv[:, 3 + step], layout))  # [2,B,H,S,D]
        cache.advance(layout)
    assert cache.layers[1].kv.data_ptr() == storage  # nothing was allocated anew
    assert cache.lengths.tolist() == [5, 3, 4]
    assert found.shape[3] == 5
    for row, n in enumerate(lengths):
        expected = torch.cat([kv[row, :n], kv[row, 3:]]).permute(1, 2, 0, 3)  # [2,H,T,D]
        assert torch.equal(found[:, row, :, : n + n_new], expected)
    kept = cache.layers[1].kv[:, [2, 1]].clone()
    cache.keep(torch.tensor([2, 1]))
    assert torch.equal(cache.layers[1].kv, kept)
    assert (cache.lengths.tolist(), cache.longest) == ([4, 3], 4)


def test_with_fixed_shapes_all_slots_count_once_the_texts_are_read():
    cache = KVCache(n_layer=1, n_rows=2, size=8, fixed_shapes=True)
    shapes = []
    for T in (3, 1, 1):
        layout = TokenLayout.of(torch.ones(2, T), cached=cache.lengths)
        keys, values = cache.layers[0].append(torch.ones(2 * T, 2, 2, 4), layout)
        shapes.append(keys.shape[2])
        cache.advance(layout)
    assert shapes == [3, 8, 8]
    assert values[:, :, :5].all()
    assert not values[:, :, 5:].any()
