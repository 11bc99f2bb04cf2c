"""Command-line flags: the groups shared by the scripts, most built from config dataclasses."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from finetune.early_stopping import EarlyStoppingConfig
from finetune.identity import INPUT_FLAGS, OUTPUT_FLAGS
from finetune.loop import FitConfig
from finetune.run import shown_files
from finetune.runtime import RuntimeConfig
from finetune.sampling import SamplingConfig
from models.config import SIZES
from modules.settings import UserError, check_setting, setting

Config = TypeVar("Config")
ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"


@dataclass(frozen=True)
class Amounts:
    """How much data to use, and in what order."""

    batch_size: int = setting(8, "examples per batch, in each process", least=1)
    seed: int = setting(
        11711,
        "seeds the adapter's initialization, data order, dropout and sampling",
        least=0,
        most=2**32 - 1,
    )
    limit_train: int | None = setting(None, "only the first N training examples [all]", least=1)
    limit_dev: int | None = setting(None, "only the first N dev and test examples [all]", least=1)


@dataclass(frozen=True)
class Samples:
    """How many poems to write."""

    num_samples: int = setting(
        1, "poems per held-out sonnet; if more than one, a second file contains them all", least=1
    )


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help in lines of 100 columns, with room for long flag names."""

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
    """Parse a script's command line with its defaults, which `demo` overrides under `--demo`.

    `--help` starts with the script's docstring instead of a list of all flags. Flags must be
    spelled out, because an abbreviation could match another flag in a later version.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--demo] [--use_gpu] [flags below; defaults in brackets]",
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    help = "run offline on a CPU within minutes, with the bundled small model and data, and with "
    help += "settings for them, which --demo --help shows"
    parser.add_argument("--demo", action="store_true", help=help)
    method, title = adapter.method, {"lora": "LoRA", "reft": "ReFT"}[adapter.method]
    add_files(parser, task, method)
    add_model(parser)
    add_settings(parser, title, adapter, prefix=f"{method}_")
    add_settings(parser, "training", FitConfig, Amounts)
    add_settings(parser, "early stopping", EarlyStoppingConfig)
    if task == "sonnet":
        add_settings(parser, "generation", SamplingConfig, Samples)
    add_run(parser)
    add_exchange(parser, method)
    parser.set_defaults(**defaults)
    if "--demo" in (sys.argv[1:] if argv is None else argv):  # before parsing, for --help
        parser.set_defaults(**demo)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_unknown(unknown[0], parser))
    for name, value in vars(args).items():
        if isinstance(value, list):  # a list of tuples, collected by `nargs`
            setattr(args, name, tuple(part for parts in value for part in parts))
    try:
        _check_conflicts(args, shown_files(vars(args), method, task), parser.get_default)
    except UserError as error:
        parser.error(str(error))
    return args


def _unknown(flag: str, parser: argparse.ArgumentParser) -> str:
    name = flag.partition("=")[0]
    if not name.startswith("-"):
        return f"unexpected argument {flag}"
    flags = re.findall(r"--\w+", parser.format_help())
    nearest = difflib.get_close_matches(name, flags, n=1, cutoff=0.7)
    return f"unknown flag {name}" + (f": did you mean {nearest[0]}?" if nearest else "")


def add_settings(
    parser: argparse.ArgumentParser,
    title: str,
    *configs: type,
    prefix: str = "",
    optional: bool = False,
) -> None:
    """Add a group of flags, one for each field of the config dataclasses, named with `prefix`.

    With `optional`, the value of a flag that is not given is None.
    """
    group = parser.add_argument_group(title)
    for config in configs:
        for field in fields(config):
            # The hint as text: that of an optional tuple of integers contains "int" as well.
            hint, help = str(field.type), field.metadata["help"]
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
    """The type of a field's flag: converts text to an allowed value, or to a tuple at commas."""
    kind = int if "int" in hint else float if "float" in hint else str

    def convert_one(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            return text  # check_setting reports what is allowed

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
    """Build a config dataclass from the flags that `add_settings` added for it."""
    return kind(**{field.name: getattr(args, prefix + field.name) for field in fields(kind)})


def add_files(parser: argparse.ArgumentParser, task: str, method: str) -> None:
    """Add the flags for data files to read and prediction files to write."""
    if task == "paraphrase":
        title, out = "question-pair files (see data/README.md)", f"predictions/{method}-para"
        files = {
            "para_train": ("data/quora-train.csv", "training pairs"),
            "para_dev": ("data/quora-dev.csv", "dev pairs, scored after each epoch"),
            "para_test": ("data/quora-test-student.csv", "unlabeled test pairs to predict"),
            "para_dev_out": (f"{out}-dev-output.csv", "dev predictions; metrics go alongside"),
            "para_test_out": (f"{out}-test-output.csv", "test predictions"),
        }
    else:
        title, out = "sonnet files (see data/README.md)", f"predictions/{method}_generated"
        files = {
            "sonnet_path": ("data/sonnets.txt", "training poems, a tenth for validation"),
            "held_out_sonnet_path": ("data/sonnets_held_out.txt", "poems to continue at the end"),
            "dev_sonnet_path": ("data/sonnets_held_out_dev.txt", "poems to continue each epoch"),
            "dev_gold_path": ("data/TRUE_sonnets_held_out_dev.txt", "the same poems, complete"),
            "sonnet_out": (f"{out}_sonnets.txt", "generated poems; metrics go alongside"),
        }
    group = parser.add_argument_group(title)
    for name, (default, help) in files.items():
        options = {"type": Path, "default": project_path(default), "metavar": "FILE"}
        group.add_argument(f"--{name}", help=f"{help} [%(default)s]", **options)


def project_path(path: str) -> Path:
    """A path in the project, relative to the working directory."""
    return Path(os.path.relpath(ROOT / path))


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the flags for the base checkpoint."""
    group = parser.add_argument_group("model")
    help = f"{', '.join(SIZES)} (bundled; the others come from the hub or its cache) [%(default)s]"
    group.add_argument("--model_size", choices=SIZES, default="gpt2", metavar="SIZE", help=help)
    help = "a GPT-2 checkpoint in Hugging Face format, instead of --model_size"
    group.add_argument("--model_path", type=Path, metavar="FOLDER", help=help)


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the flags for the run's folder and modes, and for the hardware."""
    group = parser.add_argument_group("run")

    def switch(name: str, help: str) -> None:
        group.add_argument(name, action="store_true", help=help)

    help = "folder in which each run gets its own folder [%(default)s]"
    default = project_path("runs")
    group.add_argument("--runs_dir", type=Path, default=default, metavar="FOLDER", help=help)
    switch("--resume", "resume this run if it was stopped")
    switch("--overwrite", "start this run over, even if it is finished")
    switch("--predict_only", "do not train; predict with the adapter that this command trained")
    switch("--tensorboard", "write TensorBoard logs to the run's folder")
    switch("--debug", "also show the traceback of an error")
    add_settings(parser, "hardware", RuntimeConfig)


def add_exchange(parser: argparse.ArgumentParser, method: str) -> None:
    """Add the flags to exchange adapters and checkpoints with PEFT and transformers."""
    group = parser.add_argument_group("import and export for PEFT and transformers")
    if method == "lora":
        help = "start from a PEFT adapter, which determines rank, alpha, targets and layers"
        group.add_argument("--import_peft", type=Path, metavar="FOLDER", help=help)
    for name, what in (("peft", "the adapter for PEFT"), ("merged", "the model with LoRA merged")):
        help = f"write {what}" if method == "lora" else argparse.SUPPRESS
        kind = Path if method == "lora" else _not_for_reft
        group.add_argument(f"--export_{name}", type=kind, metavar="FOLDER", help=help)


def _not_for_reft(text: str) -> Path:
    """The type of flags that are not available with ReFT."""
    raise argparse.ArgumentTypeError(
        "ReFT edits hidden states, which neither GPT-2 weights nor a LoRA adapter can represent"
    )


def _check_conflicts(
    args: argparse.Namespace, shown: dict[str, Path], default: Callable[[str], Any]
) -> None:
    """Raise UserError for flags that are valid on their own but not together."""
    modes = [name for name in ("predict_only", "resume", "overwrite") if getattr(args, name)]
    if len(modes) > 1:
        raise UserError(f"--{modes[0]} and --{modes[1]} contradict each other: use only one")
    if getattr(args, "import_peft", None):
        for name in ("lora_rank", "lora_alpha", "lora_targets", "lora_layers"):
            if getattr(args, name) != default(name):
                raise UserError(f"--{name} conflicts with --import_peft, which determines it")
    if getattr(args, "greedy", False) and args.num_samples > 1:
        raise UserError("--num_samples conflicts with --greedy, which always writes the same poem")
    given_least = getattr(args, "min_lines", None) != default("min_lines")
    if given_least and args.min_lines > args.max_lines:
        raise UserError(f"--min_lines {args.min_lines} exceeds --max_lines {args.max_lines}")
    _check_paths(args, shown)


def _check_paths(args: argparse.Namespace, shown: dict[str, Path]) -> None:
    """Raise UserError if a run would overwrite its own files, or export among other files."""
    inputs = {f"--{name}": getattr(args, name, None) for name in INPUT_FLAGS}
    seen = {os.path.realpath(path): name for name, path in inputs.items() if path}
    outputs = {f"--{n}" if n in OUTPUT_FLAGS else f"the {n} file": p for n, p in shown.items()}
    for name, path in outputs.items():
        other = seen.setdefault(os.path.realpath(path), name)
        if other != name:
            raise UserError(f"{name} and {other} are the same file, {path}")
    folders = {f"--{n}": getattr(args, n) for n in ("export_peft", "export_merged")}
    folders = {name: folder for name, folder in folders.items() if folder}
    others = outputs | {"--runs_dir": args.runs_dir, "the current folder": Path(".")} | folders
    for name, folder in folders.items():
        for other, path in others.items():
            if other != name and path.resolve().is_relative_to(folder.resolve()):
                raise UserError(f"{name} needs a folder of its own, but {other} is in {folder}")
