"""Command-line flags: groups that the scripts share, and the dataclasses made of them."""

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from datasets import GIVEN_LINES
from finetune.early_stopping import EarlyStoppingConfig
from finetune.loop import SCHEDULES, FitConfig
from finetune.runtime import PRECISIONS
from finetune.sampling import SamplingConfig
from models.gpt2 import SIZES
from modules.adapters import AdapterError
from modules.lora import TARGETS, LoRAConfig
from modules.reft import ACTIVATIONS, INTERVENTIONS, LOCATIONS, Positions, ReFTConfig

Config = TypeVar("Config")
DATA = Path(__file__).resolve().parent.parent / "data"
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


def whole(minimum: int) -> Callable[[str], int]:
    """Type of a flag that takes a whole number of `minimum` or more."""

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {minimum} or more")
        return int(text)

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


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which GPT-2 to start from."""
    group = parser.add_argument_group("model")
    group.add_argument("--model_size", choices=SIZES, default="gpt2", help="default: %(default)s")
    group.add_argument(
        "--model_path",
        type=Path,
        metavar="FOLDER",
        help="a GPT-2 checkpoint in Hugging Face format, instead of --model_size",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Device, precision, seed and what part of a run to do."""
    group = parser.add_argument_group("run")
    group.add_argument("--use_gpu", action="store_true", help="CUDA, else Apple's MPS")
    group.add_argument(
        "--precision",
        choices=["auto", *PRECISIONS],
        default="auto",
        help="auto: bf16, or fp16 on GPUs without bf16, fp32 on a CPU or MPS",
    )
    group.add_argument("--compile", action="store_true", help="torch.compile the model")
    group.add_argument("--seed", type=whole(0), default=11711, help="default: %(default)s")
    group.add_argument("--limit_train", type=whole(1), metavar="N", help="first N training rows")
    group.add_argument("--limit_dev", type=whole(1), metavar="N", help="first N dev and test rows")
    group.add_argument(
        "--checkpoint_dir", type=Path, default=Path("checkpoints"), help="default: %(default)s"
    )
    group.add_argument(
        "--predict_only", action="store_true", help="no training: predict with the saved adapter"
    )


def flag(group: argparse._ArgumentGroup, kind: type, name: str, help: str = "", **options) -> None:
    """Add a flag for a field of a config dataclass, whose default it takes and tells in brackets.

    `name` is the flag's; the field is the same without `lora_` or `reft_` before it.
    """
    default = getattr(kind, re.sub("^(lora|reft)_", "", name))
    options["help"] = f"{help} [%(default)s]".strip() if "[" not in help else help
    group.add_argument(f"--{name}", default=default, **options)


