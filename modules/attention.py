"""Multi-head causal self-attention with one fused projection for query, key and value."""

import torch.nn.functional as F
from torch import Tensor, nn

from modules.kv_cache import LayerCache
from modules.padding import TokenLayout


class CausalSelfAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v: each position attends to itself and to earlier positions."""

    scaled_dot_product_attention = staticmethod(F.scaled_dot_product_attention)

    def __init__(self, n_embd: int, n_head: int, attn_pdrop: float):
        super().__init__()
        self.n_head = n_head
        self.dropout_p = attn_pdrop
        self.qkv = nn.Linear(n_embd, 3 * n_embd)

    def forward(
        self,
        x: Tensor,
        layout: TokenLayout,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """[N,C] to [N,C], before the output projection; `last_only`: to [B,C], the rows' last.

        `mask`, bool [B,1,T,S] and True where a query may attend to a key, replaces the causal one.
        With a `cache` the S keys are all that it holds once the new ones are in it.
        """
        q, k, v = self._heads(layout.to_rows(self.qkv(x)))  # [B,H,T,D] each
        if cache is not None:
            k, v = cache.append(k, v, layout)
        if last_only:
            last = (layout.lengths - 1).view(-1, 1, 1, 1).expand(-1, q.shape[1], 1, q.shape[3])
            q = q.gather(2, last)  # [B,H,1,D]
        y = self.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout_p if self.training else 0.0,
            is_causal=mask is None and q.shape[2] > 1,
        )
        y = y.transpose(1, 2).flatten(2)  # [B,T,C]
        return y[:, 0] if last_only else layout.to_tokens(y)

    def _heads(self, qkv: Tensor) -> list[Tensor]:
        """[B,T,3C] to three of [B,H,T,D]."""
        parts = qkv.unflatten(2, (3, self.n_head, -1)).unbind(2)  # [B,T,H,D] each
        return [part.transpose(1, 2) for part in parts]
