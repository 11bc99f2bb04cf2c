"""Compare finished runs: best first, those that differ only in seed as mean and deviation.

python -m finetune.compare                                  # all runs in runs/
python -m finetune.compare reft-gpt2-3 lora-gpt2-3 --by trainable
python -m finetune.compare --csv runs.csv --png runs.png
"""

import argparse
import csv
import io
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from finetune.arguments import in_project
from finetune.files import write_files
from finetune.run import (
    DATA,
    MACHINE,
    NEITHER,
    PREDICTION,
    RECORD,
    find_run,
    is_finished,
    run_folders,
)
from modules.settings import UserError

SCORES = {  # task -> column -> its name in a record's final metrics; the first one decides
    "paraphrase": {"accuracy": "dev_accuracy", "macro_f1": "dev_macro_f1", "dev_loss": "dev_loss"},
    "sonnet": {"val_loss": "val_loss", "dev_loss": "dev_loss", "chrf": "dev_chrf"},
}
# Column -> how the table shows it: settings, which are the same for a group, and measurements.
SETTINGS = {"method": "", "model": "", "rank": "", "trainable": ",", "lr": "g", "epochs": ""}
MEASURED = {
    **{"accuracy": ".3f", "macro_f1": ".3f", "val_loss": ".3f", "dev_loss": ".3f", "chrf": ".1f"},
    **{"seconds": ",.0f", "memory_mb": ",.0f"},
}
FORMATS = SETTINGS | MEASURED
MORE_IS_BETTER = {"accuracy", "macro_f1", "chrf"}
LEFT_OUT_FIRST = ["model", "memory_mb", "dev_loss", "epochs", "seconds"]  # where lines are short
# Flags that columns show, or that decide no adapter.
NOT_COMPARED = {"seed", "lr", "epochs", "lora_rank", "reft_rank"} | PREDICTION | MACHINE | NEITHER


@dataclass(frozen=True)
class Group:
    """Runs that differ only in seed: their names, the flags that no column shows, and values.

    `values` has the mean of each measured column, and its deviation under `<column>_sd`.
    """

    names: list[str]
    flags: dict[str, str]
    values: dict[str, Any]

    def cell(self, column: str) -> str:
        """A value as the table shows it; scores with their deviation."""
        text = format(self.values[column], FORMATS[column])
        if f"{column}_sd" not in self.values or column in ("seconds", "memory_mb"):
            return text
        return f"{text}±{format(self.values[f'{column}_sd'], FORMATS[column])}"

    @property
    def title(self) -> str:
        """The names, as a shell reads them."""
        stems, digests = zip(*((name[:-6], name[-6:]) for name in self.names), strict=True)
        return f"{stems[0]}{{{','.join(digests)}}}" if len(digests) > 1 else self.names[0]


def main() -> None:
    args = get_args()
    folders = [find_run(run, args.runs_dir) for run in args.runs] or run_folders(args.runs_dir)
    records, notes = [], []
    for folder in dict.fromkeys(folders):
        if is_finished(folder):
            try:
                records.append(read_record(folder))
            except UserError as error:
                notes.append(f"left out: {error}")
        else:
            notes.append(f"unfinished (its command with --resume resumes it): {folder.name}")
    tasks = {task: ranked(records, task, args.by) for task in SCORES}
    tasks = {task: groups for task, groups in tasks.items() if groups}
    width = shutil.get_terminal_size(fallback=(1000, 24)).columns  # a pipe takes any
    for task, groups in tasks.items():
        print(f"{task}, mean±standard deviation of n seeds", format_groups(groups, width), sep="\n")
    print(*notes, sep="\n")
    if not records:
        raise UserError(
            f"no finished run in {args.runs_dir}: train one, for example by "
            "python lora_paraphrase_detection.py --demo"
        )
    if args.csv:
        write_files({args.csv: csv_text(tasks)})
    if args.png:
        write_files({args.png: picture(tasks, args.by)})


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m finetune.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    help = "a name, its beginning, or a folder [all in --runs_dir]"
    parser.add_argument("runs", nargs="*", metavar="RUN", help=help)
    help = "where the runs are [%(default)s]"
    parser.add_argument(
        "--runs_dir", type=Path, default=in_project("runs"), metavar="FOLDER", help=help
    )
    help = f"order by {', '.join(FORMATS)} [accuracy, val_loss]"
    parser.add_argument("--by", choices=FORMATS, metavar="COLUMN", help=help)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all columns there, too")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the scores there, too")
    return parser.parse_args()


