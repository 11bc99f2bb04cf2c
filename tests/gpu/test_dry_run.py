"""Training and decoding on fake CUDA tensors: devices, dtypes, host syncs and kernel launches."""

import pytest

from tests.benchmarks import results
from tests.gpu.dry_run import CASES, PEERS, TOKENS
from tests.gpu.launches import HF_TOKEN, OURS, ROWS, WHAT, can_run, dry_run

BUDGETS = {row[WHAT]: row[OURS] for row in results.load("launches")["rows"]}  # may only decrease


@pytest.fixture(scope="module")
def reports():
    """The reports of a dry run by name."""
    if not can_run():
        pytest.skip("a PyTorch without CUDA needs a C++ compiler, to build a stub of its devices")
    return dry_run()


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_a_step_stays_on_the_device_with_float32_gradients(reports, name):
    assert reports[name]["faults"] == []
    assert reports[name]["launches"] > 0


@pytest.mark.parametrize(("what", "name"), [row[:2] for row in ROWS])
def test_no_more_kernels_are_launched_than_before(reports, what, name):
    assert reports[name]["faults"] == []
    assert 0 < reports[name]["launches"] <= BUDGETS[what]


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
