"""The files that a run writes for people, and the table it ends with."""

import json
import platform
from collections.abc import Iterable
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets import Sonnet
from finetune.files import write_text
from finetune.loop import Fitted


def write_paraphrase_predictions(path: Path, ids: Iterable[str], classes: Iterable[int]) -> None:
    """One line `id, 0|1` per pair, in the order of the input file (the course's format)."""
    lines = ["id \t Predicted_Is_Paraphrase \n"]
    lines += [f"{id_}, {class_} \n" for id_, class_ in zip(ids, classes, strict=True)]
    write_text(path, "".join(lines))


def write_sonnets(path: str | Path, sonnets: Iterable[Sonnet]) -> None:
    """The course's format, which its reader and `datasets.read_sonnets` take."""
    write_text(path, "--Generated Sonnets-- \n\n" + "".join(map(format_sonnet, sonnets)))


def write_samples(path: Path, samples: list[list[Sonnet]]) -> dict[str, Path]:
    """Write the first sample of each sonnet; if there are more, all of them to a second file.

    Returns the files by what they hold.
    """
    write_sonnets(path, samples[0])
    if len(samples) == 1:
        return {"sonnets": path}
    second = path.with_stem(f"{path.stem}_samples")
    write_sonnets(second, chain(*zip(*samples, strict=True)))
    return {"sonnets": path, "samples": second}


def format_sonnet(sonnet: Sonnet) -> str:
    """Number and lines, with a blank line before and after."""
    return "\n".join(["", str(sonnet.number), *sonnet.lines, "", ""])


def write_metrics(
    path: Path,
    arguments: dict[str, Any],
    adapter: Any,
    fitted: Fitted,
    final: dict[str, Any],
    **more: Any,
) -> None:
    """Write a run's metrics as JSON, with the versions of what made them."""
    import transformers

    metrics = {"arguments": arguments, "adapter": asdict(adapter)}
    metrics |= {"history": fitted.history, "final": final} | fitted.measured | more
    metrics["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    write_text(path, json.dumps(metrics, indent=2, allow_nan=False, default=str) + "\n")


def paraphrase_table(epoch: int, metrics: dict[str, float], labels: np.ndarray) -> dict[str, Any]:
    """The rows that tell how good the predictions are, beside always answering "no"."""
    rows = {"best epoch": epoch}
    rows |= {name.replace("_", " "): f"{value:.4f}" for name, value in metrics.items()}
    return rows | {"dev accuracy of always answering no": f"{(labels == 0).mean():.4f}"}


def sonnet_table(epoch: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """The rows that tell how good the dev poems are, those of form beside Shakespeare's own."""
    rows, gold = {"best epoch": epoch}, metrics["shakespeare"]
    for name, value in metrics.items():
        if name in gold:
            rows[name.replace("_", " ")] = f"{value:.4g} (Shakespeare {gold[name]:.4g})"
        elif name != "shakespeare":
            rows[name.replace("_", " ")] = f"{value:.4f}"
    return rows


def format_table(rows: dict[str, Any]) -> str:
    """Name and value, a line each, in two columns."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
