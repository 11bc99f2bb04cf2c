"""CausalSelfAttention against PyTorch's own attention."""

import pytest
import torch
import torch.nn.functional as F

from modules.attention import AttentionProduct, CausalSelfAttention
from modules.dropout import Dropout
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


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("n_queries", [6, 1])
def test_values_and_gradients_are_those_of_the_formula_with_the_mask_of_the_forward(n_queries, p):
    torch.manual_seed(0)
    q = torch.randn(2, 3, n_queries, 4, requires_grad=True)
    k, v = (torch.randn(2, 3, 6, 4, requires_grad=True) for _ in range(2))
    bias = torch.randn(6, n_queries, 6).masked_fill(torch.rand(6, n_queries, 6) < 0.2, -torch.inf)
    weighting = torch.randn(q.shape)
    torch.manual_seed(1)
    found = AttentionProduct.apply(q, k, v, bias, p)
    torch.manual_seed(1)
    scores = q @ k.mT / 4**0.5 + bias.unflatten(0, (2, 3))
    expected = Dropout(p)(scores.softmax(3)) @ v
    assert torch.allclose(found, expected, atol=1e-5)
    pairs = zip(
        *(torch.autograd.grad(y, (q, k, v), weighting) for y in (found, expected)), strict=True
    )
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)
