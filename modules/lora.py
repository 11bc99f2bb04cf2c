"""LoRA, low-rank adaptation (Hu et al. 2021, arXiv 2106.09685), for a finished GPT-2."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from modules.adapters import AdapterError, chosen_layers, freeze_base
from modules.dropout import Dropout, drop, drop_gradient
from modules.linear import Linear, add_product, product

FUSED = ("query", "key", "value")  # the three parts of `self_attention.qkv`, in its order
TARGETS = (*FUSED, "attention_dense", "interm_dense", "out_dense")


@dataclass(frozen=True)
class LoRAConfig:
    """Which linear layers get an adapter, and its rank, scale alpha/rank and dropout."""

    method: ClassVar[str] = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.1
    targets: tuple[str, ...] = TARGETS
    layers: tuple[int, ...] | None = None  # None is every layer

    def __post_init__(self):
        unknown = sorted(set(self.targets) - set(TARGETS))
        if unknown or not self.targets:
            raise AdapterError(f"LoRA targets {unknown}: allowed are {', '.join(TARGETS)}")
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise AdapterError(
                f"LoRA rank {self.rank} has to be 1 or more, dropout {self.dropout} in [0, 1)"
            )


class LoRALinear(Linear):
    """y = W x + b + (alpha/r) B A dropout(x), with A [R,in] random and B [out,R] zero at first.

    A fused layer is several linear layers with one input. `parts` says which of them are adapted;
    each has its own A and B, kept one below the other in `lora_A` and `lora_B`.
    """

    def __init__(self, linear: nn.Linear, config: LoRAConfig, parts: tuple[bool, ...] = (True,)):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.rank, self.scale, self.parts = config.rank, config.alpha / config.rank, parts
        self.merged = False
        n, width = sum(parts), linear.out_features // len(parts)
        self.dropout = Dropout(config.dropout)
        self.lora_A = nn.Parameter(self.weight.new_empty(n * config.rank, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(n * width, config.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged or self.packed is not None:
            return super().forward(x)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        tensors = (x, self.weight, self.bias, self.lora_A, self.block_B())
        x, W, b, A, B = (tensor.to(dtype) for tensor in tensors)
        p = self.dropout.p if self.training else 0.0
        y = LoRAProduct.apply(x.flatten(0, -2), W, b, A, B, self.scale, p)
        return y.view(*x.shape[:-1], -1)

    def block_B(self) -> Tensor:
        """[out,nR]: each part's B in its own rows and columns, none for a part without one."""
        if len(self.parts) == 1:
            return self.lora_B
        none = self.lora_B.new_zeros(self.out_features // len(self.parts), 0)
        own = iter(self.lora_B.chunk(sum(self.parts)))
        return torch.block_diag(*(next(own) if adapted else none for adapted in self.parts))

    def effective_weight(self) -> Tensor:
        """W + (alpha/r) B A."""
        if self.merged:
            return self.weight
        W = self.weight.to(self.lora_A.dtype)
        return torch.addmm(W, self.block_B(), self.lora_A, alpha=self.scale)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter to the weight; `forward` then costs what the plain layer costs."""
        if not self.merged:
            self.weight.copy_(self.effective_weight())
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the adapter out of the weight again, exact to rounding in the weight's type."""
        if self.merged:
            W = self.weight.to(self.lora_A.dtype)
            self.weight.copy_(W.addmm(self.block_B(), self.lora_A, alpha=-self.scale))
            self.merged = False


class LoRAProduct(torch.autograd.Function):
    """W x + b + scale B A dropout(x) of x [N,in], with the gradients of x, A and B.

    Keeps of x what dropout left, a mask of bytes and A dropout(x). One product adds to the other:
    where BLAS does it, the sum is no pass of its own over the memory.
    """

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, scale: float, p: float):
        dropped, mask, left = drop(x, p) if p else (x, None, 1.0)
        z = product(dropped, A)  # [N,nR]
        ctx.scale, ctx.p = scale * left, p
        ctx.save_for_backward(dropped, mask, z, W, A, B)
        return add_product(product(x, W, b), z * ctx.scale, B)

    @staticmethod
    def backward(ctx, grad: Tensor):
        dropped, mask, z, W, A, B = ctx.saved_tensors
        grad_z = product(grad, B.T) * ctx.scale
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = product(grad_z, A.T)
            if ctx.p:
                grad_x = drop_gradient(grad_x, mask, ctx.p)
            add_product(grad_x, grad, W.T)
        grad_A, grad_B = product(grad_z.T, dropped.T), product(z.T, grad.T).T * ctx.scale
        return grad_x, None, None, grad_A, grad_B, None, None


def add_lora(gpt: nn.Module, config: LoRAConfig) -> None:
    """Swap the target layers of a loaded GPT-2 for LoRA ones and freeze all other weights."""
    if config.rank > gpt.config.n_embd:
        raise AdapterError(
            f"LoRA rank {config.rank} is more than the model's width, {gpt.config.n_embd}"
        )
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
