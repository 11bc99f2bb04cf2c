"""From text to batch: the prompts, their tokens, and which tokens the model sees."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.pairs import Pairs
from data.sonnets import Sonnet, read_sonnets
from datasets import (
    PairBatches,
    SonnetBatches,
    TokenizedPairs,
    TokenizedSonnet,
    answer_ids,
    load_sonnets,
    make_prompt,
    pad_to_few_shapes,
    pair_batch,
    prediction_rows,
    sonnet_batch,
    token_index,
    tokenize_pairs,
    tokenize_prompts,
    tokenize_sonnets,
)
from modules.settings import UserError
from tests.conftest import ROOT


def test_the_prompt_is_the_courses_byte_for_byte():
    assert make_prompt("What's  a BEE?", "Bees, what are they...") == (
        'Is "what \'s a bee ?" a paraphrase of "bees , what are they . . ."? Answer "yes" or "no": '
    )


def test_answers_are_class_0_no_and_class_1_yes(gpt2_tokenizer, nano_tokenizer):
    assert answer_ids(gpt2_tokenizer) == (3919, 8505)
    vocabulary = nano_tokenizer.get_vocab()
    assert answer_ids(nano_tokenizer) == (vocabulary["no"], vocabulary["yes"])


def some_pairs(*rows: tuple[str, str, int]) -> Pairs:
    """Pairs of first question, second question and label, as a file would give them."""
    first, second, labels = map(list, zip(*rows, strict=True))
    return Pairs(Path("pairs.csv"), list(map(str, range(len(rows)))), first, second, labels)


@pytest.fixture
def pairs():
    generator = np.random.default_rng(0)
    words = ["how", "do", "bees", "fly", "to", "the", "moon"]
    rows = []
    for i in range(500):
        first, second = (" ".join(generator.choice(words, n)) for n in generator.integers(3, 40, 2))
        rows.append((f"{first}?", f"{second}?", i % 2))
    return some_pairs(*rows)


def test_the_tokens_are_those_of_the_tokenizer(pairs, gpt2_tokenizer):
    data = tokenize_pairs(pairs, gpt2_tokenizer, 1024)
    for i in (0, 1, 250, 499):
        expected = gpt2_tokenizer(make_prompt(pairs.first[i], pairs.second[i]))["input_ids"]
        assert data.tokens[data.starts[i] :][: data.lengths[i]].tolist() == expected
    assert len(data.tokens) == data.lengths.sum()
    assert data.n_shortened == 0


@pytest.mark.parametrize("max_length", [30, 48])
def test_a_long_pair_loses_the_ends_of_its_questions_not_the_cue(gpt2_tokenizer, max_length):
    pairs = some_pairs(
        ("short one?", f"{'very ' * 300}long?", 1), ("x?" * 200, ("yes " * 90).strip(), 0)
    )
    data = tokenize_pairs(pairs, gpt2_tokenizer, max_length)
    assert data.n_shortened == 2
    for start, length in zip(data.starts, data.lengths, strict=True):
        assert max_length - 8 <= length <= max_length
        prompt = gpt2_tokenizer.decode(data.tokens[start : start + length])
        assert prompt.endswith('"? Answer "yes" or "no": ')
        assert prompt.startswith('Is "')
    first = gpt2_tokenizer.decode(data.tokens[: data.lengths[0]])
    assert first.startswith('Is "short one ?" a paraphrase of "very very')


def test_a_model_too_short_for_the_prompt_is_refused(pairs, gpt2_tokenizer):
    with pytest.raises(UserError, match="10 positions cannot hold even an empty prompt"):
        tokenize_pairs(pairs, gpt2_tokenizer, 10)


def test_an_epoch_has_every_pair_once_whole_and_labelled(pairs, nano_tokenizer):
    data = tokenize_pairs(pairs, nano_tokenizer, 512)
    batches = PairBatches(data, 12, seed=1)
    epoch, rows = list(batches.epoch(0)), list(batches.rows(0))
    assert sorted(np.concatenate(rows).tolist()) == list(range(500))
    assert len(epoch) == len(rows) == len(batches) == 42
    for (batch, share), chosen in zip(epoch, rows, strict=True):
        assert share == (len(chosen), len(chosen), 1)
        assert batch["labels"].tolist() == [row % 2 for row in chosen.tolist()]
        for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], chosen, strict=True):
            n = int(mask.sum())
            assert mask.tolist() == [1] * n + [0] * (len(mask) - n)
            start = data.starts[row]
            assert ids[:n].tolist() == data.tokens[start : start + data.lengths[row]].tolist()


def test_order_depends_on_seed_and_epoch_alone(pairs, nano_tokenizer):
    data = tokenize_pairs(pairs, nano_tokenizer, 512)

    def order(seed, epoch):
        return np.concatenate(list(PairBatches(data, 12, seed).rows(epoch))).tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_batches_tell_no_more_of_the_labels_than_random_draws():
    """Paraphrases are shorter: batches of one length would be batches of one label."""
    n, batch_size = 6000, 12
    labels = np.arange(n) % 3 == 0
    lengths = np.where(labels, 10, 30)
    data = TokenizedPairs(
        Pairs(None),
        labels=labels.astype(np.int64),
        tokens=np.zeros(lengths.sum(), dtype=np.int32),
        starts=lengths.cumsum() - lengths,
        lengths=lengths,
    )
    p = labels.mean()
    expected = p * (1 - p) / batch_size * (n - batch_size) / (n - 1)  # hypergeometric
    for seed in range(3):
        batches = [batch for batch, _ in PairBatches(data, batch_size, seed).epoch(0)]
        for values in (
            [batch["labels"].float().mean().item() for batch in batches],
            [(batch["attention_mask"].sum(1) == 10).float().mean().item() for batch in batches],
        ):
            assert np.var(values) == pytest.approx(expected, rel=4 * (2 / len(batches)) ** 0.5)


def test_the_order_of_an_epoch_is_a_uniform_permutation():
    poems = [TokenizedSonnet([i, 99], 1) for i in range(4)]
    batches, n_epochs = SonnetBatches(poems, 1, seed=0), 4800
    orders = Counter(tuple(np.concatenate(list(batches.rows(i)))) for i in range(n_epochs))
    assert len(orders) == 24
    chi_square = sum((count - n_epochs / 24) ** 2 / (n_epochs / 24) for count in orders.values())
    assert chi_square < 50  # 23 degrees of freedom: 1 in 1,000 is above 49.7


def test_a_token_index_is_the_tokens_then_padding_up_to_whole_tiles():
    mask = np.arange(40) < np.array([[40], [7], [3]])
    index = token_index(mask)
    assert index[:50].tolist() == mask.ravel().nonzero()[0].tolist()
    assert len(index) == 64
    assert len(set(index.tolist())) == 64
    assert len(token_index(mask[:1])) == 40  # there is no padding to take


def test_padding_to_few_shapes_changes_no_token(pairs, nano_tokenizer):
    data = tokenize_pairs(pairs, nano_tokenizer, 512)
    batches = [batch for batch, _ in PairBatches(data, 4, seed=0).epoch(0)]
    shapes = set()
    for batch in batches:
        padded = pad_to_few_shapes(batch, n_positions=512)
        shapes.add((padded["input_ids"].shape, padded["token_index"].shape))
        n = int(batch["attention_mask"].sum())
        for name in ("input_ids", "attention_mask"):
            found, expected = (
                each[name].flatten()[each["token_index"][:n]] for each in (padded, batch)
            )
            assert found.tolist() == expected.tolist()
            assert padded[name].sum() == batch[name].sum()
        assert padded["labels"] is batch["labels"]
    assert all(T % 32 == N[0] % 64 == 0 for (_, T), N in shapes)


def test_what_would_be_no_graph_is_not_padded(pairs, nano_tokenizer):
    (batch, _), *_ = PairBatches(tokenize_pairs(pairs, nano_tokenizer, 512), 4, seed=0).epoch(0)
    assert pad_to_few_shapes(batch, n_positions=batch["input_ids"].shape[1]) is None
    assert pad_to_few_shapes(batch | {"token_index": torch.arange(4097)}, 512) is None
    poems = sonnet_batch([TokenizedSonnet([*range(20)], 5)])
    assert pad_to_few_shapes(poems, n_positions=512) is None


def test_prediction_batches_hold_every_pair_once(pairs, nano_tokenizer):
    data = tokenize_pairs(pairs, nano_tokenizer, 512)
    batches = prediction_rows(data, 64)
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    assert pair_batch(data, batches[0])["input_ids"].shape[1] == data.lengths.max()
    assert max(map(len, batches)) == 64


@pytest.mark.parametrize("n", [12, 13, 16])
def test_processes_share_each_batch_of_pairs_among_themselves(pairs, nano_tokenizer, n):
    data = tokenize_pairs(pairs, nano_tokenizer, 512)
    data = replace(data, lengths=data.lengths[:n], starts=data.starts[:n])
    alone = list(PairBatches(data, 12, seed=3).epoch(1))
    shares = [list(PairBatches(data, 4, seed=3).shard(rank, 3).epoch(1)) for rank in range(3)]
    for (whole, _), parts in zip(alone, zip(*shares, strict=True), strict=True):
        n = len(whole["labels"])
        assert sum(share.weight for _, share in parts) == pytest.approx(1)
        assert {share.n_examples for _, share in parts} == {n}
        rows = [
            ids[mask.bool()].tolist()
            for batch, share in parts
            if share.weight
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        whole_rows = zip(whole["input_ids"], whole["attention_mask"], strict=True)
        assert sorted(rows) == sorted(ids[mask.bool()].tolist() for ids, mask in whole_rows)
        for batch, share in parts:
            assert share.weight in (0, len(batch["labels"]) / n)


def test_a_sonnet_ends_with_end_of_text_unless_it_is_cut(nano_tokenizer):
    sonnet = Sonnet(1, ("From fairest creatures", "we desire"))
    (poem,) = tokenize_sonnets([sonnet], nano_tokenizer, 512)
    assert nano_tokenizer.decode(poem.ids[:-1]) == "From fairest creatures\nwe desire"
    assert poem.ids[-1] == nano_tokenizer.eos_token_id
    (cut,) = tokenize_sonnets([sonnet], nano_tokenizer, 4)
    assert cut.ids == poem.ids[:5]  # four in, the fifth a target


def test_the_prompt_of_a_tokenized_sonnet_is_the_one_to_be_continued(nano_tokenizer):
    sonnets = read_sonnets(ROOT / "data" / "TRUE_sonnets_held_out_dev.txt")
    poems = tokenize_sonnets(sonnets, nano_tokenizer, 512)
    for poem, prompt in zip(poems, tokenize_prompts(sonnets, nano_tokenizer, 512), strict=True):
        assert poem.ids[: poem.prompt_length] == prompt


def test_a_prompt_is_the_first_three_lines_and_must_leave_room(nano_tokenizer):
    sonnet = Sonnet(9, ("One", "Two", "Three", "Four"))
    (ids,) = tokenize_prompts([sonnet], nano_tokenizer, 512)
    assert nano_tokenizer.decode(ids) == "One\nTwo\nThree\n"
    assert tokenize_prompts([sonnet], nano_tokenizer, len(ids) + 1) == [ids]
    with pytest.raises(UserError, match=r"given lines of sonnet 9 are \d+ tokens long"):
        tokenize_prompts([sonnet], nano_tokenizer, len(ids))


def test_each_real_token_predicts_the_one_after_it():
    batch = sonnet_batch([TokenizedSonnet([5, 6, 7, 99], 2), TokenizedSonnet([8, 99], 1)])
    assert batch["prompt_lengths"].tolist() == [2, 1]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    ids = batch["input_ids"].flatten()
    pairs = [
        (int(ids[p]), int(t)) for p, t in zip(batch["token_index"], batch["targets"], strict=False)
    ]
    assert pairs == [(5, 6), (6, 7), (7, 99), (8, 99)]


def test_an_epoch_has_every_poem_once_in_an_order_of_seed_and_epoch():
    poems = [TokenizedSonnet([i, i, 99], 1) for i in range(10)]

    def order(seed, epoch):
        return [
            int(i)
            for batch, _ in SonnetBatches(poems, 4, seed).epoch(epoch)
            for i in batch["input_ids"][:, 0]
        ]

    assert len(SonnetBatches(poems, 4, 0)) == len(list(SonnetBatches(poems, 4, 0).epoch(0))) == 3
    assert sorted(order(0, 0)) == list(range(10))
    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) != order(1, 1)


def test_processes_share_each_batch_of_poems_by_its_targets():
    poems = [TokenizedSonnet(list(range(i + 2)), 1) for i in range(10)]
    alone = list(SonnetBatches(poems, 4, seed=3).epoch(1))
    shares = [list(SonnetBatches(poems, 1, seed=3).shard(rank, 4).epoch(1)) for rank in range(4)]
    for (whole, share), parts in zip(alone, zip(*shares, strict=True), strict=True):
        assert share == (len(whole["input_ids"]), len(whole["targets"]), 1)
        for batch, part in parts:
            assert part.n_targets == share.n_targets
            assert part.weight in (0, len(batch["targets"]) / len(whole["targets"]))
        assert sum(part.weight for _, part in parts) == pytest.approx(1)
    assert [part.weight > 0 for _, part in parts] == [True, True, False, False]  # 10 = 4 + 4 + 2


def load(tokenizer, max_length, gold="TRUE_sonnets_held_out_dev", limits=(10, 2)):
    names = {"train": "sonnets", "dev": "sonnets_held_out_dev", "gold": gold}
    names |= {"held_out": "sonnets_held_out"}
    return load_sonnets(
        **{split: ROOT / "data" / f"{name}.txt" for split, name in names.items()},
        limit_train=limits[0],
        limit_dev=limits[1],
        seed=0,
        tokenizer=tokenizer,
        max_length=max_length,
    )


def test_dev_and_gold_must_be_the_same_poems(nano_tokenizer):
    with pytest.raises(UserError, match="must hold the same numbers in the same order"):
        load(nano_tokenizer, 512, gold="sonnets_held_out", limits=(None, None))


def test_poems_too_long_for_the_model_are_counted(nano_tokenizer, capsys):
    load(nano_tokenizer, 512)
    load(nano_tokenizer, 60)  # prompts fit, whole poems do not
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("2 held-out poems")
    assert second.endswith("; shortened 12")
