"""Command-line flags: groups that the scripts share, most of them made of config dataclasses."""

import argparse
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from finetune.run import INPUTS, OUTPUTS
from finetune.runtime import PRECISIONS
from models.config import SIZES
from modules.settings import UserError, check_number

Config = TypeVar("Config")
ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Flags on the left, their meaning on the right, in lines of a common width."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=100)


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose `--help` starts with the script's docstring instead of a list of all flags.

    Flags must be written out: an abbreviation could mean another flag in the next version.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--demo] [--use_gpu] [flags below; defaults in brackets]",
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    help = "the bundled small model and data: offline, on a CPU, in a minute or two"
    parser.add_argument("--demo", action="store_true", help=help)
    return parser


def number(kind: type, **bounds: float) -> Callable[[str], float]:
    """Type of a flag that takes an int or a float within bounds, those of `settings.setting`."""
    limits = {"above": -float("inf"), "least": -float("inf")}
    limits |= {"below": float("inf"), "most": float("inf")} | bounds

    def convert(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            return text

    return checked(convert, lambda value: check_number(value, kind, **limits))


def checked(convert: Callable[[str], Any], check: Callable[[Any], Any]) -> Callable[[str], Any]:
    """Type of a flag whose converted text must pass a check that raises UserError."""

    def convert_and_check(text: str) -> Any:
        value = convert(text)
        try:
            check(value)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return value

    return convert_and_check


def add_settings(
    parser: argparse.ArgumentParser, title: str, config: type, prefix: str = ""
) -> Any:
    """A group of flags, one for each field of a config dataclass, with `prefix` in their names."""
    group = parser.add_argument_group(title)
    types = get_type_hints(config)
    for field in fields(config):
        about, hint = field.metadata, str(types[field.name])
        options: dict[str, Any] = {"default": field.default, "help": about["help"]}
        if "[" not in about["help"]:
            options["help"] += " [%(default)s]"
        if types[field.name] is bool:
            options["action"] = "store_true"
            options["help"] = about["help"]
        elif about["check"]:
            options |= {"type": checked(str, about["check"]), "metavar": "WHERE"}
        elif about["choices"] is not None:
            options["choices"] = list(about["choices"])
            if all(choice in about["help"] for choice in options["choices"]):
                options["metavar"] = field.name.upper()  # else argparse lists them
        elif "int" in hint:
            options |= {"type": number(int, **about["bounds"]), "metavar": "N"}
        elif "float" in hint:
            options |= {"type": number(float, **about["bounds"]), "metavar": "X"}
        if hint.startswith("tuple"):
            options["nargs"] = "+"
        group.add_argument(f"--{prefix}{field.name}", **options)
    return group


def add_run(parser: argparse.ArgumentParser) -> None:
    """Model, device, precision, seed, how much to do, and where the run's own files are."""
    group = parser.add_argument_group("run")

    def switch(name: str, help: str) -> None:
        group.add_argument(name, action="store_true", help=help)

    help = f"{', '.join(SIZES)} (bundled, the others from the hub or its cache) [%(default)s]"
    group.add_argument("--model_size", choices=SIZES, default="gpt2", metavar="SIZE", help=help)
    help = "a GPT-2 checkpoint in Hugging Face format, instead of --model_size"
    group.add_argument("--model_path", type=Path, metavar="FOLDER", help=help)
    help = "examples in a batch of each rank [%(default)s]"
    group.add_argument("--batch_size", type=number(int, least=1), metavar="N", help=help)
    switch("--use_gpu", "CUDA, else Apple's MPS")
    help = "auto is bf16, or fp16 on GPUs without bf16, or fp32 on a CPU or MPS [auto]"
    precisions = ["auto", *PRECISIONS]
    group.add_argument("--precision", choices=precisions, default="auto", help=help)
    switch("--compile", "torch.compile the model: takes a minute or two to start")
    switch("--gradient_checkpointing", "recompute blocks in the backward: less memory, more time")
    help = "decides the adapter's initial values, order, dropout and samples [%(default)s]"
    seed = number(int, least=0, most=2**32 - 1)
    group.add_argument("--seed", type=seed, default=11711, metavar="N", help=help)
    for name, what in (("train", "training examples"), ("dev", "of dev and test")):
        help = f"only the first N {what} [all]"
        group.add_argument(f"--limit_{name}", type=number(int, least=1), metavar="N", help=help)
    switch("--predict_only", "no training: predict with the adapter that the same command trained")
    switch("--resume", "resume the run of the same command that was stopped")
    switch("--deterministic", "on a GPU, the same bits in every run: slower")
    switch("--debug", "show where in the code an error came from, too")
    for name, folder, help in (
        ("checkpoint_dir", "checkpoints", "where the best epoch's adapter is kept [%(default)s]"),
        ("tensorboard", "runs", "write TensorBoard logs [to %(const)s]"),
    ):
        path, options = in_project(folder), {"type": Path, "metavar": "FOLDER", "help": help}
        options |= {"nargs": "?", "const": path} if name == "tensorboard" else {"default": path}
        group.add_argument(f"--{name}", **options)


def add_num_samples(group: Any) -> None:
    """How many poems to write."""
    help = "K poems for each of the held-out sonnets, to choose from, in a second file"
    group.add_argument(
        "--num_samples", type=number(int, least=1), default=1, metavar="K", help=help
    )


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


def add_files(parser: argparse.ArgumentParser, title: str, files: dict[str, tuple[str, str]]):
    """A group of flags for files: name -> default, meaning."""
    group = parser.add_argument_group(title)
    for name, (default, help) in files.items():
        options = {"type": Path, "default": in_project(default), "metavar": "FILE"}
        group.add_argument(f"--{name}", help=f"{help} [%(default)s]", **options)


def add_paraphrase_files(parser: argparse.ArgumentParser, method: str) -> None:
    """The question-pair files in and the prediction files out."""
    out = f"predictions/{method}-para"
    files = {
        "para_train": ("data/quora-train.csv", "to train on"),
        "para_dev": ("data/quora-dev.csv", "to score after each epoch"),
        "para_test": ("data/quora-test-student.csv", "to predict, has no labels"),
        "para_dev_out": (f"{out}-dev-output.csv", "predictions; metrics go beside it"),
        "para_test_out": (f"{out}-test-output.csv", "predictions"),
    }
    add_files(parser, "data, tab-separated question pairs (see data/README.md)", files)


def add_sonnet_files(parser: argparse.ArgumentParser, method: str) -> None:
    """The sonnet files in and out."""
    files = {
        "sonnet_path": ("data/sonnets.txt", "to train on, a tenth to validate"),
        "held_out_sonnet_path": ("data/sonnets_held_out.txt", "to continue in the end"),
        "dev_sonnet_path": ("data/sonnets_held_out_dev.txt", "to continue after each epoch"),
        "dev_gold_path": ("data/TRUE_sonnets_held_out_dev.txt", "the same poems, whole"),
        "sonnet_out": (f"predictions/{method}_generated_sonnets.txt", "poems; metrics beside it"),
    }
    add_files(parser, "data, numbered poems (see data/README.md)", files)


def in_project(path: str) -> Path:
    """A path inside the project, as seen from the working directory."""
    return Path(os.path.relpath(ROOT / path))


def demo_files(**names: str) -> dict[str, Any]:
    """Flag -> file of `data/`, for the demos."""
    return {flag: DATA / name for flag, name in names.items()}


def parse(
    parser: argparse.ArgumentParser, defaults: dict[str, Any], demo: dict[str, Any]
) -> argparse.Namespace:
    """Parse the command line with a script's defaults, under `--demo` those of the demo too."""
    parser.set_defaults(**defaults)
    if parser.parse_known_args()[0].demo:
        parser.set_defaults(**demo)
    args = parser.parse_args()
    try:
        _check_together(args, parser.get_default)
    except UserError as error:
        parser.error(str(error))
    return args


def _check_together(args: argparse.Namespace, default: Callable[[str], Any]) -> None:
    """Raise UserError for flags that are right one by one but contradict each other."""
    if args.predict_only and args.resume:
        raise UserError("--resume beside --predict_only, which trains nothing")
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


def config(kind: type[Config], args: argparse.Namespace, prefix: str = "") -> Config:
    """A config dataclass from the flags that `add_settings` made of it."""
    values = {field.name: getattr(args, prefix + field.name) for field in fields(kind)}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
