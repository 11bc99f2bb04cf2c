"""Multi-head causal self-attention with one fused projection for query, key and value."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.dropout import Dropout, drop, drop_gradient
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
        if x.device.type == "cpu" and (p or q.shape[2] == 1):  # where PyTorch's own way is slow
            with torch.autocast("cpu", enabled=False):
                bias = _bias(q, k, attention_mask, is_causal)
                y = AttentionProduct.apply(q.float(), k.float(), v.float(), bias, p)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attention_mask, p, is_causal)
        return y.transpose(1, 2).reshape(B, -1, C)


def _bias(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """0 where a query may look and -inf elsewhere, to be added to scores [B,H,T,S], flattened."""
    (B, H, T, _), S = q.shape, k.shape[2]
    if is_causal:
        return q.new_full((T, S), -torch.inf, dtype=torch.float32).triu_(1)
    bias = q.new_zeros(1, dtype=torch.float32)
    if mask is not None:
        bias = torch.where(mask, bias, -torch.inf).expand(B, H, T, S).flatten(0, 1)
    return bias


class AttentionProduct(torch.autograd.Function):
    """dropout(softmax(q k^T / sqrt(D) + bias)) v of q [B,H,T,D] and k, v [B,H,S,D].

    Keeps the softmax and a mask of bytes; autograd would keep what dropout left as well.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, p: float) -> Tensor:
        ctx.heads, ctx.p, ctx.scale = q.shape[:2], p, q.shape[3] ** -0.5
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        weights = torch.baddbmm(bias, q, k.mT, alpha=ctx.scale).softmax(2)  # [BH,T,S]
        dropped, mask, ctx.left = drop(weights, p) if p else (weights, None, 1.0)
        ctx.save_for_backward(q, k, v, weights, mask)
        return (dropped @ v).mul_(ctx.left).unflatten(0, ctx.heads)

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, weights, mask = ctx.saved_tensors
        grad = grad.flatten(0, 1) * ctx.left
        dropped, grad_weights = weights, grad @ v.mT
        if ctx.p:
            dropped, grad_weights = (drop_gradient(x, mask, ctx.p) for x in (weights, grad_weights))
        softmax_backward = torch.ops.aten._softmax_backward_data
        grad_scores = softmax_backward(grad_weights, weights, 2, weights.dtype).mul_(ctx.scale)
        grads = (grad_scores @ k, grad_scores.mT @ q, dropped.mT @ grad)
        return *(x.unflatten(0, ctx.heads) for x in grads), None, None
