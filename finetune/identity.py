"""What determines a run's adapter: flags, seed, and the content of base checkpoint and data."""

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from finetune.runtime import RuntimeConfig
from finetune.sampling import SamplingConfig
from models.pretrained import fingerprint
from modules.settings import UserError

# Flags whose files determine the adapter.
DATA_FLAGS = ("para_train", "para_dev", "sonnet_path", "import_peft")
# All flags that name input files.
INPUT_FLAGS = (*DATA_FLAGS, "para_test", "held_out_sonnet_path", "dev_sonnet_path", "dev_gold_path")
OUTPUT_FLAGS = ("para_dev_out", "para_test_out", "sonnet_out")
# Flags that affect predictions but not the adapter.
PREDICTION_FLAGS = {field.name for field in fields(SamplingConfig)} | {"num_samples"}
PREDICTION_FLAGS |= {*INPUT_FLAGS} - {*DATA_FLAGS}
# Flags that affect rounding and dropout masks: a resumed run must use the same values.
RUNTIME_FLAGS = {field.name for field in fields(RuntimeConfig)} - {"precision"}
# A resumed run also needs the same decoding flags, so that its dev metrics can be compared.
RESUME_FLAGS = RUNTIME_FLAGS | {field.name for field in fields(SamplingConfig)}
# Flags that affect none of these; the base checkpoint is identified by its content.
OTHER_FLAGS = {"demo", "model_size", "model_path", "runs_dir", "export_peft", "export_merged"}
OTHER_FLAGS |= {"resume", "overwrite", "predict_only", "save_every", "tensorboard", "debug"}
OTHER_FLAGS |= {*OUTPUT_FLAGS}


@dataclass(frozen=True)
class Identity:
    """The values that name a run's folder and identify its adapter."""

    method: str
    task: str
    model: str
    base: str  # SHA-256 of the base checkpoint
    epochs: int  # 0 for a run that only predicts, with an imported adapter
    lr: float
    rank: int | str
    digest: str  # SHA-256, in hex, of everything that determines the adapter
    recipe: str  # the same without the seed

    @classmethod
    def of(cls, flags: dict[str, Any], task: str, adapter: Any, base: Path) -> "Identity":
        """The identity of a run with these flags and adapter config on the checkpoint in `base`."""
        model = flags["model_path"].resolve().name if flags["model_path"] else flags["model_size"]
        rank = "peft" if flags.get("import_peft") else adapter.rank
        base_digest = fingerprint(base)
        decisive = {"method": adapter.method, "task": task, "base": base_digest}
        decisive |= _determining_flags(flags)
        digest, recipe = _sha256_of_json(decisive), _sha256_of_json(decisive | {"seed": None})
        settings = (flags["epochs"], flags["lr"], rank)
        return cls(adapter.method, task, model, base_digest, *settings, digest, recipe)

    @property
    def name(self) -> str:
        """The name of the run and of its folder."""
        parts = (self.method, self.model, self.epochs, self.lr, self.rank, self.task)
        return "-".join(map(str, (*parts, self.digest[:6])))

    def adapter_metadata(self) -> dict[str, str]:
        """The values that must match when the run's adapter is loaded."""
        return {key: getattr(self, key) for key in ("method", "task", "model", "base")}


def _determining_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that determine the adapter, with files replaced by their SHA-256."""
    decisive = {}
    for name, value in flags.items():
        if name == "import_peft" and value:
            files = filter(Path.is_file, sorted(value.glob("adapter_*")))
            decisive[name] = [_sha256_of_file(path) for path in files]
        elif name in DATA_FLAGS and value:
            decisive[name] = _sha256_of_file(value)
        elif name not in PREDICTION_FLAGS | RUNTIME_FLAGS | OTHER_FLAGS:
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
