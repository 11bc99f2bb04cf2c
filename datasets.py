"""Question pairs and sonnets from file to batch: read, check, phrase, tokenize, pad."""

import csv
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROMPT = 'Is "{}" a paraphrase of "{}"? Answer "yes" or "no": '
ANSWERS = ("no", "yes")  # class 0, class 1
LABELS = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}
LONGEST_LINE = 10_000_000  # bytes
LONGEST_RECORD = 8  # lines; a quoted question may hold line ends
TILE = 16  # tokens; matmuls have few different shapes, for each of which oneDNN keeps code
SONNET_NUMBER = re.compile(r"\s*([0-9]{1,9})\s*")
GIVEN_LINES = 3  # of a sonnet to be continued


class DataError(ValueError):
    """A data file that cannot be used; the message is one sentence."""


@dataclass
class Pairs:
    """The usable rows of a question-pair file, and the lines left out, by reason."""

    path: Path
    ids: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)
    second: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)  # empty for a file without labels
    left_out: dict[str, list[int]] = field(default_factory=dict)

    def summary(self) -> str:
        """One line: how many rows were read, how many left out, why and where."""
        text = f"{self.path}: {len(self.ids):,} pairs"
        for reason, lines in self.left_out.items():
            where = ", ".join(map(str, lines[:10]))
            more = f" and {len(lines) - 10} more" if len(lines) > 10 else ""
            text += f"; left out {len(lines)} with {reason} (line {where}{more})"
        return text


@dataclass
class TokenizedPairs:
    """Prompts as token ids end to end: row i is `lengths[i]` tokens from `starts[i]` on."""

    ids: list[str]
    labels: np.ndarray | None  # int64 [N]
    tokens: np.ndarray  # int32
    starts: np.ndarray  # int64 [N]
    lengths: np.ndarray  # int64 [N]
    shortened: int  # how many prompts were too long for the model

    def __len__(self) -> int:
        return len(self.ids)


def read_pairs(path: str | Path, labelled: bool, limit: int | None = None) -> Pairs:
    """Read a tab-separated file: columns id, sentence1, sentence2 and, if labelled, is_duplicate.

    `limit` keeps only the first so many usable rows. Raises DataError for an unusable file.
    """
    path = Path(path)
    lines = _read_lines(path)
    csv.field_size_limit(LONGEST_LINE)
    header = [name.strip() for name in _parse(lines[0]) or []]
    wanted = ["id", "sentence1", "sentence2"] + ["is_duplicate"] * labelled
    missing = [name for name in wanted if name not in header]
    if missing:
        raise DataError(
            f"{path} has no column {', '.join(missing)}: its first line must be a tab-separated "
            f"header with {', '.join(wanted)}"
        )
    columns = [header.index(name) for name in wanted]
    pairs = Pairs(path)
    for line_number, row in _records(lines, len(header)):
        if limit is not None and len(pairs.ids) == limit:
            break
        values = [row[column].strip() for column in columns] if row else []
        fault = _fault(values)
        if fault:
            pairs.left_out.setdefault(fault, []).append(line_number)
            continue
        pairs.ids.append(values[0])
        pairs.first.append(values[1])
        pairs.second.append(values[2])
        pairs.labels.extend(LABELS[label] for label in values[3:])
    if not pairs.ids:
        raise DataError(f"no usable row in {pairs.summary()}")
    return pairs


def _read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file without their ends; an empty one behind the last end."""
    lines, raw, number = [], b"\n", 0
    try:
        with open(path, "rb") as file:
            while raw.endswith(b"\n"):
                raw, number = file.readline(LONGEST_LINE + 1), number + 1
                if len(raw) > LONGEST_LINE:
                    raise DataError(f"{path}: line {number} is longer than {LONGEST_LINE:,} bytes")
                if b"\0" in raw:
                    raise DataError(f"{path} is not UTF-8 text: line {number} has a NUL byte")
                lines.append(raw.removesuffix(b"\n").removesuffix(b"\r").decode())
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: see data/README.md for where to get it") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text: line {number} cannot be read") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    lines[0] = lines[0].removeprefix("\ufeff")
    return lines


def _parse(text: str) -> list[str] | None:
    """The fields of one record, None where a quote stays open; no field where it is no record."""
    try:
        rows = list(csv.reader([text, "next"], delimiter="\t"))
    except csv.Error:
        return []
    return rows[0] if len(rows) == 2 else None


def _records(lines: list[str], n_fields: int) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each record after the header; no fields for a faulty one.

    A quoted question may run over several lines, but a stray quote costs its own line only, not
    all up to the next quote in the file.
    """
    i = 1
    while i < len(lines):
        for length in range(1, LONGEST_RECORD + 1):
            row = _parse("\n".join(lines[i : i + length]))
            if row is not None:
                break
        if row is None or len(row) != n_fields or any("\t" in value for value in row):
            row, length = [], 1
        if lines[i].strip():
            yield i + 1, row
        i += length


