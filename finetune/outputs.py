"""A run's output for people: predictions in the course's formats, the table at the end, logs."""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from data.sonnets import Sonnet
from datasets import TokenizedPairs
from finetune import report
from finetune.metrics import pair_table

SONNETS_HEADER = "--Generated Sonnets-- \n\n"
FORMATS = {  # key of a run's record -> how its value is shown
    "trainable_parameters": "{:,}",
    "train_seconds": "{:.1f}",
    "examples_per_second": "{:,.1f}",
    "tokens_per_second": "{:,.0f}",
    "peak_memory_mb": "{:,.0f}",
}


def paraphrase_files(
    record: dict[str, Any],
    *,
    dev: TokenizedPairs,
    dev_logits: Tensor,
    test: TokenizedPairs,
    test_logits: Tensor,
) -> dict[str, str | bytes]:
    """The contents for `Run.write`: predictions from logits [N,2], and the report on dev."""
    rows = pair_table(dev_logits, dev)
    return {
        "para_dev_out": format_predictions(dev.pairs.ids, dev_logits),
        "para_test_out": format_predictions(test.pairs.ids, test_logits),
        "report": report.paraphrase_report(record, rows),
        "picture": report.picture(record, report.confusion_counts(rows)),
    }


def sonnet_files(
    record: dict[str, Any],
    samples: list[list[Sonnet]],
    *,
    dev: list[Sonnet],
    gold: list[Sonnet],
) -> dict[str, str | bytes]:
    """The contents for `Run.write`: the first sample of each held-out sonnet, all samples if there
    are more, and the report with the dev poems next to Shakespeare's.
    """
    files = {
        "sonnet_out": format_sonnets(samples[0]),
        "report": report.sonnet_report(record, list(zip(dev, gold, strict=True))),
        "picture": report.picture(record),
    }
    if len(samples) > 1:
        files["samples"] = format_sonnets(chain(*zip(*samples, strict=True)))
    return files


def format_predictions(ids: Iterable[str], logits: Tensor) -> str:
    """The course's format: a line `id, 0|1` per pair, in the file's order, from logits [N,2]."""
    lines = ["id \t Predicted_Is_Paraphrase \n"]
    classes = logits.argmax(1).tolist()
    lines += [f"{id_}, {class_} \n" for id_, class_ in zip(ids, classes, strict=True)]
    return "".join(lines)


def format_sonnets(sonnets: Iterable[Sonnet]) -> str:
    """The course's format, which its own reader and `data.sonnets.read_sonnets` accept."""
    return SONNETS_HEADER + "".join(map(format_sonnet, sonnets))


def format_sonnet(sonnet: Sonnet) -> str:
    """Number and lines, with a blank line before and after."""
    return "\n".join(["", str(sonnet.number), *sonnet.lines, "", ""])


def format_table(record: dict[str, Any], files: dict[str, Path]) -> str:
    """A run's results and files, one per line, in two columns.

    `record` is what `Run.record` returns. Next to the form of the poems is Shakespeare's.
    """
    final = dict(record["final"])
    shakespeare = final.pop("shakespeare", {})
    best = report.best_epoch(record["history"])["epoch"]
    rows: dict[str, Any] = {"run": record["name"], "best epoch": best or "imported"}
    for name, value in final.items():
        gold = f" (Shakespeare {shakespeare[name]:.4g})" if name in shakespeare else ""
        rows[name] = f"{value:.4g}{gold}" if gold else f"{value:.4f}"
    rows |= {name: form.format(record[name]) for name, form in FORMATS.items() if name in record}
    rows |= files
    names = [name.replace("_", " ") for name in rows]
    width = max(map(len, names))
    values = zip(names, rows.values(), strict=True)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in values)


class TensorBoardLog:
    """Logs values at a step to a folder; without a folder, does nothing."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.writer = None

    def __call__(self, values: dict[str, float], step: int) -> None:
        if self.folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        try:  # created here, so that what a stopped run logged after this step is purged
            self.writer = self.writer or SummaryWriter(self.folder, purge_step=step)
            for key, value in values.items():
                self.writer.add_scalar(key, value, step)
            self.writer.flush()
        except OSError as error:  # not worth ending the run
            print(f"no more logs: {self.folder} cannot be written: {error.strerror or error}")
            self.folder = None