def read_record(folder: Path) -> dict[str, Any]:
    """A finished run's record with its values by column; raises UserError if it is damaged."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        arguments, adapter, final = record["arguments"], record["adapter"], record["final"]
        record["name"], record["recipe"] = folder.name, str(record["recipe"])
        record["values"] = {
            "method": " ".join([record["method"], adapter.get("type", "")]).strip(),
            "model": record["model"],
            "rank": int(adapter["rank"]),
            "trainable": int(record["trainable_parameters"]),
            "lr": float(arguments["lr"]),
            "epochs": int(arguments["epochs"]),
            **{column: float(final[name]) for column, name in SCORES[record["task"]].items()},
            "seconds": float(record["train_seconds"]),
            "memory_mb": float(record["peak_memory_mb"]),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{folder / RECORD} is damaged ({reason})") from None
    return record


def ranked(records: list[dict[str, Any]], task: str, by: str | None) -> list[Group]:
    """The runs of a task, those that differ only in seed together, best first."""
    recipes: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["task"] == task:
            recipes.setdefault(record["recipe"], []).append(record)
    groups = list(map(summarize, recipes.values()))
    column = deciding(task, by)
    return sorted(groups, key=lambda g: g.values[column], reverse=column in MORE_IS_BETTER)


def compared_flags(record: dict[str, Any]) -> dict[str, str]:
    """The flags that decide an adapter and that no column shows; of data files, the names."""
    flags = {name: value for name, value in record["arguments"].items() if name not in NOT_COMPARED}
    return {name: Path(v).name if name in DATA and v else str(v) for name, v in flags.items()}


def summarize(records: list[dict[str, Any]]) -> Group:
    """A group of runs of one recipe."""
    values = dict(records[0]["values"])
    for column in values.keys() & MEASURED.keys():
        numbers = [record["values"][column] for record in records]
        values[column] = fmean(numbers)
        if len(numbers) > 1:
            values[f"{column}_sd"] = stdev(numbers)
    return Group([record["name"] for record in records], compared_flags(records[0]), values)


def deciding(task: str, by: str | None) -> str:
    """The column to order a task's groups by: `by` if it has such a column."""
    other_scores = set().union(*SCORES.values()) - SCORES[task].keys()
    return next(iter(SCORES[task])) if by is None or by in other_scores else by


def format_groups(groups: list[Group], width: int) -> str:
    """The groups as numbered lines, columns left out until they fit, then their names."""
    columns, left_out = [column for column in FORMATS if column in groups[0].values], []
    while True:
        rows = [["", "n", *columns]]
        for i, group in enumerate(groups, 1):
            rows.append([str(i), str(len(group.names)), *map(group.cell, columns)])
        widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        droppable = [column for column in LEFT_OUT_FIRST if column in columns]
        if not droppable or sum(widths) + 2 * len(widths) - 2 <= width:
            break
        columns.remove(droppable[0])
        left_out.append(droppable[0])
    lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    if left_out:
        lines.append(f"no room for {', '.join(left_out)}: --csv FILE has all")
    lines.append("")
    for i, group in enumerate(groups, 1):
        own, others = group.flags, [other.flags for other in groups]
        differing = [flag for flag in own if len({f.get(flag, own[flag]) for f in others}) > 1]
        settings = "".join(f"  {flag}={own[flag]}" for flag in differing)
        lines.append(f"{i:>{widths[0]}}  {group.title}{settings}")
    return "\n".join([*lines, ""])


def csv_text(tasks: dict[str, list[Group]]) -> str:
    """A line a group: all columns, and the standard deviations of what was measured."""
    text = io.StringIO()
    columns = ["task", "runs", "n", *FORMATS, *(f"{column}_sd" for column in MEASURED)]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for task, groups in tasks.items():
        for group in groups:
            names = {"task": task, "runs": " ".join(group.names), "n": len(group.names)}
            writer.writerow(names | group.values)
    return text.getvalue()


def picture(tasks: dict[str, list[Group]], by: str | None) -> bytes:
    """A PNG, 800 pixels wide: each group's score and its deviation, tasks one below the other."""
    from finetune import report  # and with it what scores poems, which a table does not need

    heights = [len(groups) + 2 for groups in tasks.values()]
    figure = report.new_figure(figsize=(8, 0.4 + 0.3 * sum(heights)), dpi=100)
    axes = figure.subplots(len(tasks), squeeze=False, height_ratios=heights)[:, 0]
    for axis, (task, groups) in zip(axes, tasks.items(), strict=True):
        column = deciding(task, by if by in SCORES[task] else None)
        for row, group in enumerate(groups):
            color = report.BLUE if group.values["method"] == "lora" else report.BROWN
            mean, deviation = group.values[column], group.values.get(f"{column}_sd")
            axis.errorbar(mean, row, xerr=deviation, fmt="o", capsize=4, color=color)
        labels = [
            f"{i}  {group.cell('method')}, rank {group.cell('rank')}, lr {group.cell('lr')}, "
            f"n={len(group.names)}"
            for i, group in enumerate(groups, 1)
        ]
        axis.set_yticks(range(len(groups)), labels)
        axis.set_ylim(len(groups) - 0.5, -0.5)
        axis.set_title(f"{task}: {column}, mean and standard deviation", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
