"""The linear layer, plain and packed, against F.linear."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modules.linear import Linear, can_pack, packed_layers
from modules.lora import LoRAConfig, LoRALinear

packs = pytest.mark.skipif(not can_pack(torch.zeros(4, 4)), reason="not a CPU that packs weights")


@packs
@pytest.mark.parametrize("shape", [(1, 70), (12, 70), (3, 4, 70), (12, 1, 70), (900, 70)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_gives_what_f_linear_gives(shape, bias):
    layer, x = Linear(70, 130, bias), torch.randn(shape)
    expected = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), expected)
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
