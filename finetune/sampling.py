"""Choosing the next token from logits, and the settings of decoding."""

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
        1.2, "divides the logits: below 1 sharpens, above 1 flattens the distribution", above=0
    )
    top_p: float = setting(
        0.9, "sample from the most probable tokens with this total mass", above=0, most=1
    )
    greedy: bool = setting(False, "always take the most probable token")
    repetition_penalty: float = setting(
        1.0, "makes tokens that are already in the text less likely; 1 is off", least=1
    )
    no_repeat_ngram_size: int = setting(
        0, "no n-gram of this many tokens occurs twice in a poem; 0 is off", least=0
    )
    min_lines: int = setting(
        14, "suppress end of text in shorter poems; 0 lets the model decide", least=0
    )
    max_lines: int = setting(
        14, "maximum lines of a poem, including the given ones", least=GIVEN_LINES + 1
    )
    max_new_tokens: int = setting(400, "maximum number of generated tokens", least=1)

    def __post_init__(self):
        check_settings(self)


def penalize_repetition(logits: Tensor, texts: list[list[int]], penalty: float) -> Tensor:
    """Logits [B,V] in which the tokens of each row's text are less likely.

    Keskar et al. 2019 (CTRL), as in `transformers`: positive logits are divided by the penalty,
    negative logits multiplied by it.
    """
    logits = logits.clone()
    for row, text in zip(logits, texts, strict=True):
        row[text] = torch.where(row[text] < 0, row[text] * penalty, row[text] / penalty)
    return logits


def ban_repeated_ngrams(logits: Tensor, texts: list[list[int]], size: int) -> Tensor:
    """Logits [B,V], -inf for tokens that would repeat an n-gram of their row's text."""
    logits = logits.clone()
    for row, text in enumerate(texts):
        start = tuple(text[len(text) - size + 1 :])
        ngrams = zip(*(text[i:] for i in range(size)), strict=False)
        logits[row, [ngram[-1] for ngram in ngrams if ngram[:-1] == start]] = -torch.inf
    return logits


def top_p_sample(
    logits: Tensor, temperature: float, top_p: float, generators: list[np.random.Generator]
) -> Tensor:
    """Token ids [B] from logits [B,V], each row sampled with its own generator.

    Nucleus sampling (Holtzman et al. 2019): keep the most probable tokens until their mass reaches
    `top_p`, but at least one. Sorting would take longer than the model, so a token is drawn from
    the whole vocabulary; if the more probable tokens alone have a mass of `top_p`, it is not kept,
    nor is any less probable one, and another is drawn from the more probable ones only.
    """
    p = (logits / temperature).softmax(1)
    if p.device.type == "mps" or torch.are_deterministic_algorithms_enabled():
        p = p.cpu()  # MPS has no float64, CUDA no deterministic cumsum of floats
    tokens, rows = [0] * len(p), list(range(len(p)))
    while rows:
        u = [[generators[row].random()] for row in rows]
        u = torch.tensor(u, dtype=torch.float64, device=p.device)
        chosen = _draw(p, u)  # [B,1]
        p_chosen = p.gather(1, chosen)
        likelier = torch.where(p > p_chosen, p, 0)
        again = likelier.sum(1, keepdim=True) >= top_p
        drawn = torch.cat([chosen, again], 1).tolist()  # a single GPU sync
        left = [i for i, (_, outside) in enumerate(drawn) if outside]
        for row, (token, _) in zip(rows, drawn, strict=True):
            tokens[row] = token
        rows, p = [rows[i] for i in left], likelier[left]
    return torch.tensor(tokens, device=logits.device)


def top_p_sample_at(logits: Tensor, temperature: float, top_p: float, u: Tensor) -> Tensor:
    """The same with one random number per row, u float64 [B,1], and without waiting for a GPU.

    On a GPU, sorting takes less time than that wait.
    """
    p = (logits / temperature).softmax(1)
    likeliest = p.sort(1, descending=True).values
    mass_before = likeliest.cumsum(1, dtype=torch.float64) - likeliest
    n_kept = (mass_before < top_p).sum(1, keepdim=True).clamp(min=1)  # 0 if all are nan
    return _draw(torch.where(p >= likeliest.gather(1, n_kept - 1), p, 0), u)[:, 0]


def _draw(p: Tensor, u: Tensor) -> Tensor:
    """Tokens [B,1] at which the cumulative sum of p [B,V] exceeds u [B,1] times the total."""
    # In float64, so that rounding does not make a row's token depend on the rest of its batch.
    mass = p.cumsum(1, dtype=torch.float64)
    # Slightly reduced: no token's sum would exceed a product that rounds up to the total.
    chosen = torch.searchsorted(mass, u * (1 - 2**-40) * mass[:, -1:], right=True)
    return chosen.clamp(max=p.shape[1] - 1)  # p may be nan, as in float16
