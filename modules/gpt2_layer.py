"""One GPT-2 block: pre-norm attention and pre-norm feed-forward, each with a residual."""

import torch.nn.functional as F
from torch import Tensor, nn

from modules.attention import CausalSelfAttention
from modules.dropout import Dropout
from modules.kv_cache import LayerCache
from modules.linear import Linear


class GPT2Layer(nn.Module):
    """h = x + dense(attention(norm(x))), then h + out(gelu(interm(norm(h)))).

    `after_attention` and `after_ffn` are empty places, for an adapter of the residual stream.
    """

    def __init__(
        self, n_embd: int, n_head: int, norm_eps: float, attn_pdrop: float, resid_pdrop: float
    ):
        super().__init__()
        self.attention_layer_norm = nn.LayerNorm(n_embd, eps=norm_eps)
        self.self_attention = CausalSelfAttention(n_embd, n_head, attn_pdrop)
        self.attention_dense = Linear(n_embd, n_embd)
        self.out_layer_norm = nn.LayerNorm(n_embd, eps=norm_eps)
        self.interm_dense = Linear(n_embd, 4 * n_embd)
        self.out_dense = Linear(4 * n_embd, n_embd)
        self.dropout = Dropout(resid_pdrop)
        self.after_attention: nn.Module | None = None
        self.after_ffn: nn.Module | None = None

    def forward(
        self,
        h: Tensor,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
        edited: Tensor | None = None,
        only: Tensor | None = None,
    ) -> Tensor:
        """[B,T,C] to [B,T,C], or to [B,1,C] of the positions `only`.

        Mask, cache and `only` are those of `CausalSelfAttention`. `edited`, bool [B,T,1], says
        where adapters of the residual stream work, None everywhere.
        """
        y = self.self_attention(self.attention_layer_norm(h), attention_mask, cache, only)
        if only is not None:
            h = h.take_along_dim(only, 1)
            edited = edited if edited is None else edited.take_along_dim(only, 1)
        h = h + self.dropout(self.attention_dense(y))
        if self.after_attention is not None:
            h = self.after_attention(h, edited)
        # The GPT-2 weights were trained with the tanh form of GELU; the exact form drifts by 1e-3.
        y = F.gelu(self.interm_dense(self.out_layer_norm(h)), approximate="tanh")
        h = h + self.dropout(self.out_dense(y))
        return h if self.after_ffn is None else self.after_ffn(h, edited)
