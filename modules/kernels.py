"""Faster implementations of the plain modules, swapped in by `accelerate(model)`."""

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modules.attention import CausalSelfAttention
from modules.byte_dropout import ByteDropout, drop, drop_gradient, native_dropout_works
from modules.lora import LoRALinear
from modules.lora_kernels import FastLoRALinear, cast_adapters_at_once, lora_matmul_works
from modules.next_token_loss import NextTokenLoss
from modules.onednn import (
    OneDNNMatmul,
    agrees,
    matmul,
    onednn_works,
    prepack,
    prepacked_linear,
    use_onednn,
)
from modules.padding import autocast_dtype

SWITCH = "GPT2_ACCELERATE"  # environment variable; 0 keeps the plain modules
LOSS_CHUNK = 128  # states whose logits are in memory at once
GPU_LOSS_CHUNK = 1024  # larger, as each kernel costs a launch; 200 MB of logits for gpt2


def accelerate(model: nn.Module) -> None:
    """Replace the modules of a finished model with faster ones that have the same parameters.

    On every device:
      LoRALinear           custom backward that stores less and fuses additions into matmuls; under
                           autocast, one cast of all A and B per forward of the model
      NextTokenLoss        logits for 128 states at a time (1024 on a GPU), with their gradient
                           computed in the forward
    On a CPU:
      nn.Dropout           masks cut from random 64-bit words; p, unless near 0 or 1, is rounded to
                           a multiple of 1/256
      CausalSelfAttention  custom backward under dropout; two small matmuls for a single query
      nn.Linear            oneDNN where MKL lacks code for the CPU; `prepacked` for decoding
      malloc               glibc keeps freed memory for the next step

    Code that uses private PyTorch operators, and LoRA's backward on a GPU, is first checked against
    the plain version. If an operator is missing or the results differ, a message is printed and the
    plain module stays. GPT2_ACCELERATE=0 in the environment keeps all modules plain.
    """
    if os.environ.get(SWITCH) == "0":
        return
    device = next(model.parameters()).device
    faster = {NextTokenLoss: ChunkedNextTokenLoss}
    if device.type == "cpu" or native_dropout_works(device) and lora_matmul_works(device):
        faster[LoRALinear] = FastLoRALinear
    if device.type == "cpu":
        keep_freed_memory()
        faster[nn.Dropout] = ByteDropout
        if onednn_works():
            faster[nn.Linear] = FastLinear
        if attention_backward_works():
            faster[CausalSelfAttention] = FastCausalSelfAttention
    if any(faster.get(type(module)) is FastLoRALinear for module in model.modules()):
        cast_adapters_at_once(model)
    for module in model.modules():
        module.__class__ = faster.get(type(module), type(module))


class FastLinear(nn.Linear):
    """W x + b with the faster of oneDNN and MKL."""

    prepacked: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.prepacked is not None and not torch.is_grad_enabled():
            return prepacked_linear(x, self.prepacked, self.bias)
        if use_onednn(x):
            return OneDNNMatmul.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


# Attention


class FastCausalSelfAttention(CausalSelfAttention):
    """Uses `cpu_attention` where PyTorch is slow on a CPU: under dropout and for a single query."""

    @staticmethod
    def scaled_dot_product_attention(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool
    ) -> Tensor:
        if not dropout_p and q.shape[2] > 1:
            return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal)
        with torch.autocast("cpu", enabled=False):
            return cpu_attention(q.float(), k.float(), v.float(), attn_mask, dropout_p, is_causal)


def cpu_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, p: float, is_causal: bool
) -> Tensor:
    """`F.scaled_dot_product_attention` for float32 q [B,H,T,D] and k, v [B,H,S,D]."""
    (B, H, T, _), S = q.shape, k.shape[2]
    if is_causal:
        bias = q.new_full((T, S), -torch.inf).triu_(1)
    elif bias is None:
        bias = q.new_zeros(1)
    else:
        bias = bias.float().expand(B, H, T, S).flatten(0, 1)
    return AttentionMatmul.apply(q, k, v, bias, p)


