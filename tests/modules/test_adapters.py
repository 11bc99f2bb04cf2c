"""One predicate decides what trains, what counts and what is saved."""

import pytest
import torch

from models.gpt2 import GPT2Model
from modules.adapters import (
    adapter_state,
    count_parameters,
    freeze_base,
    is_adapter,
    load_adapter_state,
)
from modules.lora import LoRAConfig, add_lora
from modules.settings import UserError


def test_what_trains_is_counted_and_saved(gpt):
    add_lora(gpt, LoRAConfig())
    adapter = {name: p for name, p in gpt.named_parameters() if is_adapter(name)}
    assert adapter.keys() == {name for name, p in gpt.named_parameters() if p.requires_grad}
    assert adapter.keys() == adapter_state(gpt).keys()
    assert count_parameters(gpt)[0] == sum(p.numel() for p in adapter.values())


def test_freezing_sets_both_directions(gpt):
    add_lora(gpt, LoRAConfig())
    for parameter in gpt.parameters():
        parameter.requires_grad_(not parameter.requires_grad)
    freeze_base(gpt)
    assert all(p.requires_grad == is_adapter(name) for name, p in gpt.named_parameters())


def test_a_model_without_an_adapter_is_refused(gpt):
    with pytest.raises(UserError, match="nothing is left to train"):
        freeze_base(gpt)


def test_a_training_step_moves_the_adapter_and_nothing_else(gpt):
    add_lora(gpt, LoRAConfig())
    gpt.train()
    before = {name: p.clone() for name, p in gpt.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in gpt.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # A moves from the second step on: B is 0 in the first
        gpt(torch.tensor([[1, 2, 3]]))["last_token"].square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in gpt.named_parameters():
        assert torch.equal(parameter, before[name]) != is_adapter(name), name


def test_saved_state_comes_back_and_is_a_copy(gpt):
    add_lora(gpt, LoRAConfig())
    state = adapter_state(gpt)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            if is_adapter(name):
                parameter.add_(1)
    load_adapter_state(gpt, state)
    assert all(torch.equal(p, state[n]) for n, p in gpt.named_parameters() if n in state)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rank": 4}, r"lora_A is \[12, 32\] in the file but \[24, 32\]"),
        ({"layers": (0,)}, "missing"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(gpt, hf_folder, settings, sentence):
    other = GPT2Model.from_pretrained(hf_folder)
    add_lora(other, LoRAConfig(**settings))
    add_lora(gpt, LoRAConfig())
    with pytest.raises(UserError, match=sentence):
        load_adapter_state(gpt, adapter_state(other))
