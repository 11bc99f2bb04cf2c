"""From file to batch: what is read, what is left out and said, what the model gets to see."""

import csv
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from datasets import (
    DataError,
    PairBatches,
    Sonnet,
    SonnetBatches,
    TokenizedPairs,
    TokenizedSonnet,
    answer_ids,
    load_sonnets,
    make_prompt,
    pair_batch,
    poem_lines,
    prediction_rows,
    read_pairs,
    read_sonnets,
    sonnet_batch,
    split_sonnets,
    token_index,
    tokenize_pairs,
    tokenize_prompts,
    tokenize_sonnets,
)
from finetune.predictions import write_sonnets
from tests.conftest import COURSE_SONNETS, ROOT

HEADER = "id\tsentence1\tsentence2\tis_duplicate\n"


def write(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "pairs.csv"
    path.write_bytes(text.encode(encoding))
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
def test_public_variants_read_the_same(tmp_path, text):
    pairs = read_pairs(write(tmp_path, text), labelled=True)
    assert rows(pairs) == [("a", "One?", "Two?", 1), ("b", "Three?", "Four?", 0)]
    assert pairs.left_out == {}


def test_quotes_line_ends_and_odd_ids(tmp_path):
    text = HEADER + (
        '12 ab\t"""Is """"x"""" odd?"""\tA 12" disc?\t0.0\n'
        '7,8\t"first line\nsecond line?"\tB?\t1.0\n'
        "c\u2028d\tWhat\x0bnow?\tC?\t1.0\n"
    )
    pairs = read_pairs(write(tmp_path, text), labelled=True)
    assert rows(pairs) == [
        ("12 ab", '"Is ""x"" odd?"', 'A 12" disc?', 0),
        ("7,8", "first line\nsecond line?", "B?", 1),
        ("c\u2028d", "What\x0bnow?", "C?", 1),
    ]


def test_faulty_rows_are_left_out_counted_and_named(tmp_path):
    text = HEADER + (
        "a\tOne?\tTwo?\t1.0\n"  # line 2
        "b\tNo label?\tNone?\t\n"
        "c\tToo few fields?\t0.0\n"
        "d\tToo\tmany\tfields\t1.0\n"
        "e\t \tEmpty?\t1.0\n"
        "f\tOdd label?\tYes?\t0.5\n"
        '"g\tA stray quote?\tIt costs one line?\t1.0\n'  # line 8
        "h\tFive?\tSix?\t0.0\n"
        "i\tNo label?\tNone?\t  \n"
    )
    pairs = read_pairs(write(tmp_path, text), labelled=True)
    assert pairs.ids == ["a", "h"]
    assert pairs.left_out == {
        "no label": [3, 10],
        "a wrong number of fields": [4, 5, 8],
        "an empty question": [6],
        "a label other than 0 and 1": [7],
    }
    summary = pairs.summary()
    assert "2 pairs; left out 2 with no label (line 3, 10);" in summary
    assert "left out 3 with a wrong number of fields (line 4, 5, 8)" in summary


def test_a_test_file_needs_no_labels_and_ignores_them(tmp_path):
    path = write(tmp_path, "id\tsentence1\tsentence2\na\tOne?\tTwo?\n")
    assert read_pairs(path, labelled=False).labels == []
    path = write(tmp_path, HEADER + "a\tOne?\tTwo?\t\n")
    assert read_pairs(path, labelled=False).ids == ["a"]


def test_limit_counts_usable_rows(tmp_path):
    text = HEADER + "a\tOne?\tTwo?\t\nb\tOne?\tTwo?\t1\nc\tOne?\tTwo?\t1\nd\tOne?\tTwo?\t1\n"
    assert read_pairs(write(tmp_path, text), labelled=True, limit=2).ids == ["b", "c"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"id\tsentence1\tis_duplicate\na\tb\t1\n", "no column sentence2"),
        (b"id,sentence1,sentence2,is_duplicate\n", "no column id, sentence1, sentence2"),
        (b"", "no column id"),
        (HEADER.encode(), "no usable row"),
        (HEADER.encode() + b"a\tb\tc\t\n", r"no usable row.*left out 1 with no label \(line 2\)"),
        (HEADER.encode() + "a\tcafé?\tb\t1\n".encode("latin-1"), "is not UTF-8 text: line 2"),
        (HEADER.encode("utf-16"), "is not UTF-8 text: line 1"),
    ],
)
def test_an_unusable_file_is_refused_in_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "pairs.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=sentence) as error:
        read_pairs(path, labelled=True)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_pairs(tmp_path / "none.csv", labelled=True)


