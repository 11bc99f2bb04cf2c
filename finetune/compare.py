"""Compare finished runs, best first, with mean and standard deviation over seeds.

python -m finetune.compare                                  # all runs in runs/
python -m finetune.compare reft-gpt2-3 lora-gpt2-3 --by trainable
python -m finetune.compare --csv runs.csv --png runs.png
"""

import argparse
import csv
import io
from dataclasses import fields
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from finetune import ending, identity, report, run
from finetune.arguments import HelpFormatter, project_path
from finetune.files import write_files
from finetune.sampling import SamplingConfig
from modules.settings import UserError

SCORES = {  # task -> column -> key in a record's final metrics; runs are ranked by the first
    "paraphrase": {"accuracy": "dev_accuracy", "macro_f1": "dev_macro_f1", "dev_loss": "dev_loss"},
    "sonnet": {"dev_loss": "dev_loss", "val_loss": "val_loss", "chrf": "dev_chrf"},
}
FORMATS = {  # column -> format in the table; the model is in the run names below it
    **{"n": "", "method": "", "model": "", "rank": "", "trainable": ",", "lr": "g", "epochs": ""},
    **{"accuracy": ".3f", "macro_f1": ".3f", "val_loss": ".3f", "dev_loss": ".3f", "chrf": ".1f"},
    **{"seconds": ",.0f", "memory_mb": ",.0f"},
}
MORE_IS_BETTER = {"accuracy", "macro_f1", "chrf"}
# Flags that have a column, or do not affect the adapter.
NOT_COMPARED = {"seed", "lr", "epochs", "lora_rank", "reft_rank"}
NOT_COMPARED |= identity.PREDICTION_FLAGS | identity.RUNTIME_FLAGS | identity.OTHER_FLAGS
# Flags of the last prediction that affect the scores.
SCORING = {field.name for field in fields(SamplingConfig)} | {"dev_sonnet_path", "dev_gold_path"}
Group = dict[str, Any]  # runs that differ only in seed: column -> mean, `<column>_sd`, and more


def main() -> None:
    args = get_args()
    named = [folder for name in args.runs for folder in run.find_runs(name, args.runs_dir)]
    folders = list(dict.fromkeys(named)) or run.run_folders(args.runs_dir)
    unfinished = [folder.name for folder in folders if not run.is_finished(folder)]
    records = read_records([folder for folder in folders if run.is_finished(folder)])
    tasks = {task: ranked(records, task, args.by) for task in SCORES}
    tasks = {task: groups for task, groups in tasks.items() if groups}
    for task, groups in tasks.items():
        print(f"{task}, mean ± standard deviation over n seeds", format_groups(groups), sep="\n")
    for name in unfinished:
        print(f"unfinished (repeat its command with --resume): {name}")
    if not folders:
        raise run.no_finished_run(args.runs_dir)
    if not records:
        raise UserError("none of these runs can be compared")
    if args.csv:
        write_files({args.csv: csv_text(sum(tasks.values(), []))})
    if args.png:
        write_files({args.png: picture(tasks)})


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m finetune.compare",
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    help = "name or folder of a run, or the beginning of several names [all runs in --runs_dir]"
    parser.add_argument("runs", nargs="*", metavar="RUN", help=help)
    help, default = "folder of the runs [%(default)s]", project_path("runs")
    parser.add_argument("--runs_dir", type=Path, default=default, metavar="FOLDER", help=help)
    help = f"column to sort by: {', '.join(FORMATS)} [accuracy, dev_loss]"
    parser.add_argument("--by", choices=FORMATS, metavar="COLUMN", help=help)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write all columns to FILE")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also plot the scores to FILE")
    return parser.parse_args()


def read_records(folders: list[Path]) -> list[dict[str, Any]]:
    """The records of finished runs, each once, even if there are links to it or copies of it.

    Prints what is wrong with a damaged record.
    """
    records = {}
    for folder in folders:
        try:
            record = run.read_record(folder)
            records.setdefault((record["name"], *conditions(record).items()), record)
        except UserError as error:
            print(f"left out: {error}")
    return list(records.values())


def ranked(records: list[dict[str, Any]], task: str, by: str | None) -> list[Group]:
    """A task's runs in groups, sorted by the column `by` if they have it, otherwise best first."""
    alike: dict[tuple, list[dict[str, Any]]] = {}
    for record in records:
        if record["task"] == task:
            key = (record["recipe"], record["model"], tuple(conditions(record).items()))
            alike.setdefault(key, []).append(record)
    groups = list(map(summarize, alike.values()))
    column = by if all(by in group for group in groups) else next(iter(SCORES[task]))
    return sorted(groups, key=lambda group: group[column], reverse=column in MORE_IS_BETTER)


