"""Files are written as one set, whole or not at all."""

import os

import pytest

from finetune.files import check_writable, write_files


def test_files_are_written_as_one_set(tmp_path):
    first, second = tmp_path / "new" / "first.txt", tmp_path / "second.bin"
    write_files({first: "old é\n", second: b"old"})
    blocked = tmp_path / "file" / "third.txt"
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"third.txt cannot be written: .*; it is unchanged"):
        write_files({first: "new\n", second: b"new", blocked: "new"})
    assert first.read_text(encoding="utf-8") == "old é\n"
    assert second.read_bytes() == b"old"
    assert os.listdir(tmp_path / "new") == ["first.txt"]
    assert sorted(os.listdir(tmp_path)) == ["file", "new", "second.bin"]


def test_a_link_stays_one(tmp_path):
    link, target = tmp_path / "link", tmp_path / "elsewhere" / "target"
    link.symlink_to(target)
    write_files({link: "text"})
    assert link.is_symlink()
    assert target.read_text() == "text"


@pytest.mark.parametrize(("make", "what"), [("mkdir", "a folder"), ("link", "not a regular file")])
def test_what_is_no_file_is_not_written_to(tmp_path, make, what):
    path = tmp_path / "x"
    path.mkdir() if make == "mkdir" else path.symlink_to("/dev/null")
    with pytest.raises(OSError, match=f"x cannot be written: it is {what}"):
        check_writable(path)
