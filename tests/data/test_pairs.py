"""Reading question pairs: what is used, what is left out and reported."""

import csv
import re

import numpy as np
import pytest

from data.pairs import read_pairs
from modules.settings import UserError
from tests.conftest import ROOT

HEADER = "id\tsentence1\tsentence2\tis_duplicate\n"


def write(tmp_path, text):
    path = tmp_path / "pairs.csv"
    path.write_bytes(text.encode())
    return path


def rows(pairs):
    return list(zip(pairs.ids, pairs.first, pairs.second, pairs.labels, strict=True))


@pytest.mark.parametrize(
    "text",
    [
        HEADER + "a\tOne?\tTwo?\t1.0\nb\tThree?\tFour?\t0.0\n",
        HEADER + "a\tOne?\tTwo?\t1\nb\tThree?\tFour?\t0",
        "\tid\tsentence1\tsentence2\tis_duplicate\n7\ta\tOne?\tTwo?\t1.0\n9\tb\tThree?\tFour?\t0.0\n",
        "is_duplicate\tsentence2\tid\tsentence1\n1.0\tTwo?\ta\tOne?\n0.0\tFour?\tb\tThree?\n",
        (HEADER + "a\t One? \tTwo?\t1.0 \nb\tThree?\tFour?\t0.0\n\n").replace("\n", "\r\n"),
        "\ufeff" + HEADER + 'a\t"One?"\tTwo?\t1.0\nb\tThree?\tFour?\t0.0\n',
    ],
    ids=["course", "whole labels", "unnamed index", "other order", "crlf and blanks", "bom"],
)
def test_public_variants_of_the_format_read_the_same(tmp_path, text):
    pairs = read_pairs(write(tmp_path, text), has_labels=True)
    assert rows(pairs) == [("a", "One?", "Two?", 1), ("b", "Three?", "Four?", 0)]
    assert pairs.left_out == {}


def test_quotes_line_ends_and_odd_ids_are_kept(tmp_path):
    text = HEADER + (
        '12 ab\t"""Is """"x"""" odd?"""\tA 12" disc?\t0.0\n'
        '7,8\t"first line\nsecond line?"\tB?\t1.0\n'
        "c\u2028d\tWhat\x0bnow?\tC?\t1.0\n"
    )
    pairs = read_pairs(write(tmp_path, text), has_labels=True)
    assert rows(pairs) == [
        ("12 ab", '"Is ""x"" odd?"', 'A 12" disc?', 0),
        ("7,8", "first line\nsecond line?", "B?", 1),
        ("c\u2028d", "What\x0bnow?", "C?", 1),
    ]


