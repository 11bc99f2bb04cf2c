"""Train a small GPT-2 and its tokenizer from scratch on a folder of plain text.

    python -m models.pretrain --text FOLDER --out models/gpt2-nano

writes `config.json`, `model.safetensors` (float16), `vocab.json`, `merges.txt` and
`pretraining.json`, which records the recipe and the loss on held-out text.
"""

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from tqdm import tqdm

from models.config import SIZES, GPT2Config
from models.gpt2 import GPT2Model
from models.pretrained import save_gpt2
from modules.kernels import accelerate
from modules.settings import UserError, check_settings, setting

END_OF_TEXT = "<|endoftext|>"
DOCUMENT = re.compile(r".{8192,}?\n\n|.+", re.DOTALL)  # ends with a blank line


@dataclass(frozen=True)
class Recipe:
    """Training hyperparameters; raises UserError for invalid values."""

    model_size: str = setting("gpt2-nano", "width, layers and heads", choices=SIZES)
    vocab_size: int = setting(8192, "tokens in the vocabulary", least=300)
    context: int = setting(512, "context length in tokens", least=8)
    batch_size: int = setting(8, "rows of --context tokens per step", least=1)
    steps: int = setting(2800, "optimizer steps", least=1)
    warmup_steps: int = setting(100, "steps over which the learning rate rises", least=1)
    lr: float = setting(4e-3, "peak learning rate", above=0)
    weight_decay: float = setting(0.1, "weight decay of the layers' matrices", least=0)
    seed: int = setting(11711, "seed of initial weights and data order", least=0, most=2**32 - 1)

    def __post_init__(self):
        check_settings(self)


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="folder of UTF-8 *.txt files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    for f in fields(Recipe):
        help = f"{f.metadata['help']} [%(default)s]"
        parser.add_argument(f"--{f.name}", type=type(f.default), default=f.default, help=help)
    return parser.parse_args()


def main() -> None:
    args = get_args()
    recipe = Recipe(**{f.name: getattr(args, f.name) for f in fields(Recipe)})
    torch.manual_seed(recipe.seed)
    train_text, held_out_text = read_text(args.text)
    tokenizer = train_tokenizer(train_text, recipe.vocab_size, args.out)
    train, held_out = encode(tokenizer, train_text), encode(tokenizer, held_out_text)
    print(f"{len(train):,} training tokens, {len(held_out):,} held out")
    enough = len(train) > (recipe.batch_size + 1) * recipe.context
    if not enough or len(held_out) <= recipe.context:
        raise UserError(f"{args.text} has too little text for this --batch_size and --context")
    n_embd, n_layer, n_head = SIZES[recipe.model_size]
    shape = (recipe.vocab_size, recipe.context, n_embd, n_layer, n_head)
    model = GPT2Model(GPT2Config(*shape, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0))
    accelerate(model)
    start = time.perf_counter()
    train_model(model, train, recipe)
    loss = held_out_loss(model, held_out)
    n_bytes = sum(len(document.encode()) for document in held_out_text)
    record = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": recipe.steps * recipe.batch_size * recipe.context,
        "held_out_tokens": len(held_out),
        "held_out_bytes": n_bytes,
        "held_out_nats_per_token": round(loss, 4),
        "held_out_bits_per_byte": round(loss / math.log(2) * len(held_out) / n_bytes, 4),
        "train_seconds": round(time.perf_counter() - start),
    }
    save_gpt2(model, args.out, tokenizer.token_to_id(END_OF_TEXT), torch.float16)
    text = json.dumps(record, indent=2)
    (args.out / "pretraining.json").write_text(text + "\n", encoding="utf-8")
    print(text)


def read_text(folder: Path) -> tuple[list[str], list[str]]:
    """Training and held-out documents of about 8,192 characters; every hundredth is held out."""
    train, held_out = [], []
    for path in sorted(folder.glob("*.txt")):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8 text") from None
        for i, document in enumerate(DOCUMENT.findall(text)):
            (held_out if i % 100 == 50 else train).append(document)
    if not held_out:
        raise UserError(f"{folder} needs *.txt files of 500,000 characters or more")
    return train, held_out


def train_tokenizer(text: list[str], vocab_size: int, out: Path) -> ByteLevelBPETokenizer:
    """Train a GPT-2-style byte-level BPE, end of text last; write `vocab.json` and `merges.txt`."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(text, vocab_size=vocab_size - 1, show_progress=False)
    tokenizer.add_special_tokens([END_OF_TEXT])
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_model(str(out))
    vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    (out / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    return tokenizer


def encode(tokenizer: ByteLevelBPETokenizer, text: list[str]) -> Tensor:
    """Token ids of all documents, each followed by an end-of-text token."""
    encodings = tokenizer.encode_batch([document + END_OF_TEXT for document in text])
    return torch.cat([torch.tensor(encoding.ids) for encoding in encodings])


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum (Jordan et al. 2024), scaled to match AdamW's step size.

    torch.optim.Muon works in bfloat16: 8.6 s a step on a CPU without bfloat16 units, against 0.2 s.
    """

    def __init__(self, params: list[Tensor], lr: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "momentum": 0.95, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(buffer, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """Approximate U V^T for g = U S V^T with the quintic Newton-Schulz iteration."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = torch.addmm(x, torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if g.shape[0] > g.shape[1] else x


def train_model(model: GPT2Model, train: Tensor, recipe: Recipe) -> None:
    """Train the layers' matrices with Muon, and embeddings, norms and biases with AdamW.

    The learning rate rises linearly during warm-up, then falls linearly to zero.
    """

    def factor(step: int) -> float:
        return min((step + 1) / recipe.warmup_steps, (recipe.steps - step) / recipe.steps)

    matrices = [p for p in model.gpt_layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = [
        Muon(matrices, lr=recipe.lr, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, factor) for each in optimizers]
    windows = random_windows(train, recipe.context, recipe.batch_size, recipe.seed)
    bar = tqdm(range(recipe.steps), desc="pretrain", mininterval=5)
    for _, rows in zip(bar, windows, strict=False):
        loss = language_model_loss(model, rows)
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def random_windows(tokens: Tensor, context: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches [B,T+1] in random order; windows start at a new offset in each epoch."""
    windows = tokens.unfold(0, context + 1, 1)  # a view of the window at every position
    generator = np.random.default_rng(seed)
    while True:
        starts = np.arange(generator.integers(context), len(windows), context)
        generator.shuffle(starts)
        for first in range(0, len(starts) - batch_size + 1, batch_size):
            yield windows[starts[first : first + batch_size]]


def language_model_loss(model: GPT2Model, rows: Tensor) -> Tensor:
    """Mean next-token loss of rows [B,T+1], in nats per token."""
    h = model(rows[:, :-1])["last_hidden_state"]  # [B,T,C]
    logits = model.hidden_state_to_token(h)  # [B,T,V]
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: GPT2Model, tokens: Tensor) -> float:
    """Mean loss over windows of the model's full context, in nats per token."""
    context = model.config.n_positions
    windows = tokens.unfold(0, context + 1, context)
    return sum(language_model_loss(model, rows).item() for rows in windows.split(1)) / len(windows)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
