"""Real runs that are killed, stopped, and kept from reading or writing: nothing is lost.

`--kills N` sets how many runs are killed, `--fault_seed` where.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import Popen, TimeoutExpired

import pytest
import torch

from finetune.run import is_finished
from tests.scripts import (
    launched,
    run_folder,
    script_flags,
    start_script,
    wait_for,
    wait_until,
)

PAIRS = "--demo --limit_train 96 --limit_dev 24 --epochs 3 --save_every 3"
POEMS = "--demo --limit_train 24 --limit_dev 3 --epochs 3 --save_every 2 --max_new_tokens 40"
RUNS = {  # name -> script, flags, processes
    "lora_pairs": (
        "lora_paraphrase_detection.py",
        f"{PAIRS} --export_peft adapter --export_merged model",
        1,
    ),
    "reft_pairs": (
        "reft_paraphrase_detection.py",
        f"{PAIRS} --reft_type loreft --reft_dropout 0.1 --grad_accum 3 --grad_clip 1",
        1,
    ),
    "lora_poems": (
        "lora_sonnet_generation.py",
        f"{POEMS} --grad_accum 2 --lr_schedule cosine --early_stopping_patience 1",
        1,
    ),
    "reft_poems": ("reft_sonnet_generation.py", f"{POEMS} --num_samples 2", 1),
    "two_processes": ("lora_paraphrase_detection.py", f"{PAIRS} --batch_size 6 --grad_accum 2", 2),
}
faults = {"injected": 0, "survived": 0}


@pytest.fixture(scope="module", autouse=True)
def tell(pytestconfig):
    """What the module comes to, in one line."""
    yield
    with pytestconfig.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print(f"\nfaults injected {faults['injected']}, survived {faults['survived']}")


@contextlib.contextmanager
def fault(n: int = 1) -> Iterator[None]:
    """Within, what follows on `n` faults is checked; they are survived if all is well."""
    faults["injected"] += n
    yield
    faults["survived"] += n


def log(folder: Path) -> Path:
    return folder.with_suffix(".log")


def output(folder: Path) -> str:
    return log(folder).read_text(errors="replace")


def start(name: str, folder: Path, *flags: str | Path, killer=None) -> BaseProcess | Popen:
    """A run in the background; `killer` is what `scripts.start_script` takes."""
    script, own, processes = RUNS[name]
    flags = (*own.split(), *map(str, flags))
    if processes == 1:
        return start_script(script, folder, *flags, out=log(folder), killer=killer)
    folder.mkdir(exist_ok=True)
    command = launched(script, (*script_flags(script, folder), *flags), processes)
    with open(log(folder), "wb") as out:
        return Popen(command, stdout=out, stderr=out, cwd=folder)


def wait(process: BaseProcess | Popen, timeout: float | None = None) -> int | None:
    """The exit code, None if the process has not ended within the time."""
    if isinstance(process, BaseProcess):
        process.join(timeout)
        return process.exitcode
    with contextlib.suppress(TimeoutExpired):
        process.wait(timeout)
    return process.returncode


def outcome(folder: Path) -> dict[str, object]:
    """All of a finished run that must be the same; it must have left nothing else behind."""
    run = run_folder(folder)
    assert is_finished(run)
    (checkpoint,) = run.glob("*.pt")
    metrics = json.loads((run / "run.json").read_text())
    files = [path for path in folder.rglob("*") if path.is_file()]
    hidden = {path.name for path in files if path.name.startswith(".")}
    assert hidden <= {".lock"}
    saved = torch.load(checkpoint, weights_only=True)
    return {
        "adapter": {name: x.numpy().tobytes() for name, x in saved["adapter"].items()},
        "about": saved["about"],
        "files": {
            path.relative_to(folder): path.read_bytes()
            for path in files
            if path.suffix in (".csv", ".txt") or path.parent.name in ("adapter", "model")
        },
        "history": metrics["history"],
        "final": metrics["final"],
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Outcome and seconds of the runs when nothing happens to them."""
    folders = {name: tmp_path_factory.mktemp(name) / "run" for name in RUNS}

    def make(name: str) -> tuple[dict[str, object], float]:
        began = time.monotonic()
        assert wait(start(name, folders[name])) == 0, output(folders[name])
        return outcome(folders[name]), time.monotonic() - began

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(RUNS, pool.map(make, RUNS), strict=True))


