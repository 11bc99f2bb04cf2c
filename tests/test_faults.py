"""Real runs that are killed, stopped, and kept from writing: nothing that was there is lost.

`--kills N` sets how many runs are killed in all, `--fault_seed` when.
"""

import contextlib
import json
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import script_command

PAIRS = "--demo --limit_train 180 --limit_dev 60 --epochs 3 --save_every 4"
POEMS = "--demo --limit_train 30 --limit_dev 4 --epochs 3 --save_every 2 --max_new_tokens 40"
RUNS = {  # name -> script, flags, processes
    "lora_pairs": ("lora_paraphrase_detection.py", PAIRS, 1),
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
    "two_processes": (
        "lora_paraphrase_detection.py",
        f"{PAIRS} --batch_size 6 --grad_accum 2",
        2,
    ),
}
faults = {"injected": 0, "survived": 0}


@pytest.fixture(scope="module", autouse=True)
def tell(pytestconfig):
    """What the module comes to, in one line."""
    yield
    with pytestconfig.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print(f"\nfaults injected {faults['injected']}, survived {faults['survived']}")


@contextlib.contextmanager
def fault(n: int = 1):
    """Within, what follows on `n` faults is checked; counts them as survived if all is well."""
    faults["injected"] += n
    yield
    faults["survived"] += n


def start(name: str, folder: Path, *flags: str | Path, **options) -> subprocess.Popen:
    script, own, processes = RUNS[name]
    command = script_command(script, folder, *own.split(), *flags, processes=processes)
    folder.mkdir(exist_ok=True)
    with open(folder / "output", "ab") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=output, cwd=folder, start_new_session=True, **options
        )


def kill(process: subprocess.Popen, folder: Path) -> None:
    """SIGKILL to all processes of a run; torchrun gives each a session of its own."""
    subprocess.run(["pkill", "-KILL", "-f", f"checkpoint_dir {folder} "], check=True)
    process.wait()


def output(folder: Path) -> str:
    return (folder / "output").read_text(errors="replace")


def outcome(folder: Path) -> dict[str, object]:
    """All of a finished run that has to be the same, and that it left nothing else behind."""
    (checkpoint,) = folder.glob("*.pt")  # so no resume file
    (metrics,) = (json.loads(path.read_text()) for path in folder.glob("*-metrics.json"))
    hidden = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert not hidden
    files = [path for path in folder.iterdir() if path.suffix in (".csv", ".txt")]
    saved = torch.load(checkpoint, weights_only=True)
    return {
        "adapter": {name: x.numpy().tobytes() for name, x in saved["adapter"].items()},
        "about": saved["about"],
        "predictions": {path.name: path.read_bytes() for path in files},
        "history": metrics["history"],
        "final": metrics["final"],
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Outcome and seconds of each run that nothing happens to, made when first asked for."""
    made = {}

    def make(name):
        if name not in made:
            folder, began = tmp_path_factory.mktemp(name) / "run", time.monotonic()
            assert start(name, folder).wait() == 0, output(folder)
            made[name] = outcome(folder), time.monotonic() - began
        return made[name]

    return make


@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_at_random_ends_as_if_it_had_not_been(
    name, undisturbed, tmp_path, pytestconfig
):
    expected, seconds = undisturbed(name)
    rng = random.Random(f"{pytestconfig.getoption('fault_seed')} {name}")
    kills = -(-pytestconfig.getoption("kills") // len(RUNS))
    while kills:
        shutil.rmtree(tmp_path, ignore_errors=True)
        tmp_path.mkdir()
        folder, killed = tmp_path / "run", 0
        while killed < min(kills, 6):
            process = start(name, folder, "--resume")
            try:
                process.wait(rng.uniform(0.2, 1.05) * seconds)
                break
            except subprocess.TimeoutExpired:
                kill(process, folder)
                killed += 1
        else:
            process = start(name, folder, "--resume")
        with fault(killed):
            assert process.wait() == 0, output(folder)
            assert outcome(folder) == expected
        kills -= killed
