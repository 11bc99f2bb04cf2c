"""The files that a run writes for people: predictions, metrics, report, logs, the final table."""

import json
import platform
from collections.abc import Iterable
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.sonnets import Sonnet
from datasets import ANSWERS
from finetune.files import replacing, write_text
from finetune.progress import Fitted

LOSSES = {"train_loss": "training", "val_loss": "validation", "dev_loss": "dev"}
INK, BEST = "#333333", "#d62728"


def write_paraphrase_predictions(path: Path, ids: Iterable[str], logits: torch.Tensor) -> None:
    """One line `id, 0|1` per pair from logits [N,2], in the order of the input (the course's)."""
    lines = ["id \t Predicted_Is_Paraphrase \n"]
    classes = logits.argmax(1).tolist()
    lines += [f"{id_}, {class_} \n" for id_, class_ in zip(ids, classes, strict=True)]
    write_text(path, "".join(lines))


def write_sonnets(path: str | Path, sonnets: Iterable[Sonnet]) -> None:
    """The course's format, which its reader and `data.sonnets.read_sonnets` take."""
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


def record_files(folder: Path, method: str, task: str) -> dict[str, Path]:
    """Where a run's metrics and report go."""
    names = {"metrics": "metrics.json", "report": "report.png"}
    return {what: folder / f"{method}-{task}-{name}" for what, name in names.items()}


def write_paraphrase_record(
    files: dict[str, Path],
    arguments: dict[str, Any],
    adapter: Any,
    fitted: Fitted,
    final: dict[str, float],
    labels: np.ndarray,
    logits: torch.Tensor,
    most_confident_errors: list[dict[str, Any]],
) -> dict[str, Any]:
    """Write metrics and report of dev pairs with `labels` [N] and `logits` [N,2].

    Returns what to print of them.
    """
    from sklearn.metrics import confusion_matrix

    more = {"most_confident_errors": most_confident_errors}
    write_metrics(files["metrics"], arguments, adapter, fitted, final, **more)
    metrics = {"dev_accuracy": "accuracy", "dev_macro_f1": "macro F1"}
    counts = confusion_matrix(labels, logits.argmax(1), labels=[0, 1])
    write_report(files["report"], fitted.history, metrics, "dev_accuracy", counts)
    return fitted.measured | files


def write_sonnet_record(
    files: dict[str, Path],
    arguments: dict[str, Any],
    adapter: Any,
    fitted: Fitted,
    final: dict[str, Any],
) -> dict[str, Any]:
    """Write metrics and report; returns what to print of them."""
    write_metrics(files["metrics"], arguments, adapter, fitted, final)
    write_report(files["report"], fitted.history, {"dev_chrf": "dev chrF"}, "val_loss")
    return fitted.measured | files


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


def paraphrase_table(metrics: dict[str, float], labels: np.ndarray) -> dict[str, Any]:
    """The rows that say how good the predictions are, beside always answering "no"."""
    rows = {name.replace("_", " "): f"{value:.4f}" for name, value in metrics.items()}
    return rows | {"dev accuracy of always answering no": f"{(labels == 0).mean():.4f}"}


def sonnet_table(metrics: dict[str, Any]) -> dict[str, Any]:
    """The rows that say how good the dev poems are, those of form beside Shakespeare's own."""
    rows, gold = {}, metrics["shakespeare"]
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


def write_report(
    path: Path,
    history: list[dict[str, Any]],
    metrics: dict[str, str],
    decisive: str,
    counts: np.ndarray | None = None,
) -> None:
    """Draw losses and `metrics` (name in the history -> label) by epoch, 800 pixels wide.

    The best epoch is marked on the `decisive` curve. `counts` [2,2] is a confusion matrix.
    """
    from matplotlib.figure import Figure  # not pyplot, which the environment's backend can break

    figure = Figure(figsize=(8, 3.4), dpi=100, layout="constrained")
    panels = figure.subplots(1, 2 if counts is None else 3)
    losses = {name: label for name, label in LOSSES.items() if name in history[0]}
    _draw_curves(panels[0], "loss, nats", history, losses, decisive)
    _draw_curves(panels[1], " and ".join(metrics.values()), history, metrics, decisive)
    if counts is not None:
        _draw_confusion(panels[2], counts)
    epochs = "1 epoch" if len(history) == 1 else f"{len(history)} epochs"
    title = f"{path.stem.removesuffix('-report')}, {epochs}"
    figure.suptitle(title, fontsize=11, color=INK)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_curves(
    panel: Any, title: str, history: list[dict[str, Any]], names: dict[str, str], decisive: str
) -> None:
    epochs = [record["epoch"] for record in history]
    best = max(record["epoch"] for record in history if record["is_best"])
    for name, label in names.items():
        panel.plot(epochs, [record[name] for record in history], "o-", ms=4, label=label)
    panel.axvline(best, color=BEST, lw=1, ls=":", zorder=0)
    if decisive in names:
        value = history[best - 1][decisive]
        panel.plot(best, value, "*", ms=13, color=BEST, label=f"best: {value:.4g}")
    panel.set_title(title, fontsize=10)
    panel.set_xlabel("epoch", fontsize=9)
    panel.set_xlim(0.6, epochs[-1] + 0.4)
    panel.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, framealpha=0.8)


def _draw_confusion(panel: Any, counts: np.ndarray) -> None:
    panel.imshow(counts, cmap="Blues", vmin=0, vmax=counts.max() * 1.4)
    for label, predicted in np.ndindex(2, 2):
        n, share = counts[label, predicted], counts[label, predicted] / max(1, counts[label].sum())
        color = "white" if n > 0.7 * counts.max() else INK
        text = f"{n:,}\n{share:.0%}"
        panel.text(predicted, label, text, ha="center", va="center", fontsize=11, color=color)
    panel.set_title("dev pairs", fontsize=10)
    panel.set_xticks([0, 1], ANSWERS, fontsize=9)
    panel.set_yticks([0, 1], ANSWERS, fontsize=9)
    panel.set_xlabel("predicted paraphrase", fontsize=9)
    panel.set_ylabel("paraphrase", fontsize=9)


class TensorBoardLog:
    """Logs values at a step to `folder`/`name`; without a folder, nowhere."""

    def __init__(self, folder: Path | None, name: str):
        self.folder = folder / name if folder else None
        self.writer = None

    def __call__(self, values: dict[str, float], step: int) -> None:
        if self.folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        try:  # made now, so that what a stopped run logged after this step is purged
            self.writer = self.writer or SummaryWriter(self.folder, purge_step=step)
            for key, value in values.items():
                self.writer.add_scalar(key, value, step)
            self.writer.flush()
        except OSError as error:  # not worth a run
            print(f"no more logs: {self.folder} cannot be written: {error.strerror or error}")
            self.folder = None
