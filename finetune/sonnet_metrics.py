"""Scores of sonnets: the loss on whole poems, chrF, and how far a poem has a sonnet's form."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pronouncing
import torch
from sacrebleu.metrics import CHRF
from torch import nn

from datasets import GIVEN_LINES, Sonnet, SonnetData, TokenizedSonnet, sonnet_batch
from finetune.runtime import Runtime
from finetune.sampling import Poet
from models.sonnet_gpt import sonnet_loss

VALIDATION_BATCH = 16  # poems
RHYMES = [(0, 2), (1, 3), (4, 6), (5, 7), (8, 10), (9, 11), (12, 13)]  # ABAB CDCD EFEF GG


@dataclass
class SonnetScorer:
    """Losses and dev chrF of a model as it is, with the poems behind the chrF."""

    model: nn.Module
    poet: Poet
    data: SonnetData
    poems: list[Sonnet] = field(default_factory=list)

    def validation_loss(self) -> float:
        """Nats per token on the poems split off."""
        return next_token_loss(self.model, self.data.validation_ids, self.poet.runtime)

    def __call__(self) -> dict[str, float]:
        """The metrics of an epoch; `poems` are then those it was scored by."""
        self.poems = self.poet.write(self.data.dev)
        return {
            "val_loss": self.validation_loss(),
            "dev_loss": next_token_loss(self.model, self.data.gold_ids, self.poet.runtime),
            "dev_chrf": chrf(self.poems, self.data.gold),
        }

    def final(self) -> dict[str, Any]:
        """The metrics with the form of the poems, and that of Shakespeare's beside it."""
        metrics = self() | sonnet_form(self.poems, self.data.train)
        return metrics | {"shakespeare": sonnet_form(self.data.gold, self.data.train)}


@torch.inference_mode()
def next_token_loss(model: nn.Module, poems: list[TokenizedSonnet], runtime: Runtime) -> float:
    """Mean loss over the targets of all tokenized poems, in nats per token."""
    model.eval()
    own = []
    batches = [poems[i : i + VALIDATION_BATCH] for i in range(0, len(poems), VALIDATION_BATCH)]
    for batch in map(sonnet_batch, runtime.mine(batches)):
        with runtime.autocast():
            loss = sonnet_loss(model, runtime.to_device(batch))
        own.append((loss.item(), len(batch["targets"])))
    losses, n_targets = zip(*runtime.gather(own), strict=True)
    return sum(loss * n for loss, n in zip(losses, n_targets, strict=True)) / sum(n_targets)


def chrf(poems: Sequence[Sonnet], gold: Sequence[Sonnet]) -> float:
    """sacrebleu's corpus chrF, 0 to 100, of whole poems."""
    texts, golds = (["\n".join(sonnet.lines) for sonnet in group] for group in (poems, gold))
    return float(CHRF().corpus_score(texts, [golds]).score)


def sonnet_form(poems: Sequence[Sonnet], sources: Iterable[Sonnet]) -> dict[str, float]:
    """How much the lines after the given ones are a sonnet's, and how far they are copied.

    `rhyming_pairs` is a share of the pairs of ABAB CDCD EFEF GG that have a line that was not
    given; `longest_copied_run` counts words that stand together in one of the `sources`, too.
    """
    written = [poem.lines[GIVEN_LINES:] for poem in poems]
    syllables = [sum(map(count_syllables, words(line))) for lines in written for line in lines]
    pairs = [pair for pair in RHYMES if max(pair) >= GIVEN_LINES]
    rhyming = [
        max(pair) < len(poem.lines) and rhymes(*(poem.lines[i] for i in pair))
        for poem in poems
        for pair in pairs
    ]
    return {
        "share_of_14_lines": float(np.mean([len(poem.lines) == 14 for poem in poems])),
        "syllables_per_line": float(np.mean(syllables)) if syllables else 0.0,
        "rhyming_pairs": float(np.mean(rhyming)),
        "longest_copied_run": longest_common_run(written, [poem.lines for poem in sources]),
    }


def words(text: str) -> list[str]:
    """The words of a text in lower case, an apostrophe inside a word being part of it."""
    return re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower().replace("’", "'"))


def count_syllables(word: str) -> int:
    """Syllables by the CMU dictionary, else groups of vowels without a silent e at the end."""
    phones = pronouncing.phones_for_word(word)
    if phones:
        return pronouncing.syllable_count(phones[0])
    return max(1, len(re.findall(r"[aeiouy]+", re.sub(r"(?<![aeiouyl])e$", "", word))))


def rhymes(first: str, second: str) -> bool:
    """Do two lines end in different words that sound the same from the last stressed vowel on?

    A word that the CMU dictionary lacks is compared by its spelling from its last vowels on.
    """
    ends = [words(line)[-1:] for line in (first, second)]
    if ends[0] == ends[1] or [] in ends:
        return False
    phones = [pronouncing.phones_for_word(word) for (word,) in ends]
    if all(phones):
        sounds = [{pronouncing.rhyming_part(phone) for phone in group} for group in phones]
    else:
        sounds = [{re.search(r"[aeiouy]*[^aeiouy]*e?$", word)[0]} for (word,) in ends]
    return not sounds[0].isdisjoint(sounds[1])


def longest_common_run(texts: Iterable[Sequence[str]], sources: Iterable[Sequence[str]]) -> int:
    """Words of the longest run that one of the `texts` (its lines) shares with a source."""
    streams = [[words(" ".join(lines)) for lines in group] for group in (texts, sources)]
    length = 0
    while True:
        ours, theirs = (
            {
                gram
                for stream in group
                for gram in zip(*(stream[i:] for i in range(length + 1)), strict=False)
            }
            for group in streams
        )
        if ours.isdisjoint(theirs):
            return length
        length += 1
