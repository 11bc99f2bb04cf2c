"""TokenLayout: rows to tokens and back, for every kind of mask."""

import pytest
import torch

from modules.padding import TokenLayout

RIGHT = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
HOLES = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 1], [0, 1, 0, 0]])
IDS = torch.arange(12).view(3, 4)


def test_without_a_mask_every_position_holds_a_token():
    layout = TokenLayout.of(IDS)
    assert layout.tokens_of(IDS).tolist() == list(range(12))
    assert layout.position.tolist() == [0, 1, 2, 3] * 3
    assert layout.row.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert layout.last.tolist() == [3, 7, 11]
    x = torch.randn(12, 5)
    assert torch.equal(layout.to_tokens(layout.to_rows(x)), x)


@pytest.mark.parametrize("mask", [RIGHT, RIGHT.flip(1), HOLES])
def test_rows_are_closed_up_and_come_back_in_place(mask):
    layout = TokenLayout.of(IDS, mask)
    tokens = layout.tokens_of(IDS)
    assert tokens.tolist() == IDS[mask.bool()].tolist()
    assert layout.lengths.tolist() == mask.sum(1).tolist()
    rows = layout.to_rows(tokens + 1)
    for row, (ids, is_token) in enumerate(zip(IDS, mask.bool(), strict=True)):
        n = int(is_token.sum())
        assert rows[row].tolist() == (ids[is_token] + 1).tolist() + [0] * (4 - n)
        assert layout.position[layout.row == row].tolist() == list(range(n))
    last = [int(ids[is_token][-1]) for ids, is_token in zip(IDS, mask.bool(), strict=True)]
    assert tokens[layout.last].tolist() == last
    assert torch.equal(layout.to_tokens(rows), tokens + 1)
    assert torch.equal(layout.to_input_shape(tokens + 1), (IDS + 1) * mask)


def test_an_index_with_padding_positions_at_its_end_is_the_same_layout():
    tokens = RIGHT.flatten().nonzero().squeeze(1)
    layout = TokenLayout.of(IDS, RIGHT, torch.cat([tokens, torch.tensor([6, 11])]))
    expected = TokenLayout.of(IDS, RIGHT)
    assert torch.equal(layout.last, expected.last)
    assert torch.equal(layout.position[: len(tokens)], expected.position)
    x = torch.randn(len(tokens) + 2, 3)
    rows = layout.to_rows(x)
    assert torch.equal(rows[RIGHT.bool()], x[: len(tokens)])
    assert torch.equal(layout.to_tokens(rows), x)


def test_a_row_without_a_token_is_refused():
    with pytest.raises(ValueError, match="a row of attention_mask holds no token"):
        TokenLayout.of(IDS, RIGHT * torch.tensor([[1], [0], [1]]))


def test_gradients_pass_both_ways_unchanged():
    layout = TokenLayout.of(IDS, HOLES)
    x = torch.randn(len(layout.row), 3, requires_grad=True)
    weighting = torch.randn(3, 4, 3)
    (layout.to_rows(x) * weighting).sum().backward()
    assert torch.equal(x.grad, layout.to_tokens(weighting))
    rows = torch.randn(3, 4, 3, requires_grad=True)
    weighting = torch.randn(len(layout.row), 3)
    (layout.to_tokens(rows) * weighting).sum().backward()
    assert torch.equal(rows.grad, layout.to_rows(weighting))


def test_cached_tokens_count_in_positions_and_in_what_is_visible():
    cached = torch.tensor([5, 2, 0])
    layout = TokenLayout.of(IDS[:, :2], RIGHT[:, :2], cached=cached)
    assert layout.position.tolist() == [5, 6, 2, 3, 0]
    bias = layout.attention_bias(n_slots=7)
    assert bias.shape == (3, 1, 2, 7)
    assert n_visible(bias)[:, 0].tolist() == [[6, 7], [3, 4], [1, 1]]
    assert n_visible(layout.last_attention_bias(bias)).flatten().tolist() == [7, 4, 1]
    causal = TokenLayout.of(IDS, RIGHT).last_attention_bias(None)
    assert n_visible(causal).flatten().tolist() == [4, 2, 1]
    with torch.autocast("cpu", torch.bfloat16):
        assert layout.attention_bias(n_slots=7).dtype == torch.bfloat16  # as the scores


def n_visible(bias: torch.Tensor) -> torch.Tensor:
    """How many slots each query may attend to."""
    assert set(bias.unique().tolist()) <= {0.0, -torch.inf}
    return (bias == 0).sum(-1)