def _fault(values: list[str]) -> str | None:
    if not values:
        return "a wrong number of fields"
    if not (values[1] and values[2]):
        return "an empty question"
    if "\n" in values[0] or "\r" in values[0]:
        return "an id of several lines"
    if len(values) == 4 and not values[3]:
        return "no label"
    if len(values) == 4 and values[3] not in LABELS:
        return "a label other than 0 and 1"
    return None


def make_prompt(first: str, second: str) -> str:
    """The cloze, byte for byte the course's, of two raw questions."""
    return PROMPT.format(_normalize(first), _normalize(second))


def _normalize(text: str) -> str:
    text = text.lower()
    for mark in ".?,'":
        text = text.replace(mark, f" {mark}")
    return " ".join(text.split())


def answer_ids(tokenizer: "PreTrainedTokenizerFast") -> tuple[int, int]:
    """The token ids of "no" and "yes"; raises DataError where the vocabulary splits one of them."""
    ids = [tokenizer.backend_tokenizer.encode(answer).ids for answer in ANSWERS]
    for answer, tokens in zip(ANSWERS, ids, strict=True):
        if len(tokens) != 1:
            raise DataError(
                f'the tokenizer makes {len(tokens)} tokens of "{answer}", the cloze needs one'
            )
    return ids[0][0], ids[1][0]


def tokenize_pairs(
    pairs: Pairs, tokenizer: "PreTrainedTokenizerFast", max_length: int
) -> TokenizedPairs:
    """Tokenize all prompts; one longer than `max_length` tokens loses the ends of its questions."""
    encode = tokenizer.backend_tokenizer.encode_batch_fast
    tokens, lengths, shortened = array("i"), [], 0
    for start in range(0, len(pairs.ids), 1024):  # bounds the encoder's own objects to some MB
        part = slice(start, start + 1024)
        questions = list(zip(pairs.first[part], pairs.second[part], strict=True))
        rows = [encoding.ids for encoding in encode([make_prompt(*pair) for pair in questions])]
        for i, ids in enumerate(rows):
            if len(ids) > max_length:
                rows[i] = _shorten(*questions[i], encode, max_length)
                shortened += 1
        tokens.extend(chain.from_iterable(rows))
        lengths += map(len, rows)
    ends = np.cumsum(lengths)
    return TokenizedPairs(
        ids=pairs.ids,
        labels=np.asarray(pairs.labels) if pairs.labels else None,
        tokens=np.frombuffer(tokens, dtype=np.int32),
        starts=ends - lengths,
        lengths=np.asarray(lengths),
        shortened=shortened,
    )


def _shorten(first: str, second: str, encode, max_length: int) -> list[int]:
    """Ids of the longest prompt that fits, the longer question cut first, then both."""
    questions = (_normalize(first), _normalize(second))

    def ids(size: int) -> list[int]:
        return encode([PROMPT.format(*(text[:size] for text in questions))])[0].ids

    fits, too_long = 0, max(map(len, questions))
    if len(ids(fits)) > max_length:
        raise DataError(f"a model of {max_length} positions cannot hold even an empty prompt")
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        fits, too_long = (middle, too_long) if len(ids(middle)) <= max_length else (fits, middle)
    return ids(fits)


def load_pairs(
    train: str | Path,
    dev: str | Path,
    test: str | Path,
    limits: tuple[int | None, int | None],
    tokenizer: "PreTrainedTokenizerFast",
    max_length: int,
) -> list[TokenizedPairs]:
    """Train, dev and test pairs of a run; `limits` are for train, and for dev and test.

    Says what was read, left out and shortened. Raises DataError for an unusable file.
    """
    splits = []
    for path, labelled, limit in (
        (train, True, limits[0]),
        (dev, True, limits[1]),
        (test, False, limits[1]),
    ):
        pairs = read_pairs(path, labelled, limit)
        splits.append(tokenize_pairs(pairs, tokenizer, max_length))
        shortened = splits[-1].shortened
        print(pairs.summary() + (f"; shortened {shortened}" if shortened else ""))
    return splits


class Share(NamedTuple):
    """This rank's shard of a global batch."""

    n_examples: int  # of the global batch
    weight: float  # of the shard's mean loss in the global mean


