"""What a run stands on: random seeds, device, precision, and how it ends on an error."""

import contextlib
import ctypes
import random
import re
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from datasets import DataError
from models.pretrained import CheckpointError
from modules.adapters import AdapterError, describe_parameters
from modules.linear import Linear

PRECISIONS = {  # name -> autocast type
    "fp32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class RunError(ValueError):
    """A run that cannot go on; the message is one sentence."""


@dataclass(frozen=True)
class Runtime:
    """The device of a run and the type its matrix products are computed in (None is float32)."""

    device: torch.device
    autocast_dtype: torch.dtype | None = None

    def autocast(self) -> contextlib.AbstractContextManager:
        """Context for forward passes; parameters stay float32."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def prepare(self, model: nn.Module, compile: bool) -> None:
        """Bring the model to the device, compile it if wanted, and say how large it is.

        The frozen matrices go to the autocast type once and for all, which changes no result:
        autocast would round them the same way in every forward.
        """
        for layer in model.modules():
            if self.autocast_dtype and isinstance(layer, Linear) and not layer.weight.requires_grad:
                for frozen in (layer.weight, layer.bias):
                    frozen.data = frozen.data.to(self.autocast_dtype)
        if self.device.type == "cpu":
            keep_freed_memory()
        model.to(self.device)
        if compile:
            model.compile(dynamic=True)
        print(f"{describe_parameters(model)}, on {self.device}")

    def to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch on the device, by a copy that a GPU does not wait for."""
        if self.device.type == "cpu":
            return batch
        pin = self.device.type == "cuda"
        return {
            name: (tensor.pin_memory() if pin else tensor).to(self.device, non_blocking=True)
            for name, tensor in batch.items()
        }

    def peak_memory_mb(self) -> float:
        """Most memory the run has held: the GPU's allocations, or the process's resident set."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        status = Path("/proc/self/status")  # Linux: its getrusage begins with the parent's memory
        peak = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.exists() else None
        if peak:
            return int(peak[1]) / 2**10
        unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, others KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks for the next step; no other C library is touched.

    It hands them back to the system, and getting them again page by page took a tenth of a
    training step and more.
    """
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)  # the most old ones take
        mallopt(trim_threshold, 2**31 - 1)


def make_runtime(use_gpu: bool, precision: str) -> Runtime:
    """Choose the device (CUDA, else Apple's MPS, where a GPU is asked for) and the precision."""
    if not use_gpu:
        device = torch.device("cpu")
    elif torch.cuda.is_available():
        device = torch.device("cuda")
    elif torch.backends.mps.is_available():
        device = torch.device("mps")
    else:
        raise RunError("--use_gpu: PyTorch finds neither a CUDA GPU nor Apple's MPS here")
    if precision == "auto":
        precision = "fp32"
        if device.type == "cuda":
            native_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            precision = "bf16" if native_bf16 else "fp16"
    if precision == "fp16" and device.type != "cuda":
        raise RunError(f"--precision fp16 needs a CUDA GPU, this run is on {device.type}")
    return Runtime(device, PRECISIONS[precision])


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators, those of every GPU included."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def run(main: Callable[[], None]) -> None:
    """Call a script's main; what a user can mend ends in one sentence and exit code 1."""
    try:
        main()
    except (AdapterError, CheckpointError, DataError, RunError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
