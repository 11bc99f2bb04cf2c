"""Adapter and resume files, which hold tensors and plain values but no code."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.files import write_files
from finetune.runtime import STABILITY_ADVICE, Runtime
from models.config import first_line
from models.pretrained import read_plain
from modules.adapters import adapter_state, load_adapter_state
from modules.settings import UserError


def save_adapter(path: Path, model: nn.Module, about: dict[str, Any]) -> None:
    """Save a model's adapter, with plain values that describe it."""
    write_files({path: _serialized({"about": about, "adapter": finite_adapter(model)})})


def load_adapter(
    path: Path, model: nn.Module, expected: dict[str, Any], runtime: Runtime
) -> dict[str, Any]:
    """Load an adapter into a model; returns the values saved with it.

    Raises UserError if they do not match those in `expected`.
    """
    about, state = runtime.from_main(lambda: read_adapter(path))
    for key, value in expected.items():
        if about.get(key) != value:
            raise UserError(f"{path} has {key} {about.get(key)}, but this run has {value}")
    try:
        load_adapter_state(model, state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return about


def read_adapter(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter file's descriptive values and its tensors; raises UserError if it is invalid."""
    saved = read_plain(path)
    saved = saved if isinstance(saved, dict) else {}
    about, state = saved.get("about"), saved.get("adapter")
    if not (isinstance(about, dict) and isinstance(state, dict)):
        raise UserError(f"{path} is not an adapter checkpoint of this project")
    for name, tensor in state.items():
        if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
            raise UserError(f"{path}: {name} is not a tensor of numbers")
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} has values that are not finite")
    return about, state


def finite_adapter(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors; raises UserError if any value is not finite."""
    state = adapter_state(model)
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(f"{name} has values that are no longer finite: {STABILITY_ADVICE}")
    return state


@dataclass(frozen=True)
class ResumeFile:
    """The file with an unfinished run's state; `state` is what `open` read from it."""

    path: Path
    conditions: dict[str, str]  # must match for the run to end as if it had never been stopped
    runtime: Runtime
    state: dict[str, Any] | None = None

    @classmethod
    def open(
        cls, path: Path, conditions: dict[str, str], wanted: bool, runtime: Runtime
    ) -> "ResumeFile":
        """Read the file if it exists and is `wanted`.

        Raises UserError if it exists and is not wanted, or was saved under different conditions.
        """
        found = runtime.from_main(path.exists)
        if found and not wanted:
            raise UserError(
                f"{path.parent} is an unfinished run of this command: --resume resumes it, "
                "--overwrite starts it over"
            )
        if wanted and not found:
            print(f"{path} does not exist: nothing to resume, starting this run from scratch")
        state = runtime.from_main(lambda: _read_state(path, conditions)) if found else None
        return cls(path, conditions, runtime, state)

    def restore(self, load: Callable[[dict[str, Any]], None]) -> None:
        """Call `load` with the state; raises UserError if that fails."""
        try:
            load(self.state)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{self.path} is damaged ({first_line(error)}): --overwrite starts the run over"
            ) from error

    def save(self, state: dict[str, Any]) -> None:
        """Save the state, which is the same on all ranks."""
        if self.runtime.is_main:
            content = {"conditions": self.conditions, "state": state}
            write_files({self.path: _serialized(content)})

    def remove(self) -> None:
        """Delete the file of a finished run."""
        self.path.unlink(missing_ok=True)


def _read_state(path: Path, conditions: dict[str, str]) -> dict[str, Any]:
    saved = read_plain(path)
    if not (isinstance(saved, dict) and saved.keys() == {"conditions", "state"}):
        raise UserError(f"{path} is not a resume file of this project")
    for name, value in conditions.items():
        before = saved["conditions"].get(name) if isinstance(saved["conditions"], dict) else None
        if before != value:
            raise UserError(
                f"{path} was saved when {name} was {before}, but now it is {value}: use the same "
                "value, or start over with --overwrite"
            )
    return saved["state"]


def _serialized(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
