"""Flags made of config dataclasses."""

import argparse
from dataclasses import fields

import pytest

from finetune import arguments
from finetune.arguments import number
from finetune.early_stopping import EarlyStoppingConfig
from finetune.loop import FitConfig
from finetune.sampling import SamplingConfig
from modules.lora import LoRAConfig
from modules.reft import ReFTConfig


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (number(int, least=1), "3", ["0", "-1", "1.5", "x", ""]),
        (number(float, above=0), "1e-3", ["0", "-1", "nan", "inf", "x"]),
        (number(float, least=0, below=1), "0", ["1", "-0.1", "nan"]),
        (number(float, above=0, most=1), "1", ["0", "1.01", "inf"]),
    ],
)
def test_flag_types(kind, good, bad):
    assert kind(good) == float(good)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="is not a"):
            kind(text)


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
    parser = arguments.make_parser("x")
    arguments.add_settings(parser, "title", kind, prefix=prefix)
    args = parser.parse_args([])
    assert {prefix + field.name for field in fields(kind)} <= vars(args).keys()
    assert arguments.config(kind, args, prefix=prefix) == kind()


def test_values_of_flags_reach_the_config():
    parser = arguments.make_parser("x")
    arguments.add_settings(parser, "LoRA", LoRAConfig, prefix="lora_")
    arguments.add_settings(parser, "generation", SamplingConfig)
    flags = "--lora_rank 3 --lora_alpha 2.5 --lora_targets key value --lora_layers 0 2 --greedy"
    args = parser.parse_args(flags.split())
    expected = LoRAConfig(rank=3, alpha=2.5, targets=("key", "value"), layers=(0, 2))
    assert arguments.config(LoRAConfig, args, prefix="lora_") == expected
    assert arguments.config(SamplingConfig, args).greedy
