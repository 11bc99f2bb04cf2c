"""Metrics of paraphrase predictions, and of poems: loss, chrF and the form of a sonnet."""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pronouncing
import torch
import torch.nn.functional as F
from sacrebleu.metrics import CHRF
from torch import nn

from data.sonnets import GIVEN_LINES, Sonnet
from datasets import (
    ANSWERS,
    SonnetData,
    TokenizedPairs,
    TokenizedSonnet,
    pair_batch,
    prediction_rows,
    sonnet_batch,
)
from finetune.generation import SonnetGenerator
from finetune.progress import bar
from finetune.runtime import Runtime
from models.paraphrase_gpt import ParaphraseGPT
from models.sonnet_gpt import sonnet_loss

PREDICTION_BATCH = {"cpu": 64, "mps": 64, "cuda": 256}  # pairs; nothing is kept for a backward pass
VALIDATION_BATCH = 16  # poems
RHYMES = [(0, 2), (1, 3), (4, 6), (5, 7), (8, 10), (9, 11), (12, 13)]  # ABAB CDCD EFEF GG


@dataclass
class ParaphraseScorer:
    """Dev metrics of the current model, and the logits [N,2] behind the last ones."""

    model: ParaphraseGPT
    data: TokenizedPairs
    runtime: Runtime
    logits: torch.Tensor | None = None

    def __call__(self) -> dict[str, float]:
        """The metrics of an epoch."""
        self.logits = paraphrase_logits(self.model, self.data, self.runtime, "dev")
        return paraphrase_metrics(self.logits, self.data.labels)

    def final(self) -> dict[str, float]:
        """The metrics, and the accuracy of always answering "no"."""
        return self() | {"dev_accuracy_of_always_no": float((self.data.labels == 0).mean())}


@torch.inference_mode()
def paraphrase_logits(
    model: ParaphraseGPT, data: TokenizedPairs, runtime: Runtime, name: str
) -> torch.Tensor:
    """Float32 logits [N,2] on the CPU, in the order of the file."""
    model.eval()
    batches = prediction_rows(data, PREDICTION_BATCH[runtime.device.type])
    own = []
    for rows in bar(runtime.shard(batches), name, leave=False, disable=not runtime.is_main):
        batch = pair_batch(data, rows)
        batch.pop("labels", None)
        batch = runtime.to_device(batch)
        with runtime.autocast():
            own.append(model(**batch))
    logits = torch.empty(len(data), 2)
    for rows, answers in zip(batches, runtime.gather([x.cpu() for x in own]), strict=True):
        logits[rows] = answers
    return logits


def paraphrase_metrics(logits: torch.Tensor, labels: np.ndarray) -> dict[str, float]:
    """Mean loss in nats, accuracy, and F1 averaged over the two classes."""
    from sklearn.metrics import accuracy_score, f1_score  # takes a second, only needed here

    predicted, both = logits.argmax(1).numpy(), {"labels": [0, 1], "zero_division": 0}
    return {
        "dev_loss": F.cross_entropy(logits, torch.from_numpy(labels)).item(),
        "dev_accuracy": float(accuracy_score(labels, predicted)),
        "dev_macro_f1": float(f1_score(labels, predicted, average="macro", **both)),
    }


def pair_table(logits: torch.Tensor, data: TokenizedPairs) -> list[dict[str, Any]]:
    """Each pair's questions as written, label, prediction and its probability, from logits [N,2].

    Errors come first; among errors and correct answers the most confident come first.
    """
    pairs = data.pairs
    probabilities, predicted = (values.numpy() for values in logits.softmax(1).max(1))
    return [
        {
            "id": pairs.ids[i],
            "first": pairs.first[i],
            "second": pairs.second[i],
            "label": ANSWERS[data.labels[i]],
            "predicted": ANSWERS[predicted[i]],
            "probability": round(float(probabilities[i]), 4),
        }
        for i in np.lexsort([-probabilities, predicted == data.labels])
    ]


