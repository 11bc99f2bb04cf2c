"""The files that a run writes for people, and the table it ends with."""

import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from finetune.files import write_text


def write_paraphrase_predictions(path: str, ids: Iterable[str], classes: Iterable[int]) -> None:
    """One line `id, 0|1` per pair, in the order of the input file (the course's format)."""
    lines = ["id \t Predicted_Is_Paraphrase \n"]
    lines += [f"{id_}, {class_} \n" for id_, class_ in zip(ids, classes, strict=True)]
    write_text(path, "".join(lines))


def write_metrics(
    path: Path,
    arguments: dict[str, Any],
    history: list[dict[str, Any]],
    final: dict[str, float],
    measured: dict[str, float],
) -> None:
    """Write a run's metrics as JSON, with the versions of what made them."""
    import transformers

    metrics = {"arguments": arguments, "history": history, "final": final} | measured
    metrics["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    write_text(path, json.dumps(metrics, indent=2, allow_nan=False, default=str) + "\n")


def format_table(rows: dict[str, Any]) -> str:
    """Name and value, a line each, in two columns."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
