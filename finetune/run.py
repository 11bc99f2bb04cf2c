"""The files of a run: what they are called, what they depend on, and their locks."""

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from finetune.checkpoint import AdapterCheckpoint, ResumeFile
from finetune.files import claim
from finetune.outputs import TensorBoardLog, format_table, record_files
from finetune.runtime import Runtime

INPUTS = (
    *("para_train", "para_dev", "para_test"),
    *("sonnet_path", "held_out_sonnet_path", "dev_sonnet_path", "dev_gold_path"),
)
OUTPUTS = ("para_dev_out", "para_test_out", "sonnet_out")
# Flags that no file of a run depends on.
INDIFFERENT = {"resume", "predict_only", "save_every", "debug", "tensorboard", "checkpoint_dir"}


@dataclass(frozen=True)
class Run:
    """The files of a run; one that only predicts has no `resume`."""

    checkpoint: AdapterCheckpoint
    resume: ResumeFile | None
    log: TensorBoardLog
    record: dict[str, Path]  # metrics and report
    imported: Path | None  # a PEFT adapter that is only to predict with

    @classmethod
    def open(
        cls, flags: dict[str, Any], *, task: str, adapter: Any, model: nn.Module, runtime: Runtime
    ) -> "Run":
        """The run of a script's `flags`, with `<checkpoint_dir>/<name>.pt` and its state.

        Locks all files that it will write. Raises OSError if another run has locked one, and
        UserError if the run was stopped before and `--resume` is not given, or the other way.
        """
        folder: Path | None = flags["model_path"]
        model_name = folder.resolve().name if folder else flags["model_size"]
        parts = (adapter.method, model_name, flags["epochs"], flags["lr"], adapter.rank, task)
        name = "-".join(map(str, parts))
        path = flags["checkpoint_dir"] / f"{name}.pt"
        outputs = [flags[output] for output in OUTPUTS if output in flags]
        record = record_files(outputs[0].parent, adapter.method, task)
        resume = None
        if runtime.is_main:
            claim(outputs if flags["predict_only"] else [*outputs, path, *record.values()])
        if not flags["predict_only"]:
            decisive = decisive_flags(flags, runtime.world_size)
            resume_path = path.with_suffix(".resume.pt")
            resume = ResumeFile.open(resume_path, decisive, flags["resume"], runtime)
        about = adapter_identity(task, model_name, adapter)
        return cls(
            checkpoint=AdapterCheckpoint(path, model, about, runtime),
            resume=resume,
            log=TensorBoardLog(flags["tensorboard"] if runtime.is_main else None, name),
            record=record,
            imported=flags.get("import_peft") if flags["predict_only"] else None,
        )

    def load_best(self) -> dict[str, Any]:
        """Load the best epoch's adapter, if none was imported to predict with; what to report."""
        if self.imported:
            return {"best epoch": "imported", "adapter": self.imported}
        return {"best epoch": self.checkpoint.load()["epoch"], "adapter": self.checkpoint.path}

    def finish(self, table: dict[str, Any]) -> None:
        """Remove the state of a run that has written all its files, and print what came of it."""
        if self.resume:
            self.resume.remove()
        print(format_table(table))


def adapter_identity(task: str, model: str, config: Any) -> dict[str, Any]:
    """What must match between the run that saves an adapter and the one that loads it."""
    identity = {"method": config.method, "task": task, "model": model} | asdict(config)
    del identity["dropout"]
    return identity


def decisive_flags(flags: dict[str, Any], world_size: int) -> dict[str, str]:
    """All flags that a run's files depend on, and the content of the files that they name."""
    decisive = {}
    for name, value in flags.items():
        if name in INPUTS and value:
            digest = hashlib.sha256(value.read_bytes()).hexdigest()
            decisive[f"in the file of --{name} the SHA-256"] = digest
        elif name not in INDIFFERENT:
            value = os.path.realpath(value) if isinstance(value, Path) else value
            decisive[f"--{name}"] = str(value)
    decisive["the number of processes"] = str(world_size)
    return decisive
