"""Time and results of the four demos, with baselines that need no language model.

python -m tests.benchmarks.demos
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from data.pairs import read_pairs
from finetune.arguments import DATA
from tests.benchmarks import overlap, results
from tests.benchmarks.results import Row, cell
from tests.conftest import ROOT

SCRIPTS = [
    f"{m}_{t}.py" for t in ("paraphrase_detection", "sonnet_generation") for m in ("lora", "reft")
]
WHAT = "script with `--demo`"


def demo(script: str, flags: list[str]) -> Row:
    """Run a demo in a temporary folder; returns its row of the table."""
    is_sonnet = "sonnet" in script
    with tempfile.TemporaryDirectory() as folder:
        names = ["sonnet_out"] if is_sonnet else ["para_dev_out", "para_test_out"]
        outputs = [word for name in names for word in (f"--{name}", f"{folder}/{name}")]
        command = [sys.executable, ROOT / script, "--demo", "--runs_dir", folder, *outputs, *flags]
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
        seconds = time.perf_counter() - started
        (path,) = Path(folder).glob("*-metrics.json")
        metrics = json.loads(path.read_text())
    return {WHAT: f"`{script}`", "time": f"{seconds:.0f} s", "result": result(metrics)}


def result(metrics: dict[str, Any]) -> str:
    final, trained = metrics["final"], f"{metrics['trainable_parameters']:,} parameters"
    if metrics["task"] == "paraphrase":
        return f"dev accuracy {cell(final['dev_accuracy'])}, {trained}"
    before, after = final["val_loss_before_training"], final["val_loss"]
    losses = f"loss {cell(before)} to {cell(after)} nats"
    return f"{losses}, chrF {cell(final['dev_chrf'])}, {trained}"


def without_model() -> list[Row]:
    """Dev accuracy of the word-overlap classifier, and of always answering "no"."""
    train, dev = (
        read_pairs(DATA / f"sample-pairs-{name}.csv", has_labels=True) for name in ("train", "dev")
    )
    labels = np.array(dev.labels)
    accuracies = [overlap.predict(train, dev) == labels, labels == 0]
    counting, always_no = (cell(float(np.mean(right))) for right in accuracies)
    result = f'dev accuracy {counting} (always "no": {always_no})'
    return [{WHAT: "word-overlap classifier", "result": result}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="demos", help="name of the result file")
    args, flags = parser.parse_known_args()
    rows = [demo(script, flags) for script in SCRIPTS]
    pairs, poems = rows[:2], rows[2:]
    results.save(args.name, pairs + without_model() + poems)


if __name__ == "__main__":
    main()
