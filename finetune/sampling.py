"""Choosing the next token: pure functions from logits to probabilities to a token."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.sonnets import GIVEN_LINES
from modules.settings import check_settings, setting


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen, and when a poem ends."""

    temperature: float = setting(
        1.2, "logits are divided by it: under 1 likelier, over 1 bolder tokens", above=0
    )
    top_p: float = setting(
        0.9, "sample from the likeliest tokens that hold this mass", above=0, most=1
    )
    greedy: bool = setting(False, "always take the likeliest token")
    repetition_penalty: float = setting(
        1.0, "makes tokens that occurred before less likely, 1 is off", least=1
    )
    no_repeat_ngram_size: int = setting(
        0, "no run of so many tokens occurs twice in a poem, 0 is off", least=0
    )
    min_lines: int = setting(
        14, "no end of text in a shorter poem, 0 leaves that to the model", least=0
    )
    max_lines: int = setting(
        14, "lines of a whole poem, the given ones included", least=GIVEN_LINES + 1
    )
    max_new_tokens: int = setting(400, "maximum number of generated tokens", least=1)

    def __post_init__(self):
        check_settings(self)


def penalize_repetition(logits: Tensor, texts: list[list[int]], penalty: float) -> Tensor:
    """Logits [B,V] that make the tokens of each row's text less likely.

    Keskar et al. 2019 (CTRL), in the form of `transformers`: positive ones are divided by the
    penalty, negative ones multiplied.
    """
    logits = logits.clone()
    for row, text in zip(logits, texts, strict=True):
        row[text] = torch.where(row[text] < 0, row[text] * penalty, row[text] / penalty)
    return logits


def ban_repeated_ngrams(logits: Tensor, texts: list[list[int]], size: int) -> Tensor:
    """Logits [B,V] without the tokens that would end an n-gram for the second time in a text."""
    logits = logits.clone()
    for row, text in enumerate(texts):
        start = tuple(text[len(text) - size + 1 :])
        ngrams = zip(*(text[i:] for i in range(size)), strict=False)
        logits[row, [ngram[-1] for ngram in ngrams if ngram[:-1] == start]] = -torch.inf
    return logits


def top_p_sample(
    logits: Tensor, temperature: float, top_p: float, generators: list[np.random.Generator]
) -> Tensor:
    """Token ids [B] from logits [B,V], each row's drawn with its own generator.

    The likeliest tokens are kept until their mass passes `top_p`, one at least (Holtzman et al.
    2019). Nothing is sorted for that, which would take longer than the model: a token is drawn from
    the whole vocabulary, and if the likelier ones hold a mass of `top_p` by themselves, it is drawn
    again from those only.
    """
    p = (logits / temperature).softmax(1)
    if p.device.type == "mps" or torch.are_deterministic_algorithms_enabled():
        p = p.cpu()  # no float64 on MPS, no deterministic sum of floats on CUDA
    tokens, rows = [0] * len(p), list(range(len(p)))
    while rows:
        u = [[generators[row].random()] for row in rows]
        u = torch.tensor(u, dtype=torch.float64, device=p.device)
        chosen = _draw(p, u)  # [B,1]
        p_chosen = p.gather(1, chosen)
        likelier = torch.where(p > p_chosen, p, 0)
        again = likelier.sum(1, keepdim=True) >= top_p
        drawn = torch.cat([chosen, again], 1).tolist()  # one wait for a GPU
        left = [i for i, (_, outside) in enumerate(drawn) if outside]
        for row, (token, _) in zip(rows, drawn, strict=True):
            tokens[row] = token
        rows, p = [rows[i] for i in left], likelier[left]
    return torch.tensor(tokens, device=logits.device)


def top_p_sample_at(logits: Tensor, temperature: float, top_p: float, u: Tensor) -> Tensor:
    """The same from one random number a row, u float64 [B,1], without a wait for a GPU.

    A GPU sorts quickly what its host would wait for.
    """
    p = (logits / temperature).softmax(1)
    likeliest = p.sort(1, descending=True).values
    mass_before = likeliest.cumsum(1, dtype=torch.float64) - likeliest
    n_kept = (mass_before < top_p).sum(1, keepdim=True).clamp(min=1)  # none if all are nan
    return _draw(torch.where(p >= likeliest.gather(1, n_kept - 1), p, 0), u)[:, 0]


def _draw(p: Tensor, u: Tensor) -> Tensor:
    """Tokens [B,1] where the cumulative sum of p [B,V] passes a share u [B,1] of the whole."""
    # In float64: by rounding, cumulative sums would differ with the batch a row is in.
    mass = p.cumsum(1, dtype=torch.float64)
    # A little less, so that no u below 1 is rounded to the whole, which no token would pass.
    chosen = torch.searchsorted(mass, u * (1 - 2**-40) * mass[:, -1:], right=True)
    return chosen.clamp(max=p.shape[1] - 1)  # of nan, as a model in float16 may give
