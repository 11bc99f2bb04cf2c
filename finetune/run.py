"""A run's folder: its name says what decides the adapter, its files are no other run's."""

import contextlib
import hashlib
import json
import platform
import subprocess
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from finetune.checkpoint import ResumeFile, load_adapter, save_adapter
from finetune.ending import Finished
from finetune.files import check_writable, lock, write_files
from finetune.outputs import TensorBoardLog
from finetune.progress import Fitted
from finetune.runtime import Runtime
from finetune.sampling import SamplingConfig
from models.pretrained import fingerprint, read_json
from modules.settings import UserError

RECORD, STATE = "run.json", "resume.pt"  # in a run's folder; no STATE: the run is finished
# Flags whose files decide the adapter by their content, and all that name files to read.
DATA = ("para_train", "para_dev", "sonnet_path", "import_peft")
INPUTS = (*DATA, "para_test", "held_out_sonnet_path", "dev_sonnet_path", "dev_gold_path")
OUTPUTS = ("para_dev_out", "para_test_out", "sonnet_out")
FILES = {  # what a run writes for people -> its name; the metrics are kept as RECORD
    "para_dev_out": "{method}-para-dev-output.csv",
    "para_test_out": "{method}-para-test-output.csv",
    "sonnet_out": "{method}_generated_sonnets.txt",
    "samples": "{method}_generated_sonnets_samples.txt",
    "metrics": "{method}-{task}-metrics.json",
    "report": "{method}-{task}-report.html",
    "picture": "{method}-{task}-report.png",
}
# Flags that decide predictions, but not the adapter.
PREDICTION = {field.name for field in fields(SamplingConfig)} | {"num_samples", *INPUTS} - {*DATA}
# Flags that change an adapter within rounding only: a resumed run must repeat them.
MACHINE = {"use_gpu", "compile", "gradient_checkpointing", "deterministic"}
# Flags that change neither; the base checkpoint counts by its content.
NEITHER = {"demo", "model_size", "model_path", "runs_dir", "export_peft", "export_merged", *OUTPUTS}
NEITHER |= {"resume", "overwrite", "predict_only", "save_every", "tensorboard", "debug"}


