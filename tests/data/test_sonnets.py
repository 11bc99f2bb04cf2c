"""Reading sonnets, splitting them, and reading what a run writes."""

import re

import pytest

from data.sonnets import Sonnet, poem_lines, read_sonnets, split_sonnets
from finetune.outputs import write_sonnets
from modules.settings import UserError
from tests.conftest import COURSE_SONNETS, ROOT


def sonnet_file(tmp_path, text):
    path = tmp_path / "sonnets.txt"
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        "Title\nby somebody\n\n\n7\n\nOne line\n  Two lines\n\n12\n\nThree\n",
        "Title\r\n\r\n7\r\n\r\nOne line\r\n  Two lines\r\n\r\n12\r\n\r\nThree",
        "7\nOne line\n  Two lines \n 12 \nThree\n\n\n",
        "\ufeff--Generated Sonnets-- \n\n\n7\nOne line\n\n  Two lines\n\n\n12\nThree\n\n",
    ],
)
def test_sonnets_are_read_whatever_the_preamble_and_line_ends(tmp_path, text):
    poems = [Sonnet(7, ("One line", "  Two lines")), Sonnet(12, ("Three",))]
    assert read_sonnets(sonnet_file(tmp_path, text)) == poems
    assert read_sonnets(sonnet_file(tmp_path, text), limit=1) == poems[:1]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no poem under a number"),
        ("Title\n\nA line and 1 number\n", "has no poem under a number"),
        ("1\n\nA line\n\n2\n\n3\nB line\n4\n", "has no line under the number 2, 4"),
    ],
)
def test_a_file_without_poems_is_refused(tmp_path, text, sentence):
    with pytest.raises(UserError, match=sentence):
        read_sonnets(sonnet_file(tmp_path, text))


def test_the_bundled_sonnets_are_all_there():
    files = ["sonnets", "TRUE_sonnets_held_out_dev", "sonnets_held_out", "sonnets_held_out_dev"]
    train, gold, held_out, dev = (read_sonnets(ROOT / "data" / f"{name}.txt") for name in files)
    assert [sonnet.number for sonnet in train + gold + held_out] == list(range(1, 155))
    short = {99: 15, 126: 12}
    assert all(len(s.lines) == short.get(s.number, 14) for s in train + gold)
    assert [s.lines for s in dev] == [s.lines[:3] for s in gold]
    assert all(len(s.lines) == 3 for s in held_out)


@pytest.mark.parametrize(
    ("name", "n", "n_lines"),
    [
        ("sonnets", 131, {12, 14, 15}),
        ("sonnets_held_out_dev", 12, {3}),
        ("TRUE_sonnets_held_out_dev", 12, {14}),
        ("sonnets_held_out", 12, {3}),
    ],
)
def test_the_courses_own_files_are_read(name, n, n_lines):
    if not COURSE_SONNETS.is_dir():
        pytest.skip("the course's edition may not be redistributed and is not beside this checkout")
    poems = read_sonnets(COURSE_SONNETS / f"{name}.txt")
    assert len(poems) == n
    assert {len(poem.lines) for poem in poems} == n_lines


def courses_reader(path):
    """How the course's own code reads a file of sonnets."""
    text = path.read_text(encoding="utf-8")
    return [poem.strip() for poem in re.split(r"\n\s*\d+\s*\n", text)[1:]]


def test_what_is_written_is_read_by_the_courses_reader_and_by_ours(tmp_path):
    poems = [Sonnet(144, ("One", "  Two")), Sonnet(145, ("Three", "Four"))]
    write_sonnets(tmp_path / "out.txt", poems)
    expected = b"--Generated Sonnets-- \n\n\n144\nOne\n  Two\n\n\n145\nThree\nFour\n\n"
    assert (tmp_path / "out.txt").read_bytes() == expected
    assert courses_reader(tmp_path / "out.txt") == ["One\n  Two", "Three\nFour"]
    assert read_sonnets(tmp_path / "out.txt") == poems


def test_poem_lines_are_neither_blank_nor_a_number():
    assert poem_lines("One \n\n \n12\n 3 \n  Two\n4 more\n") == ["One", "  Two", "4 more"]


def test_a_tenth_of_the_sonnets_is_split_off_by_the_seed():
    sonnets = [Sonnet(i, ("x",)) for i in range(131)]
    train, validation = split_sonnets(sonnets, seed=1)
    assert len(validation) == 13
    assert sorted(s.number for s in train + validation) == list(range(131))
    assert split_sonnets(sonnets, seed=1) == (train, validation)
    assert split_sonnets(sonnets, seed=2) != (train, validation)
    assert [len(part) for part in split_sonnets(sonnets[:2], seed=1)] == [1, 1]
    with pytest.raises(UserError, match="one poem cannot be split"):
        split_sonnets(sonnets[:1], seed=1)
