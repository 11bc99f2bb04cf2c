"""A run's folder: what its name depends on, what it keeps, and what is shown in predictions/."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.sonnets import Sonnet
from finetune import arguments
from finetune.ending import Finished
from finetune.outputs import format_sonnets
from finetune.run import Run, adapter_path, finished_runs, read_record
from finetune.runtime import Runtime
from modules.lora import LoRAConfig
from modules.reft import ReFTConfig
from modules.settings import UserError
from tests.conftest import ROOT

CPU = Runtime(torch.device("cpu"))
ADAPTERS = {"lora": LoRAConfig, "reft": ReFTConfig}


def parsed(*argv: str | Path, method: str = "lora", task: str = "paraphrase"):
    demo: dict[str, object] = {"model_size": "gpt2-nano"}
    if task == "paraphrase":
        demo["para_train"] = arguments.DATA / "sample-pairs-train.csv"
        demo["para_dev"] = arguments.DATA / "sample-pairs-dev.csv"
        demo["para_test"] = arguments.DATA / "sample-pairs-test.csv"
    return arguments.parse(
        "A script.",
        task=task,
        adapter=ADAPTERS[method],
        defaults={},
        demo=demo,
        argv=["--demo", *map(str, argv)],
    )


@pytest.fixture
def opened(tmp_path):
    """A function: flags to the run that they open in a folder of its own."""

    def open_run(*argv: str | Path, **script: str) -> Run:
        out = {"paraphrase": "--para_dev_out", "sonnet": "--sonnet_out"}
        task, method = script.get("task", "paraphrase"), script.get("method", "lora")
        where = ["--runs_dir", tmp_path / "runs", out[task], tmp_path / "shown" / "out.csv"]
        args = parsed(*where, *argv, method=method, task=task)
        adapter = arguments.config(ADAPTERS[method], args, prefix=f"{method}_")
        return Run.open(vars(args), task=task, adapter=adapter, runtime=CPU)

    return open_run


def record(run: Run) -> dict:
    return {"name": run.identity.name, "history": [{"epoch": 1, "is_best": True}], "final": {}}


def test_a_finished_run_says_so_and_what_can_be_done(opened):
    run = opened()
    run.write(record(run), {"para_dev_out": "1"})
    run.finish()
    for flags in ([], ["--resume"]):
        with pytest.raises(Finished, match="--predict_only .* again, --overwrite trains it anew$"):
            opened(*flags)
    with pytest.raises(Finished, match="trains it anew; ignored: --export_peft, --tensorboard$"):
        opened("--export_peft", "a", "--tensorboard")
    assert finished_runs(run.folder.parent) == [run.folder]
    again = opened("--overwrite")
    assert finished_runs(run.folder.parent) == [run.folder]  # until the first save
    again.resume.save({})
    assert finished_runs(run.folder.parent) == []


def test_an_unfinished_run_asks_what_to_do(opened):
    run = opened()
    run.resume.save({"steps": 3})
    run.write(record(run), {"para_dev_out": "1"})
    with pytest.raises(UserError, match="unfinished .* --resume resumes it, --overwrite starts"):
        opened()
    assert opened("--resume").resume.state == {"steps": 3}
    with pytest.raises(UserError, match="--gradient_checkpointing was False, but now it is True"):
        opened("--resume", "--gradient_checkpointing")
    assert opened("--overwrite").resume.state is None


def test_predicting_without_an_adapter_names_the_runs_there_are(opened):
    other = opened("--seed", 2)
    other.write(record(other), {})
    with pytest.raises(UserError, match=f"does not exist: train first.*: {other.identity.name}$"):
        opened("--predict_only")


def test_shown_files_are_of_one_run(opened, tmp_path):
    first, second = opened(task="sonnet"), opened("--seed", 2, task="sonnet")
    some = format_sonnets([Sonnet(1, ("One",))])
    first.write(record(first), {"sonnet_out": "one", "samples": some, "report": "r"})
    shown = second.write(record(second), {"sonnet_out": "two", "report": "s"})
    assert shown["report"].name == "lora-sonnet-report.html"
    metrics = shown.pop("metrics")
    assert shown.pop("folder") == second.folder
    assert json.loads(metrics.read_text())["name"] == second.identity.name
    assert metrics.name == "lora-sonnet-metrics.json"
    names = {metrics.name, *(path.name for path in shown.values())}
    assert {p.name for p in (tmp_path / "shown").iterdir() if p.name != ".lock"} == names
    assert (first.folder / "lora_generated_sonnets.txt").read_text() == "one"
    assert (first.folder / "lora_generated_sonnets_samples.txt").read_text() == some
    assert json.loads((first.folder / "run.json").read_text())["name"] == first.identity.name


def test_a_file_that_no_run_wrote_is_kept(opened, tmp_path):
    run = opened(task="sonnet")
    (tmp_path / "shown").mkdir(exist_ok=True)
    (tmp_path / "shown" / "out_samples.csv").write_bytes(b"caf\xe9 notes")
    run.write(record(run), {"sonnet_out": "one"})
    assert (tmp_path / "shown" / "out_samples.csv").read_bytes() == b"caf\xe9 notes"


def test_a_run_is_resumed_with_the_same_decoding_flags(opened):
    run = opened(task="sonnet")
    run.resume.save({})
    with pytest.raises(UserError, match="--temperature was 1.2, but now it is 0.3"):
        opened("--resume", "--temperature", 0.3, task="sonnet")


def test_an_imported_adapter_predicts_until_the_command_is_trained(opened, tmp_path, capsys):
    flags = ("--import_peft", tmp_path / "peft")
    (tmp_path / "peft").mkdir()
    untrained = opened(*flags, "--predict_only")
    assert "predicting with the imported adapter, untrained" in capsys.readouterr().out
    assert untrained.load_adapter(None)["epoch"] == 0
    trained = opened(*flags)
    assert trained.identity.name != untrained.identity.name
    trained.resume.save({})  # while it is trained, the imported one is not used
    with pytest.raises(UserError, match="has not finished an epoch: continue with --resume"):
        opened(*flags, "--predict_only")
    adapter_path(trained.folder, trained.identity.name).write_bytes(b"")
    predicting = opened(*flags, "--predict_only")
    assert predicting.folder == trained.folder
    with pytest.raises(UserError, match=r"\.pt is damaged"):
        predicting.load_adapter(None)


def test_a_removed_adapter_can_be_trained_again(opened):
    run = opened()
    run.write(record(run), {})
    with pytest.raises(UserError, match=r"\.pt was removed: --overwrite trains the run again"):
        opened("--predict_only")


def test_predicting_from_an_unfinished_run_does_not_finish_it(opened):
    run = opened()
    run.resume.save({})
    adapter_path(run.folder, run.identity.name).write_bytes(b"")
    predicting = opened("--predict_only")
    predicting.write(record(run), {"para_dev_out": "1"})
    assert not (run.folder / "run.json").exists()
    assert finished_runs(run.folder.parent) == []


def test_the_same_run_in_a_second_process_is_refused(opened, tmp_path):
    run = opened()
    code = (
        "import sys, pathlib, finetune.files as f;"
        "f.lock(pathlib.Path(sys.argv[1]), 'another process is at it')"
    )
    command = [sys.executable, "-c", code, run.lock.lock_file]
    other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "OSError: another process is at it" in other.stderr


def test_a_folder_in_place_of_an_output_is_refused_before_the_run(tmp_path):
    args = parsed("--runs_dir", tmp_path, "--para_test_out", tmp_path)
    with pytest.raises(OSError, match="cannot be written: it is a folder"):
        Run.open(vars(args), task="paraphrase", adapter=LoRAConfig(), runtime=CPU)


def test_a_record_without_what_runs_write_is_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"name": "a", "final": {}}')
    with pytest.raises(UserError, match="run.json has no adapter, arguments, base, .*: it is dam"):
        read_record(tmp_path)
