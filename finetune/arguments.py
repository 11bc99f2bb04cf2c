"""Command-line flags: groups that the scripts share, and the dataclasses made of them."""

import argparse
import math
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
from modules.lora import TARGETS, LoRAConfig

Config = TypeVar("Config")
DATA = Path(__file__).resolve().parent.parent / "data"


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


def add_fit_arguments(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """Training and early stopping."""
    group = parser.add_argument_group("training (defaults in brackets)")
    group.add_argument("--epochs", type=whole(1), default=FitConfig.epochs, help="[%(default)s]")
    group.add_argument("--batch_size", type=whole(1), default=batch_size, help="[%(default)s]")
    group.add_argument("--lr", type=number(above=0), default=FitConfig.lr, help="[%(default)s]")
    group.add_argument(
        "--weight_decay", type=number(least=0), default=FitConfig.weight_decay, help="[%(default)s]"
    )
    group.add_argument(
        "--grad_accum",
        type=whole(1),
        default=FitConfig.grad_accum,
        help="batches per optimizer step [%(default)s]",
    )
    group.add_argument(
        "--grad_clip",
        type=number(least=0),
        default=FitConfig.grad_clip,
        help="largest gradient norm, 0 for no clipping [%(default)s]",
    )
    group.add_argument(
        "--lr_schedule",
        choices=SCHEDULES,
        default=FitConfig.lr_schedule,
        help="after the warm-up [%(default)s]",
    )
    group.add_argument(
        "--warmup_ratio",
        type=number(least=0, below=1),
        default=FitConfig.warmup_ratio,
        help="share of all steps [%(default)s]",
    )
    group.add_argument(
        "--early_stopping_patience",
        type=whole(0),
        default=EarlyStoppingConfig.early_stopping_patience,
        help="epochs without --min_improvement after which to stop, 0 for never [%(default)s]",
    )
    group.add_argument(
        "--min_improvement",
        type=number(least=0),
        default=EarlyStoppingConfig.min_improvement,
        help="[%(default)s]",
    )


def add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of LoRAConfig."""
    group = parser.add_argument_group("LoRA (defaults in brackets)")
    group.add_argument("--lora_rank", type=whole(1), default=LoRAConfig.rank, help="[%(default)s]")
    group.add_argument(
        "--lora_alpha",
        type=number(above=0),
        default=LoRAConfig.alpha,
        help="the adapter is scaled by alpha / rank [%(default)s]",
    )
    group.add_argument(
        "--lora_dropout",
        type=number(least=0, below=1),
        default=LoRAConfig.dropout,
        help="on the adapter's input [%(default)s]",
    )
    group.add_argument(
        "--lora_targets",
        nargs="+",
        choices=TARGETS,
        default=LoRAConfig.targets,
        help="linear layers that get an adapter [all of them]",
    )
    group.add_argument(
        "--lora_layers",
        nargs="+",
        type=whole(0),
        metavar="LAYER",
        help="blocks that get adapters, counted from 0 [all of them]",
    )


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
    group.add_argument(
        "--temperature",
        type=number(above=0),
        default=SamplingConfig.temperature,
        help="[%(default)s]",
    )
    group.add_argument(
        "--top_p",
        type=number(above=0, most=1),
        default=SamplingConfig.top_p,
        help="sample from the likeliest tokens that hold this mass [%(default)s]",
    )
    group.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    group.add_argument(
        "--repetition_penalty",
        type=number(least=1),
        default=SamplingConfig.repetition_penalty,
        help="makes tokens that were there before less likely, 1 is off [%(default)s]",
    )
    group.add_argument(
        "--no_repeat_ngram_size",
        type=whole(0),
        default=SamplingConfig.no_repeat_ngram_size,
        help="no run of so many tokens comes twice in a poem, 0 is off [%(default)s]",
    )
    group.add_argument(
        "--min_lines",
        type=whole(0),
        default=SamplingConfig.min_lines,
        help="no end of text before; 0 leaves that to the model [%(default)s]",
    )
    group.add_argument(
        "--max_lines",
        type=whole(GIVEN_LINES + 1),
        default=SamplingConfig.max_lines,
        help="lines of a whole poem, the given ones included [%(default)s]",
    )
    group.add_argument(
        "--max_new_tokens",
        type=whole(1),
        default=SamplingConfig.max_new_tokens,
        help="should the lines not come to an end [%(default)s]",
    )
    group.add_argument(
        "--num_samples",
        type=whole(1),
        default=1,
        metavar="K",
        help="write K poems for each of the held-out sonnets to a second file [no such file]",
    )


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
