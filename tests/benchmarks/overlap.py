"""A classifier that counts the words two questions share, as a baseline for language models."""

import re

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from data.pairs import Pairs


def features(first: str, second: str) -> list[float]:
    """Shared words and bigrams; the shared fraction of the words of both, of a and of b."""
    a, b = (re.findall(r"\w+", question.lower()) for question in (first, second))
    pairs_of_a, pairs_of_b = (set(zip(words, words[1:], strict=False)) for words in (a, b))
    a, b = set(a), set(b)
    shared = len(a & b)
    shares = [shared / max(1, len(words)) for words in (a | b, a, b)]
    return [shared, len(pairs_of_a & pairs_of_b), *shares]


def predict(train: Pairs, dev: Pairs) -> np.ndarray:
    """0 or 1 for each dev pair, from a logistic regression on `features` fitted to `train`."""
    x, x_dev = (
        np.array([features(*pair) for pair in zip(pairs.first, pairs.second, strict=True)])
        for pairs in (train, dev)
    )
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return model.fit(x, train.labels).predict(x_dev)
