"""A run's report: a self-contained HTML page, and a PNG of its curves."""

import contextlib
import io
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from data.sonnets import GIVEN_LINES, Sonnet
from datasets import ANSWERS
from finetune.metrics import sonnet_form

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, BEST, GREY, BLUE, BROWN = "#333333", "#c62828", "#7d8590", "#1c6dd0", "#b35900"
PAGE_COLORS = {  # in the page, which has a light and a dark theme
    INK: "currentColor",
    BEST: "var(--best)",
    GREY: "var(--grey)",
    BLUE: "var(--blue)",
    BROWN: "var(--brown)",
}
CURVES = {  # name in the history -> label, color
    "train_loss": ("training loss", GREY),
    "val_loss": ("validation loss", BLUE),
    "dev_loss": ("dev loss", BROWN),
    "dev_accuracy": ("accuracy", BLUE),
    "dev_macro_f1": ("macro F1", BROWN),
    "dev_chrf": ("dev chrF", BROWN),
}


@dataclass(frozen=True)
class Task:
    """A task's title, the metric that selects its best epoch, and the curves of each panel."""

    title: str
    selection_metric: str
    panels: dict[str, tuple[str, ...]]  # title -> names in the history


TASKS = {
    "paraphrase": Task(
        title="Paraphrase detection",
        selection_metric="dev_accuracy",
        panels={
            "loss, nats": ("train_loss", "dev_loss"),
            "accuracy and macro F1": ("dev_accuracy", "dev_macro_f1"),
        },
    ),
    "sonnet": Task(
        title="Sonnet generation",
        selection_metric="val_loss",
        panels={
            "loss, nats per token": ("train_loss", "val_loss", "dev_loss"),
            "dev chrF": ("dev_chrf",),
        },
    ),
}


