"""Sampling against the distribution it stands for."""

from unittest import mock

import numpy as np
import pytest
import torch

from finetune.sampling import (
    ban_repeated_ngrams,
    penalize_repetition,
    top_p_sample,
    top_p_sample_at,
)


def kept(p: torch.Tensor, top_p: float) -> list[int]:
    """Tokens that the definition keeps: from the likeliest on until the mass passes top_p."""
    order = p.argsort(descending=True)
    before = p[order].cumsum(0) - p[order]
    return sorted(order[before < top_p].tolist())


def at_random_numbers(logits, temperature, top_p, generators):
    """`top_p_sample_at` with the numbers that `top_p_sample` takes from the generators first."""
    u = torch.tensor([[generator.random()] for generator in generators], dtype=torch.float64)
    return top_p_sample_at(logits, temperature, top_p, u)


both = pytest.mark.parametrize("sample", [top_p_sample, at_random_numbers])


@both
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_distribution_cut_at_top_p(sample, temperature, top_p):
    logits = torch.linspace(-2, 3, 12)[torch.randperm(12, generator=torch.manual_seed(0))]
    n = 40_000
    generators = [np.random.default_rng(0)] * n
    tokens = sample(logits.expand(n, -1), temperature, top_p, generators)
    p = (logits / temperature).softmax(0)
    expected = torch.zeros(12)
    expected[kept(p, top_p)] = p[kept(p, top_p)]
    expected /= expected.sum()
    counts = tokens.bincount(minlength=12)
    assert (counts[expected == 0] == 0).all()
    deviation = (n * expected * (1 - expected)).sqrt()
    assert ((counts - n * expected).abs() <= 4.5 * deviation + 1e-3).all()


@both
def test_forbidden_tokens_are_never_sampled(sample):
    logits = torch.full((500, 6), -torch.inf)
    logits[:, 2], logits[:, 4] = 0.0, 1.0
    generators = [np.random.default_rng(seed) for seed in range(500)]
    assert set(sample(logits, 1.0, 1.0, generators).tolist()) == {2, 4}


@both
@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_pick_tokens_that_are_kept(sample, u):
    generator = mock.Mock(random=lambda: u)
    logits = torch.tensor([[-torch.inf, 3.0, 0.0, 3.0, -torch.inf]])
    assert sample(logits, 1.0, 0.9, [generator]).tolist() == [1 if u == 0 else 3]


@both
def test_logits_that_are_not_numbers_give_some_token(sample):
    logits = torch.full((2, 5), torch.nan)
    tokens = sample(logits, 1.0, 0.9, [np.random.default_rng(0)] * 2)
    assert all(0 <= token < 5 for token in tokens.tolist())


def test_penalty_and_ban_by_hand():
    logits = torch.tensor([[2.0, -2.0, 4.0], [1.0, 1.0, -torch.inf]])
    expected = [[1.0, -4.0, 4.0], [1.0, 1.0, -torch.inf]]
    assert penalize_repetition(logits, [[0, 1, 0], [2]], 2.0).tolist() == expected
    out = ban_repeated_ngrams(torch.zeros(2, 4), [[1, 2, 3, 1, 2], [0, 1]], 3)
    assert out.isinf().nonzero().tolist() == [[0, 3]]
