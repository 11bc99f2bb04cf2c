"""Where and how a run computes: device, precision, ranks and random generators."""

import contextlib
import os
import random
import re
import resource
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from modules.adapters import count_parameters
from modules.kernels import accelerate
from modules.settings import UserError, check_settings, setting

Item = TypeVar("Item")
PRECISIONS = {  # name -> autocast dtype
    "fp32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
MEMORY_ADVICE = (
    "lower --batch_size and raise --grad_accum by the same factor, add --gradient_checkpointing, "
    "or use a smaller --model_size"
)
STABILITY_ADVICE = "try a lower --lr, --grad_clip 1 or --precision fp32"


@dataclass(frozen=True)
class RuntimeConfig:
    """Where and how to compute. Only `precision` identifies a run; the rest may redraw dropout."""

    use_gpu: bool = setting(False, "use CUDA, or else Apple's MPS")
    precision: str = setting(
        "auto",
        "fp32, bf16, fp16 or auto: bf16, but fp16 on GPUs without bf16 and fp32 on a CPU or MPS",
        choices=("auto", *PRECISIONS),
    )
    compile: bool = setting(False, "use torch.compile, which takes a minute or two to start")
    gradient_checkpointing: bool = setting(
        False, "recompute blocks in the backward pass: less memory, more time"
    )
    deterministic: bool = setting(
        False, "bitwise reproducible runs on one CUDA GPU: slower, untested"
    )
    no_graphs: bool = setting(False, "on CUDA, launch kernels one by one, without CUDA graphs")

    def __post_init__(self):
        check_settings(self)


@dataclass(frozen=True)
class Runtime:
    """Device, autocast dtype (None for float32) and rank. Only rank 0 prints and writes."""

    device: torch.device
    autocast_dtype: torch.dtype | None = None
    rank: int = 0
    world_size: int = 1
    config: RuntimeConfig = RuntimeConfig()

    @property
    def device_name(self) -> str:
        """The device's human-readable name."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return self.device.type

    @property
    def decodes_in_fixed_shapes(self) -> bool:
        """True if decoding launches the same kernels for each token; they are not deterministic."""
        return self.device.type == "cuda" and not self.config.deterministic

    @property
    def decodes_with_graphs(self) -> bool:
        """True if these kernels are launched as a CUDA graph."""
        return self.decodes_in_fixed_shapes and not self.config.no_graphs

    @property
    def trains_with_graphs(self) -> bool:
        """True if small training steps are CUDA graphs, which cannot wait for other ranks."""
        config = self.config
        has_one_way = self.world_size == 1 and not (config.compile or config.gradient_checkpointing)
        return self.decodes_with_graphs and has_one_way

    @property
    def is_main(self) -> bool:
        """True for rank 0."""
        return self.rank == 0

    def shard(self, items: Sequence[Item]) -> Sequence[Item]:
        """This rank's shard of the items: every `world_size`-th one."""
        return items[self.rank :: self.world_size]

    def gather(self, own: Sequence[Item]) -> list[Item]:
        """All ranks' results for their shards, in the original order of the items."""
        if self.world_size == 1:
            return list(own)
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, list(own))
        merged: list[Any] = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            merged[rank :: self.world_size] = part
        return merged

    def from_main(self, make: Callable[[], Item]) -> Item:
        """Call `make` on rank 0 and return its result on all ranks."""
        made = [make() if self.is_main else None]
        if self.world_size > 1:
            dist.broadcast_object_list(made)
        return made[0]

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model to train, wrapped to average gradients if there are several ranks.

        From here on, each rank draws its own dropout masks.
        """
        if self.world_size == 1:
            return model
        torch.manual_seed(torch.initial_seed() + self.rank)
        return DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )

    def autocast(self) -> contextlib.AbstractContextManager:
        """Context for forward passes; parameters stay float32."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def prepare(self, model: nn.Module) -> None:
        """Move a finished model to the device, and compile or accelerate it.

        Raises UserError if torch.compile would not find a compiler.
        """
        compilers = (os.environ.get("CXX", "g++"), "clang++")
        if self.config.compile and not any(map(shutil.which, compilers)):
            raise UserError(
                "--compile needs a C++ compiler, but there is neither g++ nor clang++: install "
                "one, or leave out the flag"
            )
        if self.autocast_dtype:
            round_frozen_matrices(model, self.autocast_dtype)
        model.to(self.device)
        if self.config.gradient_checkpointing:
            model.gpt.gradient_checkpointing = True
        if self.config.compile:
            model.compile(dynamic=True)
        else:
            accelerate(model)
        trained, total = count_parameters(model)
        print(f"{total:,} parameters, {trained:,} of them trainable, on {self.device}")
        if self.world_size > 1:
            print(f"{self.world_size} processes, each with batches of --batch_size")

    def to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy the batch to the device, asynchronously for a GPU."""
        if self.device.type == "cpu":
            return batch
        pin = self.device.type == "cuda"
        return {
            name: (tensor.pin_memory() if pin else tensor).to(self.device, non_blocking=True)
            for name, tensor in batch.items()
        }

    def usable_memory_mb(self) -> float:
        """Memory of the CUDA GPU that is free or reserved by this process."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return (free + torch.cuda.memory_reserved(self.device)) / 2**20

    def peak_memory_mb(self) -> float:
        """Peak memory of the run: CUDA allocations, or else the process's resident set."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        status = Path("/proc/self/status")  # Linux, where getrusage starts from the parent's memory
        peak = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.exists() else None
        if peak:
            return int(peak[1]) / 2**10
        unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS reports bytes, others KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class DelayedMax:
    """Lets all ranks stop for a signal at the same step.

    Called with a number at each step, returns the largest of all ranks at the step before, so that
    the all-reduce overlaps the step. With a single rank, returns the number itself.
    """

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.numbers = torch.zeros(1, dtype=torch.long)
        self.reduction: dist.Work | None = None

    def __call__(self, number: int) -> int:
        if self.runtime.world_size == 1:
            return number
        if self.reduction:
            self.reduction.wait()
        largest = int(self.numbers)
        self.numbers = torch.tensor([number])  # on the CPU, so that gloo reduces it
        self.reduction = dist.all_reduce(self.numbers, dist.ReduceOp.MAX, async_op=True)
        return largest


def round_frozen_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast frozen linear layers once; autocast would round them the same way in every forward."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.requires_grad:
            for frozen in (layer.weight, layer.bias):
                frozen.data = frozen.data.to(dtype)


def start(config: RuntimeConfig, seed: int) -> Runtime:
    """Choose device (with `use_gpu`, CUDA or else Apple's MPS) and precision, and seed everything.

    Under torchrun, joins the other ranks, each on its own GPU or all on the CPU.
    Raises UserError if this machine does not have what `config` asks for.
    """
    rank, world_size, local_rank = torchrun_ranks()
    device, precision = _find_device(config.use_gpu, world_size, local_rank), config.precision
    if device.type == "cuda":
        _choose_kernels(config.deterministic)
    elif device.type == "mps" and config.deterministic:
        raise UserError("--deterministic: PyTorch supports this only on CUDA, not on MPS")
    if precision == "auto":
        precision = "fp32"
        if device.type == "cuda":
            native_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            precision = "bf16" if native_bf16 else "fp16"
    if precision == "fp16" and device.type != "cuda":
        raise UserError(f"--precision fp16 needs a CUDA GPU, but this run is on {device.type}")
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    seed_everything(seed)
    return Runtime(device, PRECISIONS[precision], rank, world_size, config)


def _find_device(use_gpu: bool, world_size: int, local_rank: int) -> torch.device:
    if not use_gpu:
        return torch.device("cpu")
    if torch.cuda.is_available():
        n_gpus = torch.cuda.device_count()
        if local_rank >= n_gpus:
            raise UserError(f"--nproc_per_node is more than the {n_gpus} GPUs of this machine")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    if torch.backends.mps.is_available() and world_size == 1:
        return torch.device("mps")
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        raise UserError(
            "--use_gpu: there is an NVIDIA driver, but it is too old for this PyTorch's CUDA "
            f"{torch.version.cuda}, or PyTorch is a CPU-only build: update the driver, or install "
            f"torch=={torch.__version__.partition('+')[0]} for an older CUDA (pytorch.org shows "
            "the command)"
        )
    raise UserError(
        "--use_gpu: PyTorch finds neither a CUDA GPU nor Apple's MPS: leave it out to use the CPU"
    )


def _choose_kernels(deterministic: bool) -> None:
    # cuDNN attention would build a plan for every new shape, and here each batch has its own.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # as cuBLAS documents
        # With warn_only, attention's backward would still accumulate in any order.
        torch.use_deterministic_algorithms(True)


def torchrun_ranks() -> tuple[int, int, int]:
    """Rank, world size and local rank, as set by torchrun; 0, 1, 0 without it."""
    if not dist.is_torchelastic_launched():
        return 0, 1, 0
    return tuple(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators, including those of all GPUs."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of all generators of this process, as plain values and tensors."""
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    state = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}
    if device.type != "cpu":  # CUDA, MPS
        state["device"] = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore all generators to a state returned by `random_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"])
