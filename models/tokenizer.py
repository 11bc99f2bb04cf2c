"""A checkpoint's byte-level BPE tokenizer, which gives the same ids as in `transformers`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from models.config import first_line, read_json
from modules.settings import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer

TOKENIZER_FILES = [
    *("tokenizer.json", "vocab.json", "merges.txt"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
]


def load_tokenizer(folder: Path, vocab_size: int | None = None) -> "Tokenizer":
    """Load a checkpoint folder's tokenizer with `AutoTokenizer`, set up for whole texts.

    Its `backend_tokenizer` never truncates or pads, and decoding drops the space that some
    tokenizers prepend to a text. Raises UserError if it is not a byte-level BPE or does not match
    embeddings for `vocab_size` tokens.
    """
    if not has_tokenizer(folder):
        missing = "merges.txt" if (folder / "vocab.json").exists() else "vocab.json"
        raise UserError(f"{folder} has no tokenizer: {missing} is missing")
    about = folder / "tokenizer_config.json"
    if about.exists() and "auto_map" in read_json(about):
        raise UserError(f"{about} refers to custom code (auto_map), which is never run")
    try:
        tokenizer = _read(folder)
    except Exception as error:  # tokenizers raises nothing more specific
        raise UserError(f"the tokenizer in {folder} cannot be used: {first_line(error)}") from error
    if vocab_size:
        tokenizer = _fit(tokenizer, folder, vocab_size)
    if tokenizer.eos_token_id is None:
        _name_end_of_text(tokenizer, folder)
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """True if a folder has the files of a byte-level BPE."""
    alternatives = (["tokenizer.json"], ["vocab.json", "merges.txt"])
    return any(all((folder / name).exists() for name in names) for names in alternatives)


def unused_ids(tokenizer: "Tokenizer", vocab_size: int) -> list[int]:
    """The ids below `vocab_size` that no text is encoded to.

    They are embedding rows without a token, and a padding token added to the vocabulary.
    """
    used = set(tokenizer.get_vocab().values())
    named = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    own = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False).values()
    used -= {tokenizer.pad_token_id} - named - set(own)
    return sorted(set(range(vocab_size)) - used)


def _read(folder: Path) -> "Tokenizer":
    from tokenizers import decoders
    from tokenizers.models import BPE
    from transformers import AutoTokenizer, GPT2Config

    config = None if (folder / "config.json").exists() else GPT2Config()
    tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    if not tokenizer.is_fast or not isinstance(tokenizer.backend_tokenizer.model, BPE):
        raise ValueError("it is not a byte-level BPE")
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.model.dropout = None  # it would make the ids random
    backend.decoder = decoders.ByteLevel()
    text = backend.decode(backend.encode("a\na\n", add_special_tokens=False).ids)
    if "Ċ" not in backend.get_vocab(with_added_tokens=False) or text.count("\n") < 2:
        raise ValueError("it is not a byte-level BPE that preserves line breaks")
    if backend.decode(backend.encode("a", add_special_tokens=False).ids) == " a":
        without_blank = decoders.Strip(" ", left=1, right=0)
        backend.decoder = decoders.Sequence([backend.decoder, without_blank])
    return tokenizer


def _fit(tokenizer: "Tokenizer", folder: Path, vocab_size: int) -> "Tokenizer":
    """Drop added tokens that the model has no embedding for.

    Where a text contains one, it is then tokenized as ordinary text.
    """
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizer.backend_tokenizer
    n_tokens = max(backend.get_vocab(with_added_tokens=False).values()) + 1
    if n_tokens > vocab_size or len(tokenizer) < vocab_size / 2:
        raise UserError(
            f"{folder}: the tokenizer does not match the model: it has {n_tokens:,} tokens, "
            f"and the model has embeddings for {vocab_size:,}"
        )
    if max(tokenizer.get_vocab().values()) < vocab_size:
        return tokenizer
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < vocab_size]
    vocabulary, special = tokenizer.get_vocab(), tokenizer.special_tokens_map
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(state)),
        split_special_tokens=tokenizer.split_special_tokens,
        model_max_length=tokenizer.model_max_length,
        **{k: v for k, v in special.items() if vocabulary.get(str(v), vocab_size) < vocab_size},
    )


def _name_end_of_text(tokenizer: "Tokenizer", folder: Path) -> None:
    """Take `eos_token` from config.json if the tokenizer's own files do not name one."""
    config = folder / "config.json"
    end = read_json(config).get("eos_token_id") if config.exists() else None
    names = [name for name, token in tokenizer.get_vocab().items() if token == end]
    if not names:
        raise UserError(
            f"the tokenizer in {folder} has no end-of-text token: name it as eos_token in "
            "tokenizer_config.json"
        )
    tokenizer.eos_token = names[0]
