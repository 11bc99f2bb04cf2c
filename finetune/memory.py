"""How much memory a training step takes, told before the first one."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from finetune.runtime import LESS_MEMORY, Runtime
from models.gpt2 import GPT2Model

Batch = dict[str, Tensor]


def describe_memory(
    model: nn.Module,
    loss_function: Callable[[nn.Module, Batch], Tensor],
    longest: Batch,
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
    longest: Batch,
    batch_size: int,
    runtime: Runtime,
) -> int:
    """Bytes that a training step on `batch_size` rows as long as the one given takes, about.

    Weights, gradients and AdamW's two moments of what is trained, what a forward pass of that row
    keeps for the backward, times the rows, and once more what a block keeps, for the work in it.
    Python and CUDA themselves take half a gigabyte besides.
    """
    gpt = next(module for module in model.modules() if isinstance(module, GPT2Model))
    parameters = list(model.parameters())
    trained = sum(p.nbytes for p in parameters if p.requires_grad)
    row = runtime.to_device(longest)

    def kept() -> int:
        with runtime.autocast():
            return kept_for_backward(lambda: loss_function(model, row), parameters)

    was_training, again = model.training, gpt.gradient_checkpointing
    model.train()
    devices = [runtime.device] if runtime.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        gpt.gradient_checkpointing = False
        all_blocks = kept()
        gpt.gradient_checkpointing = again
        in_step = kept() if again else all_blocks
    model.train(was_training)
    working = all_blocks // len(gpt.gpt_layers)
    return sum(p.nbytes for p in parameters) + 3 * trained + batch_size * (in_step + working)


def kept_for_backward(compute: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Bytes of the tensors that `compute` leaves for a backward pass, the parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        graph = compute()  # held until here, so that no address is given out twice
    del graph
    return sum(kept.values())
