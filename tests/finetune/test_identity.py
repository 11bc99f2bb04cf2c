"""What decides a run, and what its name tells."""

import json
from pathlib import Path

import pytest

from finetune import arguments
from finetune.identity import OTHER_FLAGS, PREDICTION_FLAGS, RUNTIME_FLAGS, Identity
from models.pretrained import BUNDLED
from modules.settings import UserError
from tests.finetune.test_run import ADAPTERS, parsed


def identity(
    *argv: str | Path, base: Path = BUNDLED, task: str = "paraphrase", method: str = "lora"
) -> Identity:
    args = parsed(*argv, method=method, task=task)
    adapter = arguments.config(ADAPTERS[method], args, prefix=f"{method}_")
    return Identity.of(vars(args), task, adapter, base)


def test_a_name_tells_method_model_epochs_rate_rank_and_task():
    stem, _, digest = identity("--lora_rank", 2, "--lr", 0.002).name.rpartition("-")
    assert stem == "lora-gpt2-nano-3-0.002-2-paraphrase"
    assert len(digest) == 6
    assert identity(task="sonnet", method="reft").name.startswith(
        "reft-gpt2-nano-3-0.0001-4-sonnet-"
    )


@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("task", ["paraphrase", "sonnet"])
def test_a_new_flag_decides_the_adapter_unless_it_is_listed(method, task):
    flags = vars(parsed(method=method, task=task)).keys()
    decisive = {"batch_size", "early_stopping_patience", "epochs", "grad_accum", "grad_clip"}
    decisive |= {"limit_dev", "limit_train", "lr", "lr_schedule", "min_improvement", "precision"}
    decisive |= {"seed", "warmup_ratio", "weight_decay"}
    decisive |= {"para_train", "para_dev"} if task == "paraphrase" else {"sonnet_path"}
    decisive |= {"import_peft"} if method == "lora" else set()
    own = {flag for flag in flags if flag.startswith(f"{method}_")}
    assert flags - PREDICTION_FLAGS - RUNTIME_FLAGS - OTHER_FLAGS == decisive | own


DIFFERENT = ["--seed 2", "--lora_alpha 8", "--lora_targets query value", "--limit_train 20"]
DIFFERENT += ["--lr_schedule linear", "--weight_decay 0.1", "--early_stopping_patience 1"]
SAME = ["--debug", "--save_every 7", "--gradient_checkpointing", "--tensorboard"]
SAME += ["--lora_targets query,key,value attention_dense interm_dense,out_dense"]


@pytest.mark.parametrize("flags", DIFFERENT + SAME)
def test_runs_differ_by_what_decides_the_adapter(flags):
    same = identity(*flags.split()) == identity()
    assert same == (flags in SAME)


def test_another_adapter_in_a_peft_folder_does_not_count(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    alone = identity("--import_peft", tmp_path).digest
    (tmp_path / "adapter_b").mkdir()
    assert identity("--import_peft", tmp_path).digest == alone
    (tmp_path / "adapter_config.json").write_text("[]")
    assert identity("--import_peft", tmp_path).digest != alone


def test_runs_that_differ_in_their_seeds_alone_have_one_recipe():
    assert identity("--seed", 2).recipe == identity("--seed", 3).recipe
    assert identity("--seed", 2, "--lr", 0.1).recipe != identity("--seed", 2).recipe


def test_decoding_flags_and_held_out_files_are_of_the_same_run(tmp_path):
    plain = identity(task="sonnet")
    poems = tmp_path / "poems.txt"
    for flags in (["--temperature", 0.7], ["--held_out_sonnet_path", poems], ["--num_samples", 3]):
        assert identity(*flags, task="sonnet") == plain


def test_data_and_base_count_by_content_not_by_name(tmp_path):
    data, base = tmp_path / "pairs.csv", tmp_path / "gpt2-nano"
    data.write_bytes((arguments.DATA / "sample-pairs-train.csv").read_bytes())
    base.mkdir()
    for file in BUNDLED.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    plain = identity()
    assert identity("--para_train", data, base=base) == plain
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"attn_pdrop": 0.5}))
    assert identity(base=base) != plain
    data.write_bytes(data.read_bytes() + b"1\tA?\tB?\t0\n")
    assert identity("--para_train", data) != plain
    with pytest.raises(UserError, match=r"none.csv does not exist: see data/README.md"):
        identity("--para_train", tmp_path / "none.csv")
