"""What a user may get wrong: one sentence each, exit code 2 for flags and 1 for the rest."""

import json
import runpy
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.pretrained import BUNDLED
from tests.conftest import ROOT, Evil

LP, RP = "lora_paraphrase_detection", "reft_paraphrase_detection"
LS, RS = "lora_sonnet_generation", "reft_sonnet_generation"
QUICK = [
    "--demo",
    "--epochs",
    "1",
    "--limit_train",
    "24",
    "--limit_dev",
    "8",
    "--runs_dir",
    "runs",
]
FILES = {
    "pairs": ["--para_dev_out", "run/dev.csv", "--para_test_out", "run/test.csv"],
    "poems": ["--sonnet_out", "run/poems.txt", "--max_new_tokens", "4"],
}


def complaint(script: str, flags: list[str], monkeypatch, capsys) -> tuple[int, str]:
    """Exit code and what was said, of a script that is run as a person does."""
    files = FILES["poems" if "sonnet" in script else "pairs"]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *QUICK, *files, *flags])
    capsys.readouterr()
    code = 0
    try:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    except SystemExit as stopped:
        code = stopped.code
    return code, capsys.readouterr().err


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with what an earlier run showed in `run`."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    names = ["dev.csv", "test.csv", "poems.txt"]
    names += [f"{m}-{t}-metrics.json" for m in ("lora", "reft") for t in ("paraphrase", "sonnet")]
    for name in names:
        (run / name).write_text(f"precious {name}")
    return tmp_path


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}


