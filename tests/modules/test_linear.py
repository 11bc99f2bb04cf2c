"""The linear layer, plain and packed, against F.linear."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modules import linear
from modules.linear import Linear, add_product, can_pack, onednn_leads, packed_layers, product
from modules.lora import LoRAConfig, LoRALinear

packs = pytest.mark.skipif(not can_pack(torch.zeros(4, 4)), reason="not a CPU that packs weights")


def matrix(layout: str, rows: int, columns: int) -> torch.Tensor:
    """Random numbers, in the rows x columns of one of several layouts."""
    if layout == "transposed":
        return torch.randn(columns, rows).T
    return (
        torch.randn(rows, 2 * columns)[:, ::2]
        if layout == "strided"
        else torch.randn(rows, columns)
    )


@pytest.mark.parametrize(
    "layouts", [("plain", "plain"), ("transposed", "strided"), ("strided", "transposed")]
)
def test_products_are_those_of_f_linear(library, layouts):
    torch.manual_seed(0)
    x, W, b, y = (
        matrix(layouts[0], 31, 17),
        matrix(layouts[1], 23, 17),
        torch.randn(23),
        torch.randn(31, 23),
    )
    assert torch.allclose(product(x, W), F.linear(x, W), atol=1e-5)
    assert torch.allclose(product(x, W, b), F.linear(x, W, b), atol=1e-5)
    expected = y + F.linear(x, W)
    assert add_product(y, x, W) is y
    assert torch.allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize(
    "trains",
    [(False, False, False), (True, False, False), (True, True, True), (False, True, False)],
)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_f_linear(library, trains, bias):
    torch.manual_seed(0)
    layer, x = Linear(17, 23, bias), torch.randn(3, 7, 17, requires_grad=trains[0])
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


@packs
def test_onednn_takes_large_float32_products_and_no_others(monkeypatch):
    monkeypatch.setattr(linear, "onednn_leads", lambda: True)
    counted = []
    monkeypatch.setattr(linear.F, "linear", lambda x, *_: counted.append(len(x)))
    large, W = torch.randn(400, 200), torch.randn(100, 200)
    assert product(large, W) is not None
    product(large[:40], W)
    product(large.bfloat16(), W.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        product(large, W)
    assert counted == [40, 400, 400]


def test_onednn_leads_on_amds_cpus_with_avx512_alone(monkeypatch):
    def leads(name: str, capability: str) -> bool:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name})
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        return onednn_leads.__wrapped__()

    assert leads("AMD EPYC", "AVX512") == torch.backends.mkldnn.is_available()
    assert not leads("AMD EPYC", "AVX2")
    assert not leads("Intel Xeon", "AVX512")


@packs
@pytest.mark.parametrize("shape", [(1, 70), (12, 70), (3, 4, 70), (12, 1, 70), (900, 70)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_gives_what_f_linear_gives(shape, bias):
    layer, x = Linear(70, 130, bias), torch.randn(shape)
    expected = F.linear(x, layer.weight, layer.bias)
    with torch.no_grad(), packed_layers(nn.Sequential(layer), 12, torch.float32):
        assert layer.packed is not None
        out = layer(x)
    assert torch.allclose(out, expected, atol=1e-5)
    assert out.is_contiguous()
    assert layer.packed is None


@packs
@pytest.mark.parametrize("merged", [False, True])
def test_a_packed_lora_layer_has_its_adapter_merged_and_keeps_its_weights(merged):
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 96), LoRAConfig(rank=4), (True, False, True)).eval()
    nn.init.normal_(layer.lora_B)
    if merged:
        layer.merge()
    weights = {name: p.clone() for name, p in layer.named_parameters()}
    x = torch.randn(5, 64)
    with torch.no_grad():
        expected = layer(x)
        with packed_layers(layer, 5, torch.float32):
            assert torch.allclose(layer(x), expected, atol=1e-4)
        with packed_layers(layer, 5, torch.bfloat16):
            out = layer(x)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.float(), expected, atol=0.02 * expected.abs().max())
    assert all(torch.equal(p, weights[name]) for name, p in layer.named_parameters())


@packs
def test_an_error_within_leaves_no_packed_weight_behind():
    layer = Linear(8, 8)
    with pytest.raises(KeyError), packed_layers(layer, 2, torch.float32):
        raise KeyError
    assert layer.packed is None


def test_where_nothing_can_be_packed_layers_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    layer = Linear(8, 8)
    with packed_layers(layer, 2, torch.bfloat16):
        assert layer.packed is None
