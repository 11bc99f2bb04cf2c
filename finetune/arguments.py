"""Command-line flags: groups that the scripts share, and the dataclasses made of them."""

import argparse
import hashlib
import math
import os
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from datasets import GIVEN_LINES
from finetune.checkpoint import AdapterCheckpoint, ResumeFile, adapter_identity
from finetune.early_stopping import EarlyStopper, EarlyStoppingConfig
from finetune.files import claim
from finetune.loop import SCHEDULES, FitConfig
from finetune.report import record_files, tensorboard_log
from finetune.runtime import PRECISIONS, Runtime
from finetune.sampling import SamplingConfig
from models.config import SIZES
from modules.adapters import AdapterError
from modules.lora import TARGETS, LoRAConfig
from modules.reft import ACTIVATIONS, INTERVENTIONS, LOCATIONS, Positions, ReFTConfig

Config = TypeVar("Config")
ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
INPUTS = (
    *("para_train", "para_dev", "para_test"),
    *("sonnet_path", "held_out_sonnet_path", "dev_sonnet_path", "dev_gold_path"),
)
OUTPUTS = ("para_dev_out", "para_test_out", "sonnet_out")
DEMO = {"model_size": "gpt2-nano", "epochs": 4, "lr_schedule": "linear", "warmup_ratio": 0.1}
DEMO_PAIRS = DEMO | {
    "para_train": DATA / "sample-pairs-train.csv",
    "para_dev": DATA / "sample-pairs-dev.csv",
    "para_test": DATA / "sample-pairs-test.csv",
}
DEMO_SONNETS = DEMO | {
    "temperature": 0.9,
    "sonnet_path": DATA / "sonnets.txt",
    "held_out_sonnet_path": DATA / "sonnets_held_out.txt",
    "dev_sonnet_path": DATA / "sonnets_held_out_dev.txt",
    "dev_gold_path": DATA / "TRUE_sonnets_held_out_dev.txt",
}


def in_project(path: str) -> Path:
    """A path inside the project, as seen from the working directory."""
    return Path(os.path.relpath(ROOT / path))


def not_for_reft(text: str) -> Path:
    """Type of the flags that a ReFT run cannot serve."""
    raise argparse.ArgumentTypeError(
        "ReFT edits the states between GPT-2's blocks, which no weight of GPT-2 and no LoRA can do"
    )


def whole(least: int, most: int = 10**9) -> Callable[[str], int]:
    """Type of a flag that takes a whole number from `least` to `most`."""

    def convert(text: str) -> int:
        value = int(text) if text.isdecimal() and len(text) < 20 else -1
        if not least <= value <= most:
            allowed = f"of {least} or more" if value < least else f"of {most} or less"
            raise argparse.ArgumentTypeError(f"{text[:99]!r} is not a whole number {allowed}")
        return value

    return convert