PUBLIC = {  # format -> a file of three pairs, how its columns are taken
    "Kaggle's train.csv": (
        '"id","qid1","qid2","question1","question2","is_duplicate"\n'
        '"0","1","2","What is ""it"", then?","B?","0"\n'
        '"1","3","4","first line\nsecond line?","D, or E?","1"\n'
        '"2","5","6","It costs 5"", doesn\'t it?","F?","1"\n',
        "id, question1, question2, is_duplicate (comma-separated)",
    ),
    "pandas' CSV with an index": (
        ",id,sentence1,sentence2,is_duplicate\n"
        '7,0,"What is ""it"", then?",B?,0.0\n'
        '8,1,"first line\nsecond line?","D, or E?",1.0\n'
        '9,2,"It costs 5"", doesn\'t it?",F?,1.0\n',
        "id, sentence1, sentence2, is_duplicate (comma-separated)",
    ),
    "GLUE's QQP as datasets writes it": (
        "question1,question2,label,idx\n"
        '"What is ""it"", then?",B?,0,0\n'
        '"first line\nsecond line?","D, or E?",1,1\n'
        '"It costs 5"", doesn\'t it?",F?,1,2\n',
        "idx, question1, question2, label (comma-separated)",
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_formats_are_read_and_said(tmp_path, name):
    text, columns = PUBLIC[name]
    pairs = read_pairs(write(tmp_path, text), has_labels=True)
    assert rows(pairs) == [
        ("0", 'What is "it", then?', "B?", 0),
        ("1", "first line\nsecond line?", "D, or E?", 1),
        ("2", "It costs 5\", doesn't it?", "F?", 1),
    ]
    assert pairs.summary().endswith(f"pairs.csv: 3 pairs from {columns}")


def test_a_quote_is_a_character_in_glues_qqp(tmp_path):
    text = (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        '0\t1\t2\t"What is ""it""?"\tB?\t0\n'
        '1\t3\t4\t"Half a question\n'  # line 3
        '2\t5\t6\tIs it 5"?\t"What is it?\t1\n'
    )
    pairs = read_pairs(write(tmp_path, text), has_labels=True)
    expected = [("0", '"What is ""it""?"', "B?", 0), ("2", 'Is it 5"?', '"What is it?', 1)]
    assert rows(pairs) == expected
    assert "is_duplicate (tab-separated, quotes taken literally);" in pairs.summary()
    assert pairs.left_out == {"the wrong number of fields": [3]}


def test_quotes_around_most_fields_of_a_tab_separated_file_are_as_in_csv(tmp_path):
    text = (
        '"id"\t"question1"\t"question2"\n'
        '"0"\t"What is ""it""?"\t"B?"\n'
        '"1"\t"two\nlines"\tIt costs 5"?\n'
    )
    pairs = read_pairs(write(tmp_path, text), has_labels=False)
    assert (pairs.ids, pairs.second) == (["0", "1"], ["B?", 'It costs 5"?'])
    assert pairs.first == ['What is "it"?', "two\nlines"]
    assert pairs.summary().endswith("2 pairs from id, question1, question2 (tab-separated)")


@pytest.mark.parametrize(
    "text",
    [
        HEADER + 'a\t"Is it\tone?"\tTwo?\t1\n',
        'id,sentence1,sentence2,is_duplicate\na,"Is it\tone?",Two?,1\n',
    ],
)
def test_a_tab_in_quotes_is_part_of_a_question(tmp_path, text):
    pairs = read_pairs(write(tmp_path, text), has_labels=True)
    assert rows(pairs) == [("a", "Is it\tone?", "Two?", 1)]
    assert pairs.kept == {}


def test_kaggles_test_file_is_read(tmp_path):
    text = '"test_id","question1","question2"\n0,"A, or\nB?","C?"\n1,"","D?"\n'
    pairs = read_pairs(write(tmp_path, text), has_labels=False)
    assert (pairs.ids, pairs.first) == (["0", "1"], ["A, or\nB?", ""])
    assert "2 pairs from test_id, question1, question2 (comma-separated); kept" in pairs.summary()


def test_every_row_with_an_id_of_a_test_file_is_kept(tmp_path):
    text = "\tid\tsentence1\tsentence2\n" + (
        "0\ta\tOne?\tTwo?\n"
        "1\tb\t\tTwo?\n"  # line 3
        "2\tc\t\t\n"
        "3\td\tOne?\n"  # line 5
        "4\te\tOne?\tTwo?\tThree?\n"
        '5\tf\t"One?\tTwo?\n'  # line 7
        "6\ta\tOne?\tTwo?\n"
        "the rest of a question?\n"  # line 9
        "of\tanother question\tTwo?\n"
        "7\t\tOne?\tTwo?\n"  # line 11
        '8\t"\tTwo?\n'
    )
    pairs = read_pairs(write(tmp_path, text), has_labels=False)
    assert pairs.ids == ["a", "b", "c", "d", "e", "f", "a"]
    assert pairs.first == ["One?", "", "", "One?", "One?", '"One?', "One?"]
    assert pairs.second == ["Two?", "Two?", "", "", "Two?", "Two?", "Two?"]
    assert pairs.left_out == {"the wrong number of fields": [9, 10, 12], "no id": [11]}
    assert pairs.kept == {
        "an empty question": [3, 4, 5],
        "the wrong number of fields": [5, 6],
        "invalid CSV quotes": [7],
        "a duplicate id": [8],
    }
    assert "; kept 3 with an empty question (line 3, 4, 5); kept 2 with the wr" in pairs.summary()


def test_equal_ids_are_reported_of_labelled_rows_too(tmp_path):
    pairs = read_pairs(write(tmp_path, HEADER + 2 * "a\tOne?\tTwo?\t1\n"), has_labels=True)
    assert pairs.ids == ["a", "a"]
    assert pairs.summary().endswith("2 pairs; kept 1 with a duplicate id (line 3)")


def test_faulty_rows_are_left_out_counted_and_named(tmp_path):
    text = HEADER + (
        "a\tOne?\tTwo?\t1.0\n"  # line 2
        "b\tNo label?\tNone?\t\n"
        "c\tToo few fields?\t0.0\n"
        "d\tToo\tmany\tfields\t1.0\n"
        "e\t \tEmpty?\t1.0\n"
        "f\tOdd label?\tYes?\t0.5\n"
        '"g\tA stray quote?\tIt costs one line?\n'  # line 8
        "h\tFive?\tSix?\t0.0\n"
        "i\tNo label?\tNone?\t  \n"
    )
    pairs = read_pairs(write(tmp_path, text), has_labels=True)
    assert pairs.ids == ["a", "h"]
    assert pairs.left_out == {
        "no label": [3, 10],
        "the wrong number of fields": [4, 5, 8],
        "an empty question": [6],
        "a label other than 0 or 1": [7],
    }
    summary = pairs.summary()
    assert "2 pairs; left out 2 with no label (line 3, 10);" in summary
    assert "left out 3 with the wrong number of fields (line 4, 5, 8)" in summary


def test_a_test_file_needs_no_labels_and_ignores_them(tmp_path):
    path = write(tmp_path, "id\tsentence1\tsentence2\na\tOne?\tTwo?\n")
    assert read_pairs(path, has_labels=False).labels == []
    path = write(tmp_path, HEADER + "a\tOne?\tTwo?\t\n")
    assert read_pairs(path, has_labels=False).ids == ["a"]


def test_the_limit_counts_usable_rows(tmp_path):
    text = HEADER + "a\tOne?\tTwo?\t\nb\tOne?\tTwo?\t1\nc\tOne?\tTwo?\t1\nd\tOne?\tTwo?\t1\n"
    assert read_pairs(write(tmp_path, text), has_labels=True, limit=2).ids == ["b", "c"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"id\tsentence1\tis_duplicate\na\tb\t1\n", "no column sentence2"),
        (b"id,sentence1,sentence2,is_duplicate\n", "no usable row"),
        (b"id;sentence1;sentence2;is_duplicate\n", "no column id, sentence1.*a tab- or comma-sep"),
        (
            b"id,sent0,sent1,is_duplicate\n",
            "no column sentence1, .*with id .*sentence1 or question1",
        ),
        (b"id,question1,sentence1,question2,label\n", "has two columns for sentence1: its first"),
        (b"", "no column id"),
        (HEADER.encode(), "no usable row"),
        (HEADER.encode() + b"a\tb\tc\t\n", r"no usable row.*left out 1 with no label \(line 2\)"),
        (HEADER.encode() + "a\tcafé?\tb\t1\n".encode("latin-1"), "is not UTF-8 text: line 2"),
        (HEADER.encode("utf-16"), "is not UTF-8 text: line 1"),
        (HEADER.encode() + b"a\tb\0\tc\t1\n", "is not UTF-8 text: line 2 has a NUL byte"),
    ],
)
def test_an_unusable_file_is_refused_in_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "pairs.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentence) as error:
        read_pairs(path, has_labels=True)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_pairs(tmp_path / "none.csv", has_labels=True)


