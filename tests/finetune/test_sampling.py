"""Decoding against `transformers.generate`, and sampling against the distribution it stands for."""

from unittest import mock

import numpy as np
import pytest
import torch
import transformers

from datasets import Sonnet, read_sonnets, tokenize_prompts
from finetune.runtime import make_runtime
from finetune.sampling import (
    LineCounter,
    Poet,
    Row,
    SamplingConfig,
    ban_repeated_ngrams,
    generate,
    penalize_repetition,
    top_p_sample,
)
from models.gpt2 import GPT2Model
from models.pretrained import BUNDLED
from modules.kv_cache import LayerCache
from modules.lora import LoRAConfig, add_lora
from tests.conftest import ROOT

CPU = make_runtime(False, "fp32")
NO_LINES = LineCounter(frozenset(), str)
END = 100
PROMPTS = [[5, 9, 2], [7], [3, 1, 4, 1, 5, 9, 2, 6], [8, 8, 8, 8]]


def decode(gpt, prompts, n_new=20, end=END, seeds=None, **settings):
    config = SamplingConfig(**{"min_lines": 0} | settings)
    seeds = seeds or range(len(prompts))
    rows = [Row(p, (1, s), len(p) + n_new, NO_LINES) for p, s in zip(prompts, seeds, strict=True)]
    return generate(gpt, rows, end, config, CPU)


def decode_hf(hf, prompt, n_new=20, **settings):
    ids = torch.tensor([prompt])
    out = hf.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n_new,
        eos_token_id=END, pad_token_id=END, **settings,
    )[0].tolist()  # fmt: skip
    return out[:-1] if out[-1] == END else out


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2, "repetition_penalty": 1.1},
    ],
)
def test_greedy_decoding_is_transformers_token_for_token_alone_and_in_a_batch(
    hf_model, gpt, settings
):
    expected = [decode_hf(hf_model, prompt, **settings) for prompt in PROMPTS]
    assert decode(gpt, PROMPTS, greedy=True, **settings) == expected
    for prompt, text in zip(PROMPTS, expected, strict=True):
        assert decode(gpt, [prompt], greedy=True, **settings) == [text]


def test_greedy_decoding_is_transformers_on_the_bundled_model(nano_tokenizer):
    gpt = GPT2Model.from_pretrained(BUNDLED).eval()
    hf = transformers.GPT2LMHeadModel.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    sonnets = read_sonnets(ROOT / "data" / "sonnets_held_out.txt")
    prompts = tokenize_prompts(sonnets, nano_tokenizer, 512)
    out = hf.generate(
        torch.tensor(prompts[:1]), do_sample=False, max_new_tokens=60, pad_token_id=0,
        attention_mask=torch.ones(1, len(prompts[0]), dtype=torch.long),
    )  # fmt: skip
    texts = decode(gpt, prompts, 60, end=nano_tokenizer.eos_token_id, greedy=True)
    assert texts[0] == out[0].tolist()


def test_the_sampled_text_of_a_row_does_not_depend_on_its_neighbours(gpt):
    together = decode(gpt, PROMPTS, 30)
    alone = [decode(gpt, [p], 30, seeds=[i])[0] for i, p in enumerate(PROMPTS)]
    assert together == alone
    assert decode(gpt, PROMPTS[::-1], 30, seeds=[3, 2, 1, 0]) == together[::-1]
    assert decode(gpt, PROMPTS, 30, seeds=[9, 8, 7, 6]) != together


def test_a_row_ends_at_its_own_length_and_takes_no_further_work(gpt, monkeypatch):
    batches, append = [], LayerCache.append
    monkeypatch.setattr(
        LayerCache,
        "append",
        lambda self, k, *rest: batches.append(len(k)) or append(self, k, *rest),
    )
    rows = [Row(PROMPTS[0], (1, i), 4 + i, NO_LINES) for i in range(3)]
    texts = generate(gpt, rows, -1, SamplingConfig(min_lines=0), CPU)
    assert [len(text) for text in texts] == [4, 5, 6]
    assert batches == [3] * 3 + [2] * 3 + [1] * 3  # three layers


def test_end_of_text_ends_a_row_and_is_left_out(hf_model, gpt):
    free = decode(gpt, [PROMPTS[0]], 10, end=-1, greedy=True)[0]
    end = free[6]
    cut = decode(gpt, [PROMPTS[0]], 10, end=end, greedy=True)[0]
    assert cut == free[: free.index(end, 3)]


