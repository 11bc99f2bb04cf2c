"""Decoding: logits to probabilities to tokens by pure functions, and the loop around them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from datasets import Sonnet, poem_lines, tokenize_prompts
from finetune.runtime import Runtime
from models.gpt2 import GPT2Model
from modules.kv_cache import KVCache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen, and when a poem ends besides at end of text."""

    temperature: float = 1.2
    top_p: float = 0.9
    greedy: bool = False
    repetition_penalty: float = 1.0  # 1 is off
    no_repeat_ngram_size: int = 0  # 0 is off
    max_lines: int = 14
    max_new_tokens: int = 256


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [B,V] with those of the tokens `seen` (bool [B,V]) made less likely.

    Keskar et al. 2019 (CTRL), in the form of `transformers`: positive ones are divided by the
    penalty, negative ones multiplied.
    """
    lowered = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, lowered, logits)


def ban_repeated_ngrams(logits: Tensor, texts: Sequence[list[int]], size: int) -> Tensor:
    """Logits [B,V] without the tokens that would end an n-gram for the second time in a text."""
    logits = logits.clone()
    for row, text in enumerate(texts):
        start = tuple(text[len(text) - size + 1 :])
        ngrams = zip(*(text[i:] for i in range(size)), strict=False)
        logits[row, [ngram[-1] for ngram in ngrams if ngram[:-1] == start]] = -torch.inf
    return logits


def top_p_sample(logits: Tensor, temperature: float, top_p: float, noise: Tensor) -> Tensor:
    """Token ids [B] from logits [B,V] and as many numbers drawn from the exponential distribution.

    The likeliest tokens are kept until their mass passes `top_p`, one at least (Holtzman et al.
    2019). Nothing is sorted for that: argmax(p / noise) is distributed as p, and where it falls
    on a token that is not kept, it goes on without that and all less likely ones. As every token
    has its own number, the choice does not hang on rounding as with cumulative sums.
    """
    p = (logits / temperature).softmax(1)
    race = p / noise
    while True:
        winner = race.argmax(1, keepdim=True)  # [B,1]
        p_winner = p.gather(1, winner)
        likelier = torch.where(p > p_winner, p, 0).sum(1, keepdim=True)
        outside = likelier >= top_p
        if not bool(outside.any()):
            return winner.squeeze(1)
        race.masked_fill_((p <= p_winner) & outside, 0)


def choose_tokens(
    logits: Tensor,
    texts: Sequence[list[int]],
    generators: Sequence[np.random.Generator],
    config: SamplingConfig,
) -> Tensor:
    """The next token [B] of each text, from logits [B,V] and the text's own random generator."""
    if config.repetition_penalty != 1:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        for row, text in enumerate(texts):
            seen[row, text] = True
        logits = penalize_repetition(logits, seen, config.repetition_penalty)
    if config.no_repeat_ngram_size:
        logits = ban_repeated_ngrams(logits, texts, config.no_repeat_ngram_size)
    if config.greedy:
        return logits.argmax(1)
    u = np.empty(logits.shape, np.float32)
    for row, generator in zip(u, generators, strict=True):
        generator.random(out=row, dtype=np.float32)
    noise = -torch.from_numpy(u).to(logits.device).log()
    return top_p_sample(logits, config.temperature, config.top_p, noise)


@torch.inference_mode()
def generate(
    gpt: GPT2Model,
    prompts: Sequence[list[int]],
    seeds: Sequence[Sequence[int]],
    is_finished: Callable[[list[int]], bool],
    end_of_text: int,
    config: SamplingConfig,
    runtime: Runtime,
) -> list[list[int]]:
    """Continue all prompts in one batch; returns prompt and continuation, without end of text.

    Each row has a random generator of its own, from its `seeds`. It ends at `end_of_text`, where
    `is_finished(tokens)` says so, after `config.max_new_tokens` or with the model's last
    position, and then leaves the batch.
    """
    texts = [list(prompt) for prompt in prompts]
    longest = [min(len(p) + config.max_new_tokens, gpt.config.n_positions) for p in prompts]
    steps = max(end - len(p) for end, p in zip(longest, prompts, strict=True))
    generators = [np.random.default_rng(seed) for seed in seeds]
    input_ids, mask = _left_padded(prompts, steps, runtime.device)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    padded = not bool(mask.all())
    cache = KVCache(gpt.config.n_layer, mask.shape[1])
    active = list(range(len(prompts)))  # the rows of the batch that are not finished
    for step in range(steps):
        past, end = cache.length, mask.shape[1] - steps + step
        with runtime.autocast():
            h = gpt(
                input_ids,
                mask[:, :end] if padded else None,
                position_ids[:, past:end],
                right_padded=not padded,
                cache=cache,
            )["last_hidden_state"]
        logits = gpt.hidden_state_to_token(h[:, -1])  # [B,V]
        tokens = choose_tokens(
            logits, [texts[row] for row in active], [generators[row] for row in active], config
        )
        for row, token in zip(active, tokens.tolist(), strict=True):
            texts[row].append(token)
        goes_on = [
            texts[row][-1] != end_of_text
            and len(texts[row]) < longest[row]
            and not is_finished(texts[row])
            for row in active
        ]
        if not any(goes_on):
            break
        if not all(goes_on):
            keep = torch.tensor(goes_on).nonzero().squeeze(1).to(runtime.device)
            tokens, mask, position_ids = (x[keep] for x in (tokens, mask, position_ids))
            cache.keep(keep)
            active = [row for row, on in zip(active, goes_on, strict=True) if on]
        input_ids = tokens[:, None]
    return [text[:-1] if text[-1] == end_of_text else text for text in texts]


def _left_padded(
    prompts: Sequence[list[int]], n_new: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids [B,T] and mask [B,T+n_new]; padded on the left, rows grow at the same place."""
    T = max(map(len, prompts))
    ids = torch.tensor([[0] * (T - len(prompt)) + prompt for prompt in prompts])
    missing = torch.tensor([[T - len(prompt)] for prompt in prompts])
    mask = (torch.arange(T + n_new) >= missing).long()
    return ids.to(device), mask.to(device)


def write_poems(
    gpt: GPT2Model,
    tokenizer: "PreTrainedTokenizerFast",
    sonnets: Sequence[Sonnet],
    config: SamplingConfig,
    seed: int,
    runtime: Runtime,
    sample: int = 0,
) -> list[Sonnet]:
    """Each sonnet's given lines with a new continuation, which `seed`, the sonnet's number and
    the number of the `sample` decide."""
    breaks = {token for text, token in tokenizer.get_vocab().items() if "Ċ" in text}  # line ends
    decode = tokenizer.backend_tokenizer.decode

    def is_finished(text: list[int]) -> bool:
        return text[-1] in breaks and len(poem_lines(decode(text))) >= config.max_lines

    texts = generate(
        gpt,
        tokenize_prompts(sonnets, tokenizer, gpt.config.n_positions),
        [(seed, sonnet.number, sample) for sonnet in sonnets],
        is_finished,
        tokenizer.eos_token_id,
        config,
        runtime,
    )
    return [
        Sonnet(sonnet.number, tuple(poem_lines(decode(text))[: config.max_lines]))
        for sonnet, text in zip(sonnets, texts, strict=True)
    ]
