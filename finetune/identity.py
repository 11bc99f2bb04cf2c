"""What decides a run's adapter: flags, seed, base checkpoint and data, these two by content."""

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from finetune.runtime import RuntimeConfig
from finetune.sampling import SamplingConfig
from models.pretrained import fingerprint
from modules.settings import UserError

# Flags whose files decide the adapter, and all that name files to read.
DATA = ("para_train", "para_dev", "sonnet_path", "import_peft")
INPUTS = (*DATA, "para_test", "held_out_sonnet_path", "dev_sonnet_path", "dev_gold_path")
OUTPUTS = ("para_dev_out", "para_test_out", "sonnet_out")
# Flags that decide predictions, but not the adapter.
PREDICTION = {field.name for field in fields(SamplingConfig)} | {"num_samples", *INPUTS} - {*DATA}
# Flags that change rounding and how dropout is drawn: a resumed run must repeat them.
MACHINE = {field.name for field in fields(RuntimeConfig)} - {"precision"}
# Flags that change neither; the base checkpoint counts by its content.
NEITHER = {"demo", "model_size", "model_path", "runs_dir", "export_peft", "export_merged", *OUTPUTS}
NEITHER |= {"resume", "overwrite", "predict_only", "save_every", "tensorboard", "debug"}


@dataclass(frozen=True)
class Identity:
    """A run as its folder is named, and as its adapter is known again."""

    method: str
    task: str
    model: str
    base: str  # SHA-256 of the base checkpoint
    stem: str  # of the folder's name: method, model, epochs, learning rate, rank, task
    digest: str  # hex digits of all that decides the adapter
    recipe: str  # the same for runs that differ in their seeds alone

    @classmethod
    def of(cls, flags: dict[str, Any], task: str, adapter: Any, base: Path) -> "Identity":
        """The identity of a script's run with an adapter's config, on the checkpoint in `base`."""
        model = flags["model_path"].resolve().name if flags["model_path"] else flags["model_size"]
        rank = "peft" if flags.get("import_peft") else adapter.rank
        epochs = 0 if predicts_with_import(flags) else flags["epochs"]
        stem = "-".join(map(str, (adapter.method, model, epochs, flags["lr"], rank, task)))
        base_digest = fingerprint(base)
        decisive = {"method": adapter.method, "task": task, "base": base_digest}
        decisive |= _decisive_flags(flags)
        digest, recipe = _sha256_of_json(decisive), _sha256_of_json(decisive | {"seed": None})
        return cls(adapter.method, task, model, base_digest, stem, digest, recipe)

    @property
    def name(self) -> str:
        """The name of the run and of its folder."""
        return f"{self.stem}-{self.digest[:6]}"

    def of_adapter(self) -> dict[str, str]:
        """What must be the same where the run's adapter is loaded."""
        return {key: getattr(self, key) for key in ("method", "task", "model", "base")}


def predicts_with_import(flags: dict[str, Any]) -> bool:
    """True for a run that trains nothing and predicts with an adapter of PEFT."""
    return bool(flags["predict_only"] and flags.get("import_peft"))


def _decisive_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that decide the adapter; of files, the content."""
    decisive = {}
    for name, value in flags.items():
        if name == "import_peft" and value:
            decisive[name] = [_sha256_of_file(path) for path in sorted(value.glob("adapter_*"))]
        elif name in DATA and value:
            decisive[name] = _sha256_of_file(value)
        elif name not in PREDICTION | MACHINE | NEITHER:
            decisive[name] = str(value)
    return decisive


def _sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sha256_of_file(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: see data/README.md for where to get it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
