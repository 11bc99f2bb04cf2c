"""Fake CUDA tensors, for machines without a GPU: shapes, dtypes and devices, but no values."""

import contextlib
import importlib.util
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modules import kernels
from modules.attention import CausalSelfAttention

CUDA = torch.device("cuda", 0)
NO_KERNEL = (
    *("aten.detach", "aten.empty", "aten.new_empty", "aten._unsafe_view", "aten.lift_fresh"),
    *("prim.", "profiler."),
)


def build_stub(compiler: str, folder: Path) -> Path:
    """Compile cuda_stub.cpp, which a process must load before it imports PyTorch.

    Only a PyTorch without CUDA needs it; with CUDA, FakeTensorMode replaces PyTorch's own guard.
    """
    root = Path(importlib.util.find_spec("torch").origin).parent
    source, library = Path(__file__).with_name("cuda_stub.cpp"), folder / "cuda_stub.so"
    command = [compiler, "-std=c++20", "-shared", "-fPIC", source, "-o", library]
    command += [f"-I{root}/include", f"-L{root}/lib", f"-Wl,-rpath,{root}/lib"]
    subprocess.run([*command, "-lc10", "-ltorch_cpu"], check=True)
    return library


class Kernels(TorchDispatchMode):
    """Counts kernels launched on the device, and records copies to and from the host.

    One kernel here may be several on a GPU, for example in a `cat` of many tensors.
    """

    def __init__(self):
        super().__init__()
        self.launched = 0
        self.copied_to_host: set[str] = set()
        self.copied_from_host: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        inputs, outputs = (_devices(tree) for tree in ((args, kwargs), out))
        has_host_input = "cpu" in _devices((args, kwargs), least_dim=1)  # scalars are not copied
        if "cuda" in inputs and "cpu" in outputs:
            self.copied_to_host.add(f"{func} copies to the host")
        if "cuda" in outputs and has_host_input:
            self.copied_from_host.add(f"{func} copies from the host")
        is_idle = str(func) == "aten.dropout.default" and not args[2]  # as in evaluation
        if "cuda" in inputs | outputs and not (func.is_view or is_idle):
            self.launched += not str(func).startswith(NO_KERNEL)
        return out


def _devices(tree: object, least_dim: int = 0) -> set[str]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return {tensor.device.type for tensor in tensors if tensor.ndim >= least_dim}


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Makes device cuda work for fake tensors; mixing devices or reading a value raises."""
    with contextlib.ExitStack() as stack:

        def patch(owner: object, name: str, value: object) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        patch(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        patch(torch.Tensor, "pin_memory", lambda self: self)
        patch(nn.Module, "to", _buffers_to)
        for check in ("native_dropout_works", "lora_matmul_works"):  # they compare values
            patch(kernels, check, lambda device: True)
        patch(F, "scaled_dot_product_attention", _attention)
        patch(CausalSelfAttention, "scaled_dot_product_attention", staticmethod(_attention))
        yield stack.enter_context(FakeTensorMode())


def _buffers_to(model: nn.Module, device: torch.device, dtype: object = None) -> nn.Module:
    """Replaces `Module.to`, which cannot move fake parameters; these must be on the device."""
    for module in model.modules():
        assert {p.device.type for p in module.parameters(recurse=False)} <= {device.type}
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **rest: object,
) -> Tensor:
    """The kernels PyTorch would choose on a GPU; its own choice depends on the GPU it finds."""
    if attn_mask is None and query.dtype != torch.float32:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
        assert attn_mask.dtype == query.dtype
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, True, dropout_p, is_causal)[0]
