"""setup.sh in a folder of its own, with a Python that only writes down what it is called with."""

import os
import pty
import re
import shlex
import shutil
import subprocess

import pytest

from tests.conftest import ROOT

PYTHON = """#!/bin/bash
echo "$(basename "$(dirname "$0")")/python $*" >> "$CALLS"
[[ "$*" != *"$FAILS"* ]] || exit 1
[[ "$*" != "-m venv .venv" ]] || { mkdir -p .venv/bin && cp "$0" .venv/bin/python; }
"""
PIP = "-m pip install --quiet --disable-pip-version-check"


@pytest.fixture
def setup(tmp_path):
    """Runs setup.sh with the words given; `fails` is what a call of Python that fails contains."""
    folder, stubs = tmp_path / "project", tmp_path / "stubs"
    (folder / "tests").mkdir(parents=True)
    stubs.mkdir()
    for name in ("setup.sh", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    (stubs / "python3").write_text(PYTHON)
    (stubs / "python3").chmod(0o755)

    def run(words, fails="no such call", system="Linux", **options):
        (stubs / "uname").write_text(f"#!/bin/bash\necho {system}\n")
        (stubs / "uname").chmod(0o755)
        env = os.environ | {"PATH": f"{stubs}:{os.environ['PATH']}", "FAILS": fails}
        env |= {"CALLS": str(tmp_path / "calls")}
        env.pop("PYTHON", None)
        options = {"stdout": subprocess.PIPE} | options
        done = subprocess.run(
            ["bash", folder / "setup.sh", *shlex.split(words)],
            **{"env": env, "cwd": tmp_path, "stderr": subprocess.PIPE, "text": True} | options,
        )
        calls = tmp_path / "calls"
        done.calls = calls.read_text().splitlines()[1:] if calls.exists() else []
        calls.unlink(missing_ok=True)
        return done

    return run


def test_torch_is_installed_first_and_running_again_is_harmless(setup):
    packages = (ROOT / "requirements.txt").read_text().splitlines()
    torch = next(package for package in packages if package.startswith("torch=="))
    for _ in range(2):
        done = setup("")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "Ready. Next: .venv/bin/python lora_paraphrase_detection.py --demo\n"
        assert done.calls == [
            "stubs/python -m venv .venv",
            f"bin/python {PIP} {torch}",
            f"bin/python {PIP} -r requirements.txt",
        ]


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("--test -k 'a or b'", "-m pytest -k a or b"),
        ("--data", "-m data.fetch quora"),
        ("--data http://127.0.0.1/x", "-m data.fetch quora http://127.0.0.1/x"),
        ("--weights gpt2", "-m data.fetch weights gpt2"),
    ],
)
@pytest.mark.parametrize("venv", [True, False])
def test_an_option_is_done_after_the_packages(setup, words, call, venv):
    done = setup(words if venv else f"--no-venv {words}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.calls[-1] == f"{'bin' if venv else 'stubs'}/python {call}"
    assert any("-m venv" in call for call in done.calls) == venv
    assert sum("-m pip install" in call for call in done.calls) == (4 if "test" in words else 2)


def test_a_terminal_shows_pips_progress(setup):
    ours, terminal = pty.openpty()
    done = setup("", stdout=terminal)
    os.close(terminal)
    os.close(ours)
    assert len(done.calls) == 3
    assert not any("--quiet" in call for call in done.calls)


@pytest.mark.parametrize(
    ("words", "fails", "system", "sentence"),
    [
        ("", "pip install --quiet", "Linux", "pip could not install the packages; .* the network "),
        ("", "-r requirements.txt", "Darwin", "pip could not install the packages; .*the network "),
        ("--test", "tests/requirements.txt", "Linux", "pip could not install .* the network "),
        ("", "-m venv", "Linux", r"python3 cannot create a virtual environment: .* --no-venv"),
        ("", "-c import sys", "Linux", "Python 3.10 or newer is required; set PYTHON=/path/to/p"),
        ("--test", "", "MINGW64_NT-10.0-22631", "the project does not run .*; use WSL"),
        ("--no-venv", "", "CYGWIN_NT-10.0", "the project does not run .*; use WSL"),
    ],
)
def test_a_failure_is_said_in_a_sentence(setup, words, fails, system, sentence):
    done = setup(words, fails=fails or "no such call", system=system)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert re.match(f"setup.sh: {sentence}", done.stderr)


WORDS = ["foo", "''", "--weights", "--weights ''", "--weights gpt2 gpt2-xl", "--weights --data"]
WORDS += ["--data --weights", "--data http://127.0.0.1 more", "--test-all", "--data --no-venv"]


@pytest.mark.parametrize("words", [*WORDS, "--no-venv --no-venv"])
def test_other_words_are_refused_before_anything_is_done(setup, words):
    done = setup(words)
    usage = "[--no-venv] [--test [PYTEST ARGUMENTS] | --data [URL] | --weights SIZE]"
    assert (done.returncode, done.stderr) == (2, f"usage: bash setup.sh {usage}\n")
    assert done.calls == []


@pytest.mark.parametrize("words", ["-h", "--help"])
def test_help_names_the_options_and_the_other_ways(setup, words):
    done = setup(words)
    assert (done.returncode, done.stderr, done.calls) == (0, "", [])
    for name in ("--no-venv", "--test", "--data", "--weights", "conda", "Colab", "WSL", "PYTHON"):
        assert name in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