USAGE = [  # script, flags, what is said
    (LP, "--epochs 0", "--epochs: 0 is not a whole number of 1 or more"),
    (LP, "--epochs 1.5", "--epochs: '1.5' is not a whole number"),
    (LP, "--epochs", "--epochs: expected one argument"),
    (LP, "--batch_size -4", "--batch_size: -4 is not a whole number of 1 or more"),
    (LP, "--lr 0", "--lr: 0 is not a number above 0"),
    (LP, "--lr nan", "--lr: nan is not a number above 0"),
    (LP, "--lr 1e999", "--lr: inf is not a number above 0"),
    (LP, "--lr fast", "--lr: 'fast' is not a number above 0"),
    (LP, "--weight_decay -1", "--weight_decay: -1 is not a number of 0 or more"),
    (LP, "--grad_accum 0", "--grad_accum: 0 is not a whole number of 1 or more"),
    (LP, "--grad_clip -1", "--grad_clip: -1 is not a number of 0 or more"),
    (LP, "--lr_schedule step", "'step' is not one of constant, linear, cosine"),
    (LP, "--warmup_ratio 1", "--warmup_ratio: 1 is not a number of 0 or more and below"),
    (LP, "--early_stopping_patience -1", "-1 is not a whole number of 0 or more"),
    (LP, "--min_improvement inf", "--min_improvement: inf is not a number of 0 or more"),
    (LP, "--lora_rank 0", "--lora_rank: 0 is not a whole number of 1 or more"),
    (LP, "--lora_alpha 0", "--lora_alpha: 0 is not a number above 0"),
    (LP, "--lora_dropout 1", "--lora_dropout: 1 is not a number of 0 or more and below"),
    (LP, "--lora_targets c_attn", "'c_attn' is not one of query, key"),
    (LP, "--lora_targets", "--lora_targets: expected at least one argument"),
    (LP, "--lora_layers last", "--lora_layers: 'last' is not a whole number of 0 or more"),
    (RP, "--reft_type lowreft", "'lowreft' is not one of adapter, loreft"),
    (RP, "--reft_activation selu", "'selu' is not one of relu, gelu"),
    (RP, "--reft_locations head", "'head' is not one of attention, ffn"),
    (RP, "--reft_positions f0", "ReFT positions must be all, fN+lM, fN or lM, not 'f0'"),
    (RP, "--export_merged m", "neither GPT-2 weights nor a LoRA adapter can"),
    (RP, "--export_peft m", "ReFT edits hidden states, which neither"),
    (LS, "--top_p 0", "--top_p: 0 is not a number above 0 and of 1 or less"),
    (LS, "--temperature 0", "--temperature: 0 is not a number above 0"),
    (LS, "--top_p 1.1", "--top_p: 1.1 is not a number above 0 and of 1 or less"),
    (LS, "--repetition_penalty 0.5", "0.5 is not a number of 1 or more"),
    (LS, "--max_lines 3", "--max_lines: 3 is not a whole number of 4 or more"),
    (LS, "--num_samples 0", "--num_samples: 0 is not a whole number of 1 or more"),
    (LS, "--min_lines 20", "--min_lines 20 exceeds --max_lines 14"),
    (LS, "--greedy --num_samples 2", "--num_samples conflicts with --greedy"),
    (LP, "--seed -1", "--seed: -1 is not a whole number of 0 or more"),
    (LP, "--seed 4294967296", "4294967296 is not a whole number of 0 or more and of 4294967295"),
    (LP, "--limit_train 0", "--limit_train: 0 is not a whole number of 1 or more"),
    (LP, "--save_every -1", "--save_every: -1 is not a whole number of 0 or more"),
    (LP, "--precision fp8", "'fp8' is not one of auto, fp32, bf16"),
    (LP, "--model_size gpt3", "invalid choice: 'gpt3' (choose from"),
    (LP, "--epoch 3", "unknown flag --epoch: did you mean --epochs?"),
    (LP, "--predict_only --resume", "--predict_only and --resume contradict each other"),
    (LP, "--para_test_out run/dev.csv", "--para_test_out and --para_dev_out are the same"),
    (LP, "--para_dev run/dev.csv", "--para_dev_out and --para_dev are the same file"),
    (LP, "--import_peft a --lora_rank 4", "--lora_rank conflicts with --import_peft"),
    (LS, "--sonnet_out lora-sonnet-report.html", "the report file and --sonnet_out are the same"),
    (
        LS,
        "--sonnet_out run/p.txt --held_out_sonnet_path run/p_samples.txt",
        "the samples file and --held_out_sonnet_path are the same file",
    ),
    (LP, "--export_peft x --export_merged x", "needs a folder of its own, but --export_merged"),
    (LP, "--export_merged x --export_peft x/y", "needs a folder of its own, but --export_peft"),
    (LP, "--export_peft run", "needs a folder of its own, but --para_dev_out is in run"),
    (LP, "--export_peft .", "--para_dev_out is in ."),
    (LP, "--export_peft x --runs_dir x", "needs a folder of its own, but --runs_dir is in x"),
]


@pytest.mark.parametrize(("script", "flags", "sentence"), USAGE)
def test_flags(script, flags, sentence, folder, monkeypatch, capsys):
    before = contents(folder)
    code, said = complaint(script, flags.split(), monkeypatch, capsys)
    assert code == 2
    assert said.splitlines()[-1].startswith(f"{script}.py: error: ")
    assert sentence in said.splitlines()[-1]
    assert contents(folder) == before


def write(content: bytes, path: str = "x") -> None:
    Path(path).write_bytes(content)


def write_in(folder: str) -> None:
    Path(folder).mkdir()
    write(b"", f"{folder}/file")


def config(text: str = "", **changes) -> None:
    """A checkpoint `model` whose config.json is changed, or is the text."""
    shutil.copytree(BUNDLED, "model")
    path = Path("model/config.json")
    path.write_text(text or json.dumps(json.loads(path.read_text()) | changes))


def weights(change) -> None:
    """A checkpoint `model` whose tensors are changed."""
    config()
    tensors = load_file("model/model.safetensors")
    change(tensors)
    save_file(tensors, "model/model.safetensors")


def raw_weights(change) -> None:
    """A checkpoint `model` the bytes of whose weights are changed."""
    config()
    path = Path("model/model.safetensors")
    path.write_bytes(change(path.read_bytes()))


def pickled_weights(content) -> None:
    config()
    Path("model/model.safetensors").unlink()
    torch.save(content, "model/pytorch_model.bin")


