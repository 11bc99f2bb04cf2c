"""Sonnet files: poems that stand under their numbers."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.text import read_lines
from modules.settings import UserError

SONNET_NUMBER = re.compile(r"\s*([0-9]{1,9})\s*")
GIVEN_LINES = 3  # of a sonnet to be continued


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
    """The lines of a poem: not blank, and not a number alone, which would start the next poem."""
    lines = [line.rstrip() for line in text.split("\n")]
    return [line for line in lines if line and not SONNET_NUMBER.fullmatch(line)]


def read_sonnets(path: str | Path, limit: int | None = None) -> list[Sonnet]:
    """Read poems that stand each under its number, alone on a line; what comes before is skipped.

    `limit` keeps only the first so many. Raises UserError for an unusable file.
    """
    sonnets: list[tuple[int, list[str]]] = []
    for line in read_lines(Path(path)):
        number = SONNET_NUMBER.fullmatch(line)
        if number:
            sonnets.append((int(number[1]), []))
        elif sonnets:
            sonnets[-1][1].extend(poem_lines(line))
    if not sonnets:
        raise UserError(f"{path} has no poem under a number, alone on a line")
    empty = [str(number) for number, lines in sonnets if not lines]
    if empty:
        raise UserError(f"{path} has no line under the number {', '.join(empty)}")
    return [Sonnet(number, tuple(lines)) for number, lines in sonnets[:limit]]


def split_sonnets(sonnets: list[Sonnet], seed: int) -> tuple[list[Sonnet], list[Sonnet]]:
    """Nine tenths to train on and one tenth (one poem at least) to validate, by chance."""
    if len(sonnets) < 2:
        raise UserError("one poem cannot be split into some to train on and some to validate")
    order = np.random.default_rng(seed).permutation(len(sonnets))
    chosen = [sonnets[i] for i in order]
    cut = max(1, round(len(sonnets) / 10))
    return chosen[cut:], chosen[:cut]
