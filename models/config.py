"""GPT-2's configuration, its sizes, and how to read `config.json`."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from modules.settings import UserError


@dataclass(frozen=True)
class GPT2Config:
    """The fields of Hugging Face's GPT-2 `config.json` that are used here, under the same names."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1


SIZES = {  # name -> width, layers, heads
    "gpt2": (768, 12, 12),
    "gpt2-medium": (1024, 24, 16),
    "gpt2-large": (1280, 36, 20),
    "gpt2-xl": (1600, 48, 25),
    "gpt2-nano": (256, 4, 4),
}
# transformers accepts these names for the same fields.
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def read_config(path: Path) -> GPT2Config:
    """Read a `config.json`; raises UserError for values that this GPT-2 does not support."""
    given = {ALIASES.get(name, name): value for name, value in read_json(path).items()}
    for field in fields(GPT2Config):
        value = given.get(field.name, field.default)
        if isinstance(field.default, int):
            fits, allowed = type(value) is int and value > 0, "a whole number of 1 or more"
        else:
            fits = type(value) in (int, float) and 0 <= value < 1
            allowed = "a number of 0 or more and below 1"
        if not fits:
            raise UserError(f"{path}: {field.name} is {value!r:.40}, but must be {allowed}")
    required = {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "n_inner": (None, 4 * given.get("n_embd", GPT2Config.n_embd)),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "tie_word_embeddings": (True,),
    }
    for key, allowed in required.items():
        if given.get(key, allowed[0]) not in allowed:
            raise UserError(f"{path}: {key} is {given[key]!r}, expected {allowed[0]!r}")
    config = GPT2Config(**{f.name: given[f.name] for f in fields(GPT2Config) if f.name in given})
    if config.n_embd % config.n_head:
        raise UserError(f"{path}: n_embd {config.n_embd} is not a multiple of n_head")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; raises UserError if that fails."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its type if there is none."""
    return str(error).partition("\n")[0] or type(error).__name__
