"""Run the four scripts as processes, usually forked from one that has imported everything."""

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("lora_paraphrase_detection", "reft_paraphrase_detection"),
        *("lora_sonnet_generation", "reft_sonnet_generation"),
        *("transformers", "sklearn.metrics", "matplotlib.figure", "jinja2"),
    ]
)


def script_flags(script: str, folder: Path) -> list[str]:
    """Flags that make a script write everything to `folder`."""
    if "sonnet" in script:
        out = ["--sonnet_out", str(folder / "poems.txt")]
    else:
        out = ["--para_dev_out", f"{folder}/dev.csv", "--para_test_out", f"{folder}/test.csv"]
    return ["--runs_dir", str(folder / "runs"), *out]


def run_folder(folder: Path) -> Path:
    """The folder of the only run in `folder`."""
    (found,) = {path.parent for path in folder.glob("runs/*/*.pt")}
    return found


def run_script(
    script: str,
    folder: Path,
    *flags: str | Path,
    check: bool = True,
    processes: int = 1,
    env: dict | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end: forked, with torchrun, or with `env` as from a shell."""
    if processes > 1 or env:
        flags = (*script_flags(script, folder), *map(str, flags))
        command = launched(script, flags, processes)
        env = os.environ | (env or {})
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)
    else:
        out, err = (folder.with_name(f"{folder.name}.{end}") for end in ("out", "err"))
        process = start_script(script, folder, *flags, out=out, err=err)
        process.join()
        texts = [path.read_text(errors="replace") for path in (out, err)]
        done = subprocess.CompletedProcess([script], process.exitcode, *texts)
    assert not check or done.returncode == 0, done.stderr
    return done


def launched(script: str, flags: tuple[str, ...], processes: int) -> list[str]:
    """The script's command line, with torchrun for several processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        launcher.append("--standalone")
    return [*launcher, str(ROOT / script), *flags]


def start_script(
    script: str,
    folder: Path,
    *flags: str | Path,
    out: Path,
    err: Path | None = None,
    killer: tuple[str, int, str] | None = None,
) -> BaseProcess:
    """Start a script in a single-threaded process of its own; for `killer` see `_kill_at`."""
    folder.mkdir(exist_ok=True)
    argv = [str(ROOT / script), *script_flags(script, folder), *map(str, flags)]
    for path in {out, err or out}:
        path.write_bytes(b"")
    process = FORKS.Process(target=_child, args=(argv, folder, out, err or out, killer))
    process.daemon = True
    with _one_thread():
        process.start()
    return process


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The environment of the fork server, which the first start launches."""
    before = dict(os.environ)
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _child(argv: list[str], folder: Path, out: Path, err: Path, killer) -> None:
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(folder)
    sys.argv = argv
    if killer:
        _kill_at(*killer)
    runpy.run_path(argv[0], run_name="__main__")


def _kill_at(name: str, number: int, moment: str) -> None:
    """Make the process kill itself before or after the given call of os.fsync or os.replace."""
    real, calls = getattr(os, name), 0

    def call(*args):
        nonlocal calls
        calls += 1
        if moment == "before" and calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*args)
        if moment == "after" and calls == number:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, name, call)


def wait_for(path: Path, text: str, process: BaseProcess | subprocess.Popen) -> None:
    """Wait until a process has printed `text` to the file `path`."""
    wait_until(lambda: text in path.read_text(errors="replace"), process)


def wait_until(is_so: Callable[[], object], process: BaseProcess | subprocess.Popen) -> None:
    """Wait until a condition holds; fails if the process ends first."""
    forked = isinstance(process, BaseProcess)
    while not is_so():
        assert process.is_alive() if forked else process.poll() is None
        time.sleep(0.02)
