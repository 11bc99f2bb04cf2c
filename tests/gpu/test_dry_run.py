"""Training and decoding on a GPU that is not there: devices, types, waits, and kernels launched."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from tests.gpu.dry_run import CASES, PEERS, STEPS, TOKENS
from tests.gpu.fake_cuda import build_stub

LAUNCHES = {  # of a step or a token at gpt2's size under bfloat16; they may only fall
    "pairs, LoRA": 865,  # 12 rows; transformers + PEFT 1,794
    "pairs, ReFT adapter": 615,
    "pairs, LoReFT": 666,
    "sonnets, LoRA": 867,  # 4 rows; transformers + PEFT 1,788
    "sonnets, ReFT adapter": 617,
    "a token, LoRA": 167,  # 12 rows; transformers, with no adapter, 309
    "a token, LoReFT": 227,
    "a token, no adapter": 167,
}
HF_TOKEN = "transformers: a token"


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What `dry_run.main` prints, in a process of its own: the stub is loaded before PyTorch."""
    load = ""
    if torch.version.cuda is None:
        compiler = shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            pytest.skip("a PyTorch without CUDA needs a C++ compiler for a stub of its devices")
        load = f"ctypes.CDLL({str(build_stub(compiler, tmp_path_factory.mktemp('stub')))!r})"
    program = f"import ctypes\n{load}\nfrom tests.gpu.dry_run import main\nmain()"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_a_step_stays_on_the_device_with_float32_gradients(reports, name):
    assert reports[name]["faults"] == []
    assert reports[name]["launches"] > 0


@pytest.mark.parametrize("name", LAUNCHES)
def test_no_more_kernels_are_launched_than_before(reports, name):
    assert reports[name]["faults"] == []
    assert 0 < reports[name]["launches"] <= LAUNCHES[name]


@pytest.mark.parametrize("name", PEERS)
def test_a_step_launches_half_as_many_kernels_as_pefts(reports, name):
    assert reports[name]["launches"] <= 0.5 * reports[f"PEFT: {name}"]["launches"]


def test_a_token_launches_little_more_than_half_of_transformers_kernels(reports):
    assert reports["a token, LoRA"]["launches"] <= 0.55 * reports[HF_TOKEN]["launches"]


@pytest.mark.parametrize("name", TOKENS)
def test_the_host_waits_once_for_a_token(reports, name):
    assert reports[name]["host_reads"] == 1


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("reads a value", "DataDependentOutputException: aten._local_scalar_dense"),
        ("copies to the host", "aten._to_copy.default copies to the host"),
        ("mixes devices", "found at least two devices"),
    ],
)
def test_a_step_that_leaves_the_device_is_found(reports, change, fault):
    assert fault in str(reports[change]["faults"])


def test_every_budget_has_its_measurement():
    assert LAUNCHES.keys() == STEPS.keys() | TOKENS.keys()
