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
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, script_command

PAIRS = "--demo --limit_train 150 --limit_dev 40 --epochs 3 --save_every 4"
POEMS = "--demo --limit_train 30 --limit_dev 4 --epochs 3 --save_every 2 --max_new_tokens 40"
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
# Runs a script that kills itself at a call of os.fsync or os.replace, before or after it is done.
KILLER = f"""
import os, runpy, signal, sys
sys.path.insert(0, {str(ROOT)!r})
_, name, number, moment, *sys.argv = sys.argv
real, calls = getattr(os, name), 0
def call(*args):
    global calls
    calls += 1
    for now in ("before", "after"):
        if now == "after":
            real(*args)
        if now == moment and calls == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
setattr(os, name, call)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
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


def start(name: str, folder: Path, *flags: str | Path, killer: tuple[str, ...] = ()):
    """A run in the background, on one thread; `killer` is what KILLER takes."""
    script, own, processes = RUNS[name]
    command = script_command(script, folder, *own.split(), *flags, processes=processes)
    if killer:
        command[1:1] = ["-c", KILLER, *killer]
    folder.mkdir(exist_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(folder.with_suffix(".log"), "wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, cwd=folder, env=env)


def output(folder: Path) -> str:
    return folder.with_suffix(".log").read_text(errors="replace")


def outcome(folder: Path) -> dict[str, object]:
    """All of a finished run that has to be the same; it must have left nothing else behind."""
    (checkpoint,) = folder.glob("*.pt")  # no resume file
    (metrics,) = (json.loads(path.read_text()) for path in folder.glob("*-metrics.json"))
    hidden = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert not hidden
    saved = torch.load(checkpoint, weights_only=True)
    return {
        "adapter": {name: x.numpy().tobytes() for name, x in saved["adapter"].items()},
        "about": saved["about"],
        "files": {
            path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*")
            if path.suffix in (".csv", ".txt") or path.parent != folder
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
        assert start(name, folders[name]).wait() == 0, output(folders[name])
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
        killer = rng.choice(["fsync", "replace"]), str(rng.randrange(1, 12)), moment
        process = start(name, folder, "--resume", killer=killer)
        process.wait()
    else:
        process = start(name, folder, "--resume")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.3, 1) * seconds)
    process.kill()
    if RUNS[name][2] > 1:  # torchrun's are no children of this process
        subprocess.run(["pkill", "-KILL", "-f", f"checkpoint_dir {folder} "], check=False)
    ended = process.wait()
    assert ended in (0, -signal.SIGKILL), output(folder)
    return ended != 0


def test_a_run_that_is_killed_ends_as_if_it_had_not_been(undisturbed, tmp_path, pytestconfig):
    def endure(name: str) -> None:
        (expected, seconds), folder = undisturbed[name], tmp_path / name
        rng = random.Random(f"{pytestconfig.getoption('fault_seed')} {name}")
        left = -(-pytestconfig.getoption("kills") // len(RUNS))
        while left:
            shutil.rmtree(folder, ignore_errors=True)
            killed, most = 0, min(left, 4)  # of one run
            while killed < most and kill_once(name, folder, seconds, rng):
                killed += 1
            with fault(killed):
                if killed == most:
                    assert start(name, folder, "--resume").wait() == 0, output(folder)
                assert outcome(folder) == expected
            left -= killed

    side_by_side(endure, [name for name in RUNS if RUNS[name][2] == 1 or shutil.which("pkill")])


def say_when(folder: Path, text: str, process: subprocess.Popen) -> None:
    """Wait until the run has printed `text`."""
    while text not in output(folder):
        assert process.poll() is None, output(folder)
        time.sleep(0.02)


SIGNALS = [
    ("lora_pairs", signal.SIGTERM, "epoch 2/3:"),
    ("reft_poems", signal.SIGINT, "epoch 1/3: train_loss"),
    ("lora_poems", signal.SIGHUP, "before training"),
    ("two_processes", signal.SIGTERM, "epoch 2/3:"),
]


def test_a_signal_ends_a_run_with_advice_and_its_usual_code(undisturbed, tmp_path):
    def stop(case: tuple[str, signal.Signals, str]) -> None:
        name, signum, moment = case
        folder = tmp_path / name
        process = start(name, folder)
        say_when(folder, moment, process)
        with fault():
            process.send_signal(signum)
            code = process.wait(timeout=60)
            advice = "the same command with --resume resumes it"
            assert f"stopped by {signum.name}: {advice}\n" in output(folder)
            if name != "two_processes":  # torchrun has a code and a traceback of its own
                assert code == 128 + signum
                assert "Traceback" not in output(folder)
            if list(folder.glob("*.resume.pt")):
                assert start(name, folder).wait() != 0
                assert "is of a run that was stopped: --resume resumes it" in output(folder)
            assert start(name, folder, "--resume").wait() == 0, output(folder)
            assert outcome(folder) == undisturbed[name][0]

    side_by_side(stop, SIGNALS)


def test_of_two_runs_with_the_same_files_the_second_is_refused(undisturbed, tmp_path):
    folder, other = tmp_path / "run", tmp_path / "other"
    process = start("lora_pairs", folder)
    say_when(folder, "epoch 1/3:", process)
    process.send_signal(signal.SIGSTOP)
    with fault(3):
        same_checkpoint = "--checkpoint_dir", folder
        same_predictions = "--para_dev_out", folder / "dev.csv"
        for flags in (same_checkpoint, same_predictions, [*same_predictions, "--predict_only"]):
            assert start("lora_pairs", other, *flags).wait() == 1
            assert "error: another run is writing " in output(other)
        process.send_signal(signal.SIGCONT)
        assert process.wait() == 0, output(folder)
        assert outcome(folder) == undisturbed["lora_pairs"][0]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_damaged_resume_file_is_refused_and_nothing_touched(tmp_path):
    folder = tmp_path / "run"
    process = start("lora_pairs", folder)
    say_when(folder, "epoch 2/3:", process)
    process.send_signal(signal.SIGTERM)
    process.wait()
    (path,) = folder.glob("*.resume.pt")
    whole = path.read_bytes()
    for damaged, flags, sentence in (
        (whole[: len(whole) // 2], [], " is damaged or was not written by torch.save"),
        (
            random.Random(0).randbytes(len(whole)),
            [],
            " is damaged or was not written by torch.save",
        ),
        (whole, ["--batch_size", "7"], " is of a run with --batch_size 12, here it is 7: "),
    ):
        path.write_bytes(damaged)
        before = contents(folder)
        with fault():
            assert start("lora_pairs", folder, "--resume", *flags).wait() == 1
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


def test_a_full_and_a_read_only_disk_leave_what_was_there(small_disk, undisturbed):
    name, folder = "reft_pairs", small_disk
    flags = "--reft_rank", "32"  # 3 MB of a run's state
    assert start(name, folder, *flags).wait() == 0, output(folder)
    done = outcome(folder)
    filler = folder / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    filled = contents(folder)
    with fault(2):
        for more in ([], ["--predict_only"]):
            assert start(name, folder, *flags, *more).wait() == 1
            last = output(folder).splitlines()[-1]
            assert last.startswith(f"error: {folder}/"), output(folder)
            assert "cannot be written: No space left on device; it is unchanged" in last
            assert contents(folder) == filled
    with fault():
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        assert start(name, folder, *flags).wait() == 1
        assert "cannot be written: Read-only file system" in output(folder).splitlines()[-1]
        assert "epoch 1/3:" not in output(folder)
        subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
    filler.unlink()
    assert start(name, folder, *flags, "--resume").wait() == 0, output(folder)
    assert outcome(folder) == done
