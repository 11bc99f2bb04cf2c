"""The files of a run's adapter and of its state: tensors and plain values, no code."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.files import replacing
from finetune.runtime import STEADIER, Runtime
from models.pretrained import first_line, read_plain
from modules.adapters import adapter_state, load_adapter_state
from modules.settings import UserError


@dataclass(frozen=True)
class AdapterCheckpoint:
    """The file of a model's adapter; `about` must match between the saving and the loading run."""

    path: Path
    model: nn.Module
    about: dict[str, Any]
    runtime: Runtime

    def save(self, record: dict[str, Any]) -> None:
        """Write the adapter with `about` and `record`, plain values."""
        if self.runtime.is_main:
            _write(self.path, {"about": self.about | record, "adapter": finite_adapter(self.model)})

    def load(self) -> dict[str, Any]:
        """Read the adapter into the model; returns what is saved about it.

        Raises UserError, naming both sides, for the adapter of another run.
        """
        saved_about, state = self.runtime.from_main(lambda: read_adapter(self.path))
        for key, value in self.about.items():
            if saved_about.get(key) != value:
                raise UserError(
                    f"{self.path} has {key} {saved_about.get(key)}, this run has {value}"
                )
        try:
            load_adapter_state(self.model, state)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error
        return saved_about


def read_adapter(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What an adapter's file says about it, and its tensors; raises UserError."""
    if not path.exists():
        raise UserError(f"{path} does not exist: train first, with the same flags")
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
    """The adapter's tensors; raises UserError if one has a value that is not finite."""
    state = adapter_state(model)
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(f"{name} has values that are no longer finite: {STEADIER}")
    return state


@dataclass(frozen=True)
class ResumeFile:
    """`....resume.pt` beside a run's checkpoint: the run's state, until it has ended.

    `flags` are all that the run's result depends on, `state` is what `open` found.
    """

    path: Path
    flags: dict[str, str]
    runtime: Runtime
    state: dict[str, Any] | None = None

    @classmethod
    def open(
        cls, path: Path, flags: dict[str, str], wanted: bool, runtime: Runtime
    ) -> "ResumeFile":
        """Read the file if it exists and is `wanted`.

        Raises UserError if it exists and is not wanted, or is of a run with other flags.
        """
        found = runtime.from_main(path.exists)
        if found and not wanted:
            raise UserError(
                f"{path} is of a run that was stopped: --resume resumes it, without the file the "
                "run starts anew"
            )
        if wanted and not found:
            print(f"{path} does not exist: starting at the beginning")
        state = runtime.from_main(lambda: _read_state(path, flags)) if found else None
        return cls(path, flags, runtime, state)

    def restore(self, load: Callable[[dict[str, Any]], None]) -> None:
        """Call `load` with the state; raises UserError if that fails."""
        try:
            load(self.state)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{self.path} is damaged ({first_line(error)}): without it the run starts anew"
            ) from error

    def save(self, state: dict[str, Any]) -> None:
        """Write the state, which all ranks have in common."""
        if self.runtime.is_main:
            _write(self.path, {"flags": self.flags, "state": state})

    def remove(self) -> None:
        """The run has ended."""
        self.path.unlink(missing_ok=True)


def _read_state(path: Path, flags: dict[str, str]) -> dict[str, Any]:
    saved = read_plain(path)
    if not (isinstance(saved, dict) and isinstance(saved.get("flags"), dict) and "state" in saved):
        raise UserError(f"{path} is not a resume file of this project")
    for name in flags | saved["flags"]:
        if flags.get(name) != saved["flags"].get(name):
            raise UserError(
                f"{path} is of a run with {name} {saved['flags'].get(name)}, here it is "
                f"{flags.get(name)}: give the same flags; without the file the run starts anew"
            )
    return saved["state"]


def _write(path: Path, content: Any) -> None:
    buffer = io.BytesIO()  # torch.save words its own errors of writing a file in other ways
    torch.save(content, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
