"""Write a file whole or not at all, and by one run at a time."""

import contextlib
import fcntl
import filecmp
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

_claims: dict[Path, int] = {}  # lock file -> its descriptor


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it replaces `path`, else it is removed.

    Raises OSError, with a sentence, where that cannot be; `path` is then as it was.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    temporary = path.with_name(f".{path.name}.tmp")
    with _told(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _to_disk(temporary)
            os.replace(temporary, path)
            _to_disk(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`; on success it becomes `path`, else it is removed.

    Raises OSError where `path` is there and neither an empty folder nor the same, file by file.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.tmp")
    with _told(path):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.iterdir():
                file.chmod(0o644)  # safetensors keeps its files from others
                _to_disk(file)
            if not _same_files(temporary, path):
                os.replace(temporary, path)
                _to_disk(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def claim(paths: Iterable[Path]) -> None:
    """Have these files to write for this process alone, until `release` or its end.

    Makes their folders. Raises OSError where one cannot be written or another run has it.
    """
    for path in paths:
        with _told(path):
            if path.exists() and not path.is_file():
                what = "a folder" if path.is_dir() else "no regular file"
                raise OSError(f"{path} is {what}, a file is to be written there")
            path.parent.mkdir(parents=True, exist_ok=True)
            target = Path(os.path.realpath(path))
            lock = target.with_name(f".{target.name}.lock")
            while lock not in _claims:
                _lock(path, lock)


def release() -> None:
    """Give back all that was claimed."""
    for lock, descriptor in _claims.items():
        with contextlib.suppress(OSError):
            lock.unlink()
        os.close(descriptor)
    _claims.clear()


def _lock(path: Path, lock: Path) -> None:
    """Lock a file, which its process cannot leave locked; not if it was just removed."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OSError(
            f"another run is writing {path}: wait for its end, or give this one other files"
        ) from None
    except OSError:
        pass  # a file system without locks
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
            _claims[lock] = descriptor
            return
    os.close(descriptor)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Have errors of writing `path` say so in a sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None)
        if reason is None and isinstance(error, OSError):
            raise  # has its sentence
        raise OSError(f"{path} cannot be written: {reason or error}; it is as it was") from error


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems cannot do it for folders
            raise
    finally:
        os.close(descriptor)


def _same_files(first: Path, second: Path) -> bool:
    names = sorted(os.listdir(first))
    if not second.is_dir() or names != sorted(os.listdir(second)):
        return False
    return not any(filecmp.cmpfiles(first, second, names, shallow=False)[1:])
