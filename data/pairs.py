"""Question-pair files: find the columns, read every row, say which were left out or are odd."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.text import read_lines
from modules.settings import UserError

COLUMNS = {  # column -> its names in the course's, Kaggle's and GLUE's files
    "id": ("id", "test_id", "idx"),
    "sentence1": ("sentence1", "question1"),
    "sentence2": ("sentence2", "question2"),
    "is_duplicate": ("is_duplicate", "label"),
}
LABELS = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}
LONGEST_RECORD = 8  # lines; a quoted question may hold line ends


@dataclass
class Pairs:
    """The usable rows of a question-pair file, with the lines left out and those kept though odd.

    Both are line numbers by reason.
    """

    path: Path
    ids: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)
    second: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)  # empty for a file without labels
    left_out: dict[str, list[int]] = field(default_factory=dict)
    kept: dict[str, list[int]] = field(default_factory=dict)
    columns: str = ""  # their names in the header

    def summary(self) -> str:
        """One line: how many rows were read, from which columns, left out or odd, why and where."""
        text = f"{self.path}: {len(self.ids):,} pairs from {self.columns}"
        for what, reasons in (("left out", self.left_out), ("kept", self.kept)):
            for reason, lines in reasons.items():
                where = ", ".join(map(str, lines[:10]))
                more = f" and {len(lines) - 10} more" if len(lines) > 10 else ""
                text += f"; {what} {len(lines)} with {reason} (line {where}{more})"
        return text


def read_pairs(path: str | Path, labelled: bool, limit: int | None = None) -> Pairs:
    """Read a tab- or comma-separated file whose header names the columns as COLUMNS lists them.

    Faulty rows are left out; of a file without labels only those without an id. `limit` keeps only
    the first so many usable rows. Raises UserError for an unusable file.
    """
    path = Path(path)
    lines = read_lines(path)
    delimiter = "\t" if "\t" in lines[0] else ","
    names = [name.strip().strip('"') for name in lines[0].split(delimiter)]
    columns = _find_columns(path, names, labelled)
    is_quoted = delimiter == "," or "question1" not in names  # GLUE's files do not quote
    pairs, seen = Pairs(path, columns=", ".join(names[i] for i in columns)), set()
    for line_number, row, oddities in _records(lines, delimiter, is_quoted, len(names)):
        if len(pairs.ids) == limit:
            break
        values = [row[i].strip() if i < len(row) else "" for i in columns]
        is_whole = len(row) == len(names)
        fault = _fault(values, is_whole, labelled)
        if fault:
            pairs.left_out.setdefault(fault, []).append(line_number)
            continue
        if not is_whole:
            oddities.append("a wrong number of fields")
        if not (values[1] and values[2]):
            oddities.append("an empty question")
        if values[0] in seen:
            oddities.append("the id of an earlier row")
        for oddity in oddities:
            pairs.kept.setdefault(oddity, []).append(line_number)
        seen.add(values[0])
        pairs.ids.append(values[0])
        pairs.first.append(values[1])
        pairs.second.append(values[2])
        pairs.labels.extend(LABELS[label] for label in values[3:])
    if not pairs.ids:
        raise UserError(f"no usable row in {pairs.summary()}")
    return pairs


def _find_columns(path: Path, names: list[str], labelled: bool) -> list[int]:
    """Where id, first and second question and, if labelled, label are among a header's names."""
    wanted = list(COLUMNS)[: 4 if labelled else 3]
    found = {want: [i for i, n in enumerate(names) if n in COLUMNS[want]] for want in wanted}
    allowed = "; ".join(" or ".join(COLUMNS[want]) for want in wanted)
    for fault, count in (("no column", 0), ("two columns for", 2)):
        faulty = [want for want in wanted if min(len(found[want]), 2) == count]
        if faulty:
            raise UserError(
                f"{path} has {fault} {', '.join(faulty)}: its first line must be a header, "
                f"separated by tabs or commas, with {allowed}"
            )
    return [places[0] for places in found.values()]


def _records(
    lines: list[str], delimiter: str, is_quoted: bool, n_fields: int
) -> Iterator[tuple[int, list[str], list[str]]]:
    """Line number, fields and oddities of each record after the header.

    A quoted question may run over several lines. Where the quotes are not those of CSV the line is
    a record as it stands, so that a stray quote costs at most its own line.
    """
    i = 1
    while i < len(lines):
        row, length, oddities = lines[i].split(delimiter), 1, []
        if is_quoted and '"' in lines[i]:
            record = (f"{line}\n" for line in lines[i : i + LONGEST_RECORD])
            reader = csv.reader(record, delimiter=delimiter, strict=True)
            try:
                fields = next(reader)
            except csv.Error:
                fields = []
            if len(fields) == n_fields and not any("\t" in value for value in fields):
                row, length = fields, reader.line_num
            else:
                oddities = ["quotes that are not those of CSV"]
        if lines[i].strip():
            yield i + 1, row, oddities
        i += length


def _fault(values: list[str], is_whole: bool, labelled: bool) -> str | None:
    """Why a row is left out, if it is; one is whole if it has as many fields as the header."""
    if not is_whole and (labelled or not any(values[1:])):
        return "a wrong number of fields"
    if labelled and not (values[1] and values[2]):
        return "an empty question"
    if not values[0]:
        return "no id"
    if "\n" in values[0] or "\r" in values[0]:
        return "an id of several lines"
    if labelled and values[3] not in LABELS:
        return "a label other than 0 and 1" if values[3] else "no label"
    return None
