"""GPT-2 (Radford et al. 2019): configuration, sizes and the transformer without a task head."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules.dropout import Dropout
from modules.gpt2_layer import GPT2Layer
from modules.kv_cache import KVCache
from modules.linear import by_onednn, can_pack, pack, packed_layers, packed_linear
from modules.reft import Positions


@dataclass(frozen=True)
class GPT2Config:
    """What this model reads of Hugging Face's GPT-2 `config.json`, under the same names."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1


SIZES = {  # name -> width, layers, heads
    "gpt2": (768, 12, 12),
    "gpt2-medium": (1024, 24, 16),
    "gpt2-large": (1280, 36, 20),
    "gpt2-xl": (1600, 48, 25),
    "gpt2-nano": (256, 4, 4),
}
LENGTH_STEP = 8  # oneDNN keeps code for each shape it has met: 0.6 MB and a millisecond a product


class GPT2Model(nn.Module):
    """Token and position embeddings, a stack of `GPT2Layer`, a final layer norm; output tied."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.word_embedding = _embedding(config.vocab_size, config.n_embd)
        self.pos_embedding = _embedding(config.n_positions, config.n_embd)
        self.embed_dropout = Dropout(config.embd_pdrop)
        self.gpt_layers = nn.ModuleList(
            GPT2Layer(
                config.n_embd,
                config.n_head,
                config.layer_norm_epsilon,
                config.attn_pdrop,
                config.resid_pdrop,
            )
            for _ in range(config.n_layer)
        )
        self.final_layer_norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.edit_positions: Positions | None = None  # where ReFT works, None for everywhere
        self.packed_head: Tensor | None = None
        self.head_mean: Tensor | None = None  # the row that the packed head is less by
        self.gradient_checkpointing = False  # compute a block again for its gradient, to keep less
        if not self.word_embedding.weight.is_meta:
            self._init_weights()

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path) -> "GPT2Model":
        """The model of a size in SIZES or of a checkpoint folder; see `models.pretrained`."""
        from models.pretrained import find_checkpoint, load_gpt2

        return load_gpt2(find_checkpoint(name_or_folder))

    def _init_weights(self) -> None:
        """GPT-2's own start: N(0, 0.02), less on what writes into the residual stream."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                into_residual = name.endswith(("attention_dense.weight", "out_dense.weight"))
                scale = (2 * self.config.n_layer) ** -0.5 if into_residual else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        right_padded: bool | None = None,
        cache: KVCache | None = None,
        prompt_lengths: Tensor | None = None,
        last_only: bool = False,
    ) -> dict[str, Tensor]:
        """`last_hidden_state` [B,T,C] and `last_token` [B,C], the state at the last real token.

        With `last_only`, `last_token` alone: the last layer does without the other positions.

        `attention_mask` [B,S] is 1 on real tokens: on the T given, and with a `cache` on those
        in it before them. Pass `right_padded=True` where every row is known to be padded on the
        right: finding it out reads the mask, which makes a GPU wait. `prompt_lengths` [B] are
        tokens of each row that ReFT may count as its prompt, by default all the real ones.
        """
        T, past = input_ids.shape[1], cache.length if cache else 0
        room = self.config.n_positions
        if position_ids is None and past + T > room:
            raise ValueError(f"{past + T} tokens given, the model has {room} positions")
        if past and T > 1:
            right_padded = False  # the causal kernel takes the first query for position 0
            if attention_mask is None:
                attention_mask = input_ids.new_ones(len(input_ids), past + T)
        visible = None
        if attention_mask is not None and right_padded is None:
            right_padded = bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())
        if attention_mask is not None and not right_padded:
            visible = _visible(attention_mask, T)
            if position_ids is None:
                position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, past:]
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=input_ids.device)
        h = self.embed_dropout(self.word_embedding(input_ids) + self.pos_embedding(position_ids))
        edited = self._edited(input_ids, attention_mask, position_ids, prompt_lengths, past)
        mask = attention_mask if attention_mask is None else attention_mask[:, past:]
        last = _last_position(input_ids, mask)  # [B,1,1]
        only = last if last_only and T > 1 else None
        h = self.final_layer_norm(self._through_layers(h, visible, cache, edited, only))
        if last_only and h.shape[1] == 1:
            return {"last_token": h[:, 0]}
        return {"last_hidden_state": h, "last_token": h.take_along_dim(last, 1)[:, 0]}

    def _through_layers(
        self,
        h: Tensor,
        visible: Tensor | None,
        cache: KVCache | None,
        edited: Tensor | None,
        only: Tensor | None,
    ) -> Tensor:
        """What the blocks make of h [B,T,C]; with `only`, [B,1,C] of those positions."""
        T = h.shape[1]
        if cache is None and visible is None and by_onednn(h):
            more = (0, 0, 0, -T % LENGTH_STEP)  # no position looks at them
            h, edited = F.pad(h, more), edited if edited is None else F.pad(edited, more)
        asking = None
        for i, layer in enumerate(self.gpt_layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                layer = partial(checkpoint, layer, use_reentrant=False)
            if only is not None and i + 1 == len(self.gpt_layers):
                asking, visible = only, _visible_to(only, visible, h.shape[1])
            h = layer(h, visible, cache.layers[i] if cache else None, edited, asking)
        return h[:, :T]

    def _edited(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        prompt_lengths: Tensor | None,
        past: int,
    ) -> Tensor | None:
        """Where adapters of the residual stream work, bool [B,T,1], None for everywhere."""
        if self.edit_positions is None:
            return None
        if prompt_lengths is None and past:
            raise ValueError("ReFT at positions of the prompt needs prompt_lengths beside a cache")
        if prompt_lengths is None:
            real = torch.ones_like(input_ids[:1]) if attention_mask is None else attention_mask
            prompt_lengths = real.sum(1)
        return self.edit_positions.of(position_ids, prompt_lengths)

    def hidden_state_to_token(self, h: Tensor) -> Tensor:
        """Logits [..., V] of states [..., C] by the tied word embedding, in float32.

        Under autocast too: near a logit of -100, say, bfloat16 numbers are half a nat apart.
        """
        with torch.autocast(h.device.type, enabled=False):
            if self.packed_head is not None:
                logits = packed_linear(h, self.packed_head).float()
                if self.head_mean is not None:
                    logits += (h.float() @ self.head_mean)[..., None]
                return logits
            return F.linear(h.float(), self.word_embedding.weight)

    @contextmanager
    def packed(self, rows: int, dtype: torch.dtype) -> Iterator[None]:
        """Within, a CPU decodes about `rows` rows at a time with packed copies of all weights.

        They take as much memory again. `dtype` is what all of them work in. Of the logits, what
        all tokens have in common is computed in float32: the rest is small, and so is its rounding.
        """
        head = self.word_embedding.weight.detach()
        if can_pack(head):
            if dtype != torch.float32:
                self.head_mean = head.mean(0)
                head = (head - self.head_mean).to(dtype)
            self.packed_head = pack(head, rows)
        try:
            with packed_layers(self, rows, dtype):
                yield
        finally:
            self.packed_head = self.head_mean = None


def _embedding(rows: int, width: int) -> nn.Embedding:
    # nn.Embedding's own start on the meta device imports 800 modules, which takes seconds.
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


def _visible(attention_mask: Tensor, T: int) -> Tensor:
    """What the last T of S positions may look at, bool [B,1,T,S]: what is neither later nor
    padding, and itself, so that no row is empty."""
    key = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    query = key[-T:, None]
    real = attention_mask.bool()[:, None, None, :]  # [B,1,1,S]
    return (key < query) & real | (key == query)


def _visible_to(last: Tensor, visible: Tensor | None, T: int) -> Tensor:
    """The rows of a mask [B,1,T,S], or of the causal one for None, at positions `last` [B,1,1]."""
    if visible is None:
        return (torch.arange(T, device=last.device) <= last)[:, None]  # [B,1,1,T]
    return visible.take_along_dim(last[:, None], 2)


def _last_position(input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Index of each row's last real token among the T given, int64 [B,1,1]."""
    B, T = input_ids.shape
    if mask is None:
        return input_ids.new_full((B, 1, 1), T - 1)
    return (mask * torch.arange(1, T + 1, device=mask.device)).argmax(1)[:, None, None]