def test_the_prompt_is_the_courses_byte_for_byte():
    assert make_prompt("What's  a BEE?", "Bees, what are they...") == (
        'Is "what \'s a bee ?" a paraphrase of "bees , what are they . . ."? Answer "yes" or "no": '
    )


def test_answers_are_class_0_no_and_class_1_yes(gpt2_tokenizer, nano_tokenizer):
    assert answer_ids(gpt2_tokenizer) == (3919, 8505)
    vocabulary = nano_tokenizer.get_vocab()
    assert answer_ids(nano_tokenizer) == (vocabulary["no"], vocabulary["yes"])


@pytest.fixture
def pairs(tmp_path):
    generator = np.random.default_rng(0)
    words = ["how", "do", "bees", "fly", "to", "the", "moon"]
    text = HEADER
    for i in range(500):
        first, second = (" ".join(generator.choice(words, n)) for n in generator.integers(3, 40, 2))
        text += f"{i}\t{first}?\t{second}?\t{i % 2}\n"
    return read_pairs(write(tmp_path, text), labelled=True)


def test_tokens_are_the_tokenizers(pairs, gpt2_tokenizer):
    data = tokenize_pairs(pairs, gpt2_tokenizer, 1024)
    for i in (0, 1, 250, 499):
        expected = gpt2_tokenizer(make_prompt(pairs.first[i], pairs.second[i]))["input_ids"]
        assert data.tokens[data.starts[i] :][: data.lengths[i]].tolist() == expected
    assert len(data.tokens) == data.lengths.sum()
    assert data.shortened == 0


@pytest.mark.parametrize("max_length", [30, 48])
def test_a_long_pair_loses_the_ends_of_its_questions_not_the_cue(
    tmp_path, gpt2_tokenizer, max_length
):
    text = HEADER + f"a\tshort one?\t{'very ' * 300}long?\t1\nb\t{'x?' * 200}\t{'yes ' * 90}\t0\n"
    pairs = read_pairs(write(tmp_path, text), labelled=True)
    data = tokenize_pairs(pairs, gpt2_tokenizer, max_length)
    assert data.shortened == 2
    for start, length in zip(data.starts, data.lengths, strict=True):
        assert max_length - 8 <= length <= max_length
        prompt = gpt2_tokenizer.decode(data.tokens[start : start + length])
        assert prompt.endswith('"? Answer "yes" or "no": ')
        assert prompt.startswith('Is "')
    first = gpt2_tokenizer.decode(data.tokens[: data.lengths[0]])
    assert first.startswith('Is "short one ?" a paraphrase of "very very')


def test_a_model_too_short_for_the_prompt_is_refused(pairs, gpt2_tokenizer):
    with pytest.raises(DataError, match="10 positions cannot hold even an empty prompt"):
        tokenize_pairs(pairs, gpt2_tokenizer, 10)


def test_an_epoch_has_every_pair_once_whole_and_labelled(pairs, nano_tokenizer):
    data = tokenize_pairs(pairs, nano_tokenizer, 512)
    batches = PairBatches(data, 12, seed=1)
    epoch, rows = list(batches.epoch(0)), list(batches.rows(0))
    assert sorted(np.concatenate(rows).tolist()) == list(range(500))
    assert len(epoch) == len(rows) == len(batches) == 42
    for (batch, share), chosen in zip(epoch, rows, strict=True):
        assert share == (len(chosen), 1)
        assert batch["labels"].tolist() == [row % 2 for row in chosen.tolist()]
        for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], chosen, strict=True):
            n = int(mask.sum())
            assert mask.tolist() == [1] * n + [0] * (len(mask) - n)
            start = data.starts[row]
            assert ids[:n].tolist() == data.tokens[start : start + data.lengths[row]].tolist()