class AttentionMatmul(torch.autograd.Function):
    """dropout(softmax(q k^T / sqrt(D) + bias)) v.

    Saves the softmax and a byte mask; autograd would also save dropout's output.
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
    @once_differentiable
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


@cache
def attention_backward_works() -> bool:
    """True if the gradient of `cpu_attention`, which uses a private operator, is correct."""
    q = torch.arange(8.0).view(1, 1, 4, 2).requires_grad_()

    def gradient(attention: Callable[..., Tensor]) -> Tensor:
        with torch.enable_grad():
            y = attention(q, q.detach(), q.detach(), None, 0.0, True)
            return torch.autograd.grad(y.square().sum(), q)[0]

    plain = F.scaled_dot_product_attention
    return agrees("the custom attention", lambda: gradient(cpu_attention), lambda: gradient(plain))


class ChunkedNextTokenLoss(NextTokenLoss):
    """The same loss, computed in chunks of states if the LM head is frozen."""

    def forward(self, h: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None):
        if weight.requires_grad:
            return super().forward(h, weight, targets, bias)
        return _ChunkedLoss.apply(h, weight, targets, bias)


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradient of h in the forward, which takes no more matmuls than autograd."""

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
        total, gradients = 0.0, []
        chunk = LOSS_CHUNK if h.device.type == "cpu" else GPU_LOSS_CHUNK
        if in_tf32 := computes_in_tf32(h.device):
            # An offset common to all logits leaves the loss unchanged, so it need not be rounded.
            weight = weight - weight.mean(0)
        with torch.autocast(h.device.type, enabled=False), tf32(in_tf32):
            for h_part, target in zip(h.split(chunk), targets.split(chunk), strict=True):
                logits = matmul(h_part.float(), weight, bias)  # [chunk,V]
                log_z = logits.logsumexp(1, keepdim=True)
                total = total + (log_z - logits.gather(1, target[:, None])).sum()
                if ctx.needs_input_grad[0]:
                    p = logits.sub_(log_z).exp_()
                    p.scatter_add_(1, target[:, None], p.new_full((len(p), 1), -1.0))
                    gradients.append(matmul(p, weight.T))
        if gradients:
            ctx.save_for_backward(torch.cat(gradients).div_(len(h)))
            ctx.dtype = h.dtype
        return total / len(h)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        return (ctx.saved_tensors[0] * grad_output).to(ctx.dtype), None, None, None


def computes_in_tf32(device: torch.device) -> bool:
    """True on CUDA under autocast, when all other matmuls are computed in 16 bits."""
    return device.type == "cuda" and autocast_dtype(device) is not None


@contextlib.contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Let CUDA round the float32 inputs of matmuls to 10-bit mantissas, at several times the speed.

    Not enabled for the whole run because TF32 would spoil LoReFT's orthonormal rows.
    """
    matmuls = torch.backends.cuda.matmul
    before = matmuls.fp32_precision
    try:
        if enabled:
            matmuls.fp32_precision = "tf32"
        yield
    finally:
        matmuls.fp32_precision = before


# Decoding with prepacked weights


@contextlib.contextmanager
def prepacked(gpt: nn.Module, rows: int, dtype: torch.dtype) -> Iterator[None]:
    """Let an accelerated GPT-2 decode about `rows` rows with copies of its weights in `dtype`.

    LoRA is merged into the copies. On a CPU they use oneDNN's blocked layout and double the memory
    for weights; on CUDA the other weights already have that dtype. Other devices are unaffected.
    """
    device = gpt.word_embedding.weight.device.type
    works = device == "cuda" or (device == "cpu" and onednn_works())
    layers = [m for m in gpt.modules() if works and isinstance(m, FastLinear | FastLoRALinear)]
    try:
        for layer in layers:
            merged = layer.effective_weight() if isinstance(layer, LoRALinear) else layer.weight
            layer.prepacked = prepack(merged.to(dtype), rows)
        if layers or (device == "cuda" and os.environ.get(SWITCH) != "0"):
            gpt.hidden_state_to_token = _prepacked_head(gpt, rows, dtype)
        yield
    finally:
        for layer in layers:
            layer.prepacked = None
        gpt.__dict__.pop("hidden_state_to_token", None)  # restore the method


def _prepacked_head(gpt: nn.Module, rows: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The LM head as a function from states [B,C] to float32 logits [B,V].

    In 16 bits, the mean token embedding is first subtracted and its logit added back in float32:
    what all tokens share is not rounded, and the remainder is small, as is its rounding error.
    """
    weight, bias = gpt.word_embedding.weight.detach(), gpt.logit_bias
    used = weight if bias is None else weight[bias == 0]
    mean_row = None if dtype == torch.float32 else used.mean(0)
    head = prepack(weight if mean_row is None else (weight - mean_row).to(dtype), rows)

    def hidden_state_to_token(h: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            logits = prepacked_linear(h, head, gpt.logit_bias).float()
            return logits if mean_row is None else logits.add_((h.float() @ mean_row)[:, None])

    return hidden_state_to_token


def keep_freed_memory() -> None:
    """Make glibc keep large freed blocks for the next step; other C libraries are not affected.

    By default it returns them to the system, and faulting them back in page by page took a tenth
    of a training step or more.
    """
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD in malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)  # old versions' limit
        mallopt(trim_threshold, 2**31 - 1)
