"""Read a text file line by line, or report in one sentence why it cannot be read."""

from pathlib import Path

from modules.settings import UserError

LONGEST_LINE = 10_000_000  # bytes


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file without line endings; a final newline adds an empty line."""
    lines, raw, number = [], b"\n", 0
    try:
        with open(path, "rb") as file:
            while raw.endswith(b"\n"):
                raw, number = file.readline(LONGEST_LINE + 1), number + 1
                if len(raw) > LONGEST_LINE:
                    raise UserError(f"{path}: line {number} is longer than {LONGEST_LINE:,} bytes")
                if b"\0" in raw:
                    raise UserError(f"{path} is not UTF-8 text: line {number} has a NUL byte")
                lines.append(raw.removesuffix(b"\n").removesuffix(b"\r").decode())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: see data/README.md for where to get it") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: line {number} cannot be decoded") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    lines[0] = lines[0].removeprefix("\ufeff")
    return lines
