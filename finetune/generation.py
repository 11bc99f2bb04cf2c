"""Decoding: the loop that grows texts token by token, and the sonnets that it writes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data.sonnets import Sonnet, poem_lines
from datasets import tokenize_prompts
from finetune.runtime import Runtime
from finetune.sampling import (
    SamplingConfig,
    ban_repeated_ngrams,
    penalize_repetition,
    top_p_sample,
)
from models.gpt2 import GPT2Model
from modules.kernels import prepacked
from modules.kv_cache import KVCache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class LineCounter:
    """Finds the lines of a poem that is given as token ids."""

    ends: frozenset[int]  # the tokens that hold a line end
    decode: Callable[[list[int]], str]

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerFast") -> "LineCounter":
        """For a byte-level BPE, in whose vocabulary a line end is written Ċ."""
        ends = frozenset(token for text, token in tokenizer.get_vocab().items() if "Ċ" in text)
        return cls(ends, tokenizer.backend_tokenizer.decode)

    def lines(self, text: list[int]) -> list[str]:
        """All lines; the last may not be complete yet."""
        return poem_lines(self.decode(text))


class Sequence:
    """A growing text, `longest` tokens at most, with a random generator of its own."""

    def __init__(self, prompt: list[int], seed: tuple, longest: int, counter: LineCounter):
        self.text, self.longest, self.counter = list(prompt), longest, counter
        self.generator = np.random.default_rng(seed)
        self.complete_lines = len(counter.lines(prompt)) - (prompt[-1] not in counter.ends)

    @property
    def n_lines(self) -> int:
        """Lines so far, including one that is not complete."""
        return self.complete_lines + (self.text[-1] not in self.counter.ends)

    def add(self, token: int) -> None:
        """Append the next token."""
        self.text.append(token)
        if token in self.counter.ends:
            self.complete_lines = len(self.counter.lines(self.text))

    def is_finished(self, end_of_text: int, max_lines: int) -> bool:
        """True at the end of text, at the last line, and at the longest length."""
        at_end = self.text[-1] == end_of_text or len(self.text) >= self.longest
        return at_end or self.complete_lines >= max_lines


def choose_tokens(
    logits: Tensor, sequences: list[Sequence], end_of_text: int, config: SamplingConfig
) -> list[int]:
    """The next token of each sequence, from logits [B,V]."""
    texts = [sequence.text for sequence in sequences]
    if config.repetition_penalty != 1:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        for row, text in enumerate(texts):
            seen[row, text] = True
        logits = penalize_repetition(logits, seen, config.repetition_penalty)
    if config.no_repeat_ngram_size:
        logits = ban_repeated_ngrams(logits, texts, config.no_repeat_ngram_size)
    too_short = [i for i, s in enumerate(sequences) if s.n_lines < config.min_lines]
    if too_short:
        logits = logits.clone()
        logits[too_short, end_of_text] = -torch.inf
    if config.greedy:
        return logits.argmax(1).tolist()
    generators = [sequence.generator for sequence in sequences]
    return top_p_sample(logits, config.temperature, config.top_p, generators)


@torch.inference_mode()
def generate(
    gpt: GPT2Model,
    sequences: list[Sequence],
    end_of_text: int,
    config: SamplingConfig,
    runtime: Runtime,
) -> list[list[int]]:
    """Let all sequences grow in one batch; returns their texts, without end of text.

    A sequence that is finished leaves the batch.
    """
    active, device = list(sequences), runtime.device
    prompts = [sequence.text for sequence in active]
    size = max((sequence.longest for sequence in active), default=0)
    cache = KVCache(gpt.config.n_layer, len(active), size, device)
    input_ids, mask, prompt_lengths = _right_padded(prompts, device)
    with prepacked(gpt, len(active), runtime.autocast_dtype or torch.float32):
        while active:
            with runtime.autocast():
                h = gpt(input_ids, mask, cache=cache, prompt_lengths=prompt_lengths, last_only=True)
            logits = gpt.hidden_state_to_token(h["last_token"])  # [B,V]
            tokens = choose_tokens(logits, active, end_of_text, config)
            for sequence, token in zip(active, tokens, strict=True):
                sequence.add(token)
            finished = [s.is_finished(end_of_text, config.max_lines) for s in active]
            if any(finished):
                left = [i for i, is_finished in enumerate(finished) if not is_finished]
                active = [active[i] for i in left]
                rows = torch.tensor(left, dtype=torch.long, device=device)
                prompt_lengths = prompt_lengths[rows]
                cache.keep(rows)
            input_ids, mask = torch.tensor([[s.text[-1]] for s in active], device=device), None
    return [s.text[:-1] if s.text[-1] == end_of_text else s.text for s in sequences]


def _right_padded(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [B,T], mask [B,T] and lengths [B] of prompts."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.long)
    T = max(map(len, prompts), default=0)
    ids = torch.tensor([prompt + [0] * (T - len(prompt)) for prompt in prompts], dtype=torch.long)
    mask = (torch.arange(T) < lengths[:, None]).long()
    return ids.to(device), mask.to(device), lengths.to(device)


@dataclass(frozen=True)
class SonnetGenerator:
    """Continues sonnets; a text depends only on the seed, the sonnet and the sample's number."""

    gpt: GPT2Model
    tokenizer: "PreTrainedTokenizerFast"
    config: SamplingConfig
    seed: int
    runtime: Runtime

    def write(self, sonnets: list[Sonnet], sample: int = 0) -> list[Sonnet]:
        """The sonnets' given lines, each with a new continuation."""
        self.gpt.eval()
        n_positions, counter = self.gpt.config.n_positions, LineCounter.of(self.tokenizer)
        prompts = tokenize_prompts(sonnets, self.tokenizer, n_positions)
        sequences = [
            Sequence(
                prompt,
                (self.seed, sonnet.number, sample),
                min(len(prompt) + self.config.max_new_tokens, n_positions),
                counter,
            )
            for sonnet, prompt in zip(sonnets, prompts, strict=True)
        ]
        own, end_of_text = self.runtime.shard(sequences), self.tokenizer.eos_token_id
        texts = generate(self.gpt, own, end_of_text, self.config, self.runtime)
        return [
            Sonnet(sonnet.number, tuple(counter.lines(text)[: self.config.max_lines]))
            for sonnet, text in zip(sonnets, self.runtime.gather(texts), strict=True)
        ]
