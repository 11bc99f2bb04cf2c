"""Batches without padding: layers process the N tokens, [N,C]; only attention needs rows."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """Where the N tokens of a batch are in its B rows, each of which starts at position 0.

    Rows are those of the input with their gaps closed: left padding and holes in the mask are moved
    to the end, so plain causal attention works for every mask.
    """

    shape: tuple[int, int]  # B, T
    source: Tensor | None  # int64 [N], tokens' indices in the flattened input; None: all B*T
    index: Tensor | None  # int64 [N], their indices in the flattened rows; None likewise
    row: Tensor  # int64 [N]
    position: Tensor  # int64 [N], within the row, counting cached tokens
    lengths: Tensor  # int64 [B], not counting cached tokens

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_index: Tensor | None = None,
        cached: Tensor | None = None,
    ) -> "TokenLayout":
        """The layout of `input_ids` [B,T], whose tokens are where `attention_mask` [B,T] is 1.

        `token_index` [N], for right-padded rows, gives the tokens' indices in the flattened input
        without a scan of the mask, which would wait for a GPU. It may end in padding positions,
        which no token attends to. `cached` [B] is the number of cached tokens in each row. With
        neither of them, raises ValueError if a row has no token.
        """
        (B, T), device = input_ids.shape, input_ids.device
        source, index = token_index, token_index
        if attention_mask is None:
            place = torch.arange(B * T, device=device)
            lengths = torch.full((B,), T, device=device)
        elif token_index is not None:
            place, lengths = token_index, attention_mask.sum(1)
        else:
            source, lengths = attention_mask.flatten().nonzero().squeeze(1), attention_mask.sum(1)
            if cached is None and not lengths.all():
                raise ValueError("a row of attention_mask holds no token")
            position = attention_mask.cumsum(1).flatten()[source] - 1
            place = index = source // T * T + position
        row, position = place // T, place % T
        if cached is not None:
            position = position + cached[row]
        return cls((B, T), source, index, row, position, lengths)

    @property
    def last(self) -> Tensor:
        """int64 [B], the index of each row's last token among the N."""
        return self.lengths.cumsum(0) - 1

    def tokens_of(self, input_ids: Tensor) -> Tensor:
        """The N tokens of `input_ids` [B,T]."""
        return input_ids.flatten() if self.source is None else input_ids.flatten()[self.source]

    def to_input_shape(self, x: Tensor) -> Tensor:
        """[N,...] -> [B,T,...], each token where it was in the input and zeros for padding."""
        return self._scatter(x, self.source)

    def attention_bias(self, n_slots: int) -> Tensor:
        """The bias [B,1,T,S] on the attention scores over cached slots, in their dtype: 0 where a
        query may attend, -inf elsewhere.
        """
        slot = torch.arange(n_slots, device=self.position.device)
        return _bias(slot <= self.to_rows(self.position)[:, None, :, None])

    def last_attention_bias(self, bias: Tensor | None) -> Tensor:
        """The part [B,1,1,S] of `bias` [B,1,T,S] (None: causal) for each row's last token."""
        if bias is None:
            slot = torch.arange(self.shape[1], device=self.lengths.device)
            return _bias(slot < self.lengths[:, None, None, None])  # [B,1,1,S]
        last = (self.lengths - 1).view(-1, 1, 1, 1).expand(-1, 1, 1, bias.shape[3])
        return bias.gather(2, last)

    def to_rows(self, x: Tensor) -> Tensor:
        """[N,...] -> [B,T,...], with zeros for padding."""
        return self._scatter(x, self.index)

    def _scatter(self, x: Tensor, index: Tensor | None) -> Tensor:
        B, T = self.shape
        if index is not None:
            x = x.new_zeros(B * T, *x.shape[1:]).index_copy_(0, index, x)
        return x.unflatten(0, (B, T))

    def to_tokens(self, rows: Tensor) -> Tensor:
        """[B,T,...] -> [N,...], without padding."""
        x = rows.flatten(0, 1)
        return x if self.index is None else take(x, self.index)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which autocast computes matmuls, or None if autocast is off."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def _bias(visible: Tensor) -> Tensor:
    dtype = autocast_dtype(visible.device) or torch.float32
    return torch.where(visible, 0.0, -torch.inf).to(dtype)


class _Take(torch.autograd.Function):
    """x[index] for distinct indices: the gradient is copied, where autograd would accumulate it."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy_(0, index, grad), None


take = _Take.apply