def number(
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> Callable[[str], float]:
    """Type of a flag that takes a finite number in the range given."""
    allowed = [f"above {above:g}"] * (above > -math.inf)
    allowed += [f"of {least:g} or more"] * (least > -math.inf)
    allowed += [f"below {below:g}"] * (below < math.inf)
    allowed += [f"of {most:g} or less"] * (most < math.inf)

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        in_range = above < value < below and least <= value <= most
        if not (math.isfinite(value) and in_range):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {' and '.join(allowed)}")
        return value

    return convert


def positions(text: str) -> str:
    """Type of a flag that takes what `Positions.parse` understands."""
    try:
        Positions.parse(text)
    except AdapterError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Flags to the left, what they mean to the right, in lines of a common width."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=100)


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose `--help` starts with the script's docstring instead of a list of all flags.

    Flags have to be written out: a shortened one could mean another in the next version.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--demo] [--use_gpu] [flags below; defaults in brackets]",
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    help = "the bundled small model and data: offline, on a CPU, in about a minute"
    parser.add_argument("--demo", action="store_true", help=help)
    return parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which GPT-2 to start from."""
    group = parser.add_argument_group("model")
    help = f"{', '.join(SIZES)} (bundled, the others from the hub or its cache) [%(default)s]"
    group.add_argument("--model_size", choices=SIZES, default="gpt2", metavar="SIZE", help=help)
    help = "a GPT-2 checkpoint in Hugging Face format, instead of --model_size"
    group.add_argument("--model_path", type=Path, metavar="FOLDER", help=help)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Device, precision, seed and what part of a run to do."""
    group = parser.add_argument_group("run")
    group.add_argument("--use_gpu", action="store_true", help="CUDA, else Apple's MPS")
    group.add_argument(
        "--precision",
        choices=["auto", *PRECISIONS],
        default="auto",
        help="auto is bf16, or fp16 on GPUs without bf16, or fp32 on a CPU or MPS [auto]",
    )
    help = "torch.compile the model: a minute or two to start, for long runs on GPUs"
    group.add_argument("--compile", action="store_true", help=help)
    help = "decides the adapter's start, order, dropout and samples [%(default)s]"
    group.add_argument("--seed", type=whole(0, 2**32 - 1), default=11711, metavar="N", help=help)
    help = "only the first N training examples [all]"
    group.add_argument("--limit_train", type=whole(1), metavar="N", help=help)
    help = "only the first N of dev and test [all]"
    group.add_argument("--limit_dev", type=whole(1), metavar="N", help=help)
    help = "no training: predict with the adapter that the same command trained"
    group.add_argument("--predict_only", action="store_true", help=help)
    help = "go on with the run of the same command that was stopped"
    group.add_argument("--resume", action="store_true", help=help)
    help = "steps from one save of where the run stands to the next, 0 is after each epoch"
    flag(group, FitConfig, "save_every", help, type=whole(0))
    help = "on a GPU, the same bits in every run: slower"
    group.add_argument("--deterministic", action="store_true", help=help)
    help = "show where in the code an error came from, too"
    group.add_argument("--debug", action="store_true", help=help)


def add_output_arguments(parser: argparse.ArgumentParser, method: str) -> None:
    """Checkpoints, logs, and the formats of others."""
    group = parser.add_argument_group("checkpoints, logs and exchange")
    folder = in_project("checkpoints")
    help = "where the best epoch's adapter is kept [%(default)s]"
    group.add_argument("--checkpoint_dir", type=Path, default=folder, metavar="FOLDER", help=help)
    help = "write TensorBoard logs [to %(const)s]"
    runs = in_project("runs")
    group.add_argument(
        "--tensorboard", type=Path, nargs="?", const=runs, metavar="FOLDER", help=help
    )
    if method == "lora":
        help = "start from a PEFT adapter, which decides rank, alpha, targets and layers"
        group.add_argument("--import_peft", type=Path, metavar="FOLDER", help=help)
    new = Path if method == "lora" else not_for_reft
    help = "write the best epoch as a PEFT adapter" if method == "lora" else argparse.SUPPRESS
    group.add_argument("--export_peft", type=new, metavar="FOLDER", help=help)
    help = "write base and LoRA as one checkpoint" if method == "lora" else argparse.SUPPRESS
    group.add_argument("--export_merged", type=new, metavar="FOLDER", help=help)


def flag(group: argparse._ArgumentGroup, kind: type, name: str, help: str, **options) -> None:
    """Add a flag for a field of a config dataclass, whose default it takes and tells in brackets.

    `name` is the flag's; the field is the same without `lora_` or `reft_` before it.
    """
    default = getattr(kind, re.sub("^(lora|reft)_", "", name))
    if "choices" not in options:
        options.setdefault("metavar", "N" if isinstance(default, int) else "X")
    options["help"] = help if "[" in help else f"{help} [%(default)s]"
    group.add_argument(f"--{name}", default=default, **options)


