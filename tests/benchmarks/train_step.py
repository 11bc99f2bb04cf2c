"""Pairs per second of LoRA training: this project beside transformers + PEFT.

    python -m tests.benchmarks.train_step --pairs FILE [--model_path FOLDER]

Both take turns on the same random selection of pairs, with rank 8 on all linear layers, dropout
0.1, AdamW and the logits of the last position only. PEFT gets batches as they come, padded on the
right to their longest row; ours come grouped by length from `PairBatches`, as in a run.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import peft
import torch
import transformers
from torch import Tensor, nn

from datasets import PairBatches, answer_ids, make_batch, read_pairs, tokenize_pairs
from finetune.runtime import make_runtime, seed_everything
from models.paraphrase_gpt import ParaphraseGPT, paraphrase_loss
from models.pretrained import BUNDLED, find_checkpoint, load_gpt2, load_tokenizer
from modules.lora import LoRAConfig, add_lora

Batch = dict[str, Tensor]


class PeftParaphrase(nn.Module):
    """Hugging Face's GPT-2 with PEFT's LoRA and the same cloze head."""

    def __init__(self, folder, answers: tuple[int, int]):
        super().__init__()
        base = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
        config = peft.LoraConfig(
            r=8,
            lora_alpha=16,
            lora_dropout=0.1,
            target_modules=["c_attn", "c_proj", "c_fc"],
            fan_in_fan_out=True,
        )
        self.model = peft.get_peft_model(base, config)
        self.answers = list(answers)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, right_padded: bool) -> Tensor:
        gpt = self.model.base_model.model
        h = gpt.transformer(input_ids, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.sum(1) - 1
        return gpt.lm_head(h[torch.arange(len(h), device=h.device), last])[:, self.answers]


def stepper(model: nn.Module, runtime) -> Callable[[Batch], None]:
    """One training step as a function of a batch."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    model.train()

    def step(batch: Batch) -> None:
        with runtime.autocast():
            loss = paraphrase_loss(model, runtime.to_device(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def rate(step: Callable[[Batch], None], batches: list[Batch], device: torch.device) -> float:
    """Pairs per second over the batches."""
    started = time.perf_counter()
    for batch in batches:
        step(batch)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return sum(len(b["labels"]) for b in batches) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", required=True, help="labelled question pairs")
    parser.add_argument("--model_path", default=BUNDLED)
    parser.add_argument("--n_pairs", type=int, default=480, help="pairs in a turn")
    parser.add_argument("--batch_size", type=int, default=12)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--use_gpu", action="store_true")
    args = parser.parse_args()
    runtime = make_runtime(args.use_gpu, "auto")
    seed_everything(0)
    folder = find_checkpoint(args.model_path)
    tokenizer = load_tokenizer(folder)
    gpt = load_gpt2(folder)
    pairs = read_pairs(args.pairs, labelled=True, limit=args.n_pairs)
    data = tokenize_pairs(pairs, tokenizer, gpt.config.n_positions)
    order = np.random.default_rng(0).permutation(len(data)).reshape(-1, args.batch_size)
    as_they_come = [make_batch(data, rows) for rows in order]
    grouped = list(PairBatches(data, args.batch_size, seed=0).epoch(0))

    add_lora(gpt, LoRAConfig(rank=8))
    answers = answer_ids(tokenizer)
    peers = {
        "this project": (ParaphraseGPT(gpt, answers), grouped),
        "this project, batches as they come": (None, as_they_come),
        "transformers + PEFT": (PeftParaphrase(folder, answers), as_they_come),
    }
    steps, rates = {}, {name: [] for name in peers}
    for name, (model, _) in peers.items():
        steps[name] = stepper(model.to(runtime.device), runtime) if model else steps["this project"]
    for turn in range(args.turns + 1):  # the first warms up
        for name, (_, batches) in peers.items():
            value = rate(steps[name], batches, runtime.device)
            if turn:
                rates[name].append(value)
    reference = statistics.median(rates["transformers + PEFT"])
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{name:<36} {median:8.1f} pairs/s  {median / reference:5.2f} x PEFT")


if __name__ == "__main__":
    main()
