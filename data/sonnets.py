"""Sonnet files: poems that stand under their numbers."""

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
    r"\s*(?:(?i:sonnet)\s+)?"
    r"(?:(?P<arabic>[0-9]{1,9})|(?P<roman>(?=\w)(?:C{0,3})(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})))"
    r"[.:]?\s*"
)
ROMAN = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}
END = re.compile(r"\s*(\*\*\* ?END OF|End of (the )?Project Gutenberg|(THE END|FINIS)\W*$)")
GIVEN_LINES = 3  # of a sonnet to be continued
N_LINES = {99: 15, 126: 12}  # of Shakespeare's sonnets that have not 14


@dataclass(frozen=True)
class Sonnet:
    """A poem and its number."""

    number: int
    lines: tuple[str, ...]  # as poem_lines gives them

    @property
    def prompt(self) -> str:
        """The given lines and the line end that starts the next."""
        return "".join(f"{line}\n" for line in self.lines[:GIVEN_LINES])


def poem_lines(text: str) -> list[str]:
    """The lines of a poem: not blank, and not a number alone, which could start the next poem.

    The word "I" is a line.
    """
    lines = [line.rstrip() for line in text.split("\n")]
    return [line for line in lines if line and (line.strip() == "I" or not MARK.fullmatch(line))]


def read_sonnets(path: str | Path, limit: int | None = None) -> list[Sonnet]:
    """Read poems that stand each under its number, alone on a line.

    What comes before the first number or after an END line is skipped. `limit` keeps only the first
    so many. Prints a line for a poem whose number does not follow the one before, or whose length
    is not the usual one. Raises UserError for an unusable file.
    """
    poems: list[tuple[int, list[str]]] = []
    where: list[str] = []  # each poem's, for messages
    lines = read_lines(Path(path))
    for i, line in enumerate(lines):
        number = _number(line)
        if number is not None and not (poems and line.strip() == "I"):
            poems.append((number, []))
            where.append(f"{path}, line {i + 1}: poem {number}")
        elif poems and END.match(line) and not lines[i - 1].strip():
            break
        elif poems:
            poems[-1][1].extend(poem_lines(line))
    if not poems:
        raise UserError(f"{path} has no poem under a number, alone on a line")
    empty = [str(number) for number, poem in poems if not poem]
    if empty:
        raise UserError(f"{path} has no line under the number {', '.join(empty)}")
    usual = Counter(len(poem) for _, poem in poems).most_common(1)[0][0]
    for place, (number, poem) in zip(where, poems, strict=True):
        if len(poem) not in (usual, N_LINES.get(number)):
            print(f"{place} has {len(poem)} lines, most have {usual}")
    for place, ((before, _), (number, _)) in zip(where[1:], pairwise(poems), strict=True):
        if number != before + 1:
            print(f"{place} comes after poem {before}")
    return [Sonnet(number, tuple(poem)) for number, poem in poems[:limit]]


def _number(line: str) -> int | None:
    """The number that a line consists of, if it does."""
    match = MARK.fullmatch(line)
    if not match:
        return None
    if match["arabic"]:
        return int(match["arabic"])
    values = [ROMAN[letter] for letter in match["roman"]]
    following = [*values[1:], 0]
    return sum(-v if v < after else v for v, after in zip(values, following, strict=True))


def split_sonnets(sonnets: list[Sonnet], seed: int) -> tuple[list[Sonnet], list[Sonnet]]:
    """Nine tenths to train on and one tenth (one poem at least) to validate, by chance."""
    if len(sonnets) < 2:
        raise UserError("one poem cannot be split into some to train on and some to validate")
    order = np.random.default_rng(seed).permutation(len(sonnets))
    chosen = [sonnets[i] for i in order]
    cut = max(1, round(len(sonnets) / 10))
    return chosen[cut:], chosen[:cut]
