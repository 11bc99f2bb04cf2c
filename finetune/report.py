"""What a run leaves beside its predictions: metrics, a picture of its curves, TensorBoard logs."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.metrics import confusion_matrix
from torch import Tensor

from datasets import TokenizedPairs
from finetune.files import replacing
from finetune.loop import Fitted
from finetune.metrics import surest_mistakes
from finetune.predictions import write_metrics
from finetune.runtime import Runtime

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LOSSES = {"train_loss": "training", "val_loss": "validation", "dev_loss": "dev"}
INK, BEST = "#333333", "#d62728"


def write_paraphrase_record(
    folder: Path,
    arguments: dict[str, Any],
    adapter: Any,
    fitted: Fitted,
    final: dict[str, float],
    dev: TokenizedPairs,
    logits: Tensor,
    tokenizer: "PreTrainedTokenizerFast",
) -> dict[str, Any]:
    """Write metrics, with the surest mistakes, and report; returns what to tell of them."""
    files = record_files(folder, adapter.method, "paraphrase")
    mistakes = surest_mistakes(logits, dev, tokenizer)
    write_metrics(files["metrics"], arguments, adapter, fitted, final, surest_mistakes=mistakes)
    metrics = {"dev_accuracy": "accuracy", "dev_macro_f1": "macro F1"}
    answers = dev.labels, logits.argmax(1).numpy()
    write_report(files["report"], fitted.history, metrics, "dev_accuracy", answers)
    return fitted.measured | files


def write_sonnet_record(
    folder: Path, arguments: dict[str, Any], adapter: Any, fitted: Fitted, final: dict[str, Any]
) -> dict[str, Any]:
    """Write metrics and report; returns what to tell of them."""
    files = record_files(folder, adapter.method, "sonnet")
    write_metrics(files["metrics"], arguments, adapter, fitted, final)
    write_report(files["report"], fitted.history, {"dev_chrf": "dev chrF"}, "val_loss")
    return fitted.measured | files


def record_files(folder: Path, method: str, task: str) -> dict[str, Path]:
    """Where a run's metrics and report go."""
    names = {"metrics": "metrics.json", "report": "report.png"}
    return {what: folder / f"{method}-{task}-{name}" for what, name in names.items()}


def write_report(
    path: Path,
    history: list[dict[str, Any]],
    metrics: dict[str, str],
    decisive: str,
    answers: tuple[np.ndarray, np.ndarray] | None = None,
) -> None:
    """Draw losses and `metrics` (name in the history -> label) by epoch, 800 pixels wide.

    The best epoch is marked on the `decisive` curve. `answers`, the labels and predictions of dev
    pairs, are drawn as a table of counts.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), dpi=100, layout="constrained")
    panels = figure.subplots(1, 3 if answers else 2)
    losses = {name: label for name, label in LOSSES.items() if name in history[0]}
    _draw_curves(panels[0], "loss, nats", history, losses, decisive)
    _draw_curves(panels[1], " and ".join(metrics.values()), history, metrics, decisive)
    if answers:
        _draw_counts(panels[2], *answers)
    epochs = "1 epoch" if len(history) == 1 else f"{len(history)} epochs"
    title = f"{path.stem.removesuffix('-report')}, {epochs}"
    figure.suptitle(title, fontsize=11, color=INK)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_curves(
    panel, title: str, history: list[dict[str, Any]], names: dict[str, str], decisive: str
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


def _draw_counts(panel, labels: np.ndarray, predicted: np.ndarray) -> None:
    counts = confusion_matrix(labels, predicted, labels=[0, 1])
    panel.imshow(counts, cmap="Blues", vmin=0, vmax=counts.max() * 1.4)
    for row in (0, 1):
        for column in (0, 1):
            share = counts[row, column] / max(1, counts[row].sum())
            text = f"{counts[row, column]:,}\n{share:.0%}"
            color = "white" if counts[row, column] > 0.7 * counts.max() else INK
            panel.text(column, row, text, ha="center", va="center", fontsize=11, color=color)
    panel.set_title("dev pairs", fontsize=10)
    panel.set_xticks([0, 1], ["no", "yes"], fontsize=9)
    panel.set_yticks([0, 1], ["no", "yes"], fontsize=9)
    panel.set_xlabel("predicted paraphrase", fontsize=9)
    panel.set_ylabel("paraphrase", fontsize=9)


def tensorboard_log(
    folder: Path | None, name: str, runtime: Runtime
) -> Callable[[dict[str, float], int], None]:
    """A function that logs values at a step to `folder`/`name`; without a folder, nowhere."""
    if folder is None or not runtime.is_main:
        return lambda values, step: None
    from torch.utils.tensorboard import SummaryWriter

    writer, works = None, True

    def log(values: dict[str, float], step: int) -> None:
        nonlocal writer, works
        if not works:
            return
        try:  # made now: what a stopped run logged after this step is taken back
            writer = writer or SummaryWriter(folder / name, purge_step=step)
            for key, value in values.items():
                writer.add_scalar(key, value, step)
            writer.flush()
        except OSError as error:  # not worth a run
            works = False
            print(f"no more logs: {folder} cannot be written: {error.strerror or error}")

    return log
