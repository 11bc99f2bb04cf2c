"""GPT-2's configuration and sizes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GPT2Config:
    """What this model reads of Hugging Face's GPT-2 `config.json`, under the same names."""

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
