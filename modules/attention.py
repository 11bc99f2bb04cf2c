"""Multi-head causal self-attention with one fused projection for query, key and value."""

import torch.nn.functional as F
from torch import Tensor, nn

from modules.kv_cache import LayerCache
from modules.linear import Linear


class CausalSelfAttention(nn.Module):
    """Scaled dot-product attention in which a position sees itself and what stands to its left."""

    def __init__(self, n_embd: int, n_head: int, attn_pdrop: float):
        super().__init__()
        self.n_head = n_head
        self.attn_pdrop = attn_pdrop
        self.qkv = Linear(n_embd, 3 * n_embd)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """Heads joined, before the output projection.

        `attention_mask` (bool, [B,1,T,S] or alike, True where a query may look) replaces the
        causal mask. With a `cache` the S keys are those in it and the new T; a single query sees
        them all, several need a mask unless the cache was empty.
        """
        B, T, C = x.shape
        heads = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # 3 x [B,H,T,D]
        if cache is not None:
            k, v = cache.append(k, v)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=attention_mask,
            dropout_p=self.attn_pdrop if self.training else 0.0,
            is_causal=attention_mask is None and T > 1,
        )
        return y.transpose(1, 2).reshape(B, T, C)
