"""Flags made of config dataclasses."""

from dataclasses import fields

import pytest

from finetune import arguments
from finetune.early_stopping import EarlyStoppingConfig
from finetune.loop import FitConfig
from finetune.sampling import SamplingConfig
from modules.lora import LoRAConfig
from modules.reft import ReFTConfig


def parsed(line: str, adapter: type = LoRAConfig, task: str = "sonnet"):
    return arguments.parse("x", task=task, adapter=adapter, defaults={}, demo={}, argv=line.split())


@pytest.mark.parametrize(
    ("flag", "good", "bad"),
    [
        ("--epochs", "3", ["0", "-1", "1.5", "x", ""]),
        ("--lr", "1e-3", ["0", "-1", "nan", "inf", "x"]),
        ("--lora_dropout", "0", ["1", "-0.1", "nan"]),
        ("--top_p", "1", ["0", "1.01", "inf"]),
    ],
)
def test_numbers_are_of_the_fields_kind_and_range(flag, good, bad, capsys):
    assert getattr(parsed(f"{flag} {good}"), flag[2:]) == float(good)
    for text in bad:
        with pytest.raises(SystemExit):
            parsed(f"{flag}={text}")
        assert "is not a " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        (LoRAConfig, "lora_"),
        (ReFTConfig, "reft_"),
        (FitConfig, ""),
        (EarlyStoppingConfig, ""),
        (SamplingConfig, ""),
    ],
)
def test_every_field_of_a_config_is_a_flag_with_its_default(kind, prefix):
    args = parsed("", ReFTConfig if kind is ReFTConfig else LoRAConfig)
    assert {prefix + field.name for field in fields(kind)} <= vars(args).keys()
    assert arguments.config(kind, args, prefix=prefix) == kind()


def test_values_of_flags_reach_the_config():
    flags = "--lora_rank 3 --lora_alpha 2.5 --lora_targets key value --lora_layers 0 2 --greedy"
    args = parsed(flags)
    expected = LoRAConfig(rank=3, alpha=2.5, targets=("key", "value"), layers=(0, 2))
    assert arguments.config(LoRAConfig, args, prefix="lora_") == expected
    assert arguments.config(SamplingConfig, args).greedy


def test_lists_may_have_commas():
    args = parsed("--reft_layers 0,3 5 --reft_locations attention,ffn", ReFTConfig)
    assert args.reft_layers == (0, 3, 5)
    assert args.reft_locations == ("attention", "ffn")


def test_a_misspelt_flag_names_the_nearest(capsys):
    with pytest.raises(SystemExit):
        parsed("--lora_rnak 3")
    assert "unknown flag --lora_rnak: did you mean --lora_rank?" in capsys.readouterr().err
