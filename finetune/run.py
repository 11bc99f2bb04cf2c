"""A run's folder, which no other run writes to, and its files shown in predictions/."""

import contextlib
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from finetune.checkpoint import ResumeFile, load_adapter, save_adapter
from finetune.ending import Finished
from finetune.files import check_free, check_writable, lock, write_files
from finetune.identity import (
    INPUT_FLAGS,
    OUTPUT_FLAGS,
    PREDICTION_FLAGS,
    RESUME_FLAGS,
    Identity,
)
from finetune.outputs import SONNETS_HEADER, TensorBoardLog
from finetune.progress import Fitted
from finetune.runtime import Runtime
from models.config import read_json
from models.pretrained import find_checkpoint
from modules.settings import UserError

RECORD, STATE = "run.json", "resume.pt"  # in a run's folder; one without STATE is finished
FILES = {  # output for people -> its name; the run's folder holds the metrics as RECORD
    "para_dev_out": "{method}-para-dev-output.csv",
    "para_test_out": "{method}-para-test-output.csv",
    "sonnet_out": "{method}_generated_sonnets.txt",
    "samples": "{method}_generated_sonnets_samples.txt",
    "metrics": "{method}-{task}-metrics.json",
    "report": "{method}-{task}-report.html",
    "picture": "{method}-{task}-report.png",
}