def side_by_side(work, cases: Iterable) -> None:
    """Do `work` on all cases, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, cases))


def kill_once(name: str, folder: Path, seconds: float, rng: random.Random) -> bool:
    """Start the run, or resume it, and kill all its processes at random; False if it ended."""
    if RUNS[name][2] == 1 and rng.random() < 0.5:
        moment = rng.choice(["before", "after"])
        killer = rng.choice(["fsync", "replace"]), rng.randrange(1, 12), moment
        process = start(name, folder, "--resume", killer=killer)
        wait(process)
    else:
        process = start(name, folder, "--resume")
        wait(process, rng.uniform(0.05, 1) * seconds)
    process.kill()
    if RUNS[name][2] > 1:  # torchrun's are no children of this process
        subprocess.run(["pkill", "-KILL", "-f", f"runs_dir {folder}/runs "], check=False)
    ended = wait(process)
    assert ended in (0, -signal.SIGKILL), output(folder)
    return ended != 0


def test_a_run_that_is_killed_ends_as_if_it_had_not_been(undisturbed, tmp_path, pytestconfig):
    def endure(name: str) -> None:
        (expected, seconds), folder = undisturbed[name], tmp_path / name
        rng = random.Random(f"{pytestconfig.getoption('fault_seed')} {name}")
        left = -(-pytestconfig.getoption("kills") // (len(RUNS) * RUNS[name][2]))
        while left:
            shutil.rmtree(folder, ignore_errors=True)
            killed, most = 0, min(left, 4)  # of one run
            while killed < most and kill_once(name, folder, seconds, rng):
                killed += 1
            with fault(killed):
                if killed == most:
                    assert wait(start(name, folder, "--resume")) == 0, output(folder)
                assert outcome(folder) == expected
            left -= killed

    side_by_side(endure, [name for name in RUNS if RUNS[name][2] == 1 or shutil.which("pkill")])


SIGNALS = [
    ("lora_pairs", signal.SIGTERM, "epoch 2/3:"),
    ("reft_poems", signal.SIGINT, "epoch 1/3: train_loss"),
    ("lora_poems", signal.SIGHUP, "before training"),
    ("two_processes", signal.SIGTERM, "once its state is saved within an epoch"),
]


def test_a_signal_ends_a_run_with_advice_and_its_usual_code(undisturbed, tmp_path):
    def stop(case: tuple[str, signal.Signals, str]) -> None:
        name, signum, moment = case
        folder = tmp_path / name
        process = start(name, folder)
        if name == "two_processes":
            wait_until(lambda: list(folder.glob("runs/*/resume.pt")), process)
        else:
            wait_for(log(folder), moment, process)
        with fault():
            os.kill(process.pid, signum)
            code = wait(process, timeout=60)
            advice = "run the same command with --resume to continue"
            assert f"stopped by {signum.name}: {advice}\n" in output(folder)
            if name != "two_processes":  # torchrun has a code and a traceback of its own
                assert code == 128 + signum
                assert "Traceback" not in output(folder)
            if list(folder.glob("runs/*/resume.pt")):
                assert wait(start(name, folder)) != 0
                assert "unfinished run of this command: --resume resumes it" in output(folder)
            assert wait(start(name, folder, "--resume")) == 0, output(folder)
            assert outcome(folder) == undisturbed[name][0]

    side_by_side(stop, SIGNALS)


def test_the_same_run_twice_at_once_is_refused_and_another_is_not(undisturbed, tmp_path):
    folder = tmp_path / "run"
    process = start("lora_pairs", folder)
    wait_for(log(folder), "epoch 1/3:", process)
    os.kill(process.pid, signal.SIGSTOP)
    first = output(folder)
    with fault(3):
        for flags in ([], ["--resume"], ["--predict_only"]):
            assert wait(start("lora_pairs", folder, *flags)) == 1
            assert "error: another process is working on this run, " in output(folder)
        log(folder).write_text(first)
        other = ["--seed", "2", "--export_peft", "a2", "--export_merged", "m2"]
        assert wait(start("lora_pairs", folder, *other)) == 0, output(folder)
        os.kill(process.pid, signal.SIGCONT)
        assert wait(process) == 0, output(folder)
        names = sorted((folder / "runs").glob("[!.]*"))
        assert len(names) == 2
        shown = json.loads((folder / "lora-paraphrase-metrics.json").read_text())["name"]
        (newest,) = (path for path in names if path.name == shown)
        dev = (newest / "lora-para-dev-output.csv").read_bytes()
        assert (folder / "dev.csv").read_bytes() == dev


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_damaged_resume_file_is_refused_and_nothing_touched(tmp_path):
    folder = tmp_path / "run"
    process = start("lora_pairs", folder)
    wait_for(log(folder), "epoch 2/3:", process)
    os.kill(process.pid, signal.SIGTERM)
    wait(process)
    path = run_folder(folder) / "resume.pt"
    whole = path.read_bytes()
    damage = " is damaged or was not written by torch.save"
    for damaged, flags, sentence in (
        (whole[: len(whole) // 2], [], damage),
        (random.Random(0).randbytes(len(whole)), [], damage),
        (whole, ["--gradient_checkpointing"], " was saved when --gradient_checkpointing was "),
    ):
        path.write_bytes(damaged)
        before = contents(folder)
        with fault():
            assert wait(start("lora_pairs", folder, "--resume", *flags)) == 1
            assert f"{path.name}{sentence}" in output(folder).splitlines()[-1]
            assert contents(folder) == before


@pytest.fixture
def small_disk(tmp_path):
    """An empty file system of 4 MB."""
    folder = tmp_path / "run"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs takes Linux and root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_and_a_read_only_disk_leave_what_was_there(small_disk):
    name, folder = "reft_pairs", small_disk
    flags = "--reft_rank", "32"  # 3 MB of a run's state
    assert wait(start(name, folder, *flags)) == 0, output(folder)
    done = outcome(folder)
    filler = folder / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    filled = contents(folder)
    with fault(2):
        for more in (["--predict_only"], ["--seed", "2"]):
            assert wait(start(name, folder, *flags, *more)) == 1
            last = output(folder).splitlines()[-1]
            assert last.startswith(f"error: {folder}/"), output(folder)
            assert "cannot be written: No space left on device; it is unchanged" in last
            left = {path: data for path, data in contents(folder).items() if path in filled}
            assert left == filled
    with fault():
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        assert wait(start(name, folder, *flags, "--predict_only")) == 1
        assert "cannot be written: Read-only file system" in output(folder).splitlines()[-1]
        subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
    filler.unlink()
    assert wait(start(name, folder, *flags, "--predict_only")) == 0, output(folder)
    assert outcome(folder) == done
