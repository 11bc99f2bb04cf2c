"""What the benchmarks share: models of any size, transformers + PEFT beside ours, turns."""

import argparse
import atexit
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from torch import nn

from models.gpt2 import SIZES
from models.pretrained import BUNDLED, find_checkpoint


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """A checkpoint, or random weights at the real size and vocabulary, which cost the same."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--model_path", default=BUNDLED, help="a checkpoint's folder or size")
    group.add_argument("--random", choices=SIZES, metavar="SIZE", help="random weights: gpt2, ...")


def find_model(args: argparse.Namespace) -> Path:
    """The checkpoint's folder; a random one is temporary and goes when the program ends."""
    if not args.random:
        return find_checkpoint(args.model_path)
    n_embd, n_layer, n_head = SIZES[args.random]
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=n_embd, n_layer=n_layer, n_head=n_head)
    model = transformers.GPT2LMHeadModel(config)
    # Without this all tokens are nearly alike; with it top-p 0.9 keeps 3,500 at temperature 1.2.
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(6)
    folder = Path(tempfile.mkdtemp(prefix=f"random-{args.random}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model.save_pretrained(folder)
    return folder


def hf_model(folder: Path) -> transformers.GPT2LMHeadModel:
    """Hugging Face's GPT-2 in float32 with its best attention setting."""
    return transformers.GPT2LMHeadModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )


def with_peft(folder: Path, rank: int) -> nn.Module:
    """The same with PEFT's LoRA on all linear layers."""
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=16,
        lora_dropout=0.1,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
    )
    return peft.get_peft_model(hf_model(folder), config)


def take_turns(peers: dict[str, Callable[[], float]], turns: int) -> dict[str, float]:
    """Median of what each peer's function returns, one after the other, after a turn to warm up."""
    values = {name: [] for name in peers}
    for turn in range(turns + 1):
        for name, measure in peers.items():
            value = measure()
            if turn:
                values[name].append(value)
    return {name: statistics.median(v) for name, v in values.items()}


def report(rates: dict[str, float], unit: str, reference: str, **more: dict[str, float]) -> None:
    """A table with the ratio to the reference, then everything as one line of JSON."""
    for name, rate in rates.items():
        notes = "".join(f"  {values[name]:9.1f} {what}" for what, values in more.items())
        ratio = rate / rates[reference]
        print(f"{name:<40} {rate:9.1f} {unit}  {ratio:5.2f} x {reference}{notes}")
    ratios = {name: round(rate / rates[reference], 3) for name, rate in rates.items()}
    print(json.dumps({"unit": unit, "rates": rates, "ratios": ratios} | more))
