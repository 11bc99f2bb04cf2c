"""The files of a run's adapter and of where the run stands: tensors and plain values, no code."""

import io
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.files import replacing
from finetune.runtime import STEADIER, RunError, Runtime
from models.pretrained import CheckpointError, first_line, read_plain
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
            saved = {"about": self.about | record, "adapter": finite_adapter(self.model)}
            _write(self.path, saved)

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
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: train first, with the same flags")
    saved = read_plain(path)
    saved = saved if isinstance(saved, dict) else {}
    about, state = saved.get("about"), saved.get("adapter")
    if not (isinstance(about, dict) and isinstance(state, dict)):
        raise CheckpointError(f"{path} is no adapter checkpoint of this project")
    for name, tensor in state.items():
        if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
            raise CheckpointError(f"{path}: {name} is no tensor of numbers")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name} has values that are not finite")
    return about, state


def _read_resume(path: Path, flags: dict[str, str]) -> dict[str, Any]:
    saved = read_plain(path)
    was = saved.get("flags") if isinstance(saved, dict) else None
    if not isinstance(was, dict):
        raise CheckpointError(f"{path} is no resume file of this project")
    for name in flags | was:
        if flags.get(name) != was.get(name):
            raise CheckpointError(
                f"{path} is of a run with {name} {was.get(name)}, here it is {flags.get(name)}: "
                "give the same flags; without the file the run begins anew"
            )
    return saved


def finite_adapter(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors; raises RunError where one has a value that is not finite."""
    state = adapter_state(model)
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise RunError(f"{name} has values that are not finite any more: {STEADIER}")
    return state


def _write(path: Path, content: Any) -> None:
    buffer = io.BytesIO()  # what goes wrong with a file is told in other ways by torch.save
    torch.save(content, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


@dataclass(frozen=True)
class ResumeFile:
    """`....resume.pt` beside a run's checkpoint: where the run stands, until it has ended.

    `flags` are all that the run's result depends on, `saved` is what `open` found.
    """

    path: Path
    flags: dict[str, str]
    runtime: Runtime
    saved: dict[str, Any] | None = None

    @classmethod
    def open(
        cls, path: Path, flags: dict[str, str], wanted: bool, runtime: Runtime
    ) -> "ResumeFile":
        """Read the file if there is one and it is `wanted`.

        Raises CheckpointError if it is there and not wanted, or of a run with other flags.
        """
        found = runtime.from_main(path.exists)
        if found and not wanted:
            raise CheckpointError(
                f"{path} is of a run that was stopped: --resume goes on with it, without the file "
                "the run begins anew"
            )
        if wanted and not found:
            print(f"{path} does not exist: starting at the beginning")
        saved = runtime.from_main(lambda: _read_resume(path, flags)) if found else None
        return cls(path, flags, runtime, saved)

    def restore(self, go_on: Callable[[dict[str, Any], dict[str, Any]], None]) -> bool:
        """Call `go_on(common, own)` with what `save` was given, if it was; has it been?"""
        if self.saved is None:
            return False
        try:
            go_on(self.saved["common"], self.saved["own"][self.runtime.rank])
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = first_line(error)
            raise CheckpointError(
                f"{self.path} is damaged ({reason}): without it the run begins anew"
            ) from error
        return True

    def save(self, common: dict[str, Any], own: dict[str, Any]) -> None:
        """Write what all processes have in `common` and what each has as its `own`."""
        content = {"flags": self.flags, "common": common, "own": self.runtime.gather([own])}
        if self.runtime.is_main:
            _write(self.path, content)

    def remove(self) -> None:
        """The run has ended."""
        self.path.unlink(missing_ok=True)
