"""Question-pair files: find the columns, check every row, say which were left out."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.text import LONGEST_LINE, read_lines
from modules.settings import UserError

LABELS = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}
LONGEST_RECORD = 8  # lines; a quoted question may hold line ends


@dataclass
class Pairs:
    """The usable rows of a question-pair file, and the lines left out, by reason."""

    path: Path
    ids: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)
    second: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)  # empty for a file without labels
    left_out: dict[str, list[int]] = field(default_factory=dict)

    def summary(self) -> str:
        """One line: how many rows were read, how many left out, why and where."""
        text = f"{self.path}: {len(self.ids):,} pairs"
        for reason, lines in self.left_out.items():
            where = ", ".join(map(str, lines[:10]))
            more = f" and {len(lines) - 10} more" if len(lines) > 10 else ""
            text += f"; left out {len(lines)} with {reason} (line {where}{more})"
        return text


def read_pairs(path: str | Path, labelled: bool, limit: int | None = None) -> Pairs:
    """Read a tab-separated file: columns id, sentence1, sentence2 and, if labelled, is_duplicate.

    `limit` keeps only the first so many usable rows. Raises UserError for an unusable file.
    """
    path = Path(path)
    lines = read_lines(path)
    csv.field_size_limit(LONGEST_LINE)
    header = [name.strip() for name in _parse(lines[0]) or []]
    wanted = ["id", "sentence1", "sentence2"] + ["is_duplicate"] * labelled
    missing = [name for name in wanted if name not in header]
    if missing:
        raise UserError(
            f"{path} has no column {', '.join(missing)}: its first line must be a tab-separated "
            f"header with {', '.join(wanted)}"
        )
    columns = [header.index(name) for name in wanted]
    pairs = Pairs(path)
    for line_number, row in _records(lines, len(header)):
        if limit is not None and len(pairs.ids) == limit:
            break
        values = [row[column].strip() for column in columns] if row else []
        fault = _fault(values)
        if fault:
            pairs.left_out.setdefault(fault, []).append(line_number)
            continue
        pairs.ids.append(values[0])
        pairs.first.append(values[1])
        pairs.second.append(values[2])
        pairs.labels.extend(LABELS[label] for label in values[3:])
    if not pairs.ids:
        raise UserError(f"no usable row in {pairs.summary()}")
    return pairs


def _parse(text: str) -> list[str] | None:
    """The fields of one record, None where a quote stays open; no field where it is no record."""
    try:
        rows = list(csv.reader([text, "next"], delimiter="\t"))
    except csv.Error:
        return []
    return rows[0] if len(rows) == 2 else None


def _records(lines: list[str], n_fields: int) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each record after the header; no fields for a faulty one.

    A quoted question may run over several lines, but a stray quote costs its own line only, not
    all up to the next quote in the file.
    """
    i = 1
    while i < len(lines):
        for length in range(1, LONGEST_RECORD + 1):
            row = _parse("\n".join(lines[i : i + length]))
            if row is not None:
                break
        if row is None or len(row) != n_fields or any("\t" in value for value in row):
            row, length = [], 1
        if lines[i].strip():
            yield i + 1, row
        i += length


def _fault(values: list[str]) -> str | None:
    if not values:
        return "a wrong number of fields"
    if not (values[1] and values[2]):
        return "an empty question"
    if "\n" in values[0] or "\r" in values[0]:
        return "an id of several lines"
    if len(values) == 4 and not values[3]:
        return "no label"
    if len(values) == 4 and values[3] not in LABELS:
        return "a label other than 0 and 1"
    return None
