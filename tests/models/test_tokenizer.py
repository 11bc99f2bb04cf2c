"""The tokenizer of many kinds of checkpoint folders, beside what transformers makes of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from data.sonnets import Sonnet
from datasets import answer_ids, encode, make_prompt, tokenize_prompts
from models.pretrained import BUNDLED
from models.tokenizer import load_tokenizer, unused_ids
from modules.settings import UserError

VOCAB_SIZE = 8192  # of the bundled model
PLAIN = "Thou art more lovely\nand more temperate"
TEXTS = [
    *(PLAIN, "", "yes", "no", " no", "YES", "\n", "  two  blanks \n\n\n end ", "tab\tand\r\n"),
    make_prompt("How DO bees fly, and why?", 'What\'s a "bee"?'),
    *(
        "caf\u00e9 cafe\u0301 \u017f\u212b",
        "\u65e5\u672c\u8a9e \U0001f642 \x07",
        "in 1609 or 12345",
    ),
    *(
        "a [PAD] b[PAD] c",
        "x <|endoftext|> y<|endoftext|>",
        "x<s>y </s> <mask> z",
        "a<sep>b <SEP> c",
    ),
    *("it's we'll don't I'M", "def f(x):\n        return x", "word " * 60),
]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # of GPT-4, Llama 3 and Qwen


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_json(path: Path, **values: object) -> None:
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | values)


def plain_folder(folder: Path) -> None:
    """A checkpoint folder without weights, with the bundled vocabulary."""
    folder.mkdir(exist_ok=True)
    for name in ("vocab.json", "merges.txt", "config.json"):
        shutil.copy(BUNDLED / name, folder)


def save(
    folder: Path, change: Callable[[Tokenizer], object] = lambda _: None, **about: object
) -> None:
    """Keep the vocabulary in a changed tokenizer.json, of the class PreTrainedTokenizerFast."""
    tokenizer = Tokenizer(
        models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    change(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", settings | about)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()


def setter(name: str, value: object) -> Callable[[Tokenizer], None]:
    return lambda tokenizer: setattr(tokenizer, name, value)


def save_as_transformers(folder: Path, change: Callable[..., object], **kwargs: object) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
    change(tokenizer)
    tokenizer.save_pretrained(folder)


def old_files(folder: Path) -> None:
    """What transformers 3 wrote, and tokenizers 0.10 beside it: merges are strings."""
    save(folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    model = {name: state["model"][name] for name in ("dropout", "unk_token", "vocab", "merges")}
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    state["model"] = model
    state["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    write_json(folder / "tokenizer.json", state)
    (folder / "tokenizer_config.json").unlink()
    plain_folder(folder)
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "[PAD]"}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "added_tokens.json", {"[PAD]": 8192})
    write_json(
        folder / "tokenizer_config.json", {"model_max_length": 24, "add_prefix_space": False}
    )


def flagged(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens([AddedToken("[PAD]", lstrip=True, special=True)])
    tokenizer.add_tokens([AddedToken("<sep>", rstrip=True, normalized=True)])
    tokenizer.add_tokens([AddedToken("word", single_word=True), AddedToken("temper")])
    tokenizer.normalizer = normalizers.Lowercase()


def roberta(folder: Path) -> None:
    special = {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "RobertaTokenizer"} | special)


def template(tokenizer: Tokenizer) -> None:
    end = ("<|endoftext|>", 8191)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{end[0]} $A {end[0]}", special_tokens=[end]
    )


def byte_level_normalizer(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.ByteLevel(), None


def without_version(folder: Path) -> None:
    path = folder / "merges.txt"
    path.write_text(path.read_text(encoding="utf-8").partition("\n")[2], encoding="utf-8")


def pad(**padding: object) -> Callable[..., object]:
    def change(tokenizer) -> None:
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer(["a b c d", "e"], padding=True, **padding)

    return change


def sequence(*parts: object) -> Callable[[Tokenizer], None]:
    return setter("pre_tokenizer", pre_tokenizers.Sequence(list(parts)))


CUT = {"truncation": True, "max_length": 24}
WHOLE = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
REGEX = pre_tokenizers.ByteLevel(add_prefix_space=False)
blank = setter("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True))
lower = setter("normalizer", normalizers.Lowercase())
llama = sequence(pre_tokenizers.Split(Regex(SPLIT), "isolated"), WHOLE)
PREFIX = {"add_prefix_space": True}
BEGIN = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}
NAMES = {"tokenizer_class": "GPT2Tokenizer", "_name_or_path": "someone/gpt2"}
PAD = {"pad_token": "[PAD]"}
KINDS: dict[str, Callable[[Path], object]] = {
    "vocab and merges": lambda d: None,
    "no config.json": lambda d: (d / "config.json").unlink(),
    "tokenizer.json": lambda d: save(d),
    "tokenizer.json alone": lambda d: (save(d), (d / "tokenizer_config.json").unlink()),
    "all files": lambda d: (save(d, lower), plain_folder(d)),
    "saved truncation": lambda d: save_as_transformers(d, lambda t: t(["x"], **CUT)),
    "truncation in the file": lambda d: save(d, lambda t: t.enable_truncation(24)),
    "saved padding": lambda d: save_as_transformers(d, pad()),
    "saved left padding": lambda d: save_as_transformers(d, pad(padding_side="left")),
    "padding in the file": lambda d: save(d, lambda t: t.enable_padding(length=70)),
    "lower case": lambda d: save(d, lower),
    "lower case as GPT2": lambda d: save(d, lower, tokenizer_class="GPT2Tokenizer"),
    "lower case as backend": lambda d: save(d, lower, tokenizer_class="TokenizersBackend"),
    "NFC": lambda d: save(d, setter("normalizer", normalizers.NFC())),
    "NFKC": lambda d: save(d, setter("normalizer", normalizers.NFKC())),
    "line break as an added token": lambda d: save(d, lambda t: t.add_tokens(["\n", "\n\n"])),
    "no regex": lambda d: save(d, setter("pre_tokenizer", WHOLE)),
    "prefix blank": lambda d: save(d, blank),
    "GPT2 without its prefix blank": lambda d: save(d, blank, tokenizer_class="GPT2TokenizerFast"),
    "prefix blank configured": lambda d: write_json(d / "tokenizer_config.json", PREFIX),
    "prefix blank of GPT2": lambda d: save(d, tokenizer_class=None, **PREFIX),
    "padding token": lambda d: save_as_transformers(d, lambda t: t.add_special_tokens(PAD)),
    "added tokens with flags": lambda d: save(d, flagged),
    "beginning of text": lambda d: write_json(d / "tokenizer_config.json", BEGIN),
    "template": lambda d: save(d, template),
    "special tokens are split": lambda d: save(d, split_special_tokens=True),
    "old files": old_files,
    "class by config.json": lambda d: edit_json(d / "config.json", **NAMES),
    "RoBERTa": roberta,
    "GPT-NeoX": lambda d: save(d, tokenizer_class="GPTNeoXTokenizer"),
    "CodeGen": lambda d: save(d, tokenizer_class="CodeGenTokenizer"),
    "Qwen2": lambda d: save(d, tokenizer_class="Qwen2Tokenizer"),
    "Llama 3": lambda d: save(d, llama, tokenizer_class="LlamaTokenizer"),
    "StarCoder": lambda d: save(d, sequence(pre_tokenizers.Digits(True), REGEX)),
    "merges are passed over": lambda d: save(d, lambda t: setattr(t.model, "ignore_merges", True)),
    "no version in merges.txt": without_version,
    "byte-level normalizer": lambda d: save(d, byte_level_normalizer),
}


@pytest.fixture
def folder(tmp_path):
    plain_folder(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def auto_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerFast:
    config = None if (folder / "config.json").exists() else transformers.GPT2Config()
    return AutoTokenizer.from_pretrained(folder, config=config)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_becomes_the_ids_that_transformers_gives(folder, kind):
    KINDS[kind](folder)
    expected = auto_tokenizer(folder)(TEXTS, add_special_tokens=False)["input_ids"]
    tokenizer = load_tokenizer(folder, vocab_size=8200)
    assert encode(TEXTS, tokenizer) == expected
    assert [encode([text], tokenizer)[0] for text in TEXTS] == expected
    (ids,) = encode([PLAIN], tokenizer)
    text = PLAIN.lower() if encode(["YES"], tokenizer) == encode(["yes"], tokenizer) else PLAIN
    assert tokenizer.decode(ids) == tokenizer.backend_tokenizer.decode(ids) == text
    tokens = tokenizer.get_vocab()
    assert tokenizer.eos_token_id == tokens["</s>" if kind == "RoBERTa" else "<|endoftext|>"]
    if kind.startswith("prefix blank"):
        assert encode(["no"], tokenizer) == encode([" no"], tokenizer)
    assert answer_ids(tokenizer) == (tokens["no"], tokens["yes"])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_the_same_tokenizer(folder, tmp_path, kind):
    KINDS[kind](folder)
    tokenizer = load_tokenizer(folder, vocab_size=8200)
    tokenizer.save_pretrained(tmp_path / "copy")
    shutil.copy(BUNDLED / "config.json", tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy", vocab_size=8200)
    assert encode(TEXTS, copy) == encode(TEXTS, tokenizer)
    assert copy.eos_token_id == tokenizer.eos_token_id
    assert copy.decode(encode([PLAIN], copy)[0]) == tokenizer.decode(encode([PLAIN], tokenizer)[0])


def test_a_poem_starts_as_its_given_lines_do(folder):
    write_json(folder / "tokenizer_config.json", {"add_prefix_space": True})
    tokenizer = load_tokenizer(folder, VOCAB_SIZE)
    sonnet = Sonnet(1, ("From fairest creatures", "we desire", "increase"))
    (prompt,) = tokenize_prompts([sonnet], tokenizer, 512)
    assert tokenizer.backend_tokenizer.decode(prompt) == sonnet.prompt


def test_dropout_of_merges_is_off(folder):
    save(folder, lambda t: setattr(t.model, "dropout", 0.5))
    rows = encode([PLAIN] * 20, load_tokenizer(folder))
    assert rows == encode([PLAIN], load_tokenizer(BUNDLED)) * 20


@pytest.mark.parametrize("vocab_size", [8192, 8193])
def test_an_added_token_without_an_embedding_is_read_as_text(folder, vocab_size):
    names = ["[PAD]", "<sep>"]
    save_as_transformers(folder, lambda t: t.add_special_tokens({"extra_special_tokens": names}))
    tokenizer = load_tokenizer(folder, vocab_size)
    plain = load_tokenizer(BUNDLED)
    for name, text in zip(names, ("a [PAD] b", "a<sep>b"), strict=True):
        (ids,) = encode([text], tokenizer)
        assert max(ids) < vocab_size
        assert tokenizer.decode(ids) == text
        has_row = names.index(name) < vocab_size - 8192
        assert (ids == encode([text], plain)[0]) == (not has_row)
    assert encode(["<|endoftext|> x"], tokenizer) == encode(["<|endoftext|> x"], plain)
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == plain.eos_token_id


def test_unused_ids_are_the_rows_that_no_text_ends_up_in(folder):
    tokenizer = load_tokenizer(folder, 8192)
    assert unused_ids(tokenizer, 8192) == []
    assert unused_ids(load_tokenizer(folder, 8256), 8256) == list(range(8192, 8256))
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "extra_special_tokens": ["<sep>"]})
    tokenizer.save_pretrained(folder)
    assert unused_ids(load_tokenizer(folder, 8192), 8192) == []
    assert tokenizer.pad_token_id == 8192
    assert unused_ids(load_tokenizer(folder, 8256), 8256) == [8192, *range(8194, 8256)]
    tokenizer.pad_token = "!"  # a token of many texts
    tokenizer.save_pretrained(folder)
    assert unused_ids(load_tokenizer(folder, 8194), 8194) == []


def test_the_end_of_text_is_the_tokenizers_or_that_of_config_json(folder):
    save(folder, eos_token=None)
    edit_json(folder / "config.json", eos_token_id=77)
    assert load_tokenizer(folder).eos_token_id == 77
    edit_json(folder / "config.json", eos_token_id=9000)
    with pytest.raises(UserError, match="has no end-of-text token: name it as eos_token"):
        load_tokenizer(folder)


def other_model(model: models.Model) -> Callable[[Path], None]:
    """A tokenizer of sentencepiece's kinds."""

    def make(folder: Path) -> None:
        save(folder, setter("pre_tokenizer", pre_tokenizers.Metaspace()))
        state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        state["model"] = json.loads(Tokenizer(model).to_str())["model"]
        write_json(folder / "tokenizer.json", state)

    return make