def add_fit_arguments(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """Training and early stopping."""
    group = parser.add_argument_group("training")
    help = "examples in a batch of each process [%(default)s]"
    group.add_argument("--batch_size", type=whole(1), default=batch_size, metavar="N", help=help)
    flag(group, FitConfig, "epochs", "passes over the training data", type=whole(1))
    flag(group, FitConfig, "lr", "learning rate of AdamW", type=number(above=0))
    help = "AdamW's decoupled weight decay"
    flag(group, FitConfig, "weight_decay", help, type=number(least=0))
    flag(group, FitConfig, "grad_accum", "batches per optimizer step", type=whole(1))
    flag(group, FitConfig, "grad_clip", "largest gradient norm, 0 is off", type=number(least=0))
    help = "of the learning rate after the warm-up"
    flag(group, FitConfig, "lr_schedule", help, choices=SCHEDULES)
    help = "share of all steps in which the learning rate rises"
    flag(group, FitConfig, "warmup_ratio", help, type=number(least=0, below=1))
    help = "compute blocks again for the backward pass: less memory, half as much time again"
    group.add_argument("--gradient_checkpointing", action="store_true", help=help)
    help = "epochs that together gain less than --min_improvement and end the run, 0 is never"
    flag(group, EarlyStoppingConfig, "early_stopping_patience", help, type=whole(0))
    help = "of dev accuracy (a share) or of the validation loss (nats)"
    flag(group, EarlyStoppingConfig, "min_improvement", help, type=number(least=0))


def add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of LoRAConfig."""
    group = parser.add_argument_group("LoRA")
    flag(group, LoRAConfig, "lora_rank", "rows of A, columns of B", type=whole(1))
    help = "the adapter is scaled by alpha / rank"
    flag(group, LoRAConfig, "lora_alpha", help, type=number(above=0))
    dropout = number(least=0, below=1)
    flag(group, LoRAConfig, "lora_dropout", "on the adapter's input", type=dropout)
    help = f"linear layers that get an adapter, of {', '.join(TARGETS)} [all]"
    targets = {"nargs": "+", "choices": TARGETS, "metavar": "LAYER"}
    flag(group, LoRAConfig, "lora_targets", help, **targets)
    help = "blocks that get adapters, counted from 0 [all]"
    flag(group, LoRAConfig, "lora_layers", help, nargs="+", type=whole(0), metavar="N")


def add_reft_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of ReFTConfig."""
    group = parser.add_argument_group("ReFT")
    types = {"choices": INTERVENTIONS, "metavar": "TYPE"}
    flag(group, ReFTConfig, "reft_type", f"{', '.join(INTERVENTIONS)} [%(default)s]", **types)
    flag(group, ReFTConfig, "reft_rank", "dimensions of the states that are edited", type=whole(1))
    help = "the type adapter is scaled by alpha / rank"
    flag(group, ReFTConfig, "reft_alpha", help, type=number(above=0))
    dropout = number(least=0, below=1)
    flag(group, ReFTConfig, "reft_dropout", "on what is added to the states", type=dropout)
    help = "[relu for the type adapter, linear, as in the paper, for the others]"
    flag(group, ReFTConfig, "reft_activation", help, choices=ACTIVATIONS)
    help = "the states after these parts of a block are edited [both]"
    flag(group, ReFTConfig, "reft_locations", help, nargs="+", choices=LOCATIONS)
    help = "blocks that are edited, counted from 0 [all]"
    flag(group, ReFTConfig, "reft_layers", help, nargs="+", type=whole(0), metavar="N")
    help = "all, or the first N and last M of the prompt, each half of it at most: fN+lM, fN, lM"
    flag(group, ReFTConfig, "reft_positions", f"{help} [all]", type=positions, metavar="WHERE")


def add_paraphrase_data_arguments(parser: argparse.ArgumentParser, method: str) -> None:
    """The question-pair files in and the prediction files out."""
    group = parser.add_argument_group("data, tab-separated question pairs (see data/README.md)")
    _file(group, "para_train", "data/quora-train.csv", "to train on")
    _file(group, "para_dev", "data/quora-dev.csv", "to score after each epoch")
    _file(group, "para_test", "data/quora-test-student.csv", "to predict, has no labels")
    out = f"predictions/{method}-para"
    _file(group, "para_dev_out", f"{out}-dev-output.csv", "predictions; metrics go beside it")
    _file(group, "para_test_out", f"{out}-test-output.csv", "predictions")


def add_sonnet_data_arguments(parser: argparse.ArgumentParser, method: str) -> None:
    """The sonnet files in and out."""
    group = parser.add_argument_group("data, numbered poems (see data/README.md)")
    _file(group, "sonnet_path", "data/sonnets.txt", "to train on, a tenth to validate")
    _file(group, "held_out_sonnet_path", "data/sonnets_held_out.txt", "to continue in the end")
    dev = "data/sonnets_held_out_dev.txt"
    _file(group, "dev_sonnet_path", dev, "to continue after each epoch")
    gold = "data/TRUE_sonnets_held_out_dev.txt"
    _file(group, "dev_gold_path", gold, "the same poems whole, to score by")
    out = f"predictions/{method}_generated_sonnets.txt"
    _file(group, "sonnet_out", out, "the poems; metrics go beside it")


def _file(group: argparse._ArgumentGroup, name: str, default: str, help: str) -> None:
    options = {"type": Path, "default": in_project(default), "metavar": "FILE"}
    group.add_argument(f"--{name}", help=f"{help} [%(default)s]", **options)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of SamplingConfig, and how many samples to take."""
    group = parser.add_argument_group("generation")
    help = "logits are divided by it: under 1 likelier, over 1 bolder tokens"
    flag(group, SamplingConfig, "temperature", help, type=number(above=0))
    help = "sample from the likeliest tokens that hold this mass"
    flag(group, SamplingConfig, "top_p", help, type=number(above=0, most=1))
    group.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    help = "makes tokens that were there before less likely, 1 is off"
    flag(group, SamplingConfig, "repetition_penalty", help, type=number(least=1))
    help = "no run of so many tokens comes twice in a poem, 0 is off"
    flag(group, SamplingConfig, "no_repeat_ngram_size", help, type=whole(0))
    help = "no end of text in a shorter poem, 0 leaves that to the model"
    flag(group, SamplingConfig, "min_lines", help, type=whole(0))
    help = "lines of a whole poem, the given ones included"
    flag(group, SamplingConfig, "max_lines", help, type=whole(GIVEN_LINES + 1))
    help = "the end of a poem whose lines do not end"
    flag(group, SamplingConfig, "max_new_tokens", help, type=whole(1))
    help = "K poems for each of the held-out sonnets, to choose from, in a second file"
    group.add_argument("--num_samples", type=whole(1), default=1, metavar="K", help=help)


def parse_args(parser: argparse.ArgumentParser, demo: dict[str, Any]) -> argparse.Namespace:
    """Parse the command line; under `--demo` the values of `demo` are the defaults."""
    if parser.parse_known_args()[0].demo:
        parser.set_defaults(**demo)
    args = parser.parse_args()
    fault = _contradiction(args, parser.get_default)
    if fault:
        parser.error(fault)
    return args


def _contradiction(args: argparse.Namespace, default: Callable[[str], Any]) -> str | None:
    """What is wrong with flags that are right one by one."""
    if args.predict_only and args.resume:
        return "--resume beside --predict_only, which trains nothing"
    if getattr(args, "import_peft", None):
        for name in ("lora_rank", "lora_alpha", "lora_targets", "lora_layers"):
            if getattr(args, name) != default(name):
                return f"--{name} beside --import_peft, whose folder decides it"
    if getattr(args, "greedy", False) and args.num_samples > 1:
        return "--num_samples beside --greedy, which writes the same poem each time"
    given_least = getattr(args, "min_lines", None) != default("min_lines")
    if given_least and args.min_lines > args.max_lines:
        return f"--min_lines {args.min_lines} is more than --max_lines {args.max_lines}"
    taken = {os.path.realpath(path): name for name, path in _files(args, INPUTS).items()}
    for name, path in _files(args, OUTPUTS).items():
        other = taken.setdefault(os.path.realpath(path), name)
        if other != name:
            return f"--{name} and --{other} are the same file, {path}"
    folders = _files(args, ("export_peft", "export_merged"))
    if len(set(map(os.path.realpath, [*folders.values(), "."]))) <= len(folders):
        return "--export_peft and --export_merged need a folder each, other than the current one"
    for name, folder in folders.items():
        if not args.resume and not _is_free(folder):  # a resumed run may find its own there
            return f"--{name}: {str(folder)!r} is there already and not an empty folder"
    return None


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def _files(args: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Path]:
    return {name: getattr(args, name) for name in names if getattr(args, name, None)}


def config_from(kind: type[Config], args: argparse.Namespace, prefix: str = "") -> Config:
    """A config dataclass whose fields are flags of the same names behind `prefix`."""
    values = {field.name: getattr(args, prefix + field.name) for field in fields(kind)}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def fit_settings(
    args: argparse.Namespace, metric: str, mode: str, unfinished: ResumeFile, runtime: Runtime
) -> tuple[FitConfig, EarlyStopper, Runtime, ResumeFile, Callable]:
    """The last arguments of `fit`: `metric` decides, more of it or less by `mode` (max, min)."""
    stopper = EarlyStopper(metric, mode, config_from(EarlyStoppingConfig, args))
    name = unfinished.path.name.removesuffix(".resume.pt")
    log = tensorboard_log(args.tensorboard, name, runtime)
    return config_from(FitConfig, args), stopper, runtime, unfinished, log


def run_files(
    args: argparse.Namespace, task: str, adapter: Any, model: nn.Module, runtime: Runtime
) -> tuple[AdapterCheckpoint, ResumeFile | None]:
    """`<checkpoint_dir>/{lora,reft}-{model}-{epochs}-{lr}-{rank}-{task}.pt`; for one that trains,
    `....resume.pt` too.

    Has them and the run's other files for this run alone; raises OSError where another has one.
    """
    model_name = args.model_path.resolve().name if args.model_path else args.model_size
    name = f"{adapter.method}-{model_name}-{args.epochs}-{args.lr}-{adapter.rank}-{task}"
    about = adapter_identity(task, model_name, adapter)
    path = args.checkpoint_dir / f"{name}.pt"
    written = list(_files(args, OUTPUTS).values())
    if not args.predict_only:
        record = record_files(written[0].parent, adapter.method, task)
        written += [path, *record.values()]
    if runtime.is_main:
        claim(written)
    unfinished = None
    if not args.predict_only:
        resume = path.with_suffix(".resume.pt")
        unfinished = ResumeFile.open(resume, _decisive(args, runtime), args.resume, runtime)
    return AdapterCheckpoint(path, model, about, runtime), unfinished


def _decisive(args: argparse.Namespace, runtime: Runtime) -> dict[str, str]:
    """All flags that a run's files depend on, and what the files given by them hold."""
    decisive = {}
    elsewhere = ("resume", "predict_only", "save_every", "debug", "tensorboard", "checkpoint_dir")
    for name, value in vars(args).items():
        if name in INPUTS and value:
            digest = hashlib.sha256(value.read_bytes()).hexdigest()
            decisive[f"in the file of --{name} the SHA-256"] = digest
        elif name not in elsewhere:
            value = os.path.realpath(value) if isinstance(value, Path) else value
            decisive[f"--{name}"] = str(value)
    decisive["the number of processes"] = str(runtime.world_size)
    return decisive
