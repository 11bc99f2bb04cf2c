"""Adapter checkpoints: adapter tensors and plain values in one file that holds no code."""

import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.files import replacing
from finetune.runtime import Runtime
from models.pretrained import CheckpointError
from modules.adapters import AdapterError, adapter_state, load_adapter_state


def adapter_identity(task: str, model: str, config: Any) -> dict[str, Any]:
    """What has to be the same in the run that saves an adapter and in the one that reads it."""
    same = {"method": config.method, "task": task, "model": model} | asdict(config)
    del same["dropout"]
    return same


@dataclass(frozen=True)
class AdapterCheckpoint:
    """The file of a model's adapter; `about` has to be the same in who saves and who loads it."""

    path: Path
    model: nn.Module
    about: dict[str, Any]
    runtime: Runtime

    def save(self, record: dict[str, Any]) -> None:
        """Write the adapter with what it is about and `record`, plain values."""
        if self.runtime.is_main:
            with replacing(self.path) as temporary:
                saved = {"about": self.about | record, "adapter": adapter_state(self.model)}
                torch.save(saved, temporary)

    def load(self) -> dict[str, Any]:
        """Read the adapter into the model; returns what is saved about it.

        Raises CheckpointError, naming both sides, where it is of another run.
        """
        was, state = self.runtime.from_main(lambda: read_adapter(self.path))
        for key, value in self.about.items():
            if was.get(key) != value:
                raise CheckpointError(f"{self.path} has {key} {was.get(key)}, this run has {value}")
        try:
            load_adapter_state(self.model, state)
        except AdapterError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        return was


def read_adapter(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What an adapter's file says about it, and its tensors; raises CheckpointError."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return saved["about"], saved["adapter"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: train first, with the same flags") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no adapter checkpoint of this project") from error