def add_fit_arguments(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """Training and early stopping."""
    group = parser.add_argument_group("training (defaults in brackets)")
    group.add_argument("--batch_size", type=whole(1), default=batch_size, help="[%(default)s]")
    flag(group, FitConfig, "epochs", type=whole(1))
    flag(group, FitConfig, "lr", "learning rate of AdamW", type=number(above=0))
    flag(group, FitConfig, "weight_decay", type=number(least=0))
    flag(group, FitConfig, "grad_accum", "batches per optimizer step", type=whole(1))
    flag(group, FitConfig, "grad_clip", "largest gradient norm, 0 is off", type=number(least=0))
    flag(group, FitConfig, "lr_schedule", "after the warm-up", choices=SCHEDULES)
    flag(group, FitConfig, "warmup_ratio", "share of all steps", type=number(least=0, below=1))
    help = "epochs without --min_improvement after which to stop, 0 is never"
    flag(group, EarlyStoppingConfig, "early_stopping_patience", help, type=whole(0))
    flag(group, EarlyStoppingConfig, "min_improvement", type=number(least=0))


def add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of LoRAConfig."""
    group = parser.add_argument_group("LoRA (defaults in brackets)")
    flag(group, LoRAConfig, "lora_rank", type=whole(1))
    flag(group, LoRAConfig, "lora_alpha", "scaled by alpha / rank", type=number(above=0))
    dropout = number(least=0, below=1)
    flag(group, LoRAConfig, "lora_dropout", "on the adapter's input", type=dropout)
    help = "linear layers that get an adapter [all of them]"
    flag(group, LoRAConfig, "lora_targets", help, nargs="+", choices=TARGETS)
    help = "blocks that get adapters, counted from 0 [all of them]"
    flag(group, LoRAConfig, "lora_layers", help, nargs="+", type=whole(0), metavar="LAYER")


def add_reft_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of ReFTConfig."""
    group = parser.add_argument_group("ReFT (defaults in brackets)")
    flag(group, ReFTConfig, "reft_type", choices=INTERVENTIONS)
    flag(group, ReFTConfig, "reft_rank", type=whole(1))
    help = "the type adapter is scaled by alpha / rank"
    flag(group, ReFTConfig, "reft_alpha", help, type=number(above=0))
    dropout = number(least=0, below=1)
    flag(group, ReFTConfig, "reft_dropout", "on what is added to the states", type=dropout)
    help = "[relu for the type adapter, linear, as in the paper, for the others]"
    flag(group, ReFTConfig, "reft_activation", help, choices=ACTIVATIONS)
    help = "the states after these parts of a block are edited [both]"
    flag(group, ReFTConfig, "reft_locations", help, nargs="+", choices=LOCATIONS)
    help = "blocks that are edited, counted from 0 [all of them]"
    flag(group, ReFTConfig, "reft_layers", help, nargs="+", type=whole(0), metavar="LAYER")
    help = "all, or of the prompt the first N and last M (each half of it at most): fN+lM, fN, lM"
    flag(group, ReFTConfig, "reft_positions", help, type=positions)


def add_paraphrase_data_arguments(parser: argparse.ArgumentParser, method: str) -> None:
    """The question-pair files in and the prediction files out."""
    group = parser.add_argument_group("data (tab-separated question pairs, see data/README.md)")
    group.add_argument("--para_train", default="data/quora-train.csv")
    group.add_argument("--para_dev", default="data/quora-dev.csv")
    group.add_argument("--para_test", default="data/quora-test-student.csv")
    group.add_argument("--para_dev_out", default=f"predictions/{method}-para-dev-output.csv")
    group.add_argument("--para_test_out", default=f"predictions/{method}-para-test-output.csv")


def add_sonnet_data_arguments(parser: argparse.ArgumentParser, method: str) -> None:
    """The sonnet files in and out."""
    group = parser.add_argument_group("data (numbered poems, see data/README.md)")
    group.add_argument("--sonnet_path", default="data/sonnets.txt")
    group.add_argument("--held_out_sonnet_path", default="data/sonnets_held_out.txt")
    group.add_argument("--dev_sonnet_path", default="data/sonnets_held_out_dev.txt")
    group.add_argument("--dev_gold_path", default="data/TRUE_sonnets_held_out_dev.txt")
    group.add_argument(
        "--sonnet_out", type=Path, default=Path(f"predictions/{method}_generated_sonnets.txt")
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of SamplingConfig, and how many samples to take."""
    group = parser.add_argument_group("generation (defaults in brackets)")
    flag(group, SamplingConfig, "temperature", type=number(above=0))
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
    parser.add_argument(
        "--demo", action="store_true", help="the bundled small model and data, offline, on a CPU"
    )
    if parser.parse_known_args()[0].demo:
        parser.set_defaults(**demo)
    return parser.parse_args()


def config_from(kind: type[Config], args: argparse.Namespace, prefix: str = "") -> Config:
    """A config dataclass whose fields are flags of the same names behind `prefix`."""
    values = {field.name: getattr(args, prefix + field.name) for field in fields(kind)}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def model_name(args: argparse.Namespace) -> str:
    """What the run's files call the model: its size, or its folder's name."""
    return args.model_path.resolve().name if args.model_path else args.model_size


def checkpoint_path(args: argparse.Namespace, method: str, rank: int, task: str) -> Path:
    """`<checkpoint_dir>/{method}-{model}-{epochs}-{lr}-{rank}-{task}.pt`."""
    name = f"{method}-{model_name(args)}-{args.epochs}-{args.lr}-{rank}-{task}.pt"
    return args.checkpoint_dir / name
