"""One GPT-2 block: pre-norm attention and pre-norm feed-forward, with residual connections."""

import torch.nn.functional as F
from torch import Tensor, nn

from modules.attention import CausalSelfAttention
from modules.kv_cache import LayerCache
from modules.padding import TokenLayout


class GPT2Layer(nn.Module):
    """h = h + dense(attention(norm(h))), then h = h + out(gelu(interm(norm(h)))).

    `after_attention` and `after_ffn` are hook points for interventions on the residual stream.
    """

    def __init__(
        self, n_embd: int, n_head: int, norm_eps: float, attn_pdrop: float, resid_pdrop: float
    ):
        super().__init__()
        self.attention_layer_norm = nn.LayerNorm(n_embd, eps=norm_eps)
        self.self_attention = CausalSelfAttention(n_embd, n_head, attn_pdrop)
        self.attention_dense = nn.Linear(n_embd, n_embd)
        self.out_layer_norm = nn.LayerNorm(n_embd, eps=norm_eps)
        self.interm_dense = nn.Linear(n_embd, 4 * n_embd)
        self.out_dense = nn.Linear(4 * n_embd, n_embd)
        self.dropout = nn.Dropout(resid_pdrop)
        self.after_attention: nn.Module | None = None
        self.after_ffn: nn.Module | None = None

    def forward(
        self,
        h: Tensor,
        layout: TokenLayout,
        bias: Tensor | None = None,
        cache: LayerCache | None = None,
        intervened: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """[N,C] -> [N,C], or with `last_only` [B,C], each row's last token.

        `layout`, `bias` and `cache` are as in `CausalSelfAttention`. `intervened`, bool [N,1],
        selects the tokens that the hook points act on; None means all.
        """
        y = self.self_attention(self.attention_layer_norm(h), layout, bias, cache, last_only)
        if last_only:
            h = h.index_select(0, layout.last)
            intervened = None if intervened is None else intervened.index_select(0, layout.last)
        h = h + self.dropout(self.attention_dense(y))
        if self.after_attention is not None:
            h = self.after_attention(h, intervened)
        # GPT-2 was trained with the tanh approximation of GELU; exact GELU shifts outputs by ~1e-3.
        y = F.gelu(self.interm_dense(self.out_layer_norm(h)), approximate="tanh")
        h = h + self.dropout(self.out_dense(y))
        return h if self.after_ffn is None else self.after_ffn(h, intervened)