def paraphrase_report(record: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The page of a run, with its dev pairs in the order of `rows`.

    A row has id, first, second, label, predicted ("no" or "yes") and the answer's probability.
    """
    columns = ("first", "second", "label", "predicted", "probability", "id")
    pairs = [[row[column] for column in columns] for row in rows]
    return _page(record, pairs=pairs, counts=confusion_counts(rows).tolist(), answers=ANSWERS)


def sonnet_report(record: dict[str, Any], poems: list[tuple[Sonnet, Sonnet]]) -> str:
    """The page of a run, with each dev poem next to Shakespeare's sonnet of the same number."""
    shown = [
        {
            "number": generated.number,
            "given": generated.lines[:GIVEN_LINES],
            "endings": [
                (author, poem.lines[GIVEN_LINES:], sonnet_form([poem], sources=[]))
                for author, poem in ((record["model"], generated), ("Shakespeare", gold))
            ],
        }
        for generated, gold in poems
    ]
    return _page(record, poems=shown)


def confusion_counts(rows: list[dict[str, Any]]) -> np.ndarray:
    """The number of pairs by label and by answer, [2,2], "no" before "yes"."""
    counts = Counter((row["label"], row["predicted"]) for row in rows)
    return np.array([[counts[label, answer] for answer in ANSWERS] for label in ANSWERS])


def picture(record: dict[str, Any], counts: np.ndarray | None = None) -> bytes:
    """A PNG of losses and scores by epoch, 800 pixels wide, with the best epoch marked.

    `counts` [2,2] is a confusion matrix as returned by `confusion_counts`.
    """
    flags, titles = record["arguments"], _panel_titles(record)
    figure = new_figure(figsize=(8, 3.6), dpi=100)
    n = len(titles) + (counts is not None)
    axes = [figure.add_subplot(1, n, i + 1) for i in range(n)]
    for axis, title in zip(axes, titles, strict=False):
        _draw_curves(axis, record, title)
    if counts is not None:
        _draw_confusion(axes[-1], counts)
    title = f"{record['model']}, {_method(record)}, rank {record['adapter']['rank']}, "
    title += f"learning rate {scientific(flags['lr'])}, seed {flags['seed']}"
    figure.suptitle(title, fontsize=11, color=INK)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def new_figure(**options: Any) -> "Figure":
    """A matplotlib figure created without pyplot.

    Importing matplotlib fails if MPLBACKEND names a backend that is not installed, as in a command
    started from a Jupyter cell, so the import happens without it, and the backend is set later.
    """
    if "matplotlib" not in sys.modules and (backend := os.environ.pop("MPLBACKEND", None)):
        import matplotlib

        os.environ["MPLBACKEND"] = backend
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    from matplotlib.figure import Figure

    return Figure(**options, layout="constrained")


def scientific(value: float) -> str:
    """A learning rate in short scientific notation: 1e-4, 1.5e-4."""
    return np.format_float_scientific(value, trim="-", exp_digits=1)


def best_epoch(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of the epoch whose adapter was kept."""
    return [epoch for epoch in history if epoch["is_best"]][-1]


def _panel_titles(record: dict[str, Any]) -> list[str]:
    """The titles of the panels of curves; there are none for an imported adapter."""
    was_trained = "train_loss" in best_epoch(record["history"])
    return list(TASKS[record["task"]].panels) if was_trained else []


def describe_run(record: dict[str, Any]) -> list[str]:
    """Sentences that say what was trained, how, on which files, and at what cost."""
    adapter = f"{_method(record)} with {_describe_adapter(record['adapter'])} of {record['model']}."
    if not _panel_titles(record):
        return [adapter, "It was imported, not trained here.", *_describe_decoding(record)]
    flags, n_epochs = record["arguments"], record["arguments"]["epochs"]
    data = Path(flags["para_train" if record["task"] == "paraphrase" else "sonnet_path"]).name
    if flags["limit_train"]:
        data = f"the first {flags['limit_train']:,} examples of {data}"
    training = (
        f"Trained on {data}: {n_epochs} epoch{'s' * (n_epochs > 1)}, "
        f"batch size {flags['batch_size']}, "
        f"learning rate {scientific(flags['lr'])} ({flags['lr_schedule']}, "
        f"{flags['warmup_ratio']:.0%} warm-up), weight decay {flags['weight_decay']:g}, "
        f"seed {flags['seed']}."
    )
    if "train_seconds" not in record:
        so_far = "Training is unfinished; this is the best epoch so far."
        return [adapter, training, so_far, *_describe_decoding(record)]
    n_run, processes = len(record["history"]), record["processes"]
    return [
        adapter,
        training + f" Training stopped early, after epoch {n_run}." * (n_run < n_epochs),
        f"{record['trainable_parameters']:,} of {record['total_parameters']:,} parameters "
        f"trained in {record['train_seconds']:,.0f} s on {record['device']}"
        f"{f' with {processes} processes' if processes > 1 else ''}, "
        f"peak memory {record['peak_memory_mb']:,.0f} MB.",
        *_describe_decoding(record),
    ]


def _describe_decoding(record: dict[str, Any]) -> list[str]:
    """A sentence on how the poems shown were written; none for pairs."""
    if record["task"] != "sonnet":
        return []
    how, trained_with = record["predicted_with"], record["arguments"]
    names = {"temperature", "top_p", "greedy", "repetition_penalty", "no_repeat_ngram_size"}
    names -= {"temperature", "top_p"} if how["greedy"] else set()
    text = f"sampled at temperature {how['temperature']:g}, top-p {how['top_p']:g}"
    text = f"Poems shown are {'decoded greedily' if how['greedy'] else text}"
    differs = any(how[name] != trained_with[name] for name in names & trained_with.keys())
    return [text + ("; the chrF by epoch is of the training run's decoding." if differs else ".")]


def _describe_adapter(adapter: dict[str, Any]) -> str:
    size = f"rank {adapter['rank']}, alpha {adapter['alpha']:g}, dropout {adapter['dropout']:g}"
    blocks = "every block"
    if adapter["layers"] is not None:
        blocks = f"blocks {_listed(adapter['layers'])}"
    if "targets" in adapter:
        return f"{size} on {_listed(adapter['targets'])} in {blocks}"
    positions = adapter["positions"]
    where = "all positions" if positions == "all" else f"prompt positions {positions}"
    return (
        f"{size}, activation {adapter['activation']}, at {where} after "
        f"{_listed(adapter['locations'])} in {blocks}"
    )


def _listed(items: Sequence[Any]) -> str:
    """The items as "a, b and c"."""
    *most, last = map(str, items)
    return f"{', '.join(most)} and {last}" if most else last


def _method(record: dict[str, Any]) -> str:
    kind = record["adapter"].get("type")
    return f"ReFT ({kind})" if kind else "LoRA"


def _page(record: dict[str, Any], **parts: Any) -> str:
    """Render the template of the record's task."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    best, titles = best_epoch(record["history"]), _panel_titles(record)
    when = f"at epoch {best['epoch']} of {record['arguments']['epochs']}" if titles else "imported"
    return environment.get_template(f"report_{record['task']}.html.jinja").render(
        run=record,
        task=TASKS[record["task"]],
        method=_method(record),
        settings=describe_run(record),
        best=best,
        when=when,
        charts=[_inline_svg(record, title) for title in titles],
        labels={name: label for name, (label, _) in CURVES.items()},
        **parts,
    )


def _inline_svg(record: dict[str, Any], title: str) -> Markup:
    """A panel as an `<svg>` element with the page's colors and font."""
    figure = new_figure(figsize=(4.6, 3.2))
    _draw_curves(figure.subplots(), record, title)
    from matplotlib import rc_context

    drawn = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(drawn, format="svg", transparent=True, metadata=no_metadata)
    svg = drawn.getvalue()
    svg = re.sub(r' (xmlns(:\w+)?="[^"]*"|id="[\w.]+_\d+")', "", svg[svg.index("<svg") :])
    names = ", ".join(CURVES[name][0] for name in TASKS[record["task"]].panels[title])
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{names} by epoch"', 1)
    for color, page_color in PAGE_COLORS.items():
        svg = svg.replace(color, page_color)
    return Markup(svg)


def _draw_curves(axis: "Axes", record: dict[str, Any], title: str) -> None:
    history, task = record["history"], TASKS[record["task"]]
    epochs, best = [epoch["epoch"] for epoch in history], best_epoch(history)
    for name in task.panels[title]:
        label, color = CURVES[name]
        values = [epoch[name] for epoch in history]
        axis.plot(epochs, values, "o-", ms=4, color=color, label=label)
    axis.axvline(best["epoch"], color=BEST, lw=1, ls=":", zorder=0)
    x_label = f"epoch; best: {best['epoch']}"
    if task.selection_metric in task.panels[title]:
        axis.plot(best["epoch"], best[task.selection_metric], "*", ms=13, color=BEST)
        x_label += f" ({best[task.selection_metric]:.4g})"
    axis.set_title(title, fontsize=10, color=INK)
    axis.set_xlabel(x_label, fontsize=9, color=INK)
    axis.set_xlim(0.6, epochs[-1] + 0.4)
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axis.tick_params(labelsize=9, color=INK, labelcolor=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["bottom", "left"]].set_color(INK)
    axis.grid(alpha=0.2, color=INK)
    axis.legend(
        loc="upper center",  # below the axis, clear of the curves
        bbox_to_anchor=(0.5, -0.2),
        ncols=3,
        fontsize=8,
        frameon=False,
        labelcolor=INK,
    )


def _draw_confusion(axis: "Axes", counts: np.ndarray) -> None:
    axis.imshow(counts, cmap="Blues", vmin=0, vmax=counts.max() * 1.4)
    for label, predicted in np.ndindex(2, 2):
        n, share = counts[label, predicted], counts[label, predicted] / max(1, counts[label].sum())
        color = "white" if n > 0.7 * counts.max() else INK
        text = f"{n:,}\n{share:.0%}"
        axis.text(predicted, label, text, ha="center", va="center", fontsize=11, color=color)
    axis.set_title("dev pairs", fontsize=10, color=INK)
    axis.set_xticks([0, 1], ANSWERS, fontsize=9)
    axis.set_yticks([0, 1], ANSWERS, fontsize=9)
    axis.set_xlabel("predicted paraphrase", fontsize=9)
    axis.set_ylabel("paraphrase", fontsize=9)
