"""Errors that a user can fix, and dataclass fields that carry help text and valid values."""

import math
from collections.abc import Callable, Iterable
from dataclasses import Field, field, fields
from typing import Any


class UserError(ValueError):
    """An error that a user can fix; its message is one sentence."""


def setting(
    default: Any,
    help: str,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
    choices: Iterable[str] | None = None,
    check: Callable[[Any], Any] | None = None,
) -> Any:
    """A field of a config dataclass, with its default, help text and valid values.

    Valid values are a range, a set of choices, or those for which `check` raises no UserError.
    """
    bounds = {"above": above, "least": least, "below": below, "most": most}
    about = {"help": help, "bounds": bounds, "choices": choices, "check": check}
    return field(default=default, metadata=about)


def check_settings(config: Any) -> None:
    """Raise UserError for the first field of a config that has an invalid value."""
    for f in fields(config):
        try:
            check_setting(f, getattr(config, f.name))
        except UserError as error:
            raise UserError(f"{type(config).__name__}.{f.name}: {error}") from None


def check_setting(f: Field, value: Any) -> None:
    """Raise UserError unless `value`, or each item of a tuple, is valid for a `setting` field."""
    choices = f.metadata["choices"]
    if f.metadata["check"]:
        f.metadata["check"](value)
    elif choices is not None:
        chosen = value if isinstance(value, tuple) else (value,)
        if not chosen or set(chosen) - set(choices):
            shown = ", ".join(map(str, chosen))
            raise UserError(f"{shown or 'nothing'!r} is not one of {', '.join(choices)}")
    elif value is not None and not isinstance(value, bool):
        for number in value if isinstance(value, tuple) else (value,):
            kind = int if isinstance(f.default, int | None) else float
            _check_number(number, kind, **f.metadata["bounds"])


def _check_number(
    value: Any, kind: type, above: float, least: float, below: float, most: float
) -> None:
    """Raise UserError unless `value` is a finite number of this kind (int or float) in range."""
    fits = isinstance(value, int) or (kind is float and isinstance(value, float))
    if fits and math.isfinite(value) and above < value < below and least <= value <= most:
        return
    limits = {"above": above, "of {} or more": least, "below": below, "of {} or less": most}
    allowed = []
    for text, limit in limits.items():
        if math.isfinite(limit):
            text = text if "{}" in text else f"{text} {{}}"
            allowed.append(text.format(f"{limit:g}" if kind is float else f"{limit}"))
    noun = "a number" if kind is float else "a whole number"
    shown = f"{value:g}" if isinstance(value, float) else repr(value)
    raise UserError(f"{shown} is not {noun} {' and '.join(allowed)}".rstrip())
