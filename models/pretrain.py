"""Train a small GPT-2 and its tokenizer from scratch on a folder of plain text.

    python -m models.pretrain --text FOLDER --out models/gpt2-nano

writes `config.json`, `model.safetensors` (float16), `vocab.json`, `merges.txt` and
`pretraining.json`, which records the recipe and the loss on held-out text.
"""

import argparse
import json
import math
import sys
import time
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
from modules.settings import UserError

END_OF_TEXT = "<|endoftext|>"
CHUNK = 8192  # characters of text that make a document; every hundredth document is held out


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="folder of UTF-8 *.txt files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--model_size", choices=SIZES, default="gpt2-nano")
    for name, default, help in (
        ("vocab_size", 8192, "entries of the tokenizer"),
        ("context", 512, "positions of the model"),
        ("batch_size", 8, "rows of --context tokens a step"),
        ("steps", 2800, "optimizer steps"),
        ("warmup_steps", 100, "steps in which the learning rate rises"),
        ("lr", 4e-3, "largest learning rate"),
        ("weight_decay", 0.1, "of the matrices"),
        ("seed", 11711, "decides the initial weights and the order"),
    ):
        help = f"{help} [%(default)s]"
        parser.add_argument(f"--{name}", type=type(default), default=default, help=help)
    parser.add_argument("--use_gpu", action="store_true")
    args = parser.parse_args()
    least = {"vocab_size": 300, "context": 8, "seed": 0, "weight_decay": 0.0}
    for name, value in vars(args).items():
        if type(value) in (int, float) and value < least.get(name, 1e-9):
            allowed = f"{least[name]} or more" if name in least else "above 0"
            parser.error(f"--{name} must be {allowed}")
    return args


def main() -> None:
    args = get_args()
    device = torch.device("cuda" if args.use_gpu else "cpu")
    torch.manual_seed(args.seed)
    train_text, held_out_text = read_text(args.text)
    tokenizer = train_tokenizer(train_text, args.vocab_size, args.out)
    train, held_out = encode(tokenizer, train_text), encode(tokenizer, held_out_text)
    print(f"{train.size:,} training tokens, {held_out.size:,} held out")
    n_embd, n_layer, n_head = SIZES[args.model_size]
    no_dropout = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    shape = (args.vocab_size, args.context, n_embd, n_layer, n_head)
    model = GPT2Model(GPT2Config(*shape, **no_dropout))
    model.to(device)
    accelerate(model)
    start = time.perf_counter()
    train_model(model, train, held_out, args)
    loss = held_out_loss(model, held_out, args.batch_size)
    n_bytes = sum(len(document.encode()) for document in held_out_text)
    record = {
        "recipe": {k: v for k, v in vars(args).items() if k not in ("text", "out")},
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": args.steps * args.batch_size * args.context,
        "held_out_tokens": held_out.size,
        "held_out_bytes": n_bytes,
        "held_out_nats_per_token": round(loss, 4),
        "held_out_bits_per_byte": round(loss / math.log(2) * held_out.size / n_bytes, 4),
        "train_seconds": round(time.perf_counter() - start),
    }
    save_gpt2(model, args.out, tokenizer.token_to_id(END_OF_TEXT), torch.float16)
    text = json.dumps(record, indent=2)
    (args.out / "pretraining.json").write_text(text + "\n", encoding="utf-8")
    print(text)


def read_text(folder: Path) -> tuple[list[str], list[str]]:
    """Documents of about `CHUNK` characters, cut at blank lines: for training, held out."""
    train, held_out = [], []
    for path in sorted(folder.glob("*.txt")):
        text, start, number = path.read_text(encoding="utf-8"), 0, 0
        while start < len(text):
            end = text.find("\n\n", start + CHUNK) + 2
            end = end if end > 1 else len(text)
            (held_out if number % 100 == 50 else train).append(text[start:end])
            start, number = end, number + 1
    if not held_out:
        raise UserError(f"{folder} needs *.txt files of 500,000 characters or more")
    return train, held_out


def train_tokenizer(text: list[str], vocab_size: int, out: Path) -> ByteLevelBPETokenizer:
    """Train GPT-2's byte-level BPE, end of text last; write `vocab.json` and `merges.txt`."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(text, vocab_size=vocab_size - 1, show_progress=False)
    tokenizer.add_special_tokens([END_OF_TEXT])
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_model(str(out))
    vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    (out / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    return tokenizer


def encode(tokenizer: ByteLevelBPETokenizer, text: list[str]) -> np.ndarray:
    """Token ids of all documents, an end-of-text token after each."""
    encodings = tokenizer.encode_batch([document + END_OF_TEXT for document in text])
    return np.concatenate([np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings])


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024) and scaled to AdamW's size of step.

    torch.optim.Muon does the same in bfloat16: on a CPU without such units 8.6 s a step, this 0.2.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

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
    """An approximation of U V^T for g = U S V^T, by the quintic Newton-Schulz iteration."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = torch.addmm(x, torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if g.shape[0] > g.shape[1] else x


def make_optimizers(model: GPT2Model, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings, norms and biases."""
    matrices = [p for p in model.gpt_layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=args.lr, weight_decay=args.weight_decay),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def train_model(
    model: GPT2Model, train: np.ndarray, held_out: np.ndarray, args: argparse.Namespace
) -> None:
    """Warm up, then let the learning rate fall to zero on a line."""
    generator = np.random.default_rng(args.seed)
    optimizers = make_optimizers(model, args)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / args.warmup_steps, (args.steps - step) / args.steps),
        )
        for optimizer in optimizers
    ]
    windows = iter(())
    bar = tqdm(range(args.steps), desc="pretrain", mininterval=5)
    for step in bar:
        try:
            rows = next(windows)
        except StopIteration:
            windows = random_windows(train, args.context, args.batch_size, generator)
            rows = next(windows)
        loss = language_model_loss(model, torch.from_numpy(rows))
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if step % 500 == 499:
            value = held_out_loss(model, held_out, args.batch_size)
            tqdm.write(f"step {step + 1}: held-out loss {value:.4f} nats per token")


def random_windows(tokens: np.ndarray, context: int, batch_size: int, generator):
    """One epoch of batches [B,T+1] in random order, from windows laid at a random offset."""
    starts = np.arange(generator.integers(context), tokens.size - context, context)
    generator.shuffle(starts)
    for first in range(0, starts.size - batch_size + 1, batch_size):
        yield tokens[starts[first : first + batch_size, None] + np.arange(context + 1)]


def language_model_loss(model: GPT2Model, rows: Tensor) -> Tensor:
    """Mean next-token loss of rows [B,T+1], nats per token; on a GPU under bfloat16 autocast."""
    rows = rows.to(model.word_embedding.weight.device)
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.is_cuda):
        h = model(rows[:, :-1])["last_hidden_state"]  # [B,T,C]
        logits = model.hidden_state_to_token(h)  # [B,T,V]
        return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: GPT2Model, tokens: np.ndarray, batch_size: int) -> float:
    """Mean loss over windows of the model's whole context, nats per token."""
    context = model.config.n_positions
    starts = np.arange(0, tokens.size - context, context)
    total = 0.0
    for first in range(0, starts.size, batch_size):
        rows = tokens[starts[first : first + batch_size, None] + np.arange(context + 1)]
        loss = language_model_loss(model, torch.from_numpy(rows))
        total += loss.item() * len(rows)
    return total / starts.size


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
