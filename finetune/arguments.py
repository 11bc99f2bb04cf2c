"""Command-line flags: groups that the scripts share, most of them made of config dataclasses."""

import argparse
import difflib
import os
import re
from collections.abc import Callable
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from finetune.early_stopping import EarlyStoppingConfig
from finetune.identity import INPUTS, OUTPUTS
from finetune.loop import FitConfig
from finetune.runtime import RuntimeConfig
from finetune.sampling import SamplingConfig
from models.config import SIZES
from modules.settings import UserError, check_setting, setting

Config = TypeVar("Config")
ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"


@dataclass(frozen=True)
class Amounts:
    """How much of the data to use, in what order."""

    batch_size: int = setting(8, "examples in a batch of each rank", least=1)
    seed: int = setting(
        11711,
        "decides the adapter's initial values, order, dropout and samples",
        least=0,
        most=2**32 - 1,
    )
    limit_train: int | None = setting(None, "only the first N training examples [all]", least=1)
    limit_dev: int | None = setting(None, "only the first N of dev and test [all]", least=1)


@dataclass(frozen=True)
class Samples:
    """How many poems to write."""

    num_samples: int = setting(
        1, "N poems for each held-out sonnet, to choose from, in a second file", least=1
    )


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Flags on the left, their meaning on the right, in lines of a common width."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=100)


def parse(
    description: str,
    *,
    task: str,
    adapter: type,
    defaults: dict[str, Any],
    demo: dict[str, Any],
    argv: list[str] | None = None,
) -> argparse.Namespace:
    """Parse a script's command line with its defaults, under `--demo` those of the demo too.

    `--help` starts with the script's docstring instead of a list of all flags. Flags must be
    written out: an abbreviation could mean another flag in the next version.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--demo] [--use_gpu] [flags below; defaults in brackets]",
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    help = "the bundled small model and data: offline, on a CPU, within minutes"
    parser.add_argument("--demo", action="store_true", help=help)
    method, title = adapter.method, {"lora": "LoRA", "reft": "ReFT"}[adapter.method]
    add_files(parser, task, method)
    add_settings(parser, title, adapter, prefix=f"{method}_")
    add_settings(parser, "training", FitConfig)
    add_settings(parser, "early stopping", EarlyStoppingConfig)
    if task == "sonnet":
        add_settings(parser, "generation", SamplingConfig, Samples)
    add_run(parser)
    add_exchange(parser, method)
    parser.set_defaults(**defaults)
    if parser.parse_known_args(argv)[0].demo:
        parser.set_defaults(**demo)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_unknown(unknown[0], parser))
    for name, value in vars(args).items():
        if isinstance(value, list):  # of tuples, as `nargs` collects them
            setattr(args, name, tuple(part for parts in value for part in parts))
    try:
        _check_together(args, parser.get_default)
    except UserError as error:
        parser.error(str(error))
    return args


def _unknown(flag: str, parser: argparse.ArgumentParser) -> str:
    name = flag.partition("=")[0]
    nearest = difflib.get_close_matches(name, re.findall(r"--\w+", parser.format_help()), n=1)
    return f"there is no flag {name}" + (f": did you mean {nearest[0]}?" if nearest else "")


def add_settings(
    parser: argparse.ArgumentParser,
    title: str,
    *configs: type,
    prefix: str = "",
    optional: bool = False,
) -> None:
    """A group of flags, one for each field of config dataclasses, with `prefix` in their names.

    `optional` flags are None where they are not given.
    """
    group = parser.add_argument_group(title)
    for config in configs:
        for field in fields(config):
            hint, help = str(get_type_hints(config)[field.name]), field.metadata["help"]
            default = None if optional else field.default
            options: dict[str, Any] = {"default": default, "help": help}
            if hint == "<class 'bool'>":
                options["action"] = "store_true"
            else:
                options |= {"type": _converter(field, hint), "metavar": _metavar(field, hint)}
                if not optional and "[" not in help:
                    options["help"] += " [%(default)s]"
            if hint.startswith("tuple"):
                options["nargs"] = "+"
            group.add_argument(f"--{prefix}{field.name}", **options)


def _metavar(field: Field, hint: str) -> str:
    choices = field.metadata["choices"]
    if choices is None:
        return "N" if "int" in hint else "X" if "float" in hint else field.name.upper()
    named = all(choice in field.metadata["help"] for choice in choices)
    return field.name.upper() if named else "{" + ",".join(choices) + "}"


def _converter(field: Field, hint: str) -> Callable[[str], Any]:
    """Type of a flag: its text as a value that the field allows, or several between commas."""
    kind = int if "int" in hint else float if "float" in hint else str

    def convert_one(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            return text  # the check says what it should be

    def convert(text: str) -> Any:
        parts = tuple(map(convert_one, filter(None, text.split(","))))
        value = parts if hint.startswith("tuple") else convert_one(text)
        try:
            check_setting(field, value)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return value

    return convert


def config(kind: type[Config], args: argparse.Namespace, prefix: str = "") -> Config:
    """A config dataclass from the flags that `add_settings` made of it."""
    return kind(**{field.name: getattr(args, prefix + field.name) for field in fields(kind)})


def add_files(parser: argparse.ArgumentParser, task: str, method: str) -> None:
    """The data files in and the prediction files out, each with its default."""
    if task == "paraphrase":
        title, out = "data, question pairs (see data/README.md)", f"predictions/{method}-para"
        files = {
            "para_train": ("data/quora-train.csv", "to train on"),
            "para_dev": ("data/quora-dev.csv", "to score after each epoch"),
            "para_test": ("data/quora-test-student.csv", "to predict, has no labels"),
            "para_dev_out": (f"{out}-dev-output.csv", "predictions; metrics go beside it"),
            "para_test_out": (f"{out}-test-output.csv", "predictions"),
        }
    else:
        title, out = "data, numbered poems (see data/README.md)", f"predictions/{method}_generated"
        files = {
            "sonnet_path": ("data/sonnets.txt", "to train on, a tenth to validate"),
            "held_out_sonnet_path": ("data/sonnets_held_out.txt", "to continue in the end"),
            "dev_sonnet_path": ("data/sonnets_held_out_dev.txt", "to continue after each epoch"),
            "dev_gold_path": ("data/TRUE_sonnets_held_out_dev.txt", "the same poems, whole"),
            "sonnet_out": (f"{out}_sonnets.txt", "poems; metrics go beside it"),
        }
    group = parser.add_argument_group(title)
    for name, (default, help) in files.items():
        options = {"type": Path, "default": in_project(default), "metavar": "FILE"}
        group.add_argument(f"--{name}", help=f"{help} [%(default)s]", **options)


def in_project(path: str) -> Path:
    """A path inside the project, as seen from the working directory."""
    return Path(os.path.relpath(ROOT / path))


def add_run(parser: argparse.ArgumentParser) -> None:
    """Model, how much to do, where the run's folder is, and how to compute."""
    group = parser.add_argument_group("run")

    def switch(name: str, help: str) -> None:
        group.add_argument(name, action="store_true", help=help)

    help = f"{', '.join(SIZES)} (bundled, the others from the hub or its cache) [%(default)s]"
    group.add_argument("--model_size", choices=SIZES, default="gpt2", metavar="SIZE", help=help)
    help = "a GPT-2 checkpoint in Hugging Face format, instead of --model_size"
    group.add_argument("--model_path", type=Path, metavar="FOLDER", help=help)
    help = "where each run has its folder [%(default)s]"
    default = in_project("runs")
    group.add_argument("--runs_dir", type=Path, default=default, metavar="FOLDER", help=help)
    switch("--resume", "resume this run if it was stopped")
    switch("--overwrite", "train this run anew, finished or not")
    switch("--predict_only", "no training: predict with the adapter that the same command trained")
    switch("--tensorboard", "write TensorBoard logs to the run's folder")
    switch("--debug", "show where in the code an error came from, too")
    add_settings(parser, "machine", RuntimeConfig)
    add_settings(parser, "amounts", Amounts)


