"""Query a finished run: classify two questions, or continue three lines into a poem.

python -m finetune.ask                                       # the newest run, interactively
python -m finetune.ask lora-gpt2-3 "How old are you?" "What is your age?"
python -m finetune.ask RUN --temperature 0.8 < lines.txt     # three lines per poem
"""

import argparse
import io
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import datasets
from data.pairs import Pairs
from data.sonnets import GIVEN_LINES, Sonnet, poem_lines
from finetune import arguments, ending, runtime
from finetune.checkpoint import load_adapter
from finetune.generation import SonnetGenerator
from finetune.run import (
    adapter_path,
    find_run,
    finished_runs,
    is_finished,
    no_finished_run,
    read_record,
)
from finetune.runtime import Runtime, RuntimeConfig
from finetune.sampling import SamplingConfig
from models.gpt2 import GPT2Model
from models.paraphrase_gpt import ParaphraseGPT
from models.pretrained import find_checkpoint, fingerprint
from models.sonnet_gpt import SonnetGPT
from models.tokenizer import load_tokenizer, unused_ids
from modules.kernels import accelerate
from modules.lora import LoRAConfig, add_lora
from modules.reft import ReFTConfig, add_reft
from modules.settings import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CPU, DECODING = Runtime(torch.device("cpu")), SamplingConfig()


class Paraphraser:
    """Decides whether two questions ask the same, using a GPT-2 with or without an adapter."""

    n_lines = 2  # of input per answer

    def __init__(
        self, gpt: GPT2Model, tokenizer: "PreTrainedTokenizerFast", runtime: Runtime = CPU
    ):
        self.model = ParaphraseGPT(gpt, datasets.answer_ids(tokenizer)).eval()
        self.tokenizer, self.runtime = tokenizer, runtime

    @torch.inference_mode()
    def probability(self, first: str, second: str) -> float:
        """The probability of "yes" for two questions, given as raw text."""
        pairs = Pairs(Path("question"), ids=["0"], first=[first], second=[second])
        n_positions = self.model.gpt.config.n_positions
        data = datasets.tokenize_pairs(pairs, self.tokenizer, n_positions)
        batch = self.runtime.to_device(datasets.pair_batch(data, np.array([0])))
        with self.runtime.autocast():
            logits = self.model(**batch)
        return logits.softmax(1)[0, 1].item()

    def answer(self, first: str, second: str) -> str:
        """The more probable answer with its probability, such as `yes, 0.83`."""
        yes = self.probability(first, second)
        return f"yes, {yes:.2f}" if yes > 0.5 else f"no, {1 - yes:.2f}"


class SonnetWriter:
    """Continues poems using a GPT-2 with or without an adapter; sampling differs in each call."""

    n_lines = GIVEN_LINES

    def __init__(
        self,
        gpt: GPT2Model,
        tokenizer: "PreTrainedTokenizerFast",
        sampling: SamplingConfig = DECODING,
        seed: int = 11711,
        runtime: Runtime = CPU,
    ):
        gpt.suppress_tokens(unused_ids(tokenizer, gpt.config.vocab_size))
        self.model = SonnetGPT(gpt)
        self.generator = SonnetGenerator(gpt, tokenizer, sampling, seed, runtime)
        self.n_written = 0

    def write(self, lines: list[str]) -> list[str]:
        """The lines of a poem that begins with the three given lines."""
        lines = [line.strip() for line in lines]
        if len(lines) != GIVEN_LINES or poem_lines("\n".join(lines)) != lines:
            raise UserError(
                f"a poem needs {GIVEN_LINES} lines to start from, none of them blank or a number"
            )
        self.n_written += 1
        (poem,) = self.generator.write([Sonnet(0, tuple(lines))], sample=self.n_written)
        return list(poem.lines)

    def answer(self, *lines: str) -> str:
        """The poem as one string."""
        return "\n".join(self.write(list(lines))) + "\n"


