"""Scores by hand, on Shakespeare's own poems, and against sacrebleu."""

import json
import math

import numpy as np
import pytest
import torch

from data.pairs import Pairs
from data.sonnets import Sonnet, read_sonnets
from datasets import TokenizedPairs, tokenize_sonnets
from finetune.metrics import (
    chrf,
    count_syllables,
    longest_common_run,
    next_token_loss,
    pair_table,
    paraphrase_logits,
    paraphrase_metrics,
    rhymes,
    sonnet_form,
    words,
)
from finetune.runtime import Runtime
from models.gpt2 import GPT2Model
from models.paraphrase_gpt import ParaphraseGPT
from models.pretrained import BUNDLED
from models.sonnet_gpt import SonnetGPT
from tests.conftest import ROOT

CPU = Runtime(torch.device("cpu"))


def test_logits_are_in_the_order_of_the_file_and_without_dropout(gpt):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, 150)
    data = TokenizedPairs(
        Pairs(None),
        labels=None,
        tokens=rng.integers(0, 100, lengths.sum()).astype(np.int32),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
    )
    model = ParaphraseGPT(gpt, (7, 40)).train()
    logits = paraphrase_logits(model, data, CPU, "test")
    model.eval()
    for row, (start, length) in enumerate(zip(data.starts, lengths, strict=True)):
        ids = torch.from_numpy(data.tokens[start : start + length]).long()[None]
        with torch.no_grad():
            expected = model(ids, torch.ones_like(ids))[0]
        assert torch.allclose(logits[row], expected, atol=1e-5)


def test_paraphrase_metrics_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0], [2.0, 0.0]])
    metrics = paraphrase_metrics(logits, np.array([0, 1, 0, 0]))
    right, wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    assert metrics["dev_loss"] == pytest.approx((3 * right + wrong) / 4, rel=1e-5)
    assert metrics["dev_accuracy"] == 0.75
    assert metrics["dev_macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    none = paraphrase_metrics(torch.tensor([[1.0, 0.0]]), np.array([0]))
    assert (none["dev_accuracy"], none["dev_macro_f1"]) == (1, 0.5)  # F1 of the other class is 0


def test_the_table_of_pairs_has_the_most_confident_errors_first():
    pairs = Pairs(None, list("abcdef"), list("ABCDEF"), ["Why?"] * 6, [0, 1, 1, 0, 1, 0])
    n = np.ones(6, dtype=np.int64)
    data = TokenizedPairs(pairs, n, n, n, np.array(pairs.labels))
    logits = torch.tensor([[3.0, 0], [1.0, 0], [2.0, 0], [0, 0.5], [0, 9.0], [3.0, 0]])
    table = pair_table(logits, data)
    assert [row["id"] for row in table] == ["c", "b", "d", "e", "a", "f"]  # a and f are equal
    assert table[0] == {
        "id": "c", "first": "C", "second": "Why?", "label": "yes", "predicted": "no",
        "probability": 0.8808,
    }  # fmt: skip
    assert [row["label"] == row["predicted"] for row in table] == [False] * 3 + [True] * 3
    json.dumps(table)  # plain values


@pytest.fixture(scope="module")
def gold():
    return read_sonnets(ROOT / "data" / "TRUE_sonnets_held_out_dev.txt")


@pytest.fixture(scope="module")
def train():
    return read_sonnets(ROOT / "data" / "sonnets.txt")


def test_chrf_is_sacrebleus_corpus_score_of_whole_poems(gold, train):
    assert chrf(gold, gold) == 100
    assert (
        chrf([Sonnet(1, ("cat",)), Sonnet(2, ("dog",))], [Sonnet(1, ("cat",)), Sonnet(2, ("x",))])
        < 100
    )
    assert 20 < chrf(train[:12], gold) < 40


def test_shakespeares_own_poems_have_the_form(gold, train):
    form = sonnet_form(gold, train)
    assert form["share_of_14_lines"] == 1
    assert form["syllables_per_line"] == pytest.approx(10, abs=0.3)
    assert form["rhyming_pairs"] > 0.85
    assert form["longest_copied_run"] < 8


def test_form_looks_at_the_lines_that_were_not_given():
    given = ("the cat", "a dog", "my hat")  # cat and hat rhyme, but both are given
    poem = Sonnet(1, (*given, "on a log", "one two"))
    form = sonnet_form([poem], [Sonnet(2, ("the cat a dog", "upon a log one"))])
    assert form == {
        "share_of_14_lines": 0,
        "syllables_per_line": 2.5,
        "rhyming_pairs": pytest.approx(1 / 6),  # dog and log
        "longest_copied_run": 3,  # a log one
    }


def test_a_poem_without_a_line_of_its_own_has_no_syllables():
    form = sonnet_form([Sonnet(1, ("a", "b", "c"))], [])
    assert form["syllables_per_line"] == form["rhyming_pairs"] == form["longest_copied_run"] == 0


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("And summer's lease hath all too short a date:", "more temperate", False),
        ("the darling buds of May,", "compare thee to a summer's day?", True),
        ("in me", "to thee!", True),
        ("upon the sea", "upon the sea", False),  # the same word is no rhyme
        ("his love removeth", "he proveth", True),  # not in the dictionary: by spelling
        ("was belov'd", "had remov'd", True),
        ("", "thee", False),
        ("...", "thee", False),
    ],
)
def test_rhymes(first, second, expected):
    assert rhymes(first, second) == expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [("abundance", 3), ("love", 1), ("tatter'd", 2), ("mak'st", 1), ("wouldst", 1), ("zzz", 1)],
)
def test_syllables(word, expected):
    assert count_syllables(word) == expected


def test_words_keep_their_apostrophes_and_nothing_else():
    assert words("  'Gainst Time’s scythe--and self-love, o'er") == [
        "gainst", "time's", "scythe", "and", "self", "love", "o'er",
    ]  # fmt: skip
    assert words("Wingèd—DESPISÉD") == ["winged", "despised"]


def test_a_copied_run_goes_over_line_ends_but_not_over_poems():
    assert longest_common_run([["a b", "c d"]], [["x a", "b c"], ["d"]]) == 3
    assert longest_common_run([[]], [["a"]]) == 0


def test_the_loss_of_poems_does_not_depend_on_batches(gold, nano_tokenizer):
    model, runtime = (
        SonnetGPT(GPT2Model.from_pretrained(BUNDLED).requires_grad_(False)),
        CPU,
    )
    poems = tokenize_sonnets(gold + gold[:6], nano_tokenizer, 512)  # more than one batch
    losses = torch.tensor([next_token_loss(model, [poem], runtime) for poem in poems])
    n = torch.tensor([len(poem.ids) - 1.0 for poem in poems])
    expected = (losses * n).sum() / n.sum()
    assert next_token_loss(model, poems, runtime) == pytest.approx(expected.item(), abs=1e-4)
