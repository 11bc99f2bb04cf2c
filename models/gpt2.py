"""GPT-2 (Radford et al. 2019): the transformer without a task head."""

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.config import GPT2Config
from models.pretrained import find_checkpoint, load_config, load_weights
from modules.gpt2_layer import GPT2Layer
from modules.kv_cache import KVCache
from modules.padding import TokenLayout
from modules.reft import Positions


class GPT2Model(nn.Module):
    """Token and position embeddings, a stack of `GPT2Layer`, a final layer norm, a tied LM head."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.word_embedding = _embedding(config.vocab_size, config.n_embd)
        self.pos_embedding = _embedding(config.n_positions, config.n_embd)
        self.embed_dropout = nn.Dropout(config.embd_pdrop)
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
        self.intervention_positions: Positions | None = None  # ReFT's; None: all
        self.gradient_checkpointing = False  # recompute blocks in the backward to save memory
        self.register_buffer("logit_bias", None, persistent=False)  # [V], see suppress_tokens
        if not self.word_embedding.weight.is_meta:
            self._init_weights()

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path) -> "GPT2Model":
        """Load a size in SIZES or a checkpoint folder, in float32.

        Raises UserError if it is not found or cannot be used.
        """
        folder = find_checkpoint(name_or_folder)
        with torch.device("meta"):
            model = cls(load_config(folder))
        load_weights(model, folder)
        return model

    def _init_weights(self) -> None:
        """GPT-2's initialization: std 0.02, scaled down in projections to the residual stream."""
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
        token_index: Tensor | None = None,
        cache: KVCache | None = None,
        prompt_lengths: Tensor | None = None,
        last_only: bool = False,
    ) -> dict[str, Tensor]:
        """Returns `last_hidden_state` [B,T,C], `last_token` [B,C], the state at each row's last
        token, and `token_states` [N,C], of all tokens row by row, then of `token_index`'s padding.
        With `last_only`, only `last_token`.

        `attention_mask` [B,T] is 1 where `input_ids` [B,T] holds a token; `token_index` is as in
        `TokenLayout.of`. With a `cache`, the tokens follow the cached ones. For ReFT, the prompt
        is the first `prompt_lengths` [B] tokens of each row, by default all tokens given.
        """
        layout = self._layout(input_ids, attention_mask, token_index, cache)
        h = self.word_embedding(layout.tokens_of(input_ids)) + self.pos_embedding(layout.position)
        h = self.embed_dropout(h)  # [N,C]
        intervened = self._intervention_mask(layout, cache, prompt_lengths)
        bias = None  # None: causal attention within each row
        if cache and cache.longest:
            bias = layout.attention_bias(cache.n_slots(layout.shape[1]))
        for i, layer in enumerate(self.gpt_layers):
            # With a single token per row, as in decoding, there is nothing to skip.
            is_last = last_only and i + 1 == len(self.gpt_layers) and layout.shape[1] > 1
            if is_last:
                bias = layout.last_attention_bias(bias)
            layer_cache = cache and cache.layers[i]
            h = self._run_layer(layer, h, layout, bias, layer_cache, intervened, is_last)
        h = self.final_layer_norm(h)
        if cache:
            cache.advance(layout)
        if last_only:
            return {"last_token": h}
        rows, last = layout.to_input_shape(h), h.index_select(0, layout.last)
        return {"last_hidden_state": rows, "last_token": last, "token_states": h}

    def _layout(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_index: Tensor | None,
        cache: KVCache | None,
    ) -> TokenLayout:
        """Where the tokens are; raises ValueError if they exceed the model's positions."""
        n, limit = input_ids.shape[1] + (cache.longest if cache else 0), self.config.n_positions
        if n > limit:
            raise ValueError(f"{n} tokens given, but the model has {limit} positions")
        cached = cache.lengths if cache else None
        return TokenLayout.of(input_ids, attention_mask, token_index, cached)

    def _run_layer(self, layer: nn.Module, *inputs) -> Tensor:
        """Run a layer, which gradient checkpointing recomputes in the backward."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def _intervention_mask(
        self, layout: TokenLayout, cache: KVCache | None, prompt_lengths: Tensor | None
    ) -> Tensor | None:
        """Where ReFT intervenes, bool [N,1]; None means everywhere."""
        if self.intervention_positions is None:
            return None
        if prompt_lengths is None and cache and cache.longest:
            raise ValueError("ReFT at prompt positions needs prompt_lengths when a cache is used")
        lengths = layout.lengths if prompt_lengths is None else prompt_lengths
        return self.intervention_positions.of(layout.position, lengths[layout.row])

    def suppress_tokens(self, ids: Iterable[int]) -> None:
        """Set the logits of exactly these ids to -inf; used for embedding rows without a token."""
        self.logit_bias = None
        if ids := list(ids):
            self.logit_bias = self.word_embedding.weight.new_zeros(self.config.vocab_size)
            self.logit_bias[ids] = -torch.inf

    def hidden_state_to_token(self, h: Tensor) -> Tensor:
        """The tied LM head: float32 logits [..., V] for states [..., C].

        In float32 even under autocast: near -100, say, bfloat16 logits are half a nat apart.
        """
        with torch.autocast(h.device.type, enabled=False):
            return F.linear(h.float(), self.word_embedding.weight, self.logit_bias)


def _embedding(rows: int, width: int) -> nn.Embedding:
    # On the meta device, nn.Embedding's own initialization imports 800 modules, taking seconds.
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)