def add_exchange(parser: argparse.ArgumentParser, method: str) -> None:
    """Adapters and checkpoints in the formats of PEFT and transformers."""
    group = parser.add_argument_group("exchange with PEFT and transformers")
    if method == "lora":
        help = "start from a PEFT adapter, which decides rank, alpha, targets and layers"
        group.add_argument("--import_peft", type=Path, metavar="FOLDER", help=help)
    for name, what in (("peft", "the adapter for PEFT"), ("merged", "base and LoRA as one model")):
        help = f"write {what}" if method == "lora" else argparse.SUPPRESS
        kind = Path if method == "lora" else _not_for_reft
        group.add_argument(f"--export_{name}", type=kind, metavar="FOLDER", help=help)


def _not_for_reft(text: str) -> Path:
    """Type of the flags that a ReFT run cannot serve."""
    raise argparse.ArgumentTypeError(
        "ReFT edits the states between GPT-2's blocks, which no weight of GPT-2 and no LoRA can do"
    )


def _check_together(args: argparse.Namespace, default: Callable[[str], Any]) -> None:
    """Raise UserError for flags that are right one by one but contradict each other."""
    modes = [name for name in ("predict_only", "resume", "overwrite") if getattr(args, name)]
    if len(modes) > 1:
        raise UserError(f"--{modes[0]} and --{modes[1]} contradict each other: give one of them")
    if getattr(args, "import_peft", None):
        for name in ("lora_rank", "lora_alpha", "lora_targets", "lora_layers"):
            if getattr(args, name) != default(name):
                raise UserError(f"--{name} beside --import_peft, whose folder decides it")
    if getattr(args, "greedy", False) and args.num_samples > 1:
        raise UserError("--num_samples beside --greedy, which writes the same poem each time")
    given_least = getattr(args, "min_lines", None) != default("min_lines")
    if given_least and args.min_lines > args.max_lines:
        raise UserError(f"--min_lines {args.min_lines} is more than --max_lines {args.max_lines}")
    seen = {os.path.realpath(path): name for name, path in _given(args, INPUTS).items()}
    for name, path in _given(args, OUTPUTS).items():
        other = seen.setdefault(os.path.realpath(path), name)
        if other != name:
            raise UserError(f"--{name} and --{other} are the same file, {path}")
    folders = _given(args, ("export_peft", "export_merged"))
    if len(set(map(os.path.realpath, [*folders.values(), "."]))) <= len(folders):
        raise UserError(
            "--export_peft and --export_merged need a folder each, other than the current one"
        )
    for name, folder in folders.items():
        is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        if not (args.resume or is_free):  # a resumed run may find its own there
            raise UserError(f"--{name}: {str(folder)!r} already exists and is not an empty folder")


def _given(args: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Path]:
    return {name: getattr(args, name) for name in names if getattr(args, name, None)}