def test_order_depends_on_seed_and_epoch_alone(pairs, nano_tokenizer):
    data = tokenize_pairs(pairs, nano_tokenizer, 512)

    def order(seed, epoch):
        return np.concatenate(list(PairBatches(data, 12, seed).rows(epoch))).tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_batches_tell_no_more_of_the_labels_than_random_draws():
    """Paraphrases are shorter: batches of one length would be batches of one label."""
    n, batch_size = 6000, 12
    labels = np.arange(n) % 3 == 0
    lengths = np.where(labels, 10, 30)
    data = TokenizedPairs(
        ids=list(map(str, range(n))),
        labels=labels.astype(np.int64),
        tokens=np.zeros(lengths.sum(), dtype=np.int32),
        starts=lengths.cumsum() - lengths,
        lengths=lengths,
        shortened=0,
    )
    p = labels.mean()
    expected = p * (1 - p) / batch_size * (n - batch_size) / (n - 1)  # hypergeometric
    for seed in range(3):
        batches = [batch for batch, _ in PairBatches(data, batch_size, seed).epoch(0)]
        for values in (
            [batch["labels"].float().mean().item() for batch in batches],
            [(batch["attention_mask"].sum(1) == 10).float().mean().item() for batch in batches],
        ):
            assert np.var(values) == pytest.approx(expected, rel=4 * (2 / len(batches)) ** 0.5)


def test_the_order_of_an_epoch_is_a_uniform_permutation():
    poems = [TokenizedSonnet([i, 99], 1) for i in range(4)]
    batches, n_epochs = SonnetBatches(poems, 1, seed=0), 4800
    orders = Counter(tuple(np.concatenate(list(batches.rows(i)))) for i in range(n_epochs))
    assert len(orders) == 24
    chi_square = sum((count - n_epochs / 24) ** 2 / (n_epochs / 24) for count in orders.values())
    assert chi_square < 50  # 23 degrees of freedom: 1 in 1,000 is above 49.7


def test_a_token_index_is_the_tokens_then_padding_up_to_whole_tiles():
    mask = np.arange(40) < np.array([[40], [7], [3]])
    index = token_index(mask)
    assert index[:50].tolist() == mask.ravel().nonzero()[0].tolist()
    assert len(index) == 64
    assert len(set(index.tolist())) == 64
    assert len(token_index(mask[:1])) == 40  # there is no padding to take


def test_prediction_batches_hold_every_pair_once(pairs, nano_tokenizer):
    data = tokenize_pairs(pairs, nano_tokenizer, 512)
    batches = prediction_rows(data, 64)
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    assert pair_batch(data, batches[0])["input_ids"].shape[1] == data.lengths.max()
    assert max(map(len, batches)) == 64


