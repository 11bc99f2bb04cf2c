"""Two processes by torchrun, against one with twice the batch."""

import json
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from finetune.runtime import Runtime
from tests.scripts import ROOT, run_script

PAIRS = ["--demo", "--limit_train", "41", "--limit_dev", "70", "--epochs", "2"]
POEMS = ["--demo", "--limit_train", "9", "--limit_dev", "3", "--epochs", "2"]
POEMS += ["--max_new_tokens", "40", "--num_samples", "2"]  # no draw of these is within rounding
SUMS = {"train_loss": 1e-5, "dev_loss": 1e-4, "val_loss": 1e-5, "dev_accuracy": 0, "dev_chrf": 0}


@pytest.mark.parametrize(
    ("script", "flags", "batch_size"),
    [
        ("reft_paraphrase_detection.py", [*PAIRS, "--grad_accum", "2", "--reft_type", "loreft"], 2),
        ("lora_sonnet_generation.py", [*POEMS, "--lora_dropout", "0", "--grad_clip", "0.5"], 1),
    ],
)
def test_two_processes_are_one_with_twice_the_batch(tmp_path, script, flags, batch_size):
    def records_and_outputs(processes: int) -> tuple[dict, list[bytes]]:
        folder = tmp_path / str(processes)
        folder.mkdir()
        size = str(batch_size * 2 // processes)
        done = run_script(script, folder, *flags, "--batch_size", size, processes=processes)
        assert done.stdout.count("(best)") <= 2
        assert done.stdout.count("epoch 1/2: ") == 1  # one of them prints
        (path,) = folder.glob("*-metrics.json")
        files = sorted(path for path in folder.iterdir() if path.suffix in (".csv", ".txt"))
        assert len(files) == 2
        return json.loads(path.read_text()), [path.read_bytes() for path in files]

    with ThreadPoolExecutor(2) as pool:
        (one, first_outputs), (two, second_outputs) = pool.map(records_and_outputs, (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["trainable_parameters"] == two["trainable_parameters"]
    for first, second in zip(one["history"], two["history"], strict=True):
        for name in first.keys() & SUMS.keys():
            assert second[name] == pytest.approx(first[name], abs=SUMS[name]), name
    assert first_outputs == second_outputs


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two ranks drew as they began to train, and what they agreed on in five steps."""
    program = tmp_path_factory.mktemp("ranks") / "ranks.py"
    program.write_text(
        textwrap.dedent(
            f"""
            import json, sys
            sys.path.insert(0, {str(ROOT)!r})
            import torch
            from finetune.runtime import DelayedMax, RuntimeConfig, start
            runtime = start(RuntimeConfig(precision="fp32"), seed=3)
            runtime.parallel(torch.nn.Linear(2, 2))
            agree = DelayedMax(runtime)
            own = ([0, 0, 9, 1, 0], [0, 7, 0, 2, 0])[runtime.rank]
            found = {{
                "drawn": runtime.gather([int(torch.randint(2**62, ()))]),
                "agreed": runtime.gather([[agree(number) for number in own]]),
            }}
            if runtime.is_main:
                print(json.dumps(found))
            torch.distributed.destroy_process_group()
            """
        )
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run([*torchrun, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_each_rank_draws_its_own_dropout_masks(two_ranks):
    """With the same masks in both, a batch of pairs alike would have two gradients alike."""
    assert len(set(two_ranks["drawn"])) == 2


def test_all_ranks_learn_of_a_signal_at_the_step_after_it(two_ranks):
    assert two_ranks["agreed"] == [[0, 0, 7, 9, 2]] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_fails_ends_the_run_with_its_reason(tmp_path, rank):
    program = tmp_path / "failing.py"
    program.write_text(
        textwrap.dedent(
            f"""
            import os, sys
            sys.path.insert(0, {str(ROOT)!r})
            import lora_paraphrase_detection as script
            from modules.settings import UserError

            def broken_disk(*args, **options):
                raise UserError("the disk of this machine is gone")

            if os.environ["RANK"] == "{rank}":
                script.datasets.load_pairs = broken_disk
            args = script.get_args()
            script.ending.run(lambda: script.main(args))
            """
        )
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command = [*torchrun, program, *PAIRS, "--runs_dir", tmp_path / "runs"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    who = " on rank 1" if rank else ""
    assert f"error{who}: the disk of this machine is gone\n" in done.stderr
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("n", [0, 1, 2, 5, 6])
def test_gathered_shards_are_in_the_order_of_the_items(monkeypatch, n):
    items = list(range(n))
    ranks = [Runtime(torch.device("cpu"), rank=rank, world_size=3) for rank in range(3)]

    def all_gather(parts, own):
        parts[:] = [list(rank.shard(items)) for rank in ranks]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather)
    assert [rank.gather(rank.shard(items)) for rank in ranks] == [items] * 3
