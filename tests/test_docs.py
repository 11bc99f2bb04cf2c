"""What the documents say runs, parses and is there."""

import contextlib
import importlib
import io
import json
import re
import shlex
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from finetune import ask
from tests.benchmarks import results
from tests.scripts import ROOT, run_script

DOCS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
DOCS += [ROOT / folder / "README.md" for folder in ("data", "predictions", "models/gpt2-nano")]
SCRIPTS = sorted(path.name for path in ROOT.glob("*_*_*.py"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"[\w.-]+\.(py|md|sh)|[\w.-]+(/[\w.-]+)*/[\w.-]*")
MADE_BY_A_RUN = re.compile(r"(predictions|runs|\.venv)/|data/(quora-|course)")
RESULTS = sorted(results.RESULTS.glob("*.json"))
NUMBER = r"(?<![\w.])(?:\d[\d,]*)?\.?\d+(?![\w.]*\w)"
UNIT = r"%|s\b|seconds|minutes|Mi?B|(?:pairs|tokens)/s|times|standard errors|GFLOP"
SETTINGS = {  # figures of the texts that no benchmark measures
    **dict.fromkeys(["3.10", "0.6", "0.1", "0.21", "0.7"], "versions"),
    **dict.fromkeys(["1.2", "0.9", "0.01", "1.0"], "defaults of flags, and a label"),
    **dict.fromkeys(["38", "41", "20", "11", "8"], "the corpus of gpt2-nano"),
    **dict.fromkeys(["5.4", "11.5", "90"], "pretraining.json in millions and minutes"),
    "65": "what the authors of ReFT say",
}
FOREIGN_FLAGS = {"--nproc_per_node", "--logdir"}  # of torchrun and TensorBoard


def blocks(path: Path, language: str) -> list[str]:
    """The code of a document in one language."""
    return [code for name, code in FENCE.findall(path.read_text()) if name == language]


def commands(path: Path) -> list[list[str]]:
    """The words of each shell command of a document."""
    lines = "".join(blocks(path, "sh")).replace("\\\n", " ").splitlines()
    parts = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [words for words in parts if words]


def inline_code(path: Path) -> list[str]:
    """What a document has between single backticks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", path.read_text()))


def flags(text: str) -> set[str]:
    """All flags in a text."""
    return set(re.findall(r"--[a-z]\w+", text))


def figures(path: Path) -> set[str]:
    """The numbers of a document's text that look measured: with a point, or before a unit."""
    text = results.PLACE.sub("", FENCE.sub("", path.read_text()))
    text = re.sub(r"`[^`\n]+`|\]\([^)]*\)", "", text)
    found = re.finditer(rf"({NUMBER})(\s?(?:{UNIT}))?", text)
    return {match[1] for match in found if "." in match[1] or match[2]}


def numbers(value: object) -> set[str]:
    """All numbers of a result, as a text may have them: with fewer digits, shares without 0."""
    if isinstance(value, dict):
        value = [each for key, each in value.items() if key != "runs"]
    if isinstance(value, list):
        return set().union(*map(numbers, value))
    if isinstance(value, str | None):
        return set(re.findall(NUMBER, value or ""))
    found = {f"{value:,.{digits}f}" for digits in range(5)}
    return found | {text.replace("0.", ".", 1) for text in found if abs(value) < 1}


def each_with(found) -> pytest.MarkDecorator:
    """A test for each document in which `found` finds something."""
    paths = [path for path in DOCS if found(path)]
    return pytest.mark.parametrize("path", paths, ids=[str(p.relative_to(ROOT)) for p in paths])


def run_get_args(script: str, *words: str) -> None:
    """Parse a command line as the script does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *words])
        importlib.import_module(script.removesuffix(".py")).get_args()


@pytest.fixture(scope="module")
def known_flags():
    """Flags of the scripts, of setup.sh, of pytest here, of all benchmarks, of other programs."""
    text = io.StringIO()
    for script in SCRIPTS:
        with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
            run_get_args(script, "--help")
    done = subprocess.run(["bash", ROOT / "setup.sh", "--help"], capture_output=True, text=True)
    sources = (ROOT / "tests/conftest.py", ROOT / "tests/benchmarks/peers.py")
    known = text.getvalue() + done.stdout + "".join(path.read_text() for path in sources)
    return flags(known) | FOREIGN_FLAGS


@pytest.fixture(scope="module")
def demo_runs(tmp_path_factory):
    """The folder of a run with the name of the demo's."""
    folder = tmp_path_factory.mktemp("demo")
    flags = ["--demo", "--limit_train", "24", "--limit_dev", "8"]
    run_script("lora_paraphrase_detection.py", folder, *flags)
    return folder / "runs"


@each_with(lambda path: blocks(path, "python"))
def test_python_examples_run_as_they_stand_and_offline(path, demo_runs, monkeypatch, tmp_path):
    def no_network(*args):
        raise AssertionError("an example needs a network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(ask.arguments, "project_path", lambda path: demo_runs)
    monkeypatch.chdir(ROOT)
    namespace: dict[str, object] = {}
    for code in blocks(path, "python"):
        exec(compile(code, str(path), "exec"), namespace)


@each_with(commands)
def test_commands_parse(path, known_flags, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # without the folders that a command is to make
    for words in commands(path):
        name = words[words.index("-m") + 1].replace(".", "/") if "-m" in words else None
        own = flags((ROOT / f"{name}.py").read_text()) if name else set()
        assert flags(" ".join(words)) <= known_flags | own
        if script := next((word for word in words if word in SCRIPTS), None):
            run_get_args(*words[words.index(script) :])


@each_with(inline_code)
def test_flags_in_the_text_exist(path, known_flags):
    benchmarks = "".join(file.read_text() for file in (ROOT / "tests/benchmarks").glob("*.py"))
    assert flags(" ".join(inline_code(path))) <= known_flags | flags(benchmarks)


@each_with(lambda path: True)
def test_links_pictures_and_paths_lead_to_files(path):
    text = FENCE.sub("", path.read_text())
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("http")]
    assert [link for link in links if not (path.parent / link).exists()] == []
    words = [word for code in inline_code(path) for word in code.split()]
    words += sum(commands(path), [])
    paths = [word for word in words if PATH.fullmatch(word) and not MADE_BY_A_RUN.match(word)]
    assert [word for word in paths if not (ROOT / word).exists()] == []


@each_with(lambda path: results.PLACE.search(path.read_text()))
def test_tables_are_those_of_the_result_files(path):
    assert results.filled(path.read_text()) == path.read_text()


@each_with(lambda path: figures(path) - SETTINGS.keys())
def test_figures_in_the_text_stand_in_result_files(path):
    measured = set().union(*(numbers(results.load(file.stem)) for file in RESULTS))
    measured |= numbers(json.loads((ROOT / "models/gpt2-nano/pretraining.json").read_text()))
    assert figures(path) - SETTINGS.keys() - measured == set()


def test_lines_have_100_columns_at_most_and_the_readme_150_lines():
    readme, *texts = (path.read_text() for path in DOCS)
    texts = [readme, *(results.PLACE.sub("", text) for text in texts)]  # without wide tables
    assert max(len(line) for text in texts for line in text.splitlines()) <= 100
    assert len(readme.splitlines()) <= 150