@dataclass(frozen=True)
class Run:
    """A run and its folder; one that only predicts has no `resume`."""

    folder: Path
    base_folder: Path  # of the checkpoint
    flags: dict[str, Any]
    identity: Identity
    runtime: Runtime
    resume: ResumeFile | None
    log: TensorBoardLog
    lock: FileLock | None  # held as long as this object lives

    @classmethod
    def open(cls, flags: dict[str, Any], *, task: str, adapter: Any, runtime: Runtime) -> "Run":
        """The run of a script's `flags`, locked, with its base checkpoint found or fetched.

        Raises Finished if the run is finished, UserError if it is unfinished and neither `--resume`
        nor `--overwrite` is given, or if there is no adapter to predict with, and OSError if
        another process is working on it or an output cannot be written.
        """
        _check_inputs(flags)  # before a checkpoint is downloaded
        base = find_checkpoint(flags["model_path"] or flags["model_size"])
        identity = Identity.of(flags, task, adapter, base)
        if flags["predict_only"] and flags.get("import_peft"):
            trained = flags["runs_dir"] / identity.name
            if not runtime.from_main(lambda: trained in run_folders(flags["runs_dir"])):
                print(f"{trained} does not exist: predicting with the imported adapter, untrained")
                identity = replace(identity, epochs=0)
        folder, held, resume = flags["runs_dir"] / identity.name, None, None
        if runtime.is_main:
            busy = f"another process is working on this run, {folder}: wait for it to end"
            held = lock(flags["runs_dir"] / ".locks" / identity.name, busy)
            for path in (flags[name] for name in OUTPUT_FLAGS if name in flags):
                check_writable(path)
        if not flags["predict_only"]:
            if not flags["overwrite"] and runtime.from_main(lambda: is_finished(folder)):
                unused = [n for n in ("export_peft", "export_merged", "tensorboard") if flags[n]]
                ignored = f"; ignored: --{', --'.join(unused)}" if unused else ""
                raise Finished(
                    f"{folder} is a finished run of this command: --predict_only writes its files "
                    f"again, --overwrite trains it anew{ignored}"
                )
            resume = _open_resume_file(folder, identity, flags, runtime)
        elif identity.epochs:
            runtime.from_main(lambda: _check_trained(folder, identity))
        if runtime.is_main and not (resume and resume.state):  # resumed, it may have exported
            for name in ("export_peft", "export_merged"):
                check_free(flags[name], f"--{name}")
        log = TensorBoardLog(folder if flags["tensorboard"] and runtime.is_main else None)
        return cls(folder, base, flags, identity, runtime, resume, log, held)

    def save_adapter(self, model: nn.Module, record: dict[str, Any]) -> None:
        """Write the model's adapter with its epoch's `record`."""
        if self.runtime.is_main:
            path = adapter_path(self.folder, self.identity.name)
            save_adapter(path, model, self.identity.adapter_metadata() | record)

    def load_adapter(self, model: nn.Module) -> dict[str, Any]:
        """Load the best epoch's adapter into the model; returns the epoch's record.

        An adapter that was imported only to predict is already in the model.
        """
        if not self.identity.epochs:
            return {"epoch": 0, "is_best": True}
        expected = self.identity.adapter_metadata()
        path = adapter_path(self.folder, self.identity.name)
        about = load_adapter(path, model, expected, self.runtime)
        return {name: value for name, value in about.items() if name not in expected}

    def record(
        self, adapter: Any, best: dict[str, Any], fitted: Fitted | None, final: dict[str, Any]
    ) -> dict[str, Any]:
        """The run's full record, as stored in `run.json`.

        `best` is the best epoch's record, `final` the metrics of its adapter. What was measured in
        training comes from `fitted`, or if that is None from the record written after training.
        """
        record = {"name": self.identity.name, **self.identity.adapter_metadata()}
        record |= {"recipe": self.identity.recipe, "date": _now()}
        base = self.flags["model_path"]
        flags = self.flags | {"model_path": base and base.absolute()}
        record |= {"arguments": flags, "adapter": asdict(adapter), "history": [best]}
        record |= {"device": self.runtime.device_name, "revision": _revision()}
        record["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
        if fitted:
            record |= {"history": fitted.history} | fitted.measured
        elif is_finished(self.folder):
            record |= read_record(self.folder)
            final = record["final"] | final  # with the loss before training
        predicted_with = {name: self.flags[name] for name in self.flags if name in PREDICTION_FLAGS}
        return record | {"final": final, "predicted_with": predicted_with}

    def write(self, record: dict[str, Any], contents: dict[str, str | bytes]) -> dict[str, Path]:
        """Write the record and the contents (keys as in FILES), as one set, to the run's folder
        and to where they are shown; returns the folder and the latter paths.
        """
        text = json.dumps(record, indent=2, allow_nan=False, default=str) + "\n"
        contents = {**contents, "metrics": text}
        identity = self.identity
        shown = shown_files(self.flags, identity.method, identity.task)
        files = {shown[key]: content for key, content in contents.items()}
        for key, content in contents.items():
            if key != "metrics":
                files[self._kept(key)] = content
            elif self.resume or is_finished(self.folder):  # an unfinished run has no RECORD
                files[self.folder / RECORD] = content
        folder = shown["metrics"].parent
        busy = f"another process has locked {folder}: try again once it has ended"
        held = lock(folder / ".lock", busy, timeout=60)
        try:
            write_files(files)
            if "samples" in shown and "samples" not in contents:
                for path in (shown["samples"], self._kept("samples")):
                    _remove_poems(path)  # of an earlier prediction
        finally:
            held.release()
        return {"folder": self.folder} | {key: shown[key] for key in contents}

    def _kept(self, key: str) -> Path:
        return self.folder / FILES[key].format(**self.identity.adapter_metadata())

    def finish(self) -> None:
        """Remove the state of a run that has written all its files."""
        if self.resume and self.runtime.is_main:
            self.resume.remove()


def shown_files(flags: dict[str, Any], method: str, task: str) -> dict[str, Path]:
    """Where each of a run's files is shown, by its key in FILES."""
    shown = {key: flags[key] for key in OUTPUT_FLAGS if key in flags}
    first = next(iter(shown.values()))
    if "sonnet_out" in shown:
        shown["samples"] = first.parent / f"{first.stem}_samples{first.suffix}"
    for key in ("metrics", "report", "picture"):
        shown[key] = first.parent / FILES[key].format(method=method, task=task)
    return shown


def adapter_path(folder: Path, name: str) -> Path:
    """The best epoch's adapter in a run's folder: the run's name without the digest."""
    return folder / f"{name.rpartition('-')[0]}.pt"


def run_folders(runs_dir: Path) -> list[Path]:
    """The folders of all runs, finished or not, sorted by name."""
    return sorted({path.parent for name in (RECORD, STATE) for path in runs_dir.glob(f"*/{name}")})


def finished_runs(runs_dir: Path) -> list[Path]:
    """The folders of all finished runs, the newest first."""
    found = filter(is_finished, run_folders(runs_dir))
    return sorted(found, key=lambda folder: (folder / RECORD).stat().st_mtime, reverse=True)


def is_finished(folder: Path) -> bool:
    """True for the folder of a run that has written all its files."""
    return (folder / RECORD).exists() and not (folder / STATE).exists()


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a finished run; raises UserError for one that lacks what runs write."""
    record = read_json(folder / RECORD)
    needed = {"name", "method", "task", "model", "base", "recipe", "arguments", "adapter", "final"}
    needed |= {"trainable_parameters", "train_seconds", "peak_memory_mb", "processes"}
    needed |= {"predicted_with"}
    if missing := sorted(needed - record.keys()):
        raise UserError(
            f"{folder / RECORD} has no {', '.join(missing)}: it is damaged, or of another version: "
            "the run's command with --overwrite trains it again"
        )
    return record


def no_finished_run(runs_dir: Path) -> UserError:
    """The error where a finished run is needed and there is none."""
    return UserError(
        f"no finished run in {runs_dir}; train one first, for example with "
        "python lora_paraphrase_detection.py --demo"
    )


def find_runs(run: str | Path, runs_dir: Path) -> list[Path]:
    """The folder `run`, or those in `runs_dir` whose name is or begins with `run`.

    Raises UserError if there is none.
    """
    folders = run_folders(runs_dir)
    for exact in (Path(run), runs_dir / run):
        if (exact / RECORD).exists() or (exact / STATE).exists():
            return [exact]
    if found := [folder for folder in folders if folder.name.startswith(str(run))]:
        return found
    there_are = f": {_some_names(folders)}" if folders else ""
    raise UserError(f"{str(run)!r} is not a run in {runs_dir}{there_are}")


def find_run(run: str | Path, runs_dir: Path) -> Path:
    """The only one of `find_runs`; raises UserError if there are more."""
    found = find_runs(run, runs_dir)
    if len(found) > 1:
        raise UserError(f"{str(run)!r} begins the names of several runs: {_some_names(found)}")
    return found[0]


def _some_names(folders: list[Path]) -> str:
    names = [folder.name for folder in folders]
    return ", ".join(names[:4]) + f" and {len(names) - 4} more" * (len(names) > 4)


def _check_inputs(flags: dict[str, Any]) -> None:
    """Raise UserError if a file or folder to read does not exist."""
    hint = "" if flags["demo"] else ", or try --demo"
    for name in INPUT_FLAGS:
        if flags.get(name) and not os.path.exists(flags[name]):
            where = f": see data/README.md for where to get it{hint}"
            raise UserError(f"{flags[name]} does not exist{'' if name == 'import_peft' else where}")


def _open_resume_file(
    folder: Path, identity: Identity, flags: dict[str, Any], runtime: Runtime
) -> ResumeFile:
    conditions = {f"--{name}": str(flags[name]) for name in sorted(RESUME_FLAGS & flags.keys())}
    conditions["the number of processes"] = str(runtime.world_size)
    conditions["the digest"] = identity.digest
    if flags["overwrite"]:  # the run that is there stays intact until the first save
        return ResumeFile(folder / STATE, conditions, runtime)
    return ResumeFile.open(folder / STATE, conditions, flags["resume"], runtime)


def _check_trained(folder: Path, identity: Identity) -> None:
    """Raise UserError if there is no adapter to predict with."""
    path = adapter_path(folder, identity.name)
    if path.exists():
        return
    if is_finished(folder):
        raise UserError(f"{path} was removed: --overwrite trains the run again")
    if (folder / STATE).exists():
        raise UserError(f"{folder} has not finished an epoch: continue with --resume")
    begin, task = f"{identity.method}-", f"-{identity.task}-"
    names = [path.name for path in finished_runs(folder.parent)]
    names = [name for name in names if name.startswith(begin) and task in name]
    others = f"; existing runs have other flags: {', '.join(names[:3])}" if names else ""
    raise UserError(
        f"{path} does not exist: train first, with the same command without --predict_only{others}"
    )


def _remove_poems(path: Path) -> None:
    """Remove a file that `format_sonnets` wrote, and leave others."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if path.read_text(encoding="utf-8").startswith(SONNETS_HEADER):
            path.unlink()


def _now() -> str:
    return datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds")


def _revision() -> str | None:
    """The commit of this project, if it is a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.strip() or None
    return None
