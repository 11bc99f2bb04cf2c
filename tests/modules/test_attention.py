"""CausalSelfAttention against the formula and PyTorch's own attention."""

import pytest
import torch
import torch.nn.functional as F

from modules.attention import CausalSelfAttention
from modules.kernels import accelerate
from modules.kv_cache import KVCache
from modules.padding import TokenLayout

MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])


def formula(attention: CausalSelfAttention, x: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v of one row x [T,C], by hand."""
    q, k, v = attention.qkv(x).view(len(x), 3, attention.n_head, -1).permute(1, 2, 0, 3)
    scores = q @ k.mT / q.shape[-1] ** 0.5
    hidden = torch.ones(len(x), len(x)).triu(1).bool()
    return (scores.masked_fill(hidden, -torch.inf).softmax(2) @ v).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("last_only", [False, True])
def test_each_row_is_the_formula_of_its_own_tokens(last_only):
    torch.manual_seed(0)
    attention, layout = CausalSelfAttention(32, 4, 0.1).eval(), TokenLayout.of(MASK, MASK)
    x = torch.randn(11, 32)
    bias = layout.last_attention_bias(None) if last_only else None
    with torch.no_grad():
        y = attention(x, layout, bias, last_only=last_only)
        rows = [formula(attention, row) for row in (x[:7], x[7:])]
    expected = torch.stack([row[-1] for row in rows]) if last_only else torch.cat(rows)
    assert torch.allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_query_attends_to_the_cache_in_float32(dtype):
    torch.manual_seed(0)
    attention, cache = CausalSelfAttention(32, 4, 0.1).eval(), KVCache(1, 2, 9)
    accelerate(attention)
    layout = TokenLayout.of(MASK, MASK, cached=cache.lengths)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        attention(torch.randn(11, 32), layout, cache=cache.layers[0])
        cache.advance(layout)
        x, layout = torch.randn(2, 32), TokenLayout.of(MASK[:, :1], cached=cache.lengths)
        y = attention(x, layout, layout.attention_bias(cache.n_slots(1)), cache.layers[0])
        q = attention.qkv(x)[:, :32].view(2, 4, 1, 8).float()
    kv = cache.layers[0].kv
    assert kv.dtype == dtype
    k, v = kv[:, :, :, :8].float()
    mask = (torch.arange(8) <= torch.tensor([[7], [4]]))[:, None, None]
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    assert torch.allclose(y, expected.flatten(1), atol=1e-6)
