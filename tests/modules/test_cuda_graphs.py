"""CUDAGraphs, with a recorder that needs no GPU: what is replayed, and when it gives up."""

import pytest
import torch

from modules import cuda_graphs
from modules.cuda_graphs import CUDAGraphs, results_match


def noisy_double(x: torch.Tensor) -> tuple[torch.Tensor]:
    return (2 * x + torch.rand(()),)


def test_shapes_that_come_again_are_replayed_with_the_same_random_numbers(recorder):
    made, graphs = recorder(), CUDAGraphs(noisy_double, "it")
    inputs = [torch.randn(n) for n in (3, 3, 4, 3, 3, 4)]
    torch.manual_seed(0)
    found = [graphs(x=x)[0].clone() for x in inputs]
    state = torch.get_rng_state()
    torch.manual_seed(0)
    expected = [noisy_double(x)[0] for x in inputs]
    assert all(map(torch.equal, found, expected))
    assert torch.equal(torch.get_rng_state(), state)
    assert (made.n, made.n_replays) == (2, 4)


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        ({"spoil": lambda tensor: tensor * 1.1}, "the results differ"),
        ({"error": RuntimeError("operation not permitted\nmore")}, "operation not permitted\n"),
    ],
)
def test_a_graph_that_fails_is_not_used_and_one_line_says_so(recorder, capsys, about, reason):
    made, graphs = recorder(**about), CUDAGraphs(noisy_double, "training")
    torch.manual_seed(0)
    found = [graphs(x=torch.ones(3))[0] for _ in range(4)]
    torch.manual_seed(0)
    expected = [noisy_double(torch.ones(3))[0] for _ in range(4)]
    assert all(map(torch.equal, found, expected))
    assert made.n == 1
    assert capsys.readouterr().out == f"training continues without CUDA graphs: {reason.strip()}\n"
    assert recorder.streams == (["stream"] if "error" in about else [])


def test_no_more_graphs_are_made_than_allowed(recorder, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MOST_GRAPHS", 2)
    made, graphs = recorder(), CUDAGraphs(noisy_double, "it")
    for _ in range(3):
        for n in range(1, 6):
            graphs(x=torch.ones(n))
    assert made.n == 2


def test_results_agree_up_to_rounding_and_in_what_is_not_finite():
    x = torch.tensor([1.0, -torch.inf, torch.nan, 1e-9])
    assert results_match((x,), (x,))
    assert results_match((torch.full((9,), 1.001),), (torch.ones(9),))
    assert not results_match((torch.full((9,), 1.1),), (torch.ones(9),))
    assert not results_match((torch.ones(4),), (x,))
    assert not results_match((x,), (torch.ones(4),))
    assert results_match((torch.zeros(3),), (torch.zeros(3),))
