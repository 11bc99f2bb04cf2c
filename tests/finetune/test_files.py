"""Files are written whole or not at all, and by one run at a time."""

import os
import subprocess
import sys

import pytest

from finetune.files import claim, release, replacing, write_text
from tests.conftest import ROOT


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_text(path, "first\n")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert path.read_text() == "first\n"
    assert os.listdir(path.parent) == ["file.txt"]


def test_a_file_that_is_claimed_is_refused_to_another_process_until_it_is_released(tmp_path):
    path = tmp_path / "new" / "dev.csv"
    code = "import sys, pathlib, finetune.files as f; f.claim([pathlib.Path(sys.argv[1])])"

    def other() -> str:
        command = [sys.executable, "-c", code, str(path)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stderr

    claim([path, path])
    assert "another run is writing" in other()
    release()
    assert not list(path.parent.iterdir())
    assert other() == ""


@pytest.mark.parametrize(("make", "what"), [("mkdir", "a folder"), ("link", "no regular file")])
def test_what_is_no_file_is_not_claimed(tmp_path, make, what):
    path = tmp_path / "x"
    path.mkdir() if make == "mkdir" else path.symlink_to("/dev/null")
    with pytest.raises(OSError, match=f"x is {what}, a file is to be written there"):
        claim([path])
