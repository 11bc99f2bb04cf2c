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
        bias: Tensor | None = None,
        cache: LayerCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """[N,C] -> [N,C], or with `last_only` [B,C], each row's last token; no output projection.

        `bias` [B,1,T,S] is added to the attention scores and replaces the causal mask. With a
        `cache`, the S keys are those it holds once the new ones have been appended.
        """
        qkv = self.qkv(x)  # [N,3C]
        parts = layout.to_rows(qkv).unflatten(2, (3, self.n_head, -1)).unbind(2)  # [B,T,H,D] each
        q, k, v = (part.transpose(1, 2) for part in parts)  # [B,H,T,D] each
        if cache is not None:
            k, v = cache.append(qkv.unflatten(1, (3, self.n_head, -1))[:, 1:], layout)
        if last_only:
            last = (layout.lengths - 1).view(-1, 1, 1, 1).expand(-1, q.shape[1], 1, q.shape[3])
            q = q.gather(2, last)  # [B,H,1,D]
        y = self.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=bias,
            dropout_p=self.dropout_p if self.training else 0.0,
            # Spelled out so that torch.compile sees a constant rather than a dynamic size.
            is_causal=True if bias is None and q.shape[2] > 1 else False,  # noqa: SIM210
        )
        y = y.transpose(1, 2).flatten(2)  # [B,T,C]
        return y[:, 0] if last_only else layout.to_tokens(y)
