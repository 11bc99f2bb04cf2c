"""Text generation: the decoding loop for a batch of texts, and the sonnets written with it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.sonnets import GIVEN_LINES, Sonnet, poem_lines
from datasets import tokenize_prompts
from finetune.decoder import Decoder, GPUDecoder
from finetune.runtime import Runtime
from finetune.sampling import (
    SamplingConfig,
    ban_repeated_ngrams,
    penalize_repetition,
    top_p_sample,
    top_p_sample_at,
)
from models.gpt2 import GPT2Model
from modules.kernels import prepacked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class LineCounter:
    """Counts the lines of a poem given as token ids."""

    ends: frozenset[int]  # the tokens that contain a newline
    decode: Callable[[list[int]], str]

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerFast") -> "LineCounter":
        """For a byte-level BPE, which writes a newline as Ċ, except in added tokens."""
        vocabulary = tokenizer.get_vocab().items()
        ends = frozenset(token for text, token in vocabulary if "Ċ" in text or "\n" in text)
        return cls(ends, tokenizer.backend_tokenizer.decode)

    def n_complete(self, text: list[int]) -> int:
        """The number of lines that end in a newline."""
        return len(poem_lines(self.decode(text).rpartition("\n")[0]))


class Sequence:
    """The token ids of a text being generated, with its own random generator."""

    def __init__(self, prompt: list[int], seed: tuple, max_length: int, counter: LineCounter):
        self.ids, self.max_length, self.counter = list(prompt), max_length, counter
        self.generator = np.random.default_rng(seed)
        self.complete_lines = counter.n_complete(prompt)
        self.is_finished = False

    def is_shorter_than(self, n_lines: int) -> bool:
        """True if there are fewer lines, counting an incomplete last line that is not blank."""
        if self.complete_lines + 1 != n_lines:
            return self.complete_lines < n_lines
        return not poem_lines(self.counter.decode(self.ids).rpartition("\n")[2])

    def add(self, token: int, end_of_text: int, max_lines: int) -> None:
        """Append a token; finish at end of text, at `max_lines` lines or `max_length` tokens."""
        self.ids.append(token)
        if token in self.counter.ends:
            self.complete_lines = self.counter.n_complete(self.ids)
        at_end = token == end_of_text or len(self.ids) >= self.max_length
        self.is_finished = at_end or self.complete_lines >= max_lines


def choose_tokens(
    logits: Tensor,
    sequences: list[Sequence],
    end_of_text: int,
    config: SamplingConfig,
    u: Tensor | None = None,
) -> Tensor:
    """The next token of each sequence, int64 [B], from logits [B,V], which may be overwritten.

    Tokens are sampled with the random numbers u [B,1], or else with the sequences' generators.
    """
    texts = [sequence.ids for sequence in sequences]
    if config.repetition_penalty != 1:
        logits = penalize_repetition(logits, texts, config.repetition_penalty)
    if config.no_repeat_ngram_size:
        logits = ban_repeated_ngrams(logits, texts, config.no_repeat_ngram_size)
    growing = [i for i, sequence in enumerate(sequences) if not sequence.is_finished]
    too_short = [i for i in growing if sequences[i].is_shorter_than(config.min_lines)]
    if too_short:
        all_are = len(too_short) == len(growing)  # then no index is copied to the device
        logits[slice(None) if all_are else too_short, end_of_text] = -torch.inf
    if config.greedy:
        return logits.argmax(1)
    if u is not None:
        return top_p_sample_at(logits, config.temperature, config.top_p, u)
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
    """Continue all sequences in one batch; returns their token ids without end of text."""
    if not sequences:  # this rank's shard is empty
        return []
    rows, u, n_steps = sequences, None, 0
    decoder_type = GPUDecoder if runtime.decodes_in_fixed_shapes else Decoder
    with prepacked(gpt, len(rows), runtime.autocast_dtype or torch.float32):
        max_length = max(s.max_length for s in rows)
        decoder = decoder_type(gpt, [s.ids for s in rows], max_length, runtime)
        numbers = None if decoder.removes_finished else random_numbers(rows, runtime.device)
        logits = decoder.prefill()
        while True:
            if numbers is not None:
                u = numbers[:, n_steps : n_steps + 1]
            tokens = choose_tokens(logits, rows, end_of_text, config, u)
            for sequence, token in zip(rows, tokens.tolist(), strict=True):
                if not sequence.is_finished:
                    sequence.add(token, end_of_text, config.max_lines)
            left = [i for i, sequence in enumerate(rows) if not sequence.is_finished]
            if not left:
                break
            if decoder.removes_finished and len(left) < len(rows):
                rows, tokens = [rows[i] for i in left], tokens[left]
                decoder.keep(torch.tensor(left, device=runtime.device))
            logits = decoder.read(tokens)
            n_steps += 1
    return [s.ids[:-1] if s.ids[-1] == end_of_text else s.ids for s in sequences]


def random_numbers(sequences: list[Sequence], device: torch.device) -> Tensor:
    """Random numbers for up to T new tokens of each sequence, float64 [B,T], on the device.

    Copying one number per token to a GPU would make the host wait for it each time.
    """
    rows = [torch.from_numpy(s.generator.random(s.max_length - len(s.ids))) for s in sequences]
    return pad_sequence(rows, batch_first=True).to(device)


@dataclass(frozen=True)
class SonnetGenerator:
    """Continues sonnets; a text depends only on the seed, the sonnet and the sample number."""

    gpt: GPT2Model
    tokenizer: "PreTrainedTokenizerFast"
    config: SamplingConfig
    seed: int
    runtime: Runtime

    def write(self, sonnets: list[Sonnet], sample: int = 0) -> list[Sonnet]:
        """Continue the given lines of each sonnet; returns the whole poems."""
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
        poems = []
        texts = self.runtime.gather(texts)
        for sonnet, prompt, text in zip(sonnets, prompts, texts, strict=True):
            written = poem_lines(counter.decode(text))[counter.n_complete(prompt) :]
            lines = (*sonnet.lines[:GIVEN_LINES], *written)  # a tokenizer may change the given ones
            poems.append(Sonnet(sonnet.number, lines[: self.config.max_lines]))
        return poems
