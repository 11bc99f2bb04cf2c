"""Byte masks: their share, their scale, their gradient, and the generator that decides them."""

from unittest import mock

import pytest
import torch

from modules import byte_dropout
from modules.byte_dropout import ByteDropout, drop


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_and_scale_of_what_is_dropped(p):
    torch.manual_seed(0)
    y = ByteDropout(p)(torch.ones(400, 1001))
    share = round(256 * p) / 256
    assert (y == 0).float().mean().item() == pytest.approx(share, abs=0.003)
    assert y.max().item() == pytest.approx(1 / (1 - share))
    assert y.mean().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("p", [0.001, 0.002, 0.999])
def test_a_share_near_0_or_1_is_not_rounded(p):
    torch.manual_seed(0)
    x = torch.ones(1000, 2000, requires_grad=True)
    y = ByteDropout(p)(x)
    y.sum().backward()
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=2e-4)
    assert torch.equal(x.grad, y)


def test_every_byte_of_a_word_is_random_by_itself():
    torch.manual_seed(0)
    dropped = (ByteDropout(0.5)(torch.ones(50_000, 8)) == 0).float()
    assert (dropped.mean(0) - 0.5).abs().max() < 0.01
    assert (torch.corrcoef(dropped.T) - torch.eye(8)).abs().max() < 0.02


def test_the_gradient_of_dropout_passes_the_same_mask():
    x = torch.ones(5, 77, requires_grad=True)
    y = ByteDropout(0.3)(x)
    y.sum().backward()
    assert torch.equal(x.grad, y)


def test_a_seed_fixes_the_mask_and_evaluation_has_none():
    x, dropout = torch.ones(9, 9), ByteDropout(0.5)
    torch.manual_seed(1)
    first = dropout(x)
    torch.manual_seed(1)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(dropout(x), first)
    assert dropout.eval()(x) is x
    assert ByteDropout(0.0)(x) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_and_the_scale_are_those_that_were_used(dtype):
    x = torch.randn(7, 33, dtype=dtype)
    y, mask, scale = drop(x, 0.25)
    assert torch.equal(y, x * mask)
    assert y.dtype == dtype
    assert set(mask.unique().tolist()) == {0, 1}
    assert scale == 256 / 192


def test_masks_follow_pytorchs_generator_and_nothing_else():
    x = torch.ones(300, 40)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    masks = [drop(x, 0.5)[1] for _ in range(3)]
    torch.set_rng_state(state)
    assert all(torch.equal(drop(x, 0.5)[1], mask) for mask in masks)
    agreement = (masks[0] == masks[1]).float().mean().item()
    assert agreement == pytest.approx(0.5, abs=0.02)


def test_native_dropout_is_checked_in_both_directions(monkeypatch, capsys):
    check = byte_dropout.native_dropout_works.__wrapped__
    assert check(torch.device("cpu"))
    ops = mock.Mock(native_dropout_backward=lambda grad, mask, scale: grad * mask)  # no scale
    monkeypatch.setattr(byte_dropout.torch.ops, "aten", ops)
    assert not check(torch.device("cpu"))
    assert "running without the custom LoRA backward" in capsys.readouterr().out
