"""Reading sonnets, splitting them, and reading what a run writes."""

import re

import pytest

from data.sonnets import Sonnet, poem_lines, read_sonnets, split_sonnets
from finetune.outputs import format_sonnets
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
        ("", "has no poems: each must"),
        ("Title\n\nA line and 1 number\n", "has no poems: each must"),
        ("1\n\nA line\n\n2\n\n3\nB line\n4\n", "has no text below the number 2, 4"),
    ],
)
def test_a_file_without_poems_is_refused(tmp_path, text, sentence):
    with pytest.raises(UserError, match=sentence):
        read_sonnets(sonnet_file(tmp_path, text))


def test_the_bundled_sonnets_are_all_there(capsys):
    files = ["sonnets", "TRUE_sonnets_held_out_dev", "sonnets_held_out", "sonnets_held_out_dev"]
    train, gold, held_out, dev = (read_sonnets(ROOT / "data" / f"{name}.txt") for name in files)
    assert [sonnet.number for sonnet in train + gold + held_out] == list(range(1, 155))
    short = {99: 15, 126: 12}
    assert all(len(s.lines) == short.get(s.number, 14) for s in train + gold)
    assert [s.lines for s in dev] == [s.lines[:3] for s in gold]
    assert all(len(s.lines) == 3 for s in held_out)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "n", "n_lines"),
    [
        ("sonnets", 131, {12, 14, 15}),
        ("sonnets_held_out_dev", 12, {3}),
        ("TRUE_sonnets_held_out_dev", 12, {14}),
        ("sonnets_held_out", 12, {3}),
    ],
)
def test_the_courses_own_files_are_read(name, n, n_lines, capsys):
    if not COURSE_SONNETS.is_dir():
        pytest.skip("the course's edition may not be redistributed and is not beside this checkout")
    poems = read_sonnets(COURSE_SONNETS / f"{name}.txt")
    assert len(poems) == n
    assert {len(poem.lines) for poem in poems} == n_lines
    assert capsys.readouterr().out == ""


def poem(n_lines=14, indent=""):
    return "".join(f"{indent}Verse {i} of some length\n" for i in range(n_lines))


GUTENBERG = (
    "The Project Gutenberg eBook of Shakespeare's Sonnets\n\nRelease date: 1997\n\n2\n\n"
    "*** START OF THE PROJECT GUTENBERG EBOOK SHAKESPEARE'S SONNETS ***\n\n{}"
    "\n\n*** END OF THE PROJECT GUTENBERG EBOOK SHAKESPEARE'S SONNETS ***\n\n4\n\nLicence\n"
)
COMPLETE_WORKS = (
    "<<THIS ELECTRONIC VERSION IS COPYRIGHT>>\n\n\n1609\n\nTHE SONNETS\n\n"
    "by William Shakespeare\n\n\n\n{}"
    "\n\nTHE END\n\n\n\n1610\n\nALLS WELL THAT ENDS WELL\n\nby William Shakespeare\n\nACT I\n"
)


@pytest.mark.parametrize("frame", [GUTENBERG, COMPLETE_WORKS, "THE SONNETS\n\n{}", "{}\nFINIS.\n"])
@pytest.mark.parametrize(
    "numbers", ["I II III", "I. II. III.", "1. 2. 3.", "Sonnet~1 Sonnet~2 Sonnet~3"]
)
def test_the_text_around_the_poems_is_left_out(tmp_path, capsys, frame, numbers):
    text = "".join(f"  {n.replace('~', ' ')}\n\n{poem(indent='  ')}\n" for n in numbers.split())
    poems = read_sonnets(sonnet_file(tmp_path, frame.format(text)))
    assert [(poem.number, len(poem.lines)) for poem in poems] == [(1, 14), (2, 14), (3, 14)]
    assert poems[2].lines[-1] == "  Verse 13 of some length"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["XVIII", "SONNET XVIII", "Sonnet 18:", "18."])
def test_a_file_may_begin_with_any_number(tmp_path, name):
    assert read_sonnets(sonnet_file(tmp_path, f"{name}\n\nOne\n"))[0] == Sonnet(18, ("One",))


@pytest.mark.parametrize("numbers", ["I II III", "1 2 3", "CXLIV CXLV CXLVI"])
def test_the_verse_i_starts_no_poem(tmp_path, numbers):
    text = "".join(f"{number}\nI\nThe end of all\n\nI\n\n" for number in numbers.split())
    poems = read_sonnets(sonnet_file(tmp_path, text))
    assert [poem.lines for poem in poems] == 3 * [("I", "The end of all", "I")]


def test_another_work_is_left_out_with_a_line_up_to_a_number_that_runs_on(tmp_path, capsys):
    parts = [
        f"126\n{poem()}",
        "THE DARK LADY\n\n1\nNote\n",
        f"127\n{poem()}",
        "A COMPLAINT\n\nOne\n",
    ]
    path = sonnet_file(tmp_path, "\n".join(parts))
    poems = read_sonnets(path)
    assert [(poem.number, len(poem.lines)) for poem in poems] == [(126, 14), (127, 14)]
    assert capsys.readouterr().out == (
        f"{path}, line 17: left out 'THE DARK LADY' and the text below it\n"
        f"{path}, line 38: left out 'A COMPLAINT' and the text below it\n"
    )


def numbered(numbers, n_lines=14):
    return "".join(f"{number}\n\n{poem(n_lines)}\n" for number in numbers)


