"""The linear layer against F.linear, on both of its ways."""

import pytest
import torch
import torch.nn.functional as F

from modules import linear
from modules.linear import Linear


@pytest.mark.parametrize("shape", [(1, 6), (12, 6), (3, 4, 6), (12, 1, 6), (40, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_gradients_and_layout_are_those_of_f_linear(shape, bias, monkeypatch):
    monkeypatch.setattr(linear, "LARGE", 0)
    layer, x = Linear(6, 10, bias), torch.randn(shape, requires_grad=True)
    out = layer(x)
    expected = F.linear(x, layer.weight, layer.bias)
    assert torch.allclose(out, expected, atol=1e-6)
    assert out.is_contiguous()
    weights = torch.randn_like(out)
    inputs = [x, *layer.parameters()]
    ours, theirs = (torch.autograd.grad((y * weights).sum(), inputs) for y in (out, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