@dataclass(frozen=True)
class Run:
    """A run and its folder; one that only predicts has no `resume`."""

    folder: Path
    flags: dict[str, Any]
    identity: dict[str, Any]  # what must be the same where its adapter is loaded
    recipe: str  # hex digits, the same for runs that differ in their seeds alone
    runtime: Runtime
    resume: ResumeFile | None
    log: TensorBoardLog
    lock: FileLock | None  # held as long as this object lives

    @classmethod
    def open(
        cls, flags: dict[str, Any], *, task: str, adapter: Any, base: Path, runtime: Runtime
    ) -> "Run":
        """The run of a script's `flags`, on the checkpoint in the folder `base`, locked.

        Raises Finished if it has been done, UserError if it is unfinished and neither `--resume`
        nor `--overwrite` says what to do, or if there is no adapter to predict with, and OSError if
        another process is at it.
        """
        identity = {"method": adapter.method, "task": task, "base": fingerprint(base)}
        model = flags["model_path"].resolve().name if flags["model_path"] else flags["model_size"]
        rank = "peft" if flags.get("import_peft") else adapter.rank
        is_imported = bool(flags["predict_only"] and flags.get("import_peft"))
        epochs = 0 if is_imported else flags["epochs"]
        stem = "-".join(map(str, (adapter.method, model, epochs, flags["lr"], rank, task)))
        decisive = identity | _decisive(flags)
        digest, recipe = _digest(decisive), _digest(decisive | {"seed": None})
        folder = flags["runs_dir"] / f"{stem}-{digest[:6]}"
        held = None
        if runtime.is_main:
            busy = f"another process is at this run, {folder}: wait for its end"
            held = lock(flags["runs_dir"] / ".locks" / folder.name, busy)
            for path in (flags[name] for name in OUTPUTS if name in flags):
                check_writable(path)
        resume = None
        if not flags["predict_only"]:
            runtime.from_main(lambda: _start_over(folder) if flags["overwrite"] else None)
            _refuse_finished(folder, flags, runtime)
            machine = {f"--{name}": str(flags[name]) for name in sorted(MACHINE)}
            machine |= {"digest": digest, "the number of processes": str(runtime.world_size)}
            resume = ResumeFile.open(folder / STATE, machine, flags["resume"], runtime)
        log = TensorBoardLog(folder if flags["tensorboard"] and runtime.is_main else None)
        run = cls(folder, flags, identity | {"model": model}, recipe, runtime, resume, log, held)
        if flags["predict_only"] and not is_imported:
            runtime.from_main(run.check_trained)
        return run

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    def check_trained(self) -> None:
        """Raise UserError if there is no adapter to predict with."""
        if not adapter_path(self.folder).exists():
            raise UserError(
                f"{adapter_path(self.folder)} does not exist: train first, by the same command "
                f"without --predict_only{_others(self.folder)}"
            )

    def save_adapter(self, model: nn.Module, record: dict[str, Any]) -> None:
        """Write the model's adapter with its epoch's `record`."""
        if self.runtime.is_main:
            save_adapter(adapter_path(self.folder), model, self.identity | record)

    def load_adapter(self, model: nn.Module) -> dict[str, Any]:
        """Load the best epoch's adapter into the model; returns the epoch's record.

        An adapter that was imported to predict with is in the model already.
        """
        if self.flags["predict_only"] and self.flags.get("import_peft"):
            return {"epoch": 0, "is_best": True}
        about = load_adapter(adapter_path(self.folder), model, self.identity, self.runtime)
        return {name: value for name, value in about.items() if name not in self.identity}

    def record(
        self, adapter: Any, best: dict[str, Any], fitted: Fitted | None, final: dict[str, Any]
    ) -> dict[str, Any]:
        """All there is to say of the run, as `run.json` keeps it.

        `best` is the best epoch's record, `final` the metrics of its adapter. What was measured in
        training comes from `fitted`, or without one from the training's own record.
        """
        record = {"name": self.name, **self.identity, "recipe": self.recipe, "date": _now()}
        base = self.flags["model_path"]
        flags = self.flags | {"model_path": base and base.absolute()}
        record |= {"arguments": flags, "adapter": asdict(adapter), "history": [best]}
        record |= {"device": self.runtime.device_name, "revision": _revision()}
        record["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
        if fitted:
            record |= {"history": fitted.history} | fitted.measured
        elif (self.folder / RECORD).exists():
            record |= read_json(self.folder / RECORD)
            final = record["final"] | final  # the loss before training is known from then
        predicted_with = {name: self.flags[name] for name in self.flags if name in PREDICTION}
        return record | {"final": final, "predicted_with": predicted_with}

    def write(self, record: dict[str, Any], contents: dict[str, str | bytes]) -> dict[str, Path]:
        """Write record and contents, by their keys in FILES, to the run's folder and, as one set,
        to where they are shown; returns these places.
        """
        text = json.dumps(record, indent=2, allow_nan=False, default=str) + "\n"
        contents = {**contents, "metrics": text}
        shown = self._shown()
        files = {shown[key]: content for key, content in contents.items()}
        for key, content in contents.items():
            if key != "metrics":
                files[self._kept(key)] = content
            elif self.resume or is_finished(self.folder):  # not of a run that is unfinished still
                files[self.folder / RECORD] = content
        folder = shown["metrics"].parent
        busy = f"another process has locked {folder}: try again once it has ended"
        held = lock(folder / ".lock", busy, timeout=60)
        try:
            write_files(files)
            for key in shown.keys() - contents.keys():  # another run's, or an earlier prediction's
                shown[key].unlink(missing_ok=True)
                self._kept(key).unlink(missing_ok=True)
        finally:
            held.release()
        return {key: shown[key] for key in contents}

    def _kept(self, key: str) -> Path:
        return self.folder / FILES[key].format(**self.identity)

    def _shown(self) -> dict[str, Path]:
        """Where each of the run's files is shown, by its key in FILES."""
        shown = {key: self.flags[key] for key in OUTPUTS if key in self.flags}
        first = next(iter(shown.values()))
        if "sonnet_out" in shown:
            shown["samples"] = first.with_stem(f"{first.stem}_samples")
        for key in ("metrics", "report", "picture"):
            shown[key] = first.parent / FILES[key].format(**self.identity)
        return shown

    def finish(self) -> None:
        """Remove the state of a run that has written all its files."""
        if self.resume and self.runtime.is_main:
            self.resume.remove()


def adapter_path(folder: Path) -> Path:
    """The best epoch's adapter in a run's folder: the run's name without the digest."""
    return folder / f"{folder.name.rpartition('-')[0]}.pt"


def run_folders(runs_dir: Path) -> list[Path]:
    """The folders of all runs, finished or not, by name."""
    return sorted({path.parent for name in (RECORD, STATE) for path in runs_dir.glob(f"*/{name}")})


def finished_runs(runs_dir: Path) -> list[Path]:
    """The folders of all finished runs, the newest first."""
    found = filter(is_finished, run_folders(runs_dir))
    return sorted(found, key=lambda folder: (folder / RECORD).stat().st_mtime, reverse=True)


def is_finished(folder: Path) -> bool:
    """True for the folder of a run that has written all its files."""
    return (folder / RECORD).exists() and not (folder / STATE).exists()


def find_run(run: str | Path, runs_dir: Path) -> Path:
    """The folder `run`, or the one in `runs_dir` whose name is `run` or alone begins with it.

    Raises UserError if there is none, or more than one.
    """
    folders = run_folders(runs_dir)
    for exact in (Path(run), runs_dir / run):
        if (exact / RECORD).exists() or (exact / STATE).exists():
            return exact
    found = [folder for folder in folders if folder.name.startswith(str(run))]
    if len(found) == 1:
        return found[0]
    fault = "begins the names of several runs" if found else f"is no run in {runs_dir}"
    names = [folder.name for folder in found or folders]
    shown = ", ".join(names[:4]) + f" and {len(names) - 4} more" * (len(names) > 4)
    raise UserError(f"{str(run)!r} {fault}{': ' if names else ''}{shown}")


def _refuse_finished(folder: Path, flags: dict[str, Any], runtime: Runtime) -> None:
    if runtime.from_main(lambda: is_finished(folder)):
        raise Finished(
            f"{folder} is a finished run of this command: --predict_only writes its predictions "
            "again, --overwrite trains it anew"
        )


def _start_over(folder: Path) -> None:
    for name in (RECORD, STATE):
        (folder / name).unlink(missing_ok=True)


def _others(folder: Path) -> str:
    """A hint at the runs of the same script that there are."""
    method = folder.name.partition("-")[0]
    task = folder.name.rpartition("-")[0].rpartition("-")[2]
    names = [path.name for path in finished_runs(folder.parent)]
    names = [name for name in names if name.startswith(method) and f"-{task}-" in name]
    return f"; the runs there are of other flags: {', '.join(names[:3])}" if names else ""


def _decisive(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that decide the adapter; of files, the content."""
    decisive = {}
    for name, value in flags.items():
        if name == "import_peft" and value:
            decisive[name] = [_sha256(path) for path in sorted(value.glob("adapter_*"))]
        elif name in DATA and value:
            decisive[name] = _sha256(value)
        elif name not in PREDICTION | MACHINE | NEITHER:
            decisive[name] = str(value)
    return decisive


def _digest(decisive: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: see data/README.md for where to get it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _now() -> str:
    return datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds")


def _revision() -> str | None:
    """The commit of this project, if it is a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.strip() or None
    return None