def test_the_sample_pairs_are_what_their_readme_says():
    questions, groups = {}, set()
    for name, least in (("train", 1200), ("dev", 200), ("test", 200)):
        path = ROOT / "data" / f"sample-pairs-{name}.csv"
        pairs = read_pairs(path, has_labels=name != "test")
        assert pairs.left_out == {}
        assert len(pairs.ids) >= least
        assert len(set(pairs.ids)) == len(pairs.ids)
        if name != "test":
            assert 0.35 <= np.mean(pairs.labels) <= 0.40
        plain = {re.sub(r"\W+", " ", q.lower()).strip() for q in pairs.first + pairs.second}
        assert not any(plain & other for other in questions.values())
        questions[name] = plain
        groups |= {pair_id.split("-")[0] for pair_id in pairs.ids}
    assert len(groups) >= 400


def test_the_courses_own_reader_reads_the_sample_pairs():
    with open(ROOT / "data" / "sample-pairs-dev.csv", encoding="utf-8") as file:
        theirs = [
            (row["id"], row["sentence1"], row["sentence2"], int(float(row["is_duplicate"])))
            for row in csv.DictReader(file, delimiter="\t")
        ]
    assert theirs == rows(read_pairs(ROOT / "data" / "sample-pairs-dev.csv", has_labels=True))
