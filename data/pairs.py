"""Read question-pair files: find the columns, read the rows, report those left out or irregular."""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.text import LONGEST_LINE, read_lines
from modules.settings import UserError

COLUMNS = {  # column -> its names in the course's, Kaggle's and GLUE's files
    "id": ("id", "test_id", "idx"),
    "sentence1": ("sentence1", "question1"),
    "sentence2": ("sentence2", "question2"),
    "is_duplicate": ("is_duplicate", "label"),
}
LABELS = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}
LONGEST_RECORD = 8  # lines; a quoted question may contain line breaks


@dataclass
class Pairs:
    """The usable rows of a question-pair file.

    `left_out` and `kept` (rows kept although they are irregular) map reasons to line numbers.
    """

    path: Path
    ids: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)
    second: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)  # empty for a file without labels
    left_out: dict[str, list[int]] = field(default_factory=dict)
    kept: dict[str, list[int]] = field(default_factory=dict)
    layout: str = ""  # the columns and separator, if they differ from the course's files

    def summary(self) -> str:
        """One line: number of rows read, their columns, and the rows left out or irregular."""
        text = f"{self.path}: {len(self.ids):,} pairs"
        if self.layout:
            text += f" from {self.layout}"
        for what, reasons in (("left out", self.left_out), ("kept", self.kept)):
            for reason, lines in reasons.items():
                where = ", ".join(map(str, lines[:10]))
                more = f" and {len(lines) - 10} more" if len(lines) > 10 else ""
                text += f"; {what} {len(lines)} with {reason} (line {where}{more})"
        return text


@dataclass(frozen=True)
class Layout:
    """How a file's rows are formatted, according to its header."""

    delimiter: str
    quoted: bool  # if False, quotes are ordinary characters and every line is a row
    n_fields: int
    columns: tuple[int, ...]  # indices of id, both questions and, if present, label
    description: str


def read_pairs(path: str | Path, has_labels: bool, limit: int | None = None) -> Pairs:
    """Read a tab- or comma-separated file with a header that uses the names in COLUMNS.

    Invalid rows are left out; without labels, a row only needs a readable id to be kept. `limit`
    is the maximum number of rows to return. Raises UserError if the file is unusable.
    """
    path = Path(path)
    lines = read_lines(path)
    csv.field_size_limit(LONGEST_LINE)
    layout = _layout(path, lines, has_labels)
    pairs, seen = Pairs(path, layout=layout.description), set()
    for line_number, row, oddities in _records(lines, layout):
        if limit is not None and len(pairs.ids) == limit:
            break
        values = [row[i].strip() if i < len(row) else "" for i in layout.columns]
        is_whole = len(row) == layout.n_fields
        fault = _reason_to_skip(values, is_whole, has_labels)
        if fault:
            pairs.left_out.setdefault(fault, []).append(line_number)
            continue
        if not is_whole:
            oddities.append("the wrong number of fields")
        if not (values[1] and values[2]):
            oddities.append("an empty question")
        if values[0] in seen:
            oddities.append("a duplicate id")
        for oddity in oddities:
            pairs.kept.setdefault(oddity, []).append(line_number)
        seen.add(values[0])
        pairs.ids.append(values[0])
        pairs.first.append(values[1])
        pairs.second.append(values[2])
        pairs.labels.extend(LABELS[label] for label in values[3:])
    if not pairs.ids:
        raise UserError(f"no usable rows in {pairs.summary()}")
    return pairs


def _layout(path: Path, lines: list[str], has_labels: bool) -> Layout:
    """The layout according to the header; raises UserError unless each column occurs exactly once.

    Of tab-separated files with columns question1 and question2, some have no quoting, as GLUE's.
    """
    delimiter = "\t" if "\t" in lines[0] else ","
    names = [name.strip().strip('"') for name in lines[0].split(delimiter)]
    wanted = list(COLUMNS)[: 4 if has_labels else 3]
    columns = {want: [i for i, n in enumerate(names) if n in COLUMNS[want]] for want in wanted}
    missing = [want for want, found in columns.items() if not found]
    doubled = [want for want, found in columns.items() if len(found) > 1]
    if missing or doubled:
        fault = f"no column {', '.join(missing)}" if missing else f"two columns for {doubled[0]}"
        raise UserError(
            f"{path} has {fault}: its first line must be a tab- or comma-separated header with "
            f"{'; '.join(' or '.join(COLUMNS[want]) for want in wanted)}"
        )
    taken = tuple(found[0] for found in columns.values())
    quoted = delimiter == "," or "question1" not in names or _has_quoted_fields(lines)
    description = ""
    if delimiter == "," or [names[i] for i in taken] != wanted:
        separated = "comma-separated" if delimiter == "," else "tab-separated"
        quoting = "" if quoted else ", quotes taken literally"
        description = f"{', '.join(names[i] for i in taken)} ({separated}{quoting})"
    return Layout(delimiter, quoted, len(names), taken, description)


def _has_quoted_fields(lines: list[str]) -> bool:
    """True if most fields of a tab-separated file that contain a quote are enclosed in quotes."""
    fields = [field for line in lines if '"' in line for field in line.split("\t") if '"' in field]
    enclosed = [field for field in fields if field[0] == field[-1] == '"' and len(field) > 1]
    return 2 * len(enclosed) > len(fields)


def _records(lines: list[str], layout: Layout) -> Iterator[tuple[int, list[str], list[str]]]:
    """Yield the line number, fields and irregularities of each record after the header.

    A quoted question may span several lines. A line with invalid CSV quotes is a record by
    itself, so that a stray quote affects at most its own line.
    """
    i = 1
    while i < len(lines):
        row, length, oddities = lines[i].split(layout.delimiter), 1, []
        if layout.quoted and '"' in lines[i]:
            record = (f"{line}\n" for line in lines[i : i + LONGEST_RECORD])
            reader = csv.reader(record, delimiter=layout.delimiter, strict=True)
            try:
                fields = next(reader)
            except csv.Error:
                fields = []
            is_merged = layout.delimiter == "\t" and any("\t" in value for value in fields)
            if len(fields) == layout.n_fields and (reader.line_num == 1 or not is_merged):
                row, length = fields, reader.line_num
            else:
                oddities = ["invalid CSV quotes"]
        if lines[i].strip():
            yield i + 1, row, oddities
        i += length


def _reason_to_skip(values: list[str], is_whole: bool, has_labels: bool) -> str | None:
    """The reason to leave a row out, or None. `is_whole`: it has as many fields as the header.

    Without labels, a row that is not whole is kept if it starts like a row and not like the
    continuation of one.
    """
    begins_like_a_row = re.fullmatch(r"[\w.,-]+", values[0]) and any(values[1:])
    if not is_whole and (has_labels or not begins_like_a_row):
        return "the wrong number of fields"
    if has_labels and not (values[1] and values[2]):
        return "an empty question"
    if not values[0]:
        return "no id"
    if "\n" in values[0] or "\r" in values[0]:
        return "a multi-line id"
    if has_labels and not values[3]:
        return "no label"
    if has_labels and values[3] not in LABELS:
        return "a label other than 0 or 1"
    return None
