"""Matmuls x W^T + b with oneDNN, which ships with PyTorch, where it beats MKL on a CPU."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# N * in * out of the smallest matmul worth the 0.6 MB of code that oneDNN keeps for its shape.
MIN_SIZE = 5_000_000


def matmul(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """x W^T + b with the faster library; large float32 matmuls on a CPU may go to oneDNN.

    oneDNN is fast only if W or its transpose is contiguous. With gaps, as in a slice of a fused
    layer's gradient, it takes a thousand times as long.
    """
    is_dense = W.is_contiguous() or W.T.is_contiguous()
    if use_onednn(x) and is_dense and x.numel() * len(W) >= MIN_SIZE:
        return torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")
    return F.linear(x, W, b)


def add_matmul(y: Tensor, x: Tensor, W: Tensor) -> Tensor:
    """Add x W^T to y in place; all three are matrices."""
    if use_onednn(x) and y.numel() * x.shape[1] >= MIN_SIZE:
        return y.add_(matmul(x, W))
    return y.addmm_(x, W.T)


def use_onednn(x: Tensor) -> bool:
    """True if large matmuls with this x are faster in oneDNN than in MKL, which F.linear uses."""
    plain_float32 = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return x.device.type == "cpu" and plain_float32 and prefer_onednn()


@cache
def prefer_onednn() -> bool:
    """True on AMD CPUs with AVX-512, which oneDNN uses on every CPU but MKL only on Intel's.

    On two cores of an AMD EPYC (Zen 5), float32 runs at 450 GFLOP/s in oneDNN and 200 in MKL.
    """
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    is_amd = "AMD" in torch.cpu.get_capabilities().get("cpu_name", "")
    return has_avx512 and is_amd and onednn_works()


@cache
def onednn_works() -> bool:
    """True if oneDNN is available, the CPU has AVX and the results are correct."""
    has_vectors = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    if not (has_vectors and torch.backends.mkldnn.is_available()):
        return False
    x, W, b = torch.ones(3, 32), torch.arange(64.0).view(2, 32) / 64, torch.ones(2)

    def by_onednn() -> Tensor:
        outputs = [torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")]
        outputs.append(prepacked_linear(x, prepack(W, rows=3), b))
        return torch.stack(outputs)

    return agrees("oneDNN's matmuls", by_onednn, lambda: F.linear(x, W, b).expand(2, 3, 2))


class OneDNNMatmul(torch.autograd.Function):
    """x W^T + b for x [...,in], with gradients for x, W and b."""

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, W)
        return matmul(x, W, b)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (x, W), (needs_x, needs_W, needs_b) = ctx.saved_tensors, ctx.needs_input_grad
        rows = grad.flatten(0, -2)  # [N,out]
        grad_x = matmul(grad, W.T) if needs_x else None
        grad_W = matmul(rows.T, x.flatten(0, -2).T) if needs_W else None
        return grad_x, grad_W, rows.sum(0) if needs_b else None


def prepack(weight: Tensor, rows: int) -> Tensor:
    """A copy of a weight in oneDNN's blocked layout, for matmuls with about `rows` rows.

    On two AVX-512 cores, twelve rows through all of gpt2's matrices, LM head included, take 35 ms
    this way and 77 ms with F.linear. On a GPU, returns the weight itself.
    """
    if weight.device.type != "cpu":
        return weight.detach()
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)


def prepacked_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b with a prepacked W, in its dtype."""
    x, bias = x.to(weight.dtype), bias if bias is None else bias.to(weight.dtype)
    if weight.device.type != "cpu":
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def agrees(what: str, fast: Callable[[], Tensor], plain: Callable[[], Tensor]) -> bool:
    """True if a private operator matches the plain computation; otherwise prints a message."""
    try:
        if torch.allclose(fast(), plain(), atol=1e-4):
            return True
        reason = "the results differ"
    except (AttributeError, RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
    print(f"running without {what}, which failed a check on PyTorch {torch.__version__} ({reason})")
    return False