@pytest.mark.parametrize("n", [12, 13, 16])
def test_processes_share_each_batch_of_pairs_among_themselves(pairs, nano_tokenizer, n):
    data = tokenize_pairs(pairs, nano_tokenizer, 512)
    data = replace(data, ids=data.ids[:n], lengths=data.lengths[:n], starts=data.starts[:n])
    alone = list(PairBatches(data, 12, seed=3).epoch(1))
    shares = [list(PairBatches(data, 4, 3, rank, world_size=3).epoch(1)) for rank in range(3)]
    for (whole, _), parts in zip(alone, zip(*shares, strict=True), strict=True):
        n = len(whole["labels"])
        assert sum(share.weight for _, share in parts) == pytest.approx(1)
        assert {share.n_examples for _, share in parts} == {n}
        rows = [
            ids[mask.bool()].tolist()
            for batch, share in parts
            if share.weight
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        whole_rows = zip(whole["input_ids"], whole["attention_mask"], strict=True)
        assert sorted(rows) == sorted(ids[mask.bool()].tolist() for ids, mask in whole_rows)
        for batch, share in parts:
            assert share.weight in (0, len(batch["labels"]) / n)


def test_the_sample_pairs_are_what_their_readme_says(nano_tokenizer):
    questions, groups = {}, set()
    for name, least in (("train", 1200), ("dev", 200), ("test", 200)):
        path = ROOT / "data" / f"sample-pairs-{name}.csv"
        pairs = read_pairs(path, labelled=name != "test")
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
    assert theirs == rows(read_pairs(ROOT / "data" / "sample-pairs-dev.csv", labelled=True))


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
    with pytest.raises(DataError, match=sentence):
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
    with pytest.raises(DataError, match="one poem cannot be split"):
        split_sonnets(sonnets[:1], seed=1)


def test_a_sonnet_ends_with_end_of_text_unless_it_is_cut(nano_tokenizer):
    sonnet = Sonnet(1, ("From fairest creatures", "we desire"))
    (poem,) = tokenize_sonnets([sonnet], nano_tokenizer, 512)
    assert nano_tokenizer.decode(poem.ids[:-1]) == "From fairest creatures\nwe desire"
    assert poem.ids[-1] == nano_tokenizer.eos_token_id
    (cut,) = tokenize_sonnets([sonnet], nano_tokenizer, 4)
    assert cut.ids == poem.ids[:5]  # four in, the fifth a target


def test_the_prompt_of_a_tokenized_sonnet_is_the_one_to_be_continued(nano_tokenizer):
    sonnets = read_sonnets(ROOT / "data" / "TRUE_sonnets_held_out_dev.txt")
    poems = tokenize_sonnets(sonnets, nano_tokenizer, 512)
    for poem, prompt in zip(poems, tokenize_prompts(sonnets, nano_tokenizer, 512), strict=True):
        assert poem.ids[: poem.prompt_length] == prompt


def test_a_prompt_is_the_first_three_lines_and_has_to_leave_room(nano_tokenizer):
    sonnet = Sonnet(9, ("One", "Two", "Three", "Four"))
    (ids,) = tokenize_prompts([sonnet], nano_tokenizer, 512)
    assert nano_tokenizer.decode(ids) == "One\nTwo\nThree\n"
    assert tokenize_prompts([sonnet], nano_tokenizer, len(ids) + 1) == [ids]
    with pytest.raises(DataError, match=r"given lines of sonnet 9 are \d+ tokens, the model has"):
        tokenize_prompts([sonnet], nano_tokenizer, len(ids))


def test_each_real_token_predicts_the_one_after_it():
    batch = sonnet_batch([TokenizedSonnet([5, 6, 7, 99], 2), TokenizedSonnet([8, 99], 1)])
    assert batch["prompt_lengths"].tolist() == [2, 1]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    ids = batch["input_ids"].flatten()
    pairs = [
        (int(ids[p]), int(t)) for p, t in zip(batch["token_index"], batch["targets"], strict=False)
    ]
    assert pairs == [(5, 6), (6, 7), (7, 99), (8, 99)]


def test_an_epoch_has_every_poem_once_in_an_order_of_seed_and_epoch():
    poems = [TokenizedSonnet([i, i, 99], 1) for i in range(10)]

    def order(seed, epoch):
        return [
            int(i)
            for batch, _ in SonnetBatches(poems, 4, seed).epoch(epoch)
            for i in batch["input_ids"][:, 0]
        ]

    assert len(SonnetBatches(poems, 4, 0)) == len(list(SonnetBatches(poems, 4, 0).epoch(0))) == 3
    assert sorted(order(0, 0)) == list(range(10))
    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) != order(1, 1)


def test_processes_share_each_batch_of_poems_by_its_targets():
    poems = [TokenizedSonnet(list(range(i + 2)), 1) for i in range(10)]
    alone = list(SonnetBatches(poems, 4, seed=3).epoch(1))
    shares = [list(SonnetBatches(poems, 1, 3, rank, world_size=4).epoch(1)) for rank in range(4)]
    for (whole, share), parts in zip(alone, zip(*shares, strict=True), strict=True):
        assert share == (len(whole["input_ids"]), 1)
        for batch, part in parts:
            assert part.weight in (0, len(batch["targets"]) / len(whole["targets"]))
        assert sum(part.weight for _, part in parts) == pytest.approx(1)
    assert [part.weight > 0 for _, part in parts] == [True, True, False, False]  # 10 = 4 + 4 + 2


def test_dev_and_gold_have_to_be_the_same_poems(tmp_path, nano_tokenizer):
    data = ROOT / "data"
    paths = [data / "sonnets.txt", data / "sonnets_held_out_dev.txt", data / "sonnets_held_out.txt"]
    with pytest.raises(DataError, match="have to hold the same numbers in one order"):
        load_sonnets(*paths, paths[2], (None, None), 0, nano_tokenizer, 512)


def test_poems_too_long_for_the_model_are_counted(nano_tokenizer, capsys):
    data = ROOT / "data"
    names = ["sonnets", "sonnets_held_out_dev", "TRUE_sonnets_held_out_dev", "sonnets_held_out"]
    paths = [data / f"{name}.txt" for name in names]
    load_sonnets(*paths, (10, 2), 0, nano_tokenizer, 512)
    load_sonnets(*paths, (10, 2), 0, nano_tokenizer, 60)  # prompts fit, whole poems do not
    first, second = capsys.readouterr().out.splitlines()
    assert "shortened" not in first
    assert second.endswith("; shortened 12")
