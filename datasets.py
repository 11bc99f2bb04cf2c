"""Question pairs and sonnets from text to batch: prompt, tokenize, pad."""

import copy
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.pairs import Pairs, read_pairs
from data.sonnets import Sonnet, read_sonnets, split_sonnets
from modules.settings import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer

PROMPT = 'Is "{}" a paraphrase of "{}"? Answer "yes" or "no": '
ANSWERS = ("no", "yes")  # class 0, class 1
TILE = 16  # tokens in a batch are a multiple of it, because oneDNN compiles code for each number
MOST_GRAPH_TOKENS = 4096  # in a batch; larger ones keep a GPU busy without CUDA graphs


@dataclass
class TokenizedPairs:
    """Prompts as one array of token ids: prompt i is `lengths[i]` ids, beginning at `starts[i]`."""

    pairs: Pairs
    tokens: np.ndarray  # int32
    starts: np.ndarray  # int64 [N]
    lengths: np.ndarray  # int64 [N]
    labels: np.ndarray | None  # int64 [N]
    n_shortened: int = 0  # prompts that were too long for the model

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        """The token ids of prompt i."""
        return self.tokens[self.starts[i] : self.starts[i] + self.lengths[i]]


def make_prompt(first: str, second: str) -> str:
    """The cloze for two raw questions, byte for byte the course's."""
    return PROMPT.format(_normalize(first), _normalize(second))


def _normalize(text: str) -> str:
    text = text.lower()
    for mark in ".?,'":
        text = text.replace(mark, f" {mark}")
    return " ".join(text.split())


def encode(texts: list[str], tokenizer: "Tokenizer") -> list[list[int]]:
    """Token ids of each text, without the special tokens that frame a whole input."""
    backend = tokenizer.backend_tokenizer
    return [row.ids for row in backend.encode_batch_fast(texts, add_special_tokens=False)]


def answer_ids(tokenizer: "Tokenizer") -> tuple[int, int]:
    """The ids of "no" and "yes"; raises UserError if the vocabulary splits one of them."""
    # After a newline, because a tokenizer may put a space before its first word.
    rows = encode([f"\n{answer}" for answer in ANSWERS], tokenizer)
    for answer, row in zip(ANSWERS, rows, strict=True):
        if tokenizer.convert_ids_to_tokens(row[-1]) != answer:
            raise UserError(f'the tokenizer has no single token for "{answer}": the cloze needs it')
    return rows[0][-1], rows[1][-1]


def tokenize_pairs(pairs: Pairs, tokenizer: "Tokenizer", max_length: int) -> TokenizedPairs:
    """Tokenize all prompts; one of over `max_length` tokens has its questions cut at the end."""
    tokens, lengths, n_shortened = array("i"), [], 0
    for start in range(0, len(pairs.ids), 1024):  # limits the memory that the encoder needs
        part = slice(start, start + 1024)
        questions = list(zip(pairs.first[part], pairs.second[part], strict=True))
        rows = encode([make_prompt(*pair) for pair in questions], tokenizer)
        for pair, ids in zip(questions, rows, strict=True):
            if len(ids) > max_length:
                ids = _shorten(*pair, tokenizer, max_length)
                n_shortened += 1
            tokens.extend(ids)
            lengths.append(len(ids))
    return TokenizedPairs(
        pairs,
        tokens=np.frombuffer(tokens, dtype=np.int32),
        starts=np.cumsum(lengths) - lengths,
        lengths=np.asarray(lengths),
        labels=np.asarray(pairs.labels) if pairs.labels else None,
        n_shortened=n_shortened,
    )


def _shorten(first: str, second: str, tokenizer: "Tokenizer", max_length: int) -> list[int]:
    """Ids of the longest prompt that fits, the longer question cut first, then both."""
    questions = (_normalize(first), _normalize(second))

    def ids(size: int) -> list[int]:
        return encode([PROMPT.format(*(text[:size] for text in questions))], tokenizer)[0]

    sizes = range(max(map(len, questions)))
    n_fitting = bisect_right(sizes, max_length, key=lambda size: len(ids(size)))
    if n_fitting == 0:
        raise UserError(f"a model of {max_length} positions cannot hold even an empty prompt")
    return ids(sizes[n_fitting - 1])


def load_pairs(
    path: str | Path,
    tokenizer: "Tokenizer",
    max_length: int,
    *,
    limit: int | None,
    has_labels: bool = True,
) -> TokenizedPairs:
    """Read and tokenize a file's pairs, or its first `limit`; prints how the file was read."""
    pairs = read_pairs(path, has_labels, limit)
    data = tokenize_pairs(pairs, tokenizer, max_length)
    print(pairs.summary() + (f"; shortened {data.n_shortened}" if data.n_shortened else ""))
    return data


