"""Scores of sonnets by hand, on Shakespeare's own, and against sacrebleu."""

import pytest
import torch

from datasets import Sonnet, read_sonnets, tokenize_sonnets
from finetune.runtime import make_runtime
from finetune.sonnet_metrics import (
    chrf,
    count_syllables,
    longest_common_run,
    next_token_loss,
    rhymes,
    sonnet_form,
    words,
)
from models.gpt2 import GPT2Model
from models.pretrained import BUNDLED
from models.sonnet_gpt import SonnetGPT
from tests.conftest import ROOT


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


def test_a_copied_run_goes_over_line_ends_but_not_over_poems():
    assert longest_common_run([["a b", "c d"]], [["x a", "b c"], ["d"]]) == 3
    assert longest_common_run([[]], [["a"]]) == 0


def test_the_loss_of_poems_does_not_depend_on_batches(gold, nano_tokenizer):
    model, runtime = (
        SonnetGPT(GPT2Model.from_pretrained(BUNDLED).requires_grad_(False)),
        make_runtime(False, "fp32"),
    )
    poems = tokenize_sonnets(gold + gold[:6], nano_tokenizer, 512)  # more than one batch
    losses = torch.tensor([next_token_loss(model, [poem], runtime) for poem in poems])
    n = torch.tensor([len(poem.ids) - 1.0 for poem in poems])
    expected = (losses * n).sum() / n.sum()
    assert next_token_loss(model, poems, runtime) == pytest.approx(expected.item(), abs=1e-4)
