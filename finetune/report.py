"""Reports of a run to look at: an HTML file that opens anywhere without a network, and a PNG."""

import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from data.sonnets import GIVEN_LINES, Sonnet
from datasets import ANSWERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, BEST, GREY, BLUE, BROWN = "#333333", "#c62828", "#7d8590", "#1c6dd0", "#b35900"
TITLES = {"paraphrase": "Paraphrase detection", "sonnet": "Sonnet generation"}
CURVES = {  # name in the history -> label, color
    "train_loss": ("training loss", GREY),
    "val_loss": ("validation loss", BLUE),
    "dev_loss": ("dev loss", BROWN),
    "dev_accuracy": ("accuracy", BLUE),
    "dev_macro_f1": ("macro F1", BROWN),
    "dev_chrf": ("chrF", BROWN),
}
PANELS = {  # task -> title of a panel -> its curves
    "paraphrase": {
        "loss, nats": ("train_loss", "dev_loss"),
        "dev accuracy and macro F1": ("dev_accuracy", "dev_macro_f1"),
    },
    "sonnet": {
        "loss, nats per token": ("train_loss", "val_loss", "dev_loss"),
        "dev chrF": ("dev_chrf",),
    },
}


def paraphrase_report(record: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The page of a run with its dev pairs, in the order of `rows`.

    A row has id, first, second, label, predicted ("no" or "yes") and the answer's probability.
    """
    columns = ("first", "second", "label", "predicted", "probability", "id")
    pairs = json.dumps([[row[column] for column in columns] for row in rows], ensure_ascii=False)
    return _page(record, confusion_counts(rows), pairs=pairs)


def sonnet_report(record: dict[str, Any], poems: list[tuple[Sonnet, Sonnet]]) -> str:
    """The page of a run with its dev poems, each beside Shakespeare's of the same number."""
    return _page(record, poems=poems, n_given=GIVEN_LINES)


def confusion_counts(rows: list[dict[str, Any]]) -> np.ndarray:
    """[2,2]: pairs by label, then by answer, each no before yes."""
    counts = Counter((row["label"], row["predicted"]) for row in rows)
    return np.array([[counts[label, answer] for answer in ANSWERS] for label in ANSWERS])


def picture(record: dict[str, Any], counts: np.ndarray | None = None) -> bytes:
    """A PNG of losses and scores by epoch, 800 pixels wide, with the best epoch marked.

    `counts` [2,2] are a confusion matrix as `confusion_counts` gives it.
    """
    figure = _draw(record, counts)
    figure.suptitle(f"{record['name']}, seed {record['arguments']['seed']}", color=INK)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def new_figure(**options: Any) -> "Figure":
    """A matplotlib figure without pyplot.

    MPLBACKEND is hidden meanwhile: in a command started from a Jupyter cell it names a backend that
    may not be installed, and matplotlib could not be imported.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    from matplotlib.figure import Figure

    if backend:
        os.environ["MPLBACKEND"] = backend
    return Figure(**options, layout="constrained")


def best_epoch(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of the epoch whose adapter was kept."""
    return [epoch for epoch in history if epoch["is_best"]][-1]


def settings_in_words(record: dict[str, Any]) -> list[str]:
    """Sentences that say what was trained, how, on which files, and at what cost."""
    method = {"lora": "LoRA", "reft": "ReFT"}[record["method"]]
    adapter = f"{method} in {record['model']}: {_listed(record['adapter'])}."
    if not _was_trained(record):
        return [adapter, "It was imported, not trained here."]
    flags = record["arguments"]
    data = Path(flags["para_train" if record["task"] == "paraphrase" else "sonnet_path"]).name
    names = ("limit_train", "epochs", "batch_size", "lr", "lr_schedule", "warmup_ratio")
    names = (*names, "weight_decay", "seed")
    training = f"Trained on {data}: {_listed({name: flags[name] for name in names})}."
    if "train_seconds" not in record:
        return [adapter, training, "The training is unfinished; this is its best epoch so far."]
    if len(record["history"]) < flags["epochs"]:
        training += f" It stopped early, after epoch {len(record['history'])}."
    cost = (
        f"{record['trainable_parameters']:,} trainable parameters of "
        f"{record['total_parameters']:,}, {record['train_seconds']:,.0f} s on "
        f"{record['device']}, {record['peak_memory_mb']:,.0f} MB at most."
    )
    return [adapter, training, cost]


def _listed(values: dict[str, Any]) -> str:
    """Names and values, without those that are None."""
    words = {name.replace("_", " "): v for name, v in values.items() if v is not None}
    words |= {k: ", ".join(map(str, v)) for k, v in words.items() if isinstance(v, tuple | list)}
    return "; ".join(f"{name} {value}" for name, value in words.items())


def _was_trained(record: dict[str, Any]) -> bool:
    """False for an adapter that was imported to predict with, which has no curves."""
    return "train_loss" in best_epoch(record["history"])


def _page(record: dict[str, Any], counts: np.ndarray | None = None, **parts: Any) -> str:
    """Fill the template of the record's task."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    when = "imported"
    if _was_trained(record):
        best, n_epochs = best_epoch(record["history"]), record["arguments"]["epochs"]
        when = f"at epoch {best['epoch']} of {n_epochs}"
    figure = _draw(record, counts)
    return environment.get_template(f"report_{record['task']}.html.jinja").render(
        run=record,
        title=TITLES[record["task"]],
        settings=settings_in_words(record),
        flags=record["arguments"] | record["predicted_with"] | record["versions"],
        when=when,
        chart=_svg(figure) if figure.axes else "",
        counts=counts,
        **parts,
    )


def _svg(figure: "Figure") -> Markup:
    """A figure as an `<svg>` element, the same for the same figure."""
    from matplotlib import rc_context

    drawn = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.hashsalt": "report"}):
        figure.savefig(drawn, format="svg", metadata=no_metadata)
    _, tag, rest = drawn.getvalue().partition("<svg")
    return Markup(f'{tag} role="img" aria-label="losses and scores by epoch"{rest}')


def _draw(record: dict[str, Any], counts: np.ndarray | None = None) -> "Figure":
    """The panels of a run's curves, and of the confusion matrix if there is one."""
    panels = PANELS[record["task"]] if _was_trained(record) else {}
    figure = new_figure(figsize=(8, 3.6), dpi=100)
    n = len(panels) + (counts is not None)
    axes = [figure.add_subplot(1, n, i + 1) for i in range(n)]
    for axis, (title, names) in zip(axes, panels.items(), strict=False):
        _draw_curves(axis, record["history"], title, names)
    if counts is not None:
        _draw_confusion(axes[-1], counts)
    return figure


def _draw_curves(
    axis: "Axes", history: list[dict[str, Any]], title: str, names: tuple[str, ...]
) -> None:
    epochs, best = [epoch["epoch"] for epoch in history], best_epoch(history)
    for name in names:
        label, color = CURVES[name]
        axis.plot(epochs, [epoch[name] for epoch in history], "o-", ms=4, color=color, label=label)
    axis.axvline(best["epoch"], color=BEST, lw=1, ls=":", zorder=0)
    axis.set_title(title, fontsize=10, color=INK)
    axis.set_xlabel(f"epoch; {best['epoch']} is the best", fontsize=9, color=INK)
    axis.set_xlim(0.6, epochs[-1] + 0.4)
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axis.tick_params(labelsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.2)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)}  # where no curve is
    axis.legend(**below, ncols=3, fontsize=8, frameon=False)


def _draw_confusion(axis: "Axes", counts: np.ndarray) -> None:
    axis.pcolormesh([0, 1], [0, 1], counts, cmap="Blues", vmin=0, vmax=counts.max() * 1.4)
    axis.invert_yaxis()
    axis.set_aspect("equal")
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
