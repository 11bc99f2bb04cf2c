"""Adapter checkpoints: adapter tensors and plain values in one file that holds no code."""

import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.files import replacing
from models.pretrained import CheckpointError
from modules.adapters import AdapterError, adapter_state, load_adapter_state


def adapter_identity(method: str, task: str, model: str, config: Any) -> dict[str, Any]:
    """What has to be the same in the run that saves an adapter and in the one that reads it."""
    same = {"method": method, "task": task, "model": model} | asdict(config)
    del same["dropout"]
    return same


def save_adapter(path: Path, model: nn.Module, about: dict[str, Any]) -> None:
    """Write the model's adapter and `about`, plain values that tell where it comes from."""
    with replacing(path) as temporary:
        torch.save({"about": about, "adapter": adapter_state(model)}, temporary)


def load_adapter(path: Path, model: nn.Module, about: dict[str, Any]) -> dict[str, Any]:
    """Read an adapter into a model that has its layers already; returns what is saved about it.

    Every value of `about` has to be as it was saved. Raises CheckpointError, naming both sides.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        was, state = saved["about"], saved["adapter"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: train first, with the same flags") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no adapter checkpoint of this project") from error
    for key, value in about.items():
        if was.get(key) != value:
            raise CheckpointError(f"{path} has {key} {was.get(key)}, this run has {value}")
    try:
        load_adapter_state(model, state)
    except AdapterError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return was