def test_min_lines_keeps_end_of_text_away(gpt):
    free = decode(gpt, [PROMPTS[0]], 10, end=-1, greedy=True)[0]
    text = decode(gpt, [PROMPTS[0]], 10, end=free[3], greedy=True, min_lines=2)[0]
    assert len(text) == 13
    assert free[3] not in text[3:]


def kept(p: torch.Tensor, top_p: float) -> list[int]:
    """Tokens that the definition keeps: from the likeliest on until the mass passes top_p."""
    order = p.argsort(descending=True)
    before = p[order].cumsum(0) - p[order]
    return sorted(order[before < top_p].tolist())


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_distribution_cut_at_top_p(temperature, top_p):
    logits = torch.linspace(-2, 3, 12)[torch.randperm(12, generator=torch.manual_seed(0))]
    n = 40_000
    generators = [np.random.default_rng(0)] * n
    tokens = top_p_sample(logits.expand(n, -1), temperature, top_p, generators)
    p = (logits / temperature).softmax(0)
    expected = torch.zeros(12)
    expected[kept(p, top_p)] = p[kept(p, top_p)]
    expected /= expected.sum()
    counts = torch.tensor(tokens).bincount(minlength=12)
    assert (counts[expected == 0] == 0).all()
    deviation = (n * expected * (1 - expected)).sqrt()
    assert ((counts - n * expected).abs() <= 4.5 * deviation + 1e-3).all()


def test_forbidden_tokens_are_never_sampled():
    logits = torch.full((500, 6), -torch.inf)
    logits[:, 2], logits[:, 4] = 0.0, 1.0
    generators = [np.random.default_rng(seed) for seed in range(500)]
    assert set(top_p_sample(logits, 1.0, 1.0, generators)) == {2, 4}


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_pick_tokens_that_are_kept(u):
    generator = mock.Mock(random=lambda: u)
    logits = torch.tensor([[-torch.inf, 3.0, 0.0, 3.0, -torch.inf]])
    assert top_p_sample(logits, 1.0, 0.9, [generator]) == [1 if u == 0 else 3]


def test_penalty_and_ban_by_hand():
    logits = torch.tensor([[2.0, -2.0, 4.0]])
    seen = torch.tensor([[True, True, False]])
    assert penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 4.0]]
    out = ban_repeated_ngrams(torch.zeros(2, 4), [[1, 2, 3, 1, 2], [0, 1]], 3)
    assert out.isinf().nonzero().tolist() == [[0, 3]]


@pytest.fixture(scope="module")
def poet(nano_tokenizer):
    gpt = GPT2Model.from_pretrained(BUNDLED)
    add_lora(gpt, LoRAConfig(rank=2))  # fresh, so it changes nothing
    return Poet(gpt, nano_tokenizer, SamplingConfig(max_new_tokens=300), 7, CPU)


@pytest.fixture(scope="module")
def prompts():
    return read_sonnets(ROOT / "data" / "sonnets_held_out.txt")


def test_poems_have_14_lines_and_begin_with_those_given(poet, prompts):
    poems = poet.write(prompts)
    for prompt, poem in zip(prompts, poems, strict=True):
        assert poem.number == prompt.number
        assert poem.lines[:3] == prompt.lines
        assert len(poem.lines) == 14
        assert all(line.strip() for line in poem.lines)


def test_a_poem_depends_on_seed_number_and_sample_alone(poet, prompts):
    together = poet.write(prompts[:4])
    assert poet.write(prompts[2:3]) == together[2:3]
    assert poet.write(prompts[:4], sample=1) != together
    renumbered = [Sonnet(prompts[0].number + 1, prompts[0].lines)]
    assert poet.write(renumbered)[0].lines != together[0].lines


def test_numbers_and_blank_lines_do_not_count_as_lines(poet, nano_tokenizer):
    counter = LineCounter.of(nano_tokenizer)
    row = Row(nano_tokenizer.encode("One\nTwo\n"), (0,), 99, counter)
    assert (row.complete_lines, row.n_lines) == (2, 2)
    for token in nano_tokenizer.encode("\n \n 145 \n"):
        row.add(token)
    assert row.complete_lines == 2
    row.add(nano_tokenizer.encode("Three")[0])
    assert (row.complete_lines, row.n_lines) == (2, 3)
