"""LoRA, low-rank adaptation (Hu et al. 2021, arXiv 2106.09685), of a pretrained GPT-2."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.adapters import chosen_layers, freeze_base
from modules.settings import UserError, check_settings, setting

FUSED = ("query", "key", "value")  # the three parts of `self_attention.qkv`, in order
TARGETS = (*FUSED, "attention_dense", "interm_dense", "out_dense")


@dataclass(frozen=True)
class LoRAConfig:
    """Which linear layers get an adapter, and how large; raises UserError for invalid values."""

    method: ClassVar[str] = "lora"
    rank: int = setting(8, "rows of A, columns of B", least=1)
    alpha: float = setting(16.0, "scales the adapter by alpha / rank", above=0)
    dropout: float = setting(0.1, "dropout on the adapter's input", least=0, below=1)
    targets: tuple[str, ...] = setting(
        TARGETS, f"layers that get an adapter: any of {', '.join(TARGETS)} [all]", choices=TARGETS
    )
    layers: tuple[int, ...] | None = setting(
        None, "transformer blocks that get adapters, counted from 0 [all]", least=0
    )

    def __post_init__(self):
        check_settings(self)


class LoRALinear(nn.Linear):
    """y = W x + b + (alpha/r) B A dropout(x); initially A [R,in] is random and B [out,R] is 0.

    A fused layer is several linear layers with the same input. `parts` says which of them are
    adapted; each of those has its own A and B, stacked row-wise in `lora_A` and `lora_B`.
    """

    def __init__(self, linear: nn.Linear, config: LoRAConfig, parts: tuple[bool, ...] = (True,)):
        if isinstance(linear, LoRALinear) and not linear.merged:
            raise UserError("the layer has a LoRA adapter already: merge it before adding another")
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scale, self.parts = config.alpha / config.rank, parts
        self.merged = False
        n, width = sum(parts), linear.out_features // len(parts)
        self.dropout = nn.Dropout(config.dropout)
        self.lora_A = nn.Parameter(self.weight.new_empty(n * config.rank, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(n * width, config.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.train(linear.training)
        self.register_state_dict_pre_hook(_refuse_if_merged)
        self.register_load_state_dict_pre_hook(_refuse_if_merged)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)  # W x + b
        if self.merged:
            return y
        z = F.linear(self.dropout(x), self.lora_A)  # A dropout(x), [...,nR]
        return y + self.scale * F.linear(z, self.block_B())

    def block_B(self) -> Tensor:
        """The block-diagonal B, [out,nR]; unadapted parts have rows of 0 and no columns."""
        if len(self.parts) == 1:
            return self.lora_B
        none = self.lora_B.new_zeros(self.out_features // len(self.parts), 0)
        own = iter(self.lora_B.chunk(sum(self.parts)))
        return torch.block_diag(*(next(own) if adapted else none for adapted in self.parts))

    def effective_weight(self) -> Tensor:
        """W + (alpha/r) B A, [out,in]."""
        return self.weight if self.merged else self._plus(self.scale)

    def _plus(self, scale: float) -> Tensor:
        """W + scale B A, in the dtype of A even under autocast."""
        W = self.weight.to(self.lora_A.dtype)
        with torch.autocast(W.device.type, enabled=False):
            return torch.addmm(W, self.block_B(), self.lora_A, alpha=scale)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter to the weight; `forward` then costs the same as the plain layer."""
        if not self.merged:
            self.weight.copy_(self.effective_weight())
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract the adapter from the weight again, exact to rounding in the weight's dtype."""
        if self.merged:
            self.weight.copy_(self._plus(-self.scale))
            self.merged = False


def _refuse_if_merged(layer: LoRALinear, *args: Any) -> None:
    """Raise UserError if a merged weight would be saved, or loaded, beside its adapter."""
    if layer.merged:
        raise UserError("LoRA is merged: unmerge it before saving or loading the state")


def add_lora(gpt: nn.Module, config: LoRAConfig) -> None:
    """Replace the target layers of a loaded GPT-2 with LoRA layers and freeze everything else."""
    if config.rank > gpt.config.n_embd:
        raise UserError(f"LoRA rank {config.rank} exceeds the model's width, {gpt.config.n_embd}")
    parts = tuple(name in config.targets for name in FUSED)
    for index in chosen_layers(config.layers, len(gpt.gpt_layers)):
        layer = gpt.gpt_layers[index]
        if any(parts):
            layer.self_attention.qkv = LoRALinear(layer.self_attention.qkv, config, parts)
        for name in config.targets:
            if name not in FUSED:
                setattr(layer, name, LoRALinear(getattr(layer, name), config))
    freeze_base(gpt)


def merge_lora(model: nn.Module) -> None:
    """Merge every adapter into its weight."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.unmerge()
