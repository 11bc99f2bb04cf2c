"""Decoding against `transformers.generate`, and the poems that it writes."""

from dataclasses import replace

import pytest
import torch
import transformers
from tokenizers import normalizers

from data.sonnets import Sonnet, read_sonnets
from datasets import tokenize_prompts
from finetune.generation import LineCounter, Sequence, SonnetGenerator, generate
from finetune.runtime import Runtime
from finetune.sampling import SamplingConfig
from models.gpt2 import GPT2Model
from models.pretrained import BUNDLED
from models.tokenizer import load_tokenizer
from modules.kernels import accelerate
from modules.kv_cache import LayerCache
from modules.lora import LoRAConfig, add_lora
from modules.reft import ReFTConfig, add_reft
from tests.conftest import ROOT
from tests.models.test_gpt2 import with_unused_rows

CPU = Runtime(torch.device("cpu"))
NO_LINES = LineCounter(frozenset(), str)
END = 100
PROMPTS = [[5, 9, 2], [7], [3, 1, 4, 1, 5, 9, 2, 6], [8, 8, 8, 8]]


def decode(gpt, prompts, n_new=20, end=END, seeds=None, runtime=CPU, **settings):
    config = SamplingConfig(**{"min_lines": 0} | settings)
    accelerate(gpt)
    seeds = seeds or range(len(prompts))
    sequences = [
        Sequence(prompt, (1, seed), len(prompt) + n_new, NO_LINES)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    return generate(gpt, sequences, end, config, runtime)


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
        lambda self, kv, layout: batches.append(layout.shape[0]) or append(self, kv, layout),
    )
    rows = [Sequence(PROMPTS[0], (1, i), 4 + i, NO_LINES) for i in range(3)]
    texts = generate(gpt, rows, -1, SamplingConfig(min_lines=0), CPU)
    assert [len(text) for text in texts] == [4, 5, 6]
    assert batches == [3] * 3 + [2] * 3 + [1] * 3  # three layers


class FixedShapes(Runtime):
    """A CPU that decodes as a GPU does."""

    decodes_in_fixed_shapes, decodes_with_graphs = True, False


@pytest.mark.parametrize("adapter", ["none", "lora", "reft"])
def test_in_fixed_shapes_greedy_texts_are_the_same(gpt, adapter):
    if adapter == "lora":
        add_lora(gpt, LoRAConfig(rank=2))
    elif adapter == "reft":
        add_reft(gpt, ReFTConfig("nodireft", positions="f1+l2"))
    for parameter in gpt.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    fixed = FixedShapes(torch.device("cpu"))
    expected = decode(gpt, PROMPTS, greedy=True)
    assert min(map(len, expected)) < max(map(len, expected))
    assert decode(gpt, PROMPTS, greedy=True, runtime=fixed) == expected


@pytest.mark.parametrize("error", [None, RuntimeError("not permitted")])
def test_a_token_by_a_graph_is_a_token_without(gpt, recorder, capsys, error):
    class ByGraphs(FixedShapes):
        decodes_with_graphs = True

    made, n_new = recorder(error=error), gpt.config.n_positions - max(map(len, PROMPTS))
    for greedy in (True, False):
        fixed, by_graphs = (
            decode(gpt, PROMPTS, n_new, end=-1, greedy=greedy, runtime=kind(torch.device("cpu")))
            for kind in (FixedShapes, ByGraphs)
        )
        assert by_graphs == fixed
        assert max(map(len, fixed)) == gpt.config.n_positions
    if error:
        assert capsys.readouterr().out.count("decoding continues without CUDA graphs") == 2
    else:
        assert made.n_replays > made.n == 2


