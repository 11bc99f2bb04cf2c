"""Write files atomically, and keep two runs from writing to the same files."""

import contextlib
import filecmp
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError


def write_files(contents: dict[Path, str | bytes]) -> None:
    """Write files as one set: all are on disk before the first is renamed to its final name.

    Raises OSError with a one-sentence message if one cannot be written; then none has changed.
    """
    temporaries: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            with _explained(path):
                path = Path(os.path.realpath(path))  # so that a link is kept
                path.parent.mkdir(parents=True, exist_ok=True)
                temporaries[path] = path.with_name(f".{path.name}.tmp")
                data = content.encode() if isinstance(content, str) else content
                temporaries[path].write_bytes(data)
                _flush_to_disk(temporaries[path])
        for path, temporary in temporaries.items():
            with _explained(path):
                os.replace(temporary, path)
        for folder in {path.parent for path in temporaries}:
            _flush_to_disk(folder)
    finally:
        for temporary in temporaries.values():
            with contextlib.suppress(OSError):
                temporary.unlink()


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path`; it becomes `path` on success, else it is removed.

    Raises OSError if `path` exists, unless it is an empty folder or has the same files.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.tmp")
    with _explained(path):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for file in filter(Path.is_file, temporary.rglob("*")):
                file.chmod(0o644)  # safetensors makes its files unreadable to other users
                _flush_to_disk(file)
            if not _same_files(temporary, path):
                os.replace(temporary, path)
                _flush_to_disk(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def lock(path: Path, busy: str, timeout: float = 0) -> FileLock:
    """Lock a file until the lock is released or the process ends.

    Raises OSError with message `busy` if another process still holds it after `timeout` seconds.
    """
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(path, timeout=timeout, is_singleton=True, thread_local=False)
        try:
            held.acquire()
        except Timeout:
            raise OSError(busy) from None
    return held


def check_writable(path: Path) -> None:
    """Raise OSError if `path` cannot be written as a regular file; creates its parent folder."""
    with _explained(path):
        if path.exists() and not path.is_file():
            what = "a folder" if path.is_dir() else "not a regular file"
            raise OSError(f"{path} cannot be written: it is {what}")
        folder = Path(os.path.realpath(path)).parent
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise OSError(f"{folder} is not writable, so {path.name} cannot be written there")


def check_free(folder: Path | None, flag: str) -> None:
    """Raise OSError if `folder`, which a flag names, exists and is not an empty folder."""
    if folder and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise OSError(f"{flag}: {str(folder)!r} already exists and is not an empty folder")


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn errors from writing `path` into OSErrors with a one-sentence message."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None)
        if reason is None and isinstance(error, OSError):
            raise  # already has such a message
        raise OSError(f"{path} cannot be written: {reason or error}; it is unchanged") from error


def _flush_to_disk(path: Path) -> None:
    """Flush a file, or the names in a folder, so that it survives a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems cannot flush folders
            raise
    finally:
        os.close(descriptor)


def _same_files(first: Path, second: Path) -> bool:
    ours, theirs = (sorted(path.relative_to(f) for path in f.rglob("*")) for f in (first, second))
    files = [name for name in ours if (first / name).is_file()]
    return ours == theirs and not any(filecmp.cmpfiles(first, second, files, shallow=False)[1:])
