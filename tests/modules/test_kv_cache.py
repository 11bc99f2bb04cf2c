"""The cache gives back what was put in, for the rows that are kept."""

import torch

from modules.kv_cache import KVCache


def test_appended_keys_and_values_come_back_in_order_for_the_rows_kept():
    keys, values = torch.randn(2, 3, 2, 5, 4)  # [B,H,T,D] each
    cache = KVCache(n_layer=2, size=8)
    layer = cache.layers[1]
    layer.append(keys[:, :, :3], values[:, :, :3])
    storage = layer.keys.data_ptr()
    layer.append(keys[:, :, 3:4], values[:, :, 3:4])
    assert layer.keys.data_ptr() == storage  # nothing was allocated anew
    cache.layers[0].append(keys[:, :, :4], values[:, :, :4])
    cache.keep(torch.tensor([2, 0]))
    all_keys, all_values = layer.append(keys[[2, 0], :, 4:], values[[2, 0], :, 4:])
    assert torch.equal(all_keys, keys[[2, 0]])
    assert torch.equal(all_values, values[[2, 0]])
    assert cache.length == 4  # that of the first layer
