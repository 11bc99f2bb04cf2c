"""How much memory a training step takes, told before the first one."""

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.runtime import LESS_MEMORY, Runtime

Batch = dict[str, Tensor]


def describe_memory(
    model: nn.Module,
    loss_function: Callable[[nn.Module, Batch], Tensor],
    longest: Callable[[int], Batch],
    batch_size: int,
    runtime: Runtime,
) -> str:
    """`step_memory` in words, with advice where a GPU has less."""
    needed = step_memory(model, loss_function, longest, batch_size, runtime) / 1e9
    text = f"a training step takes up to about {needed:.1f} GB of memory"
    if runtime.device.type != "cuda":
        return text
    there = torch.cuda.get_device_properties(runtime.device).total_memory / 1e9
    text += f", the GPU has {there:.1f} GB"
    return text + (f"; should it run out: {LESS_MEMORY}" if needed > 0.9 * there else "")


def step_memory(
    model: nn.Module,
    loss_function: Callable[[nn.Module, Batch], Tensor],
    longest: Callable[[int], Batch],
    batch_size: int,
    runtime: Runtime,
) -> int:
    """Bytes that a training step takes on a batch of the longest rows: `longest(n)` gives n.

    Weights, AdamW's two moments, and what lives at the worst moment of a forward and backward
    pass, measured on one row and on two. Python and CUDA take some hundred megabytes besides.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    was_training = model.training
    model.train()
    devices = [runtime.device] if runtime.device.type == "cuda" else []
    peaks = []
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        for rows in range(1, 1 + min(2, batch_size)):
            batch = runtime.to_device(longest(rows))
            with LiveMemory(model.parameters()) as live:
                with runtime.autocast():
                    loss = loss_function(model, batch)
                loss.backward()
            peaks.append(live.peak)
            for parameter in trained:
                parameter.grad = None
            del loss
    model.train(was_training)
    constant = sum(p.nbytes for p in model.parameters()) + 2 * sum(p.nbytes for p in trained)
    return constant + peaks[0] + (batch_size - 1) * (peaks[-1] - peaks[0])


class LiveMemory(TorchDispatchMode):
    """Within, follows the memory of all tensors but those of `known`; `peak` is in bytes."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.known:
            self.known.add(storage)
            self._change(storage.nbytes())
            weakref.finalize(storage, self._change, -storage.nbytes())

    def _change(self, nbytes: int) -> None:
        self.now += nbytes
        self.peak = max(self.peak, self.now)