def index(text: str) -> None:
    config()
    Path("model/model.safetensors").rename("model/a.safetensors")
    Path("model/model.safetensors.index.json").write_text(text)


def tokenizer(file: str, content: bytes) -> None:
    config()
    write(content, f"model/{file}")


def untokenized() -> None:
    config()
    Path("model/merges.txt").unlink()


def peft(**changes) -> None:
    """A PEFT adapter `peft` with a changed configuration and without weights."""
    Path("peft").mkdir()
    about = {"peft_type": "LORA", "lora_alpha": 16, "r": 8} | changes
    Path("peft/adapter_config.json").write_text(json.dumps(about))


def header_that_lies(data: bytes) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header["transformer.wte.weight"]["shape"][0] += 1
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


BIG = torch.zeros(2_800_000)
H = b"id\tsentence1\tsentence2\tis_duplicate\n"
TRAIN, MODEL, PEFT = "--para_train x", "--model_path model", "--import_peft"
POEM = b"\n1\n\nline one\nline two\nline three\nline four\n"
RUNS = [  # script, what is prepared, flags, what is said
    (LP, None, TRAIN, "x does not exist: see data/README.md"),
    (LP, lambda: Path("x").mkdir(), TRAIN, "x cannot be read: Is a directory"),
    (LP, lambda: write(b""), TRAIN, "x has no column id, sentence1, sentence2, is_dup"),
    (LP, lambda: write(H), TRAIN, "no usable rows in x: 0 pairs"),
    (LP, lambda: write(b"id\tsentence1\n1\ta"), TRAIN, "x has no column sentence2"),
    (LP, lambda: write(H + b"1\tcaf\xe9\tb\t1\n"), TRAIN, "line 2 cannot be decoded"),
    (LP, lambda: write(H.decode().encode("utf-16")), TRAIN, "x is not UTF-8 text: line 1"),
    (LP, lambda: write(H + b"1\ta\0\tb\t1\n"), TRAIN, "x is not UTF-8 text: line 2 has"),
    (
        LP,
        lambda: shutil.copy(sys.executable, "x"),
        TRAIN,
        "x is not UTF-8 text: line 1 has",
    ),
    (LP, lambda: write(H + b"a" * 10_000_001), TRAIN, "line 2 is longer than 10,000,000 b"),
    (LP, lambda: write(H + b"1\ta\tb\tmaybe\n"), TRAIN, "a label other than 0 or 1"),
    (LP, lambda: write(H + b'1\t"a\tb\n'), TRAIN, "the wrong number of fields (line 2)"),
    (LP, lambda: write(H + b'"1\n2"\ta\tb\t1\n'), TRAIN, "a multi-line id (line 2)"),
    (LP, lambda: write(b"\x89PNG\r\n\x1a\n"), TRAIN, "x is not UTF-8 text: line 1 cannot"),
    (LP, None, "--para_dev x", "x does not exist: see data/README.md"),
    (LP, None, "--para_test x", "x does not exist: see data/README.md"),
    (LS, None, "--sonnet_path x", "x does not exist"),
    (LS, None, "--limit_train 1", "one poem cannot be split"),
    (LS, lambda: write(b"1 number"), "--dev_sonnet_path x", "x has no poems: each must"),
    (LS, lambda: write(b"no number"), "--sonnet_path x", "x has no poems: each must"),
    (LS, lambda: write(b"1\n2\na line\n"), "--sonnet_path x", "no text below the number 1"),
    (LS, lambda: write(POEM), "--sonnet_path x", "one poem cannot be split"),
    (LS, lambda: write(POEM), "--dev_gold_path x", "must hold the same numbers in the same"),
    (
        LS,
        lambda: write(b"1\n" + b"word " * 2000),
        "--held_out_sonnet_path x",
        "the given lines of sonnet 1 are",
    ),
    (LP, None, MODEL, "model is neither a folder nor one of the models"),
    (LP, lambda: write(b"", "model"), MODEL, "model is neither a folder nor one of the"),
    (LP, lambda: Path("model").mkdir(), MODEL, "model is not a GPT-2 checkpoint: it has no config"),
    (LP, lambda: config("{"), MODEL, "config.json is not JSON"),
    (LP, lambda: config("[1]"), MODEL, "config.json is not a JSON object"),
    (LP, lambda: config("[" * 100_000), MODEL, "config.json is not JSON"),
    (LP, lambda: config(n_embd="256"), MODEL, "n_embd is '256', but must be a whole num"),
    (LP, lambda: config(n_embd=-256), MODEL, "n_embd is -256, but must be a whole number"),
    (
        LP,
        lambda: config(n_layer=True),
        MODEL,
        "n_layer is True, but must be a whole number",
    ),
    (LP, lambda: config(n_layer=10**9), MODEL, "parameters, but the weights have"),
    (LP, lambda: config(n_embd=10**15), MODEL, "parameters, but the weights have"),
    (LP, lambda: config(n_embd=128), MODEL, "requires a floating-point tensor of"),
    (LP, lambda: config(n_head=3), MODEL, "n_embd 256 is not a multiple of n_head"),
    (LP, lambda: config(attn_pdrop=1.0), MODEL, "attn_pdrop is 1.0, but must be a number"),
    (LP, lambda: config(embd_pdrop=float("nan")), MODEL, "embd_pdrop is nan, but must be"),
    (LP, lambda: config(layer_norm_epsilon=None), MODEL, "layer_norm_epsilon is None"),
    (
        LP,
        lambda: config(model_type="llama"),
        MODEL,
        "model_type is 'llama', expected 'gpt2'",
    ),
    (LP, lambda: raw_weights(lambda b: b[: len(b) // 2]), MODEL, "cannot be read: "),
    (LP, lambda: raw_weights(lambda b: b""), MODEL, "model.safetensors cannot be read: "),
    (
        LP,
        lambda: raw_weights(header_that_lies),
        MODEL,
        "model.safetensors cannot be read: ",
    ),
    (
        LP,
        lambda: raw_weights(lambda b: struct.pack("<Q", 2**60) + b[8:]),
        MODEL,
        "model.safetensors cannot be read: ",
    ),
    (
        LP,
        lambda: weights(lambda t: t["transformer.wte.weight"][5].fill_(float("nan"))),
        MODEL,
        "wte.weight has values that are not finite",
    ),
    (LP, lambda: weights(lambda t: t.pop("transformer.wpe.weight")), MODEL, "missing wpe"),
    (LP, lambda: pickled_weights([Evil(Path("harm")), BIG]), MODEL, "mkdir, which could run code"),
    (
        LP,
        lambda: pickled_weights([BIG]),
        MODEL,
        "does not hold a dict of named",
    ),
    (LP, lambda: index("{}"), MODEL, "weight_map must name files in its own folder"),
    (
        LP,
        lambda: index('{"weight_map": {"wte": "../../secret"}}'),
        MODEL,
        "weight_map must name files in its own folder",
    ),
    (LP, lambda: index('{"weight_map": {"wte": "b.bin"}}'), MODEL, "model/b.bin cannot be read"),
    (LP, lambda: untokenized(), MODEL, "model has no tokenizer: merges.txt is missing"),
    (LP, lambda: tokenizer("vocab.json", b"{"), MODEL, "the tokenizer in model cannot be"),
    (LP, lambda: tokenizer("vocab.json", b'{"a": 0}'), MODEL, "the tokenizer in model"),
    (LP, lambda: tokenizer("merges.txt", b"\xff"), MODEL, "the tokenizer in model cannot"),
    (
        LP,
        lambda: tokenizer("tokenizer.json", b"[]"),
        MODEL,
        "the tokenizer in model cannot",
    ),
    (LP, None, f"{PEFT} peft", "peft does not exist"),
    (LP, lambda: peft(lora_alpha="x"), f"{PEFT} peft", "no numeric lora_alpha"),
    (LP, lambda: peft(use_dora=True), f"{PEFT} peft", "use_dora is True, but only plain LoRA"),
    (LP, lambda: peft(), f"{PEFT} peft", "adapter_model.safetensors cannot be read: "),
    (LP, None, "--lora_layers 4", "there is no block 4: the model has blocks 0 to 3"),
    (RP, None, "--reft_layers 9", "there is no block 9: the model has blocks 0 to 3"),
    (LP, None, "--lora_rank 257", "LoRA rank 257 exceeds the model's width, 256"),
    (RP, None, "--reft_rank 257", "ReFT rank 257 exceeds the model's width, 256"),
    (LP, None, "--precision fp16", "--precision fp16 needs a CUDA GPU"),
    (LP, lambda: write(b"", "file"), "--runs_dir file", "cannot be written: "),
    (
        LP,
        lambda: write_in("taken"),
        "--export_peft taken",
        "'taken' already exists and is not",
    ),
    (LP, lambda: write_in("taken"), "--resume --export_merged taken", "'taken' already exists"),
    (LS, None, "--sonnet_out .", ". cannot be written: it is a folder"),
    (LP, None, "--para_dev_out run", "run cannot be written: it is a folder"),
    (LP, None, "--para_dev_out /dev/null", "/dev/null cannot be written: it is not a regular"),
    (LP, None, "--para_test_out " + "long" * 99, "cannot be written: File name too long"),
]


@pytest.mark.parametrize(("script", "prepare", "flags", "sentence"), RUNS)
def test_files_and_models(script, prepare, flags, sentence, folder, monkeypatch, capsys):
    if prepare:
        prepare()
    before = contents(folder)
    code, said = complaint(script, flags.split(), monkeypatch, capsys)
    *earlier, last = said.splitlines()
    assert last.startswith("error: ")
    assert sentence in last
    assert code == 1
    assert "Traceback" not in said
    assert contents(folder) == before
    assert not Path("harm").exists()


ADAPTERS = [  # content of the adapter's file, what is said
    (b"precious", "is damaged or was not written by torch.save"),
    ({}, "is not an adapter checkpoint of this project"),
    ({"about": {}, "adapter": 1}, "is not an adapter checkpoint of"),
    ({"about": {}, "adapter": {}}, "has method None, but this run has"),
    ({"about": {}, "adapter": {"a": 1}}, "a is not a tensor of numb"),
    (Evil(Path("harm")), "mkdir, which could run code"),
    (
        {"about": {}, "adapter": {"a": torch.tensor([float("inf")])}},
        "a has values that are not finite",
    ),
]


@pytest.mark.parametrize(("content", "sentence"), ADAPTERS)
def test_adapters(content, sentence, folder, monkeypatch, capsys):
    code, said = complaint(RS, ["--predict_only"], monkeypatch, capsys)
    assert code == 1
    missing, _, rest = said.removeprefix("error: ").partition(" does not exist: train first")
    assert rest
    path = Path(missing)
    path.parent.mkdir(parents=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    before = contents(folder)
    code, said = complaint(RS, ["--predict_only"], monkeypatch, capsys)
    assert code == 1
    assert said.splitlines()[-1].startswith(f"error: {path}")
    assert sentence in said.splitlines()[-1]
    assert contents(folder) == before
    assert not Path("harm").exists()


def test_debug_shows_where_it_came_from(folder, monkeypatch, capsys):
    code, said = complaint(LP, [*TRAIN.split(), "--debug"], monkeypatch, capsys)
    assert code == 1
    assert "Traceback (most recent call last)" in said
    assert said.splitlines()[-1].startswith("error: x does not exist")


def test_a_million_characters_are_a_question_like_another(folder, monkeypatch, capsys):
    write(H + b"1\t" + b"why " * 250_000 + b"\t" + b"a" * 1_000_000 + b"\t1\n2\ta\tb\t0\n")
    code, said = complaint(LP, TRAIN.split(), monkeypatch, capsys)
    assert code == 0, said
    assert Path("run/dev.csv").read_text().startswith("id \t Predicted_Is_Paraphrase")
