"""CausalSelfAttention against PyTorch's own attention."""

import pytest
import torch
import torch.nn.functional as F

from modules.attention import CausalSelfAttention
from modules.kv_cache import LayerCache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_a_single_query_sees_the_cache_in_float32(dtype, padded):
    torch.manual_seed(0)
    attention, cache = CausalSelfAttention(32, 4, 0.1).eval(), LayerCache(9)
    mask = torch.ones(2, 1, 1, 8, dtype=torch.bool)
    mask[1, ..., :3] = not padded
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        attention(torch.randn(2, 7, 32), cache=cache)
        x = torch.randn(2, 1, 32)
        y = attention(x, mask if padded else None, cache)
        q = attention.qkv(x)[..., :32].view(2, 1, 4, 8).transpose(1, 2).float()
    assert cache.keys.dtype == dtype
    k, v = (part[:, :, :8].float() for part in (cache.keys, cache.values))
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    assert torch.allclose(y, expected.transpose(1, 2).reshape(2, 1, 32), atol=1e-6)