def wordpiece(folder: Path) -> None:
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"})


def own_code(folder: Path) -> None:
    (folder / "own.py").write_text("from pathlib import Path\nPath(__file__ + '.ran').touch()\n")
    about = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    write_json(folder / "tokenizer_config.json", about)


def few_tokens(folder: Path) -> None:
    write_json(folder / "vocab.json", {"\u010a": 0, "a": 1, "<|endoftext|>": 2})
    (folder / "merges.txt").write_text("#version: 0.2\n")


REFUSED = {
    "sentencepiece": (
        lambda d: ((d / "vocab.json").unlink(), (d / "tokenizer.model").touch()),
        "has no tokenizer: vocab.json is missing",
    ),
    "unigram": (other_model(models.Unigram([("<unk>", 0.0)], 0)), "it is not a byte-level BPE$"),
    "metaspace": (
        other_model(models.BPE({"a": 0}, [])),
        "not a byte-level BPE that preserves line",
    ),
    "stripped texts": (
        lambda d: save(d, setter("normalizer", normalizers.Strip())),
        "not a byte-level BPE that preserves line",
    ),
    "wordpiece": (wordpiece, "the tokenizer in .* cannot be used"),
    "own code": (own_code, "refers to custom code .*, which is never run"),
    "damaged": (lambda d: (d / "tokenizer.json").write_text('{"version": "1.0"'), "cannot be used"),
    "damaged configuration": (
        lambda d: (d / "tokenizer_config.json").write_text("["),
        "tokenizer_config.json is not JSON",
    ),
    "more tokens than embeddings": (
        lambda d: edit_json(d / "vocab.json", more=8192),
        "has 8,193 tokens, and the model has embeddings for 8,192",
    ),
    "few tokens": (few_tokens, "has 3 tokens, and the model has embeddings for 8,192"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_served_is_refused_in_one_sentence(folder, kind):
    make, sentence = REFUSED[kind]
    make(folder)
    with pytest.raises(UserError, match=sentence) as error:
        load_tokenizer(folder, VOCAB_SIZE)
    assert "\n" not in str(error.value)
    assert not list(folder.glob("*.ran"))
