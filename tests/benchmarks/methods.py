"""LoRA and ReFT at the same number of trainable parameters, each at its best learning rate.

    python -m tests.benchmarks.methods sonnet
    python -m tests.benchmarks.methods paraphrase --para_train FILE --para_dev FILE --para_test FILE

Runs the scripts themselves: every method with every learning rate and the first seed, then with
the best of them, by the metric that early stopping follows, and the other seeds. Flags that this
program does not know go to the scripts. Prints a row a method: mean and standard deviation.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conftest import ROOT

METHODS = {  # name -> script, flags; 73,728 parameters of gpt2-nano train, or 73,872
    "LoRA": ("lora", "--lora_rank 4"),
    "ReFT adapter": ("reft", "--reft_rank 18"),
    "LoReFT": ("reft", "--reft_rank 18 --reft_type loreft"),
    "DiReFT": ("reft", "--reft_rank 18 --reft_type direft"),
}
TASKS = {  # name -> script, its flags, metric, sign of better
    "paraphrase": ("paraphrase_detection", "--batch_size 12", "dev_accuracy", 1),
    "sonnet": ("sonnet_generation", "--epochs 4", "val_loss", -1),
}
SHOWN = {
    "paraphrase": ["dev_accuracy", "dev_macro_f1", "dev_loss"],
    "sonnet": ["val_loss", "dev_loss", "dev_chrf"],
}


def one_run(task: str, method: str, lr: float, seed: int, flags: list[str]) -> dict[str, float]:
    """The final metrics of a run, its trainable parameters and its seconds of training."""
    kind, method_flags = METHODS[method]
    script, task_flags, *_ = TASKS[task]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, ROOT / f"{kind}_{script}.py", "--model_size", "gpt2-nano",
            "--lr", str(lr), "--seed", str(seed), "--lr_schedule", "linear",
            "--warmup_ratio", "0.1", *method_flags.split(), *task_flags.split(), *flags,
        ]  # fmt: skip
        files = ["sonnet_out"] if task == "sonnet" else ["para_dev_out", "para_test_out"]
        for name in files:
            command += [f"--{name}", f"{folder}/{name}"]
        command += ["--runs_dir", folder]
        subprocess.run(command, check=True, capture_output=True, text=True)
        path = Path(folder) / f"{kind}-{task}-metrics.json"
        metrics = json.loads(path.read_text())
    about = {name: metrics[name] for name in ("trainable_parameters", "train_seconds")}
    return metrics["final"] | about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[11711, 11712, 11713])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args, flags = parser.parse_known_args()
    flags = [str(Path(f).resolve()) if Path(f).is_file() else f for f in flags]
    *_, metric, sign = TASKS[args.task]
    for method in args.methods:
        sweep = {lr: one_run(args.task, method, lr, args.seeds[0], flags) for lr in args.lrs}
        best = max(args.lrs, key=lambda lr: sign * sweep[lr][metric])
        others = [one_run(args.task, method, best, seed, flags) for seed in args.seeds[1:]]
        runs = [sweep[best], *others]
        row = f"{method:<14} lr {best:g}, {runs[0]['trainable_parameters']:,} parameters"
        for name in [*SHOWN[args.task], "train_seconds"]:
            values = [run[name] for run in runs]
            row += f", {name} {statistics.mean(values):.4f} +- {statistics.stdev(values):.4f}"
        tried = ", ".join(f"{lr:g}: {run[metric]:.4f}" for lr, run in sweep.items())
        print(f"{row} (sweep {tried})", flush=True)


if __name__ == "__main__":
    main()