@dataclass
class SonnetScorer:
    """Losses and dev chrF of the current model, and the poems behind the last chrF."""

    model: nn.Module
    generator: SonnetGenerator
    data: SonnetData
    poems: list[Sonnet] = field(default_factory=list)

    def validation_loss(self) -> float:
        """Nats per token on the validation poems."""
        return next_token_loss(self.model, self.data.validation_ids, self.generator.runtime)

    def before_training(self) -> dict[str, float]:
        """Print and return the validation loss that training starts from."""
        loss = self.validation_loss()
        print(f"validation loss before training {loss:.4f}")
        return {"val_loss_before_training": loss}

    def __call__(self) -> dict[str, float]:
        """The metrics of an epoch."""
        self.poems = self.generator.write(self.data.dev)
        return {
            "val_loss": self.validation_loss(),
            "dev_loss": next_token_loss(self.model, self.data.gold_ids, self.generator.runtime),
            "dev_chrf": chrf(self.poems, self.data.gold),
        }

    def final(self) -> dict[str, Any]:
        """The metrics, and the form of the poems and of Shakespeare's."""
        metrics = self() | sonnet_form(self.poems, self.data.train)
        return metrics | {"shakespeare": sonnet_form(self.data.gold, self.data.train)}


@torch.inference_mode()
def next_token_loss(model: nn.Module, poems: list[TokenizedSonnet], runtime: Runtime) -> float:
    """Mean loss over the targets of all tokenized poems, in nats per token."""
    model.eval()
    own = []
    batches = [poems[i : i + VALIDATION_BATCH] for i in range(0, len(poems), VALIDATION_BATCH)]
    for batch in map(sonnet_batch, runtime.shard(batches)):
        with runtime.autocast():
            loss = sonnet_loss(model, runtime.to_device(batch))
        n = len(batch["targets"])
        own.append((n * loss.item(), n))
    loss_sum, n_targets = map(sum, zip(*runtime.gather(own), strict=True))
    return loss_sum / n_targets


def chrf(poems: list[Sonnet], gold: list[Sonnet]) -> float:
    """sacrebleu's corpus chrF, 0 to 100, of whole poems."""
    texts, golds = (["\n".join(sonnet.lines) for sonnet in group] for group in (poems, gold))
    return float(CHRF().corpus_score(texts, [golds]).score)


def sonnet_form(poems: list[Sonnet], sources: Iterable[Sonnet]) -> dict[str, float]:
    """How well the lines after the given ones keep a sonnet's form, and how much they copy.

    `rhyming_pairs` is the share that rhymes, among ABAB CDCD EFEF GG's pairs that include a
    generated line; `longest_copied_run` is the length in words of the longest run found in one of
    the `sources`.
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
    """The words of a text in lower case without accents; an apostrophe in a word is part of it."""
    letters = unicodedata.normalize("NFKD", text.lower().replace("’", "'"))
    letters = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return re.findall(r"[a-z]+(?:'[a-z]+)*", letters)


def count_syllables(word: str) -> int:
    """Syllables by the CMU dictionary, or else groups of vowels, without a silent final e."""
    phones = pronouncing.phones_for_word(word)
    if phones:
        return pronouncing.syllable_count(phones[0])
    return max(1, len(re.findall(r"[aeiouy]+", re.sub(r"(?<![aeiouyl])e$", "", word))))


def rhymes(first: str, second: str) -> bool:
    """True if two lines end in different words that sound alike from the last stressed vowel on.

    If the CMU dictionary lacks one, their spellings are compared from the last vowels on.
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


def longest_common_run(texts: Iterable[tuple], sources: Iterable[tuple]) -> int:
    """Length in words of the longest run that a text (its lines) shares with a source."""
    ours, theirs = ([words(" ".join(lines)) for lines in group] for group in (texts, sources))
    length = 0
    while ngrams(ours, length + 1) & ngrams(theirs, length + 1):
        length += 1
    return length


def ngrams(texts: Iterable[list[str]], n: int) -> set[tuple[str, ...]]:
    """All runs of n consecutive words."""
    return {gram for text in texts for gram in zip(*(text[i:] for i in range(n)), strict=False)}
