"""Decoding: the loop that grows texts token by token, and the sonnets that it writes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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

    def n_complete(self, text: list[int]) -> int:
        """How many lines have an end."""
        return len(poem_lines(self.decode(text).rpartition("\n")[0]))


class Sequence:
    """A growing text, `longest` tokens at most, with a random generator of its own."""

    def __init__(self, prompt: list[int], seed: tuple, longest: int, counter: LineCounter):
        self.text, self.longest, self.counter = list(prompt), longest, counter
        self.generator = np.random.default_rng(seed)
        self.complete_lines = counter.n_complete(prompt)

    @property
    def n_lines(self) -> int:
        """Lines so far, including one that is not complete."""
        return self.complete_lines + (self.text[-1] not in self.counter.ends)

    def add(self, token: int) -> None:
        """Append the next token."""
        self.text.append(token)
        if token in self.counter.ends:
            self.complete_lines = self.counter.n_complete(self.text)

    def is_finished(self, end_of_text: int, max_lines: int) -> bool:
        """True at the end of text, at the last line, and at the longest length."""
        at_end = self.text[-1] == end_of_text or len(self.text) >= self.longest
        return at_end or self.complete_lines >= max_lines


def choose_tokens(
    logits: Tensor, sequences: list[Sequence], end_of_text: int, config: SamplingConfig
) -> list[int]:
    """The next token of each sequence, from logits [B,V], which change."""
    texts = [sequence.text for sequence in sequences]
    if config.repetition_penalty != 1:
        logits = penalize_repetition(logits, texts, config.repetition_penalty)
    if config.no_repeat_ngram_size:
        logits = ban_repeated_ngrams(logits, texts, config.no_repeat_ngram_size)
    if too_short := [i for i, s in enumerate(sequences) if s.n_lines < config.min_lines]:
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
    if not sequences:  # of a rank that has none
        return []
    active, device = sequences, runtime.device
    input_ids = pad_sequence([torch.tensor(s.text, device=device) for s in active], True)
    prompt_lengths = torch.tensor([len(s.text) for s in active], device=device)
    mask = (torch.arange(input_ids.shape[1], device=device) < prompt_lengths[:, None]).long()
    cache = KVCache(gpt.config.n_layer, len(active), max(s.longest for s in active), device)
    with prepacked(gpt, len(active), runtime.autocast_dtype or torch.float32):
        while active:
            with runtime.autocast():
                h = gpt(input_ids, mask, cache=cache, prompt_lengths=prompt_lengths, last_only=True)
            logits = gpt.hidden_state_to_token(h["last_token"])  # [B,V]
            tokens = choose_tokens(logits, active, end_of_text, config)
            for sequence, token in zip(active, tokens, strict=True):
                sequence.add(token)
            left = [s for s in active if not s.is_finished(end_of_text, config.max_lines)]
            if len(left) < len(active):
                rows = torch.tensor([active.index(s) for s in left], device=device).long()
                active, prompt_lengths = left, prompt_lengths[rows]
                cache.keep(rows)
            input_ids, mask = torch.tensor([[s.text[-1]] for s in active], device=device), None
    return [s.text[:-1] if s.text[-1] == end_of_text else s.text for s in sequences]


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
            Sonnet(sonnet.number, tuple(poem_lines(counter.decode(text))[: self.config.max_lines]))
            for sonnet, text in zip(sonnets, self.runtime.gather(texts), strict=True)
        ]