def test_in_fixed_shapes_a_text_depends_on_no_neighbour_and_ends_by_itself(gpt):
    fixed = FixedShapes(torch.device("cpu"))
    together = decode(gpt, PROMPTS, 30, runtime=fixed)
    for i, prompt in enumerate(PROMPTS):
        assert decode(gpt, [prompt], 30, seeds=[i], runtime=fixed) == [together[i]]
    assert END not in sum(together, [])
    rows = [Sequence(PROMPTS[0], (1, i), 4 + 20 * i, NO_LINES) for i in range(3)]
    texts = generate(gpt, rows, -1, SamplingConfig(min_lines=0), fixed)
    assert [len(text) for text in texts] == [4, 24, 44]


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_suppressed_ids_never_come_and_change_no_text(gpt, greedy, dtype):
    padded = with_unused_rows(gpt)
    runtime = Runtime(torch.device("cpu"), dtype)
    expected, found = (decode(m, PROMPTS, greedy=greedy, runtime=runtime) for m in (gpt, padded))
    assert found == expected
    padded.suppress_tokens(())
    assert max(map(max, decode(padded, PROMPTS, greedy=greedy, runtime=runtime))) > END


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


@pytest.fixture(scope="module")
def generator(nano_tokenizer):
    gpt = GPT2Model.from_pretrained(BUNDLED)
    add_lora(gpt, LoRAConfig(rank=2))  # fresh, so it changes nothing
    accelerate(gpt)
    return SonnetGenerator(gpt, nano_tokenizer, SamplingConfig(max_new_tokens=300), 7, CPU)


@pytest.fixture(scope="module")
def prompts():
    return read_sonnets(ROOT / "data" / "sonnets_held_out.txt")


def test_poems_have_14_lines_and_begin_with_those_given(generator, prompts):
    poems = generator.write(prompts)
    for prompt, poem in zip(prompts, poems, strict=True):
        assert poem.number == prompt.number
        assert poem.lines[:3] == prompt.lines
        assert len(poem.lines) == 14
        assert all(line.strip() for line in poem.lines)


def test_a_poem_depends_on_seed_number_and_sample_alone(generator, prompts):
    together = generator.write(prompts[:4])
    assert generator.write(prompts[2:3]) == together[2:3]
    assert generator.write(prompts[:4], sample=1) != together
    renumbered = [Sonnet(prompts[0].number + 1, prompts[0].lines)]
    assert generator.write(renumbered)[0].lines != together[0].lines


def lines_of(row: Sequence) -> tuple[int, int]:
    """The number of complete lines, and that of all lines."""
    return row.complete_lines, next(n for n in range(20) if row.is_shorter_than(n + 1))


def test_numbers_and_blank_lines_do_not_count_as_lines(generator, nano_tokenizer):
    counter = LineCounter.of(nano_tokenizer)
    row = Sequence(nano_tokenizer.encode("One\nTwo\n"), (0,), 99, counter)
    assert lines_of(row) == (2, 2)
    for token in nano_tokenizer.encode("\n \n 145 \n"):
        row.add(token, END, 14)
    assert row.complete_lines == 2
    row.add(nano_tokenizer.encode("7")[0], END, 14)  # dropped from the poem if the line ends here
    assert lines_of(row) == (2, 2)
    row.add(nano_tokenizer.encode(" Three")[0], END, 14)
    assert lines_of(row) == (2, 3)


def test_given_lines_stay_as_they_are(generator):
    tokenizer = load_tokenizer(BUNDLED)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    lines = ("From Fairest CREATURES", "12", "we desire increase")
    (poem,) = replace(generator, tokenizer=tokenizer).write([Sonnet(1, lines)])
    assert poem.lines[:3] == lines
    assert len(poem.lines) == 14


def test_a_line_break_may_be_an_added_token():
    tokenizer = load_tokenizer(BUNDLED)
    tokenizer.add_tokens(["\n\n"])
    counter = LineCounter.of(tokenizer)
    row = Sequence(tokenizer.encode("One\nTwo\n\n"), (0,), 99, counter)
    assert row.ids[-1] == len(tokenizer) - 1
    assert lines_of(row) == (2, 2)


def test_a_line_is_complete_at_its_end_even_if_the_token_begins_the_next():
    words = {0: "One", 1: "\nTwo", 2: "\n"}  # as a BPE that does not split at blanks has them
    row = Sequence(
        [0], (0,), 99, LineCounter(frozenset({1, 2}), lambda ids: "".join(map(words.get, ids)))
    )
    assert row.complete_lines == 0
    row.add(1, END, 14)
    assert row.complete_lines == 1
    row.add(2, END, 14)
    assert lines_of(row) == (2, 2)
