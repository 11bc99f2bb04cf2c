"""oneDNN's matmuls against F.linear, and when they are chosen."""

import pytest
import torch
import torch.nn.functional as F

from modules import onednn
from modules.onednn import add_matmul, matmul, onednn_works, prefer_onednn
from tests.modules.test_kernels import fast_linear, prepacks


def matrix(layout: str, rows: int, columns: int) -> torch.Tensor:
    """Random numbers, in the rows x columns of one of several layouts."""
    if layout == "transposed":
        return torch.randn(columns, rows).T
    if layout == "strided":
        return torch.randn(rows, 2 * columns)[:, ::2]
    return torch.randn(rows, columns)


@pytest.mark.parametrize(
    "layouts", [("plain", "plain"), ("transposed", "strided"), ("strided", "transposed")]
)
def test_matmuls_are_those_of_f_linear(library, layouts):
    torch.manual_seed(0)
    x, W = matrix(layouts[0], 31, 17), matrix(layouts[1], 23, 17)
    b, y = torch.randn(23), torch.randn(31, 23)
    assert torch.allclose(matmul(x, W), F.linear(x, W), atol=1e-5)
    assert torch.allclose(matmul(x, W, b), F.linear(x, W, b), atol=1e-5)
    expected = y + F.linear(x, W)
    assert add_matmul(y, x, W) is y
    assert torch.allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize(
    "trains",
    [(False, False, False), (True, False, False), (True, True, True), (False, True, False)],
)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_a_linear_layer_are_those_of_f_linear(library, trains, bias):
    torch.manual_seed(0)
    layer, x = fast_linear(17, 23, bias), torch.randn(3, 7, 17, requires_grad=trains[0])
    layer.weight.requires_grad_(trains[1])
    if bias:
        layer.bias.requires_grad_(trains[2])
    y, expected = layer(x), F.linear(x, layer.weight, layer.bias)
    assert y.shape == (3, 7, 23)
    assert torch.allclose(y, expected, atol=1e-5)
    inputs = [t for t in (x, layer.weight, layer.bias) if t is not None and t.requires_grad]
    assert y.requires_grad == bool(inputs)
    if inputs:
        weighting = torch.randn(3, 7, 23)
        pairs = zip(
            *(torch.autograd.grad(out, inputs, weighting) for out in (y, expected)), strict=True
        )
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in pairs)


@prepacks
def test_onednn_takes_large_float32_matmuls_and_no_others(monkeypatch):
    monkeypatch.setattr(onednn, "prefer_onednn", lambda: True)
    counted = []
    monkeypatch.setattr(onednn.F, "linear", lambda x, *_: counted.append(len(x)))
    large, W = torch.randn(400, 200), torch.randn(100, 200)
    assert matmul(large, W) is not None
    matmul(large.T.contiguous().T, W.T.contiguous().T)  # transposed, but without gaps
    matmul(large[:40], W)
    matmul(large[:390], torch.cat([W, W], 1)[:, :200])  # in a thousand times the time
    matmul(large.bfloat16(), W.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        matmul(large, W)
    assert counted == [40, 390, 400, 400]


def test_onednn_leads_on_amds_cpus_with_avx512_alone(monkeypatch):
    works = onednn_works()

    def leads(name: str, capability: str) -> bool:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name})
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        return prefer_onednn.__wrapped__()

    assert leads("AMD EPYC", "AVX512") == works
    assert not leads("AMD EPYC", "AVX2")
    assert not leads("Intel Xeon", "AVX512")
