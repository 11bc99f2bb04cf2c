"""Write files atomically, and keep two runs from writing the same one."""

import contextlib
import filecmp
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

_locks: dict[Path, FileLock] = {}


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it replaces `path`, else it is removed.

    Raises OSError, with a sentence, if that fails; `path` is then unchanged.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    temporary = path.with_name(f".{path.name}.tmp")
    with _explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _flush_to_disk(temporary)
            os.replace(temporary, path)
            _flush_to_disk(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`; on success it becomes `path`, else it is removed.

    Raises OSError if `path` exists and is neither an empty folder nor the same, file by file.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.tmp")
    with _explained(path):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.iterdir():
                file.chmod(0o644)  # safetensors makes its files unreadable for others
                _flush_to_disk(file)
            if not _same_files(temporary, path):
                os.replace(temporary, path)
                _flush_to_disk(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def claim(paths: Iterable[Path]) -> None:
    """Take an exclusive lock on each output file until `release()` or exit.

    Makes their folders. Raises OSError if one cannot be written or another run has locked it.
    """
    for path in paths:
        with _explained(path):
            if path.exists() and not path.is_file():
                what = "a folder" if path.is_dir() else "no regular file"
                raise OSError(f"{path} is {what}, a file is to be written there")
            path.parent.mkdir(parents=True, exist_ok=True)
            target = Path(os.path.realpath(path))
            lock_path = target.with_name(f".{target.name}.lock")
            if lock_path not in _locks:
                lock = FileLock(lock_path, timeout=0)
                try:
                    lock.acquire()
                except Timeout:
                    raise OSError(
                        f"another run is writing {path}: wait for its end, or give this one other "
                        "files"
                    ) from None
                _locks[lock_path] = lock


def release() -> None:
    """Release all locks."""
    for path, lock in _locks.items():
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()
    _locks.clear()


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn errors of writing `path` into a sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None)
        if reason is None and isinstance(error, OSError):
            raise  # has its sentence
        raise OSError(f"{path} cannot be written: {reason or error}; it is unchanged") from error


def _flush_to_disk(path: Path) -> None:
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
