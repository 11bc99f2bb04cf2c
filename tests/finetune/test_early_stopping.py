"""EarlyStopper: what is best, and when to stop."""

import math

import pytest

from finetune.early_stopping import EarlyStopper, EarlyStoppingConfig
from modules.settings import UserError


def stopper(mode="max", patience=2, min_improvement=0.01):
    return EarlyStopper("x", mode, EarlyStoppingConfig(patience, min_improvement))


def test_best_is_any_gain_and_waiting_ends_with_a_real_one():
    s = stopper()
    assert s.update({"x": 0.5})
    assert s.update({"x": 0.506})  # better, so best; too little to count as progress
    assert not s.should_stop
    assert s.update({"x": 0.512})  # two small gains make a real one
    assert not s.update({"x": 0.512})
    assert not s.should_stop
    assert not s.update({"x": 0.4})
    assert s.should_stop


def test_less_is_better_where_it_is():
    s = stopper("min", patience=1)
    assert s.update({"x": 2.0})
    assert s.update({"x": 1.0})
    assert not s.update({"x": 1.5})
    assert s.should_stop


def test_nan_is_never_best():
    s = stopper()
    assert not s.update({"x": math.nan})
    assert s.update({"x": 0.1})


def test_patience_0_never_stops():
    s = stopper(patience=0)
    for _ in range(50):
        s.update({"x": 0.1})
    assert not s.should_stop


def test_no_gain_counts_even_if_any_gain_does():
    s = stopper(patience=1, min_improvement=0.0)
    s.update({"x": 0.5})
    s.update({"x": 0.5001})
    assert not s.should_stop
    s.update({"x": 0.5001})
    assert s.should_stop


@pytest.mark.parametrize("before", [0.5, 0.56, 0.57, 0.58, 0.7])
def test_an_improvement_of_exactly_the_smallest_counts(before):
    s = stopper(patience=1)
    s.update({"x": before})
    s.update({"x": round(before + 0.01, 2)})
    assert not s.should_stop


def test_negative_patience_is_refused():
    with pytest.raises(UserError, match="early_stopping_patience: -1 is not a whole number"):
        EarlyStoppingConfig(early_stopping_patience=-1)
