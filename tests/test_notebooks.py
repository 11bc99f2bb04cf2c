"""Scripts run where standard output is not a terminal's or a file's: notebooks, closed streams."""

import os
import subprocess
import sys
import textwrap

import pytest

from tests.scripts import ROOT, script_flags

FLAGS = ["--demo", "--limit_train", "12", "--limit_dev", "2", "--epochs", "1"]
SCRIPTS = ["lora_paraphrase_detection.py", "reft_paraphrase_detection.py"]
SCRIPTS += ["lora_sonnet_generation.py", "reft_sonnet_generation.py"]
# As IPython's %run: in one process, twice, with an output stream of its own.
CELL = """
import io, runpy, sys

class OutStream(io.TextIOBase):
    def __init__(self):
        self.text = []
    def write(self, text):
        self.text.append(text)

real, sys.stdout, sys.stderr = sys.stdout, OutStream(), OutStream()
sys.path.insert(0, "{root}")
for script in {scripts}:
    short = ["--max_new_tokens", "30"] if "sonnet" in script else []
    for more in ([], ["--predict_only"], []) if "lora" in script else ([], []):
        sys.argv = ["{root}/" + script, *{flags}, *{own}[script], *short, *more]
        runpy.run_path(sys.argv[0], run_name="__main__")
real.write("".join(sys.stdout.text))
"""


def test_scripts_run_in_a_notebook_cell_with_its_plotting_backend(tmp_path):
    own = {script: script_flags(script, tmp_path) for script in SCRIPTS}
    code = CELL.format(root=ROOT, scripts=SCRIPTS, flags=FLAGS, own=own)
    env = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is a finished run of this command") == 4
    assert done.stdout.count("dev accuracy of always no") == 3  # two trainings, a prediction
    assert len(list(tmp_path.glob("*-report.html"))) == 4


@pytest.mark.parametrize("closed", ["2>&-", "1>&- 2>&-"])
def test_a_script_runs_with_closed_streams(tmp_path, closed):
    words = [sys.executable, ROOT / SCRIPTS[1], *FLAGS, *script_flags(SCRIPTS[1], tmp_path)]
    command = f'"$@" {closed}'
    done = subprocess.run(["sh", "-c", command, "sh", *map(str, words)], cwd=tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "dev.csv").exists()