def test_of_two_gutenberg_books_the_first_is_read(tmp_path, capsys):
    books = [GUTENBERG.format(numbered(range(1, 11))), GUTENBERG.format(numbered(range(1, 21)))]
    path = sonnet_file(tmp_path, "".join(books))
    assert [poem.number for poem in read_sonnets(path)] == [*range(1, 11)]
    line = (tmp_path / "sonnets.txt").read_text().rpartition("*** START")[0].count("\n") + 1
    said = capsys.readouterr().out
    assert said == f"{path}, line {line}: left out the next Project Gutenberg book\n"


@pytest.mark.parametrize("end", ["THE END", "FINIS.", "The end of all\n\nTHE END!"])
def test_poems_after_an_end_that_run_on_are_read(tmp_path, capsys, end):
    text = f"{numbered(range(1, 11))}{end}\n\nVolume two\n\n{numbered(range(11, 21))}THE END\n"
    path = sonnet_file(tmp_path, text)
    assert [poem.number for poem in read_sonnets(path)] == [*range(1, 21)]
    assert (
        f": left out {end.rpartition(chr(10))[2]!r} and the text below" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "after", ["FINIS.\n\nLondon\n\n1609\n", "THE END\n\n43\n", "THE END\n\n1890\nPrinted by A.\n"]
)
def test_a_number_after_the_end_is_no_poem(tmp_path, capsys, after):
    poems = read_sonnets(sonnet_file(tmp_path, numbered(range(1, 11)) + after))
    assert [poem.number for poem in poems] == [*range(1, 11)]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("end", ["THE END", "End of Project Gutenberg's Sonnets, part 1"])
def test_poems_left_out_after_an_end_are_reported(tmp_path, capsys, end):
    text = numbered(range(1, 4)) + f"{end}\n\n" + numbered(range(5, 8))
    path = sonnet_file(tmp_path, text)
    assert [poem.number for poem in read_sonnets(path)] == [1, 2, 3]
    assert f": left out {end!r} and the text below it\n" in capsys.readouterr().out


def test_the_footer_is_left_out_after_another_end(tmp_path):
    text = numbered(range(1, 4)) + "THE END\n\n*** END OF THE PROJECT\n\n4\nA\nB\nC\n"
    assert len(read_sonnets(sonnet_file(tmp_path, text))) == 3


@pytest.mark.parametrize("before", ["Produced by A.", "A story.\n\nChapter one"])
def test_the_book_with_the_poems_is_read(tmp_path, capsys, before):
    text = f"*** START OF THE PROJECT GUTENBERG EBOOK X ***\n\n{before}\n\n"
    text += "*** START OF THIS PROJECT GUTENBERG EBOOK Y ***\n\n" + numbered(range(1, 4))
    path = sonnet_file(tmp_path, text)
    assert [poem.number for poem in read_sonnets(path)] == [1, 2, 3]
    assert capsys.readouterr().out == ""


def test_a_second_sequence_does_not_run_on_the_first(tmp_path, capsys):
    parts = [numbered(range(1, 11)), "IDEA\n\n", numbered(range(1, 21))]
    path = sonnet_file(tmp_path, "DELIA\n\n" + "".join(parts))
    assert [poem.number for poem in read_sonnets(path)] == [*range(1, 11)]
    assert "left out 'IDEA' and the text below it" in capsys.readouterr().out


def test_a_poem_out_of_line_with_the_others_is_named(tmp_path, capsys):
    lengths = {97: 14, 98: 13, 99: 15, 200: 14, 101: 14, 102: 14, 103: 14, 104: 14, 126: 12}
    path = sonnet_file(tmp_path, "".join(f"{n}\n{poem(k)}" for n, k in lengths.items()))
    assert len(read_sonnets(path)) == 9
    assert capsys.readouterr().out == (
        f"{path}, line 16: poem 98 has 13 lines, but most have 14\n"
        f"{path}, line 46: poem 200 is out of sequence next to 99 and 101\n"
        f"{path}, line 121: poem 126 is out of sequence next to 104\n"
    )


def courses_reader(path):
    """How the course's own code reads a file of sonnets."""
    text = path.read_text(encoding="utf-8")
    return [poem.strip() for poem in re.split(r"\n\s*\d+\s*\n", text)[1:]]


def test_what_is_written_is_read_by_the_courses_reader_and_by_ours(tmp_path):
    poems = [Sonnet(144, ("One", "  Two")), Sonnet(145, ("Three", "Four"))]
    (tmp_path / "out.txt").write_text(format_sonnets(poems))
    expected = b"--Generated Sonnets-- \n\n\n144\nOne\n  Two\n\n\n145\nThree\nFour\n\n"
    assert (tmp_path / "out.txt").read_bytes() == expected
    assert courses_reader(tmp_path / "out.txt") == ["One\n  Two", "Three\nFour"]
    assert read_sonnets(tmp_path / "out.txt") == poems


def test_generated_lines_that_look_like_numbers_or_endings_are_read_back(tmp_path):
    generated = (
        "One\n12\n 3. \nI\nI\nXVIII\nSONNET IX\nSonnet 4\nV\n1609\nTHE END\nALL IN CAPITALS\n"
    )
    lines = poem_lines(generated + "End of Project Gutenberg\n\n  I\n4 more \n")
    assert lines == [
        *(
            "One",
            "I",
            "I",
            "THE END",
            "ALL IN CAPITALS",
            "End of Project Gutenberg",
            "  I",
            "4 more",
        )
    ]
    poems = [Sonnet(number, tuple(lines)) for number in (144, 144, 1)]
    (tmp_path / "out.txt").write_text(format_sonnets(poems))
    assert read_sonnets(tmp_path / "out.txt") == poems


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
