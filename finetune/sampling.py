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
from modules.kernels import prepacked
from modules.kv_cache import KVCache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen, and when a poem ends."""

    temperature: float = 1.2
    top_p: float = 0.9
    greedy: bool = False
    repetition_penalty: float = 1.0  # 1 is off
    no_repeat_ngram_size: int = 0  # 0 is off
    min_lines: int = 14  # end of text is not chosen in a shorter poem
    max_lines: int = 14
    max_new_tokens: int = 400


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


def top_p_sample(
    logits: Tensor, temperature: float, top_p: float, generators: Sequence[np.random.Generator]
) -> list[int]:
    """Token ids [B] from logits [B,V], each row's drawn with its own generator.

    The likeliest tokens are kept until their mass passes `top_p`, one at least (Holtzman et al.
    2019). Nothing is sorted for that: a token is drawn from the whole vocabulary, and where the
    likelier ones hold a mass of `top_p` by themselves, it is drawn again from those alone.
    """
    p = (logits / temperature).softmax(1)
    if p.device.type == "mps":
        p = p.cpu()  # there is no float64 on MPS
    tokens, rows = [0] * len(p), list(range(len(p)))
    while rows:
        u = [[generators[row].random()] for row in rows]
        u = torch.tensor(u, dtype=torch.float64, device=p.device)
        # In float64: by rounding, cumulative sums would differ with the batch a row is in.
        mass = p.cumsum(1, dtype=torch.float64)
        chosen = torch.searchsorted(mass, u * mass[:, -1:], right=True)  # [B,1]
        chosen = chosen.clamp(max=p.shape[1] - 1)
        p_chosen = p.gather(1, chosen)
        likelier = torch.where(p > p_chosen, p, 0)
        again = (likelier.sum(1, keepdim=True) >= top_p) | (p_chosen == 0)
        drawn = torch.cat([chosen, again], 1).tolist()  # one wait for a GPU
        left = [i for i, (_, outside) in enumerate(drawn) if outside]
        for row, (token, _) in zip(rows, drawn, strict=True):
            tokens[row] = token
        rows, p = [rows[i] for i in left], likelier[left]
    return tokens


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


class Row:
    """A text in the making, `longest` tokens at most, with a random generator of its own."""

    def __init__(self, prompt: list[int], seed: Sequence[int], longest: int, counter: LineCounter):
        self.text, self.longest, self.counter = list(prompt), longest, counter
        self.generator = np.random.default_rng(seed)
        self.complete_lines = len(counter.lines(prompt)) - (prompt[-1] not in counter.ends)

    @property
    def n_lines(self) -> int:
        """Lines so far, with one that is not complete."""
        return self.complete_lines + (self.text[-1] not in self.counter.ends)

    def add(self, token: int) -> None:
        """Take the next token."""
        self.text.append(token)
        if token in self.counter.ends:
            self.complete_lines = len(self.counter.lines(self.text))


def choose_tokens(
    logits: Tensor, rows: list[Row], end_of_text: int, config: SamplingConfig
) -> list[int]:
    """The next token of each row, from logits [B,V]."""
    if config.repetition_penalty != 1:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        for i, row in enumerate(rows):
            seen[i, row.text] = True
        logits = penalize_repetition(logits, seen, config.repetition_penalty)
    if config.no_repeat_ngram_size:
        texts = [row.text for row in rows]
        logits = ban_repeated_ngrams(logits, texts, config.no_repeat_ngram_size)
    too_short = [i for i, row in enumerate(rows) if row.n_lines < config.min_lines]
    logits[too_short, end_of_text] = -torch.inf
    if config.greedy:
        return logits.argmax(1).tolist()
    generators = [row.generator for row in rows]
    return top_p_sample(logits, config.temperature, config.top_p, generators)


@torch.inference_mode()
def generate(
    gpt: GPT2Model, rows: Sequence[Row], end_of_text: int, config: SamplingConfig, runtime: Runtime
) -> list[list[int]]:
    """Let all rows grow in one batch; returns their texts, without end of text.

    A row ends at `end_of_text`, with `config.max_lines`, or when it has its `longest` length, and
    then leaves the batch.
    """
    if not rows:
        return []
    with prepacked(gpt, len(rows), runtime.autocast_dtype or torch.float32):
        _grow(gpt, rows, end_of_text, config, runtime)
    return [row.text[: -1 if row.text[-1] == end_of_text else None] for row in rows]


def _grow(
    gpt: GPT2Model, rows: Sequence[Row], end_of_text: int, config: SamplingConfig, runtime: Runtime
) -> None:
    active, device = list(rows), runtime.device
    lengths = [len(row.text) for row in active]
    room = max(lengths) + max(row.longest - len(row.text) for row in active)
    cache = KVCache(gpt.config.n_layer, len(active), room, device)
    prompt_lengths = torch.tensor(lengths, device=device)
    mask = (torch.arange(max(lengths), device=device) < prompt_lengths[:, None]).long()
    padded = [row.text + [0] * (mask.shape[1] - len(row.text)) for row in active]
    input_ids = torch.tensor(padded, device=device)
    while active:
        with runtime.autocast():
            h = gpt(input_ids, mask, cache=cache, prompt_lengths=prompt_lengths, last_only=True)[
                "last_token"
            ]
        logits = gpt.hidden_state_to_token(h)  # [B,V]
        tokens = choose_tokens(logits, active, end_of_text, config)
        for row, token in zip(active, tokens, strict=True):
            row.add(token)
        goes_on = [
            i
            for i, (row, token) in enumerate(zip(active, tokens, strict=True))
            if token != end_of_text
            and len(row.text) < row.longest
            and row.complete_lines < config.max_lines
        ]
        if len(goes_on) < len(active):
            active = [active[i] for i in goes_on]
            keep = torch.tensor(goes_on, dtype=torch.long, device=device)
            prompt_lengths = prompt_lengths[keep]
            cache.keep(keep)
        input_ids, mask = torch.tensor([[row.text[-1]] for row in active], device=device), None


@dataclass(frozen=True)
class Poet:
    """Continues sonnets; a text depends on the seed, the sonnet and the sample's number alone."""

    gpt: GPT2Model
    tokenizer: "PreTrainedTokenizerFast"
    config: SamplingConfig
    seed: int
    runtime: Runtime

    def write(self, sonnets: Sequence[Sonnet], sample: int = 0) -> list[Sonnet]:
        """The sonnets' given lines with a new continuation each."""
        self.gpt.eval()
        room = self.gpt.config.n_positions
        counter = LineCounter.of(self.tokenizer)
        prompts = tokenize_prompts(sonnets, self.tokenizer, room)
        rows = [
            Row(
                prompt,
                (self.seed, sonnet.number, sample),
                min(len(prompt) + self.config.max_new_tokens, room),
                counter,
            )
            for sonnet, prompt in zip(sonnets, prompts, strict=True)
        ]
        own, end = self.runtime.mine(rows), self.tokenizer.eos_token_id
        texts = self.runtime.gather(generate(self.gpt, own, end, self.config, self.runtime))
        return [
            Sonnet(sonnet.number, tuple(counter.lines(text)[: self.config.max_lines]))
            for sonnet, text in zip(sonnets, texts, strict=True)
        ]