class Batches:
    """Training batches in random order; `data` are examples, `batch` makes a batch of some.

    `batch_size` is for each of the `world_size` ranks, of which this is `rank`.
    """

    unit: str  # what an example is called

    def __init__(self, data, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.data, self.batch_size, self.seed = data, batch_size * world_size, seed
        self.rank, self.world_size = rank, world_size
        self.n_examples = len(data)

    def __len__(self) -> int:
        return -(-self.n_examples // self.batch_size)

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        """The batch of these examples."""
        raise NotImplementedError

    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64."""
        raise NotImplementedError

    def n_targets(self, rows: np.ndarray) -> int:
        """Over how many terms the loss of a batch is a mean."""
        raise NotImplementedError

    def longest(self, n: int) -> dict[str, Tensor]:
        """A batch of the n longest examples."""
        return self.batch(np.argsort(-self.lengths(), kind="stable")[:n])

    def rows(self, number: int) -> Iterator[np.ndarray]:
        """The examples of each global batch of an epoch: all once, in an order that seed and
        epoch fix."""
        order = np.random.default_rng([self.seed, number]).permutation(self.n_examples)
        for start in range(0, self.n_examples, self.batch_size):
            yield order[start : start + self.batch_size]

    def epoch(self, number: int) -> Iterator[tuple[dict[str, Tensor], Share]]:
        """This rank's shard of each batch.

        A rank with an empty shard runs the batch's first example with weight 0, so that every rank
        joins the all-reduce.
        """
        for rows in self.rows(number):
            own = rows[self.rank :: self.world_size]
            share = Share(len(rows), self.n_targets(own) / self.n_targets(rows))
            yield self.batch(own if len(own) else rows[:1]), share


class PairBatches(Batches):
    """Batches of tokenized pairs."""

    unit = "pair"

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        return pair_batch(self.data, rows)

    def lengths(self) -> np.ndarray:
        return self.data.lengths

    def n_targets(self, rows: np.ndarray) -> int:
        return len(rows)


def prediction_rows(data: TokenizedPairs, batch_size: int) -> list[np.ndarray]:
    """The rows of batches that hold all pairs once, the longest first, so that one too many for
    the memory fails at once."""
    order = np.argsort(-data.lengths, kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def pair_batch(data: TokenizedPairs, rows: np.ndarray) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` [B,T] padded on the right, `token_index` [N], `labels` [B] or
    none.
    """
    lengths = data.lengths[rows]
    positions = np.arange(lengths.max())
    mask = positions < lengths[:, None]  # [B,T]
    ids = data.tokens.take(data.starts[rows, None] + positions, mode="clip") * mask
    batch = {"input_ids": ids.astype(np.int64), "attention_mask": mask.astype(np.int64)}
    batch["token_index"] = token_index(mask)
    if data.labels is not None:
        batch["labels"] = data.labels[rows]
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def token_index(mask: np.ndarray) -> np.ndarray:
    """int64 [N], where the tokens are in the flattened mask [B,T], padded on the right.

    Some padding positions follow to make N a multiple of TILE, which no result depends on.
    """
    is_token = mask.ravel()
    tokens, padding = is_token.nonzero()[0], (~is_token).nonzero()[0]
    return np.concatenate([tokens, padding[: -len(tokens) % TILE]])


@dataclass(frozen=True)
class Sonnet:
    """A poem and its number."""

    number: int
    lines: tuple[str, ...]  # as poem_lines gives them

    @property
    def prompt(self) -> str:
        """The given lines and the line end that starts the next."""
        return "".join(f"{line}\n" for line in self.lines[:GIVEN_LINES])


def poem_lines(text: str) -> list[str]:
    """The lines of a poem: not blank, and not a number alone, which would start the next poem."""
    lines = [line.rstrip() for line in text.split("\n")]
    return [line for line in lines if line and not SONNET_NUMBER.fullmatch(line)]


def read_sonnets(path: str | Path, limit: int | None = None) -> list[Sonnet]:
    """Read poems that stand each under its number, alone on a line; what comes before is skipped.

    `limit` keeps only the first so many. Raises DataError for an unusable file.
    """
    sonnets: list[tuple[int, list[str]]] = []
    for line in _read_lines(Path(path)):
        number = SONNET_NUMBER.fullmatch(line)
        if number:
            sonnets.append((int(number[1]), []))
        elif sonnets:
            sonnets[-1][1].extend(poem_lines(line))
    if not sonnets:
        raise DataError(f"{path} has no poem under a number, alone on a line")
    empty = [str(number) for number, lines in sonnets if not lines]
    if empty:
        raise DataError(f"{path} has no line under the number {', '.join(empty)}")
    return [Sonnet(number, tuple(lines)) for number, lines in sonnets[:limit]]


def split_sonnets(sonnets: list[Sonnet], seed: int) -> tuple[list[Sonnet], list[Sonnet]]:
    """Nine tenths to train on and one tenth (one poem at least) to validate, by chance."""
    if len(sonnets) < 2:
        raise DataError("one poem cannot be split into some to train on and some to validate")
    order = np.random.default_rng(seed).permutation(len(sonnets))
    chosen = [sonnets[i] for i in order]
    cut = max(1, round(len(sonnets) / 10))
    return chosen[cut:], chosen[:cut]


@dataclass(frozen=True)
class TokenizedSonnet:
    """A poem as token ids, end of text last, of which the first `prompt_length` are its prompt."""

    ids: list[int]
    prompt_length: int


def tokenize_sonnets(
    sonnets: list[Sonnet], tokenizer: "PreTrainedTokenizerFast", max_length: int
) -> list[TokenizedSonnet]:
    """Tokenize whole poems; one too long for the model loses its end."""
    encode, end = tokenizer.backend_tokenizer.encode, tokenizer.eos_token_id
    return [
        TokenizedSonnet(
            [*encode("\n".join(sonnet.lines)).ids, end][: max_length + 1],
            len(encode(sonnet.prompt).ids),
        )
        for sonnet in sonnets
    ]


def tokenize_prompts(
    sonnets: list[Sonnet], tokenizer: "PreTrainedTokenizerFast", max_length: int
) -> list[list[int]]:
    """Token ids of each poem's given lines; raises DataError where they fill the model."""
    prompts = []
    for sonnet in sonnets:
        prompts.append(tokenizer.backend_tokenizer.encode(sonnet.prompt).ids)
        if len(prompts[-1]) >= max_length:
            raise DataError(
                f"the given lines of sonnet {sonnet.number} are {len(prompts[-1])} tokens, the "
                f"model has {max_length} positions and needs some to go on"
            )
    return prompts


@dataclass(frozen=True)
class SonnetData:
    """The poems of a run, and as token ids those that a loss is taken of."""

    train: list[Sonnet]
    dev: list[Sonnet]  # to be continued and compared to
    gold: list[Sonnet]
    held_out: list[Sonnet]  # to be continued
    train_ids: list[TokenizedSonnet]
    validation_ids: list[TokenizedSonnet]
    gold_ids: list[TokenizedSonnet]


def load_sonnets(
    path: str | Path,
    dev_path: str | Path,
    gold_path: str | Path,
    held_out_path: str | Path,
    limits: tuple[int | None, int | None],
    seed: int,
    tokenizer: "PreTrainedTokenizerFast",
    max_length: int,
) -> SonnetData:
    """Read, check, split and tokenize the poems of a run; `limits` are for train, dev and held out.

    Says what was read. Raises DataError for an unusable file, and where the gold poems are not
    those of the dev file.
    """
    train, validation = split_sonnets(read_sonnets(path, limits[0]), seed)
    dev, gold, held_out = (read_sonnets(p, limits[1]) for p in (dev_path, gold_path, held_out_path))
    if [sonnet.number for sonnet in dev] != [sonnet.number for sonnet in gold]:
        raise DataError(f"{dev_path} and {gold_path} have to hold the same numbers in one order")
    tokenize_prompts(dev + held_out, tokenizer, max_length)  # fails now, not after the training
    ids = [tokenize_sonnets(group, tokenizer, max_length) for group in (train, validation, gold)]
    cut = sum(poem.ids[-1] != tokenizer.eos_token_id for group in ids for poem in group)
    print(
        f"{len(train)} poems to train on, {len(validation)} to validate, {len(dev)} to continue "
        f"and compare, {len(held_out)} to continue" + (f"; shortened {cut}" if cut else "")
    )
    return SonnetData(train, dev, gold, held_out, *ids)


class SonnetBatches(Batches):
    """Batches of tokenized poems, in which each token but a poem's first is a target."""

    unit = "poem"

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        return sonnet_batch([self.data[row] for row in rows])

    def lengths(self) -> np.ndarray:
        return np.array([len(poem.ids) for poem in self.data])

    def n_targets(self, rows: np.ndarray) -> int:
        return sum(len(self.data[row].ids) - 1 for row in rows)


def sonnet_batch(poems: list[TokenizedSonnet]) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` [B,T] padded on the right, `token_index` [N], `prompt_lengths`
    [B], and for each token, row by row, the one that follows it, `targets`.
    """
    lengths = torch.tensor([len(poem.ids) - 1 for poem in poems])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # [B,T]
    input_ids = torch.zeros(mask.shape, dtype=torch.long)
    input_ids[mask] = torch.tensor([token for poem in poems for token in poem.ids[:-1]])
    return {
        "input_ids": input_ids,
        "attention_mask": mask.long(),
        "token_index": torch.from_numpy(token_index(mask.numpy())),
        "prompt_lengths": torch.tensor([poem.prompt_length for poem in poems]),
        "targets": torch.tensor([token for poem in poems for token in poem.ids[1:]]),
    }
