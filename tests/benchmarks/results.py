"""Benchmark results as JSON files, and the tables that the documents show of them.

    python -m tests.benchmarks.results

writes the table of docs/results/NAME.json into README.md and docs/*.md, between the line
`<!-- docs/results/NAME.json -->` and the next `<!-- end -->`. A result has rows, which map columns
to values, and the command, date and machine of the measurement; it may also have texts to show.
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import textwrap
from datetime import date
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from tests.conftest import ROOT

Row = dict[str, Any]  # column -> text, number or [mean, standard deviation]
RESULTS = ROOT / "docs" / "results"
PLACE = re.compile(r"(<!-- docs/results/([\w-]+)\.json -->\n).*?(<!-- end -->)", re.DOTALL)


def about() -> dict[str, Any]:
    """The running command, with date, machine and versions."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    spec = sys.modules["__main__"].__spec__
    paths = [Path(word) for word in sys.argv[1:]]
    given = [f"data/{path.name}" if path.is_absolute() else str(path) for path in paths]
    words = [f"python -m {spec.name}" if spec else "", *map(shlex.quote, given)]
    return {
        "command": " ".join(words),
        "date": date.today().isoformat(),
        "machine": cpu_name(),
        "commit": commit,
        "python": platform.python_version(),
    } | versions


def cpu_name() -> str:
    """The processor and how many of its cores this process may use."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    name = found[1] if found else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = "" if torch.get_num_threads() == cores else f", {torch.get_num_threads()} thread"
    return f"{name}, {cores} cores{threads}"


def save(name: str, rows: list[Row], **more: Any) -> None:
    """Write the rows and `more` to docs/results/NAME.json, and print the table."""
    RESULTS.mkdir(exist_ok=True)
    content = {"about": about(), "rows": rows} | more
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if rows:
        print(markdown(rows))


def load(name: str) -> dict[str, Any]:
    """The content of docs/results/NAME.json; empty if there is no such file."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def markdown(rows: list[Row]) -> str:
    """A Markdown table of the rows, with every column that any row has."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[cell(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    """A value as shown in a table: counts and large values without decimals, 0.5 as .500."""
    if isinstance(value, list):
        return " ± ".join(map(cell, value))
    if isinstance(value, str | None):
        return value or ""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.{digits}f}"


def caption(result: dict[str, Any]) -> str:
    """The command, date, machine, versions and number of examples of a result."""
    about, counts = result["about"], result.get("examples", {})
    day = date.fromisoformat(about["date"])
    text = (
        f"`{about['command']}`, {day.day} {day:%B %Y}, {about['machine']}, commit "
        f"{about['commit']}, PyTorch {about['torch']}, transformers {about['transformers']}, "
        f"PEFT {about['peft']}"
    )
    if counts:
        text += "; examples: " + ", ".join(f"{n:,} {split}" for split, n in counts.items())
    if "seeds" in result:
        text += f"; mean ± standard deviation over {len(result['seeds'])} seeds"
    text += "."
    return textwrap.fill(text, 100, break_on_hyphens=False, break_long_words=False)


def filled(text: str) -> str:
    """The document with its tables filled in from the result files."""

    def table(place: re.Match) -> str:
        begin, name, end = place.groups()
        result = load(name)
        parts = [markdown(result["rows"]), caption(result)]
        for title, text in result.get("texts", {}).items():
            parts += [f"{title}:", f"```text\n{text}\n```"]
        return begin + "\n\n".join(parts) + f"\n{end}"

    return PLACE.sub(table, text)


def main() -> None:
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))):
        text = path.read_text(encoding="utf-8")
        if filled(text) != text:
            path.write_text(filled(text), encoding="utf-8")
            print(f"filled {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