def conditions(record: dict[str, Any]) -> dict[str, str]:
    """What else affects a run's scores: how it was predicted with, and its number of processes."""
    values = {k: v for k, v in record["predicted_with"].items() if k in SCORING}
    return shown_values(values | {"processes": record["processes"]})


def shown_values(flags: dict[str, Any]) -> dict[str, str]:
    """Flags as text, sorted, with files by their names."""
    paths = identity.INPUT_FLAGS
    return {k: Path(str(v)).name if k in paths else str(v) for k, v in sorted(flags.items())}


def summarize(records: list[dict[str, Any]]) -> Group:
    """The group of runs that differ only in their seed."""
    first = records[0]
    arguments, adapter = first["arguments"], first["adapter"]
    flags = {name: arguments[name] for name in arguments.keys() - NOT_COMPARED}
    group = {
        "task": first["task"],
        "runs": [record["name"] for record in records],
        "flags": shown_values(flags) | conditions(first),
        "n": len(records),
        "method": f"{first['method']} {adapter.get('type', '')}".strip(),
        "model": first["model"],
        "rank": adapter["rank"],
        "trainable": first["trainable_parameters"],
        "lr": arguments["lr"],
        "epochs": arguments["epochs"],
        "seconds": fmean(record["train_seconds"] for record in records),
        "memory_mb": fmean(record["peak_memory_mb"] for record in records),
    }
    for column, name in SCORES[first["task"]].items():
        scores = [record["final"][name] for record in records]
        group[column] = fmean(scores)
        if len(scores) > 1:
            group[f"{column}_sd"] = stdev(scores)
    return group


def format_groups(groups: list[Group]) -> str:
    """A numbered table of the groups, then their run names and the flags that differ."""
    columns = [name for name in FORMATS if name in groups[0] and name != "model"]
    rows = [["", *columns]]
    rows += [[str(i), *(cell(g, column) for column in columns)] for i, g in enumerate(groups, 1)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    lines.append("")
    for i, group in enumerate(groups, 1):
        name, *others = group["runs"]
        if others:  # in the shell's brace notation
            name = f"{name[:-6]}{{{','.join(other[-6:] for other in group['runs'])}}}"
        lines.append(f"{i:>{widths[0]}}  {name}")
        for flag, value in group["flags"].items():
            if any(other["flags"].get(flag, value) != value for other in groups):
                lines[-1] += f"  {flag}={value}"
    return "\n".join([*lines, ""])


def cell(group: Group, column: str) -> str:
    """A value as shown in the table, with its standard deviation if there is one."""
    text = format(group[column], FORMATS[column])
    if f"{column}_sd" in group:
        text += f"±{format(group[f'{column}_sd'], FORMATS[column])}"
    return text


def csv_text(groups: list[Group]) -> str:
    """One line per group, with all columns and the standard deviations of the scores."""
    text = io.StringIO()
    scores = dict.fromkeys(f"{column}_sd" for task in SCORES.values() for column in task)
    columns = ["task", "runs", *FORMATS, *scores]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for group in groups:
        writer.writerow(group | {"runs": " ".join(group["runs"])})
    return text.getvalue()


def picture(tasks: dict[str, list[Group]]) -> bytes:
    """A PNG, 800 pixels wide: each group's score and standard deviation, one panel per task."""
    heights = [len(groups) + 2 for groups in tasks.values()]
    figure = report.new_figure(figsize=(8, 0.4 + 0.3 * sum(heights)), dpi=100)
    axes = figure.subplots(len(tasks), squeeze=False, height_ratios=heights)[:, 0]
    for axis, (task, groups) in zip(axes, tasks.items(), strict=True):
        column, labels = next(iter(SCORES[task])), []
        for i, group in enumerate(groups, 1):
            color = report.BLUE if group["method"] == "lora" else report.BROWN
            deviation = group.get(f"{column}_sd")
            axis.errorbar(group[column], i, xerr=deviation, fmt="o", capsize=4, color=color)
            labels.append(f"{i}  {group['method']}, rank {group['rank']}, lr {group['lr']:g}")
        axis.set_yticks(range(1, len(groups) + 1), labels)
        axis.set_ylim(len(groups) + 0.5, 0.5)
        axis.set_title(f"{task}: {column}, mean and standard deviation", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


if __name__ == "__main__":
    ending.run(main)
