"""Adapter checkpoints: what comes back, and what is refused."""

import pytest
import torch

from finetune.checkpoint import load_adapter, save_adapter
from finetune.runtime import Runtime
from modules.lora import LoRAConfig, add_lora
from modules.settings import UserError
from tests.conftest import Evil

CPU = Runtime(torch.device("cpu"))


@pytest.fixture
def lora_gpt(gpt):
    add_lora(gpt, LoRAConfig(rank=2))
    return gpt


def test_an_adapter_checkpoint_comes_back(lora_gpt, tmp_path):
    path = tmp_path / "a.pt"
    save_adapter(path, lora_gpt, {"method": "lora", "epoch": 3})
    before = {n: p.clone() for n, p in lora_gpt.named_parameters()}
    with torch.no_grad():
        for name, parameter in lora_gpt.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    assert load_adapter(path, lora_gpt, {"method": "lora"}, CPU)["epoch"] == 3
    assert all(torch.equal(p, before[n]) for n, p in lora_gpt.named_parameters())
    assert torch.load(path, weights_only=True).keys() == {"about", "adapter"}
    assert path.stat().st_size < 60_000  # the adapter alone, not the model


def test_checkpoints_that_do_not_fit_are_refused_in_one_sentence(lora_gpt, tmp_path):
    path = tmp_path / "a.pt"
    save_adapter(path, lora_gpt, {"base": "1"})
    with pytest.raises(UserError, match=r"a.pt has base 1, but this run has 2"):
        load_adapter(path, lora_gpt, {"base": "2"}, CPU)
    for content in (
        {"about": Evil(tmp_path / "harm")},
        {"about": {}},
        [1],
        {"about": {}, "adapter": {}},
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=r"a\.pt") as error:
            load_adapter(path, lora_gpt, {}, CPU)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "harm").exists()
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="is damaged or was not written by torch.save$"):
        load_adapter(path, lora_gpt, {}, CPU)
