"""Multi-head causal self-attention with one fused projection for query, key and value."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.dropout import Dropout
from modules.kv_cache import LayerCache
from modules.linear import Linear


class CausalSelfAttention(nn.Module):
    """Scaled dot-product attention in which a position sees itself and what stands to its left."""

    def __init__(self, n_embd: int, n_head: int, attn_pdrop: float):
        super().__init__()
        self.n_head = n_head
        self.dropout = Dropout(attn_pdrop)
        self.qkv = Linear(n_embd, 3 * n_embd)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
        only: Tensor | None = None,
    ) -> Tensor:
        """Heads joined, before the output projection: [B,T,C], or [B,1,C] of the positions `only`.

        `attention_mask` (bool, [B,1,T,S] or alike, True where a query may look) replaces the
        causal mask. With a `cache` the S keys are those in it and the new T; a single query sees
        them all, several need a mask unless the cache was empty. `only`, int64 [B,1,1], is the
        one position of each row that asks.
        """
        B, T, C = x.shape
        heads = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # 3 x [B,H,T,D]
        if cache is not None:
            k, v = cache.append(k, v)
        if only is not None:
            q = q.take_along_dim(only[:, None], 2)  # [B,H,1,D]
        p = self.dropout.p if self.training else 0.0
        is_causal = attention_mask is None and q.shape[2] > 1
        if p and x.device.type == "cpu":  # where PyTorch's way is slow: it draws a number for each
            y = self._attend(q, k, v, attention_mask, is_causal)
        elif q.shape[2] == 1 and x.device.type == "cpu":  # slow again: twice in bfloat16
            with torch.autocast("cpu", enabled=False):
                y = self._attend(q.float(), k.float(), v.float(), attention_mask, False)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attention_mask, p, is_causal)
        return y.transpose(1, 2).reshape(B, -1, C)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """The formula: dropout(softmax(q k^T / sqrt(D))) v, over what the mask lets through."""
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)  # [B,H,T,S]
        if is_causal:
            mask = scores.new_ones(scores.shape[2:], dtype=torch.bool).tril()
        if mask is not None:
            scores = scores + torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
        return self.dropout(scores.softmax(3)) @ v