class Share(NamedTuple):
    """The size of a global batch, and the share that one rank's shard has in its mean loss."""

    n_examples: int
    n_targets: int  # terms of the loss
    weight: float


class Batches:
    """Training batches of `data` in random order.

    Subclasses define `count_tokens_and_targets()`, for each example, and `make_batch(rows)`.
    """

    unit: str  # what an example is called

    def __init__(self, data: Any, batch_size: int, seed: int):
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.rank, self.world_size, self.global_size = 0, 1, batch_size  # of all ranks
        self.lengths, self.n_targets = self.count_tokens_and_targets()
        self.n_examples = len(self.lengths)

    def shard(self, rank: int, world_size: int) -> "Batches":
        """One rank's part of the batches of all ranks, `batch_size` examples for each."""
        shard = copy.copy(self)
        shard.rank, shard.world_size = rank, world_size
        shard.global_size = self.batch_size * world_size
        return shard

    def __len__(self) -> int:
        return -(-self.n_examples // self.global_size)

    def longest(self, n: int) -> dict[str, Tensor]:
        """A batch of the n longest examples."""
        return self.make_batch(np.argsort(-self.lengths, kind="stable")[:n])

    def rows(self, number: int) -> Iterator[np.ndarray]:
        """The rows of each global batch of an epoch, in an order set by seed and epoch number."""
        order = np.random.default_rng([self.seed, number]).permutation(self.n_examples)
        for start in range(0, self.n_examples, self.global_size):
            yield order[start : start + self.global_size]

    def epoch(self, number: int) -> Iterator[tuple[dict[str, Tensor], Share]]:
        """This rank's shard of each batch.

        A rank with an empty shard runs the batch's first example with weight 0, so that every rank
        joins the all-reduce.
        """
        for rows in self.rows(number):
            own = rows[self.rank :: self.world_size]
            total = int(self.n_targets[rows].sum())
            weight = float(self.n_targets[own].sum() / total)
            yield self.make_batch(own if len(own) else rows[:1]), Share(len(rows), total, weight)


class PairBatches(Batches):
    """Batches of tokenized pairs; each pair is one loss term."""

    unit = "pair"

    def count_tokens_and_targets(self) -> tuple[np.ndarray, np.ndarray]:
        return self.data.lengths, np.ones(len(self.data), dtype=np.int64)

    def make_batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        return pair_batch(self.data, rows)


def prediction_rows(data: TokenizedPairs, batch_size: int) -> list[np.ndarray]:
    """The rows of each batch, longest prompts first, so that a lack of memory shows at once."""
    order = np.argsort(-data.lengths, kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def pad(rows: list[Any]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [B,T] of rows padded on the right, and `token_index` [N]."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]  # [B,T]
    input_ids = np.zeros(mask.shape, dtype=np.int64)
    input_ids[mask] = np.concatenate(rows)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
        "token_index": torch.from_numpy(token_index(mask)),
    }


def pair_batch(data: TokenizedPairs, rows: np.ndarray) -> dict[str, Tensor]:
    """The prompts as in `pad`, and `labels` [B] if the data has them."""
    batch = pad([data[row] for row in rows])
    if data.labels is not None:
        batch["labels"] = torch.from_numpy(data.labels[rows])
    return batch


def token_index(mask: np.ndarray, tile: int = TILE) -> np.ndarray:
    """The indices of the tokens in the flattened mask [B,T] of right-padded rows, int64 [N].

    Padding positions follow, as far as there are any, to make N a multiple of `tile`.
    """
    is_token = mask.ravel()
    tokens, padding = is_token.nonzero()[0], (~is_token).nonzero()[0]
    return np.concatenate([tokens, padding[: -len(tokens) % tile]])


def pad_to_few_shapes(batch: dict[str, Tensor], n_positions: int) -> dict[str, Tensor] | None:
    """A batch of pairs padded further, so that few different shapes occur.

    None for a batch that keeps a GPU busy without a CUDA graph, for one that would exceed the
    model's positions, and for poems, whose number of targets rarely occurs twice.
    """
    (B, T), n_tokens = batch["input_ids"].shape, len(batch["token_index"])
    width = T + -T % 32
    if n_tokens > MOST_GRAPH_TOKENS or width > n_positions or "targets" in batch:
        return None
    wider = {name: F.pad(batch[name], (0, width - T)) for name in ("input_ids", "attention_mask")}
    # Where the padding does not suffice for a multiple, all B * width positions are used.
    index = token_index(wider["attention_mask"].bool().numpy(), tile=max(64, B))
    return batch | wider | {"token_index": torch.from_numpy(index)}


@dataclass(frozen=True)
class TokenizedSonnet:
    """A poem's token ids, end of text last unless cut; the first `prompt_length` are its prompt."""

    ids: list[int]
    prompt_length: int


def tokenize_sonnets(
    sonnets: list[Sonnet], tokenizer: "Tokenizer", max_length: int
) -> list[TokenizedSonnet]:
    """Tokenize whole poems; one too long for the model is cut at the end."""
    poems = encode(["\n".join(sonnet.lines) for sonnet in sonnets], tokenizer)
    prompts = encode([sonnet.prompt for sonnet in sonnets], tokenizer)
    return [  # the last token is only a target
        TokenizedSonnet([*poem, tokenizer.eos_token_id][: max_length + 1], len(prompt))
        for poem, prompt in zip(poems, prompts, strict=True)
    ]


def tokenize_prompts(
    sonnets: list[Sonnet], tokenizer: "Tokenizer", max_length: int
) -> list[list[int]]:
    """Token ids of each poem's given lines; raises UserError if they leave no room for more."""
    prompts = encode([sonnet.prompt for sonnet in sonnets], tokenizer)
    for sonnet, prompt in zip(sonnets, prompts, strict=True):
        if len(prompt) >= max_length:
            raise UserError(
                f"the given lines of sonnet {sonnet.number} are {len(prompt)} tokens long: "
                f"the model has {max_length} positions and needs some of them to continue"
            )
    return prompts


@dataclass(frozen=True)
class SonnetData:
    """A run's sonnets by split, with the token ids of the splits that a loss is computed on."""

    train: list[Sonnet]
    dev: list[Sonnet]  # to be continued and compared with gold
    gold: list[Sonnet]
    held_out: list[Sonnet]  # to be continued
    train_ids: list[TokenizedSonnet]
    validation_ids: list[TokenizedSonnet]
    gold_ids: list[TokenizedSonnet]


def load_sonnets(
    *,
    train: str | Path,
    dev: str | Path,
    gold: str | Path,
    held_out: str | Path,
    limit_train: int | None,
    limit_dev: int | None,
    seed: int,
    tokenizer: "Tokenizer",
    max_length: int,
) -> SonnetData:
    """Read, check, split and tokenize a run's poems; `limit_dev` applies to all but `train`.

    Prints what was read. Raises UserError for an unusable file, or if the gold poems are not those
    of the dev file.
    """
    train_poems, validation = split_sonnets(read_sonnets(train, limit_train), seed)
    dev_poems, gold_poems, held_out_poems = (
        read_sonnets(path, limit_dev) for path in (dev, gold, held_out)
    )
    if [sonnet.number for sonnet in dev_poems] != [sonnet.number for sonnet in gold_poems]:
        raise UserError(f"{dev} and {gold} must hold the same numbers in the same order")
    # Fail now, not after training, if a prompt leaves no room.
    tokenize_prompts(dev_poems + held_out_poems, tokenizer, max_length)
    groups = (train_poems, validation, gold_poems)
    ids = [tokenize_sonnets(group, tokenizer, max_length) for group in groups]
    cut = sum(poem.ids[-1] != tokenizer.eos_token_id for group in ids for poem in group)
    print(
        f"{len(train_poems)} training, {len(validation)} validation, {len(dev_poems)} dev and "
        f"{len(held_out_poems)} held-out poems" + (f"; shortened {cut}" if cut else "")
    )
    return SonnetData(train_poems, dev_poems, gold_poems, held_out_poems, *ids)


class SonnetBatches(Batches):
    """Batches of a list of tokenized poems, in which each token but a poem's first is a target."""

    unit = "poem"

    def count_tokens_and_targets(self) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.array([len(poem.ids) for poem in self.data])
        return lengths, lengths - 1

    def make_batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        return sonnet_batch([self.data[row] for row in rows])


def sonnet_batch(poems: list[TokenizedSonnet]) -> dict[str, Tensor]:
    """The poems but for their last tokens as in `pad`, `prompt_lengths` [B], and `targets` [N], the
    tokens that follow those of `input_ids`, row by row.
    """
    return pad([poem.ids[:-1] for poem in poems]) | {
        "prompt_lengths": torch.tensor([poem.prompt_length for poem in poems]),
        "targets": torch.tensor([token for poem in poems for token in poem.ids[1:]]),
    }
