"""Read sonnet files: poems, each below its number."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from data.text import read_lines
from modules.settings import UserError

# A number alone on a line: 18, 18., XVIII, Sonnet 18, SONNET XVIII.
MARK = re.compile(
    r"\s*(?P<word>(?i:sonnet)\s+)?"
    r"(?:(?P<arabic>[0-9]{1,9})|(?P<roman>(?=\w)(?:C{0,3})(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})))"
    r"[.:]?\s*"
)
ROMAN = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}
START = re.compile(r"\*\*\* ?START OF (THE|THIS) PROJECT GUTENBERG")
END = re.compile(r"\s*(?i:\*\*\* ?END OF|End of (the )?Project Gutenberg)")
THE_END = re.compile(r"\s*(THE END|FINIS)\W*")
AUTHOR = re.compile(r"\s*by( [A-Z][\w.'-]*){1,4}\s*")  # the line below a title
GIVEN_LINES = 3  # lines of a sonnet that form the prompt
N_LINES = {99: 15, 126: 12}  # Shakespeare's sonnets that do not have 14 lines


@dataclass(frozen=True)
class Sonnet:
    """A poem and its number."""

    number: int
    lines: tuple[str, ...]  # as returned by poem_lines

    @property
    def prompt(self) -> str:
        """The given lines, each with a newline."""
        return "".join(f"{line}\n" for line in self.lines[:GIVEN_LINES])


def poem_lines(text: str) -> list[str]:
    """The lines of a poem, without blank lines and bare numbers, which could start another poem.

    A bare "I" is kept: it is the pronoun.
    """
    lines = [line.rstrip() for line in text.split("\n")]
    return [line for line in lines if line and (line.strip() == "I" or not MARK.fullmatch(line))]


def read_sonnets(path: str | Path, limit: int | None = None) -> list[Sonnet]:
    """Read poems, each below its number on a line of its own; text before the first is skipped.

    `limit` is the maximum number of poems to return. Prints a line for each poem with an unexpected
    number or length, and for text that is left out. Raises UserError if the file is unusable.
    """
    poems = _numbered_poems(path, read_lines(Path(path)))
    if not poems:
        raise UserError(f"{path} has no poems: each must be below its number on a line of its own")
    empty = [str(poem.number) for poem in poems if not poem.lines]
    if empty:
        raise UserError(f"{path} has no text below the number {', '.join(empty)}")
    _warn(path, poems)
    return [Sonnet(poem.number, tuple(poem.lines)) for poem in poems[:limit]]


@dataclass(frozen=True)
class _Poem:
    """A poem being read, with the line that its number is on."""

    number: int
    line_number: int
    lines: list[str]


def _mark(line: str) -> tuple[int, tuple[bool, bool]] | None:
    """The number that a line consists of, with its style: (follows "Sonnet", is Roman)."""
    match = MARK.fullmatch(line)
    if not match:
        return None
    style = (bool(match["word"]), bool(match["roman"]))
    if match["arabic"]:
        return int(match["arabic"]), style
    values = [ROMAN[letter] for letter in match["roman"]]
    following = [*values[1:], 0]
    number = sum(-v if v < after else v for v, after in zip(values, following, strict=True))
    return number, style


def _starts(lines: list[str]) -> dict[int, int]:
    """The numbers that start a poem, by line index: those in the most common style.

    A year with a title and an author below it does not start a poem, nor does the word "I".
    """
    marks = {i: mark for i, line in enumerate(lines) if (mark := _mark(line))}
    styles = Counter(style for _, style in dict.fromkeys(marks.values())).most_common(1)
    starts: dict[int, int] = {}
    for i, (number, style) in marks.items():
        below = [line for line in lines[i + 1 : i + 8] if line.strip()][:2]
        is_year = number >= 1000 and any(map(AUTHOR.fullmatch, below))
        is_verse = starts and lines[i].strip() == "I"
        if style == styles[0][0] and not is_year and not is_verse:
            starts[i] = number
    return starts


def _is_title(line: str) -> bool:
    return line.isupper() and len(line.strip()) > 3  # not I or O!


def _first_book(path: str | Path, lines: list[str]) -> list[str]:
    """The lines with those outside the first Project Gutenberg book that has numbers made blank.

    A file that is no such book is left as it is.
    """
    begin = 0
    for i, line in enumerate(lines):
        if START.match(line) and begin and any(map(_mark, lines[begin:i])):
            print(f"{path}, line {i + 1}: left out the next Project Gutenberg book")
            return [""] * begin + lines[begin:i]
        if START.match(line):
            begin = i + 1
    return [""] * begin + lines[begin:]


def _numbered_poems(path: str | Path, lines: list[str]) -> list[_Poem]:
    """The poems of a file, without Project Gutenberg's header and footer.

    A title in capitals below a blank line starts other text, skipped up to a higher number that
    does not continue a sequence in that text. After THE END, only the next number is read.
    """
    lines = _first_book(path, lines)
    starts = _starts(lines)
    poems: list[_Poem] = []
    is_open = False  # whether lines belong to the last poem
    skipped, highest = -1, math.inf  # the last number skipped; the highest that may follow
    for i, line in enumerate(lines):
        is_below_blank = poems and poems[-1].lines and not lines[i - 1].strip()
        is_footer, is_end = bool(END.match(line)), bool(THE_END.fullmatch(line))
        if i in starts:
            may_follow = not poems or poems[-1].number < starts[i] <= highest
            if is_open or (may_follow and starts[i] != skipped + 1):
                poems.append(_Poem(starts[i], i + 1, []))
                is_open = True
            else:
                skipped = starts[i]
        elif is_below_blank and (is_footer or (is_open and (is_end or _is_title(line)))):
            is_other_work = not (is_footer or is_end)
            if is_other_work or _has_more_poems(lines, starts, i, poems[-1].number):
                print(f"{path}, line {i + 1}: left out {line.strip()!r} and the text below it")
            if is_footer:
                break
            is_open, skipped, highest = False, -1, poems[-1].number + 1 if is_end else math.inf
        elif is_open:
            poems[-1].lines.extend(poem_lines(line))
    return poems


def _has_more_poems(lines: list[str], starts: dict[int, int], end: int, number: int) -> bool:
    """True if a higher number below the line `end` has some lines of text below it."""
    later = [i for i in starts if i > end and starts[i] > number]
    below = [[line for line in lines[i + 1 : i + 9] if line.strip()] for i in later]
    return any(len(verse) >= GIVEN_LINES for verse in below)


def _warn(path: str | Path, poems: list[_Poem]) -> None:
    """Print a line for each poem of unusual length, or whose number is out of sequence.

    Checks lengths only if most poems have the same one, and numbers only if most are consecutive.
    """
    usual, n_usual = Counter(len(poem.lines) for poem in poems).most_common(1)[0]
    numbers = [poem.number for poem in poems]
    n_steps = sum(after - number == 1 for number, after in pairwise(numbers))
    for i, poem in enumerate(poems):
        where, n_lines = f"{path}, line {poem.line_number}: poem {poem.number}", len(poem.lines)
        if n_usual > len(poems) / 2 and n_lines not in (usual, N_LINES.get(poem.number)):
            print(f"{where} has {n_lines} lines, but most have {usual}")
        before, after = numbers[max(i - 1, 0) : i], numbers[i + 1 : i + 2]
        if n_steps > len(poems) / 2 and [poem.number - 1] != before and [poem.number + 1] != after:
            print(f"{where} is out of sequence next to {' and '.join(map(str, before + after))}")


def split_sonnets(sonnets: list[Sonnet], seed: int) -> tuple[list[Sonnet], list[Sonnet]]:
    """Split at random: nine tenths for training, one tenth (at least one poem) for validation."""
    if len(sonnets) < 2:
        raise UserError("one poem cannot be split into training and validation: use at least two")
    order = np.random.default_rng(seed).permutation(len(sonnets))
    chosen = [sonnets[i] for i in order]
    cut = max(1, round(len(sonnets) / 10))
    return chosen[cut:], chosen[:cut]