def load(
    run: str | Path | None = None,
    *,
    runs_dir: str | Path | None = None,
    model_path: str | Path | None = None,
    use_gpu: bool = False,
    seed: int | None = None,
    **decoding: Any,
) -> Paraphraser | SonnetWriter:
    """Load a finished run, given its name, a prefix of it, or its folder; None is the newest.

    `runs_dir` defaults to the project's, `model_path` to where the run found its base checkpoint.
    For a run of sonnets, `decoding` overrides fields of its `SamplingConfig`, `seed` its seed.
    Raises UserError if there is no such run, or if its base checkpoint has changed.
    """
    folder = _find_finished(run, Path(runs_dir or arguments.project_path("runs")))
    record = read_record(folder)
    flags = record["arguments"]
    if record["task"] == "paraphrase" and (decoding or seed is not None):
        raise UserError("decoding flags and --seed are only for runs that write sonnets")
    if seed is not None and seed < 0:
        raise UserError(f"seed {seed} is not a whole number of 0 or more")
    needs_gpu = flags["precision"] == "fp16"
    precision = "auto" if needs_gpu and not use_gpu else flags["precision"]
    machine = runtime.start(RuntimeConfig(use_gpu=use_gpu, precision=precision), flags["seed"])
    own = model_path or flags["model_path"]
    base = find_checkpoint(Path(own) if own else flags["model_size"])
    if fingerprint(base) != record["base"]:
        raise UserError(f"{base} is no longer the checkpoint that {folder.name} was trained on")
    gpt = GPT2Model.from_pretrained(base)
    tokenizer = load_tokenizer(base, gpt.config.vocab_size)
    if record["method"] == "lora":
        add_lora(gpt, _config(LoRAConfig, record["adapter"]))
    else:
        add_reft(gpt, _config(ReFTConfig, record["adapter"]))
    if record["task"] == "paraphrase":
        loaded = Paraphraser(gpt, tokenizer, machine)
    else:
        if decoding.keys() & {"temperature", "top_p"}:
            decoding = {"greedy": False} | decoding
        sampling = replace(_config(SamplingConfig, flags | record["predicted_with"]), **decoding)
        seed = flags["seed"] if seed is None else seed
        loaded = SonnetWriter(gpt, tokenizer, sampling, seed, machine)
    identity = {key: record[key] for key in ("method", "task", "base")}
    load_adapter(adapter_path(folder, record["name"]), loaded.model, identity, machine)
    loaded.model.to(machine.device)
    accelerate(loaded.model)
    return loaded


def _find_finished(run: str | Path | None, runs_dir: Path) -> Path:
    found = [find_run(run, runs_dir)] if run else finished_runs(runs_dir)
    if not found:
        raise no_finished_run(runs_dir)
    if not is_finished(found[0]):
        raise UserError(f"{found[0]} is unfinished; repeat its command with --resume")
    return found[0]


def _config(kind: type, values: dict[str, Any]) -> Any:
    """A config dataclass from JSON values, in which tuples are lists."""
    own = {f.name: values[f.name] for f in fields(kind)}
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in own.items()})


def main(args: argparse.Namespace) -> None:
    given = {f.name: getattr(args, f.name) for f in fields(SamplingConfig)}
    run = load(
        args.run,
        runs_dir=args.runs_dir,
        model_path=args.model_path,
        use_gpu=args.use_gpu,
        seed=args.seed,
        **{name: value for name, value in given.items() if value is not None},
    )
    if sys.stdin.isatty() and not args.text:
        print(f"Type {run.n_lines} lines per answer; Ctrl-D quits.", file=sys.stderr)
    group: list[str] = []
    for line in lines_of(args.text or sys.stdin):
        if line.strip():
            group.append(line.strip())
        if len(group) == run.n_lines:
            print(run.answer(*group), flush=True)
            group = []
    if group:
        raise UserError(f"this run takes {run.n_lines} lines at a time; left over: {group}")


def lines_of(text: Iterable[str]) -> Iterator[str]:
    """The lines of arguments or standard input; raises UserError unless they are UTF-8."""
    if isinstance(text, io.TextIOWrapper):
        text.reconfigure(encoding="utf-8-sig")
    try:
        for line in text:
            line.encode()  # fails for an argument that Python could not decode
            yield line
    except UnicodeError:
        raise UserError("the text is not UTF-8") from None


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m finetune.ask",
        description=__doc__,
        formatter_class=arguments.HelpFormatter,
        allow_abbrev=False,
    )
    help = "name, name prefix or folder of a run [the newest]"
    parser.add_argument("run", nargs="?", metavar="RUN", help=help)
    help = "two questions, or the first three lines of a poem [from standard input]"
    parser.add_argument("text", nargs="*", metavar="TEXT", help=help)
    help = "folder of the runs [%(default)s]"
    default = arguments.project_path("runs")
    parser.add_argument("--runs_dir", type=Path, default=default, metavar="FOLDER", help=help)
    help = "where the run's base checkpoint is now [where the run found it]"
    parser.add_argument("--model_path", type=Path, metavar="FOLDER", help=help)
    parser.add_argument("--use_gpu", action="store_true", help="use CUDA, or else Apple's MPS")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the poems [the run's]")
    arguments.add_settings(parser, "generation [the run's settings]", SamplingConfig, optional=True)
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    args = get_args()
    ending.run(lambda: main(args))
