"""Training steps of LoRA on all linear layers: this project beside transformers + PEFT.

    python -m tests.benchmarks.train_step --task paraphrase --pairs FILE [--random gpt2]
    python -m tests.benchmarks.train_step --task sonnet [--random gpt2]

Both take turns on the same random selection, with dropout 0.1 and AdamW; PEFT has sdpa attention.

paraphrase: rank 8, the logits of the last position only. PEFT gets batches as they come, padded on
the right to their longest row; ours come grouped by length from `PairBatches`, as in a run.
sonnet: rank 4, the next-token loss of the real tokens. Both get the same batches.

Peak memory is that of a process of its own for each, with the model and the steps of one turn.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets import (
    PairBatches,
    SonnetBatches,
    answer_ids,
    make_batch,
    read_pairs,
    read_sonnets,
    tokenize_pairs,
    tokenize_sonnets,
)
from finetune.arguments import DATA
from finetune.runtime import Runtime, make_runtime, seed_everything
from models.paraphrase_gpt import ParaphraseGPT, paraphrase_loss
from models.pretrained import BUNDLED, load_gpt2, load_tokenizer
from models.sonnet_gpt import SonnetGPT, sonnet_loss
from modules.lora import LoRAConfig, add_lora
from tests.benchmarks.peers import (
    add_model_arguments,
    find_model,
    report,
    take_turns,
    with_peft,
)

Batch = dict[str, Tensor]
OURS, PEFT = "this project", "transformers + PEFT"


class PeftParaphrase(nn.Module):
    """Hugging Face's GPT-2 with PEFT's LoRA and the same cloze head."""

    def __init__(self, folder: Path, answers: tuple[int, int]):
        super().__init__()
        self.model, self.answers = with_peft(folder, rank=8), list(answers)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, right_padded: bool) -> Tensor:
        gpt = self.model.base_model.model
        h = gpt.transformer(input_ids, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.sum(1) - 1
        return gpt.lm_head(h[torch.arange(len(h), device=h.device), last])[:, self.answers]


class PeftSonnet(nn.Module):
    """Hugging Face's GPT-2 with PEFT's LoRA and the usual language-model loss."""

    def __init__(self, folder: Path):
        super().__init__()
        self.model = with_peft(folder, rank=4)

    def forward(self, input_ids, attention_mask, positions, targets) -> Tensor:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return F.cross_entropy(logits.flatten(0, 1)[positions].float(), targets)


@dataclass
class Work:
    """What one of the peers does: its model, its loss, and the batches of a turn."""

    model: nn.Module
    loss: Callable[[nn.Module, Batch], Tensor]
    batches: list[Batch]


def make_work(args: argparse.Namespace, folder: Path, name: str) -> Work:
    """The work of the peer called `name`."""
    tokenizer = load_tokenizer(BUNDLED)
    gpt = load_gpt2(folder)
    if args.task == "sonnet":
        poems = tokenize_sonnets(read_sonnets(DATA / "sonnets.txt"), tokenizer, 512)
        batches = list(SonnetBatches(poems[: args.n], args.batch_size, seed=0).epoch(0))
        if name == PEFT:
            return Work(PeftSonnet(folder), sonnet_loss, batches)
        add_lora(gpt, LoRAConfig(rank=4))
        return Work(SonnetGPT(gpt), sonnet_loss, batches)
    pairs = read_pairs(args.pairs, labelled=True, limit=args.n)
    data = tokenize_pairs(pairs, tokenizer, gpt.config.n_positions)
    order = np.random.default_rng(0).permutation(len(data)).reshape(-1, args.batch_size)
    batches = [make_batch(data, rows) for rows in order]
    if name == PEFT:
        return Work(PeftParaphrase(folder, answer_ids(tokenizer)), paraphrase_loss, batches)
    if name == OURS:
        batches = list(PairBatches(data, args.batch_size, seed=0).epoch(0))
    add_lora(gpt, LoRAConfig(rank=8))
    return Work(ParaphraseGPT(gpt, answer_ids(tokenizer)), paraphrase_loss, batches)


def make_turn(work: Work, runtime: Runtime) -> Callable[[], float]:
    """A function that trains on all batches and returns its rate, in pairs or tokens a second."""
    work.model.to(runtime.device).train()
    parameters = [p for p in work.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    amount = sum(len(batch["labels" if "labels" in batch else "targets"]) for batch in work.batches)

    def turn() -> float:
        started = time.perf_counter()
        for batch in work.batches:
            with runtime.autocast():
                loss = work.loss(work.model, runtime.to_device(batch))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()
        return amount / (time.perf_counter() - started)

    return turn


def peak_memory(args: argparse.Namespace, folder: Path, name: str, send) -> None:
    """Run a turn in this process and send what memory it took, in MiB."""
    runtime = make_runtime(args.use_gpu, "auto")
    make_turn(make_work(args, folder, name), runtime)()
    send.send(runtime.peak_memory_mb())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--task", choices=["paraphrase", "sonnet"], default="paraphrase")
    parser.add_argument("--pairs", default=DATA / "sample-pairs-train.csv")
    parser.add_argument("--n", type=int, help="examples in a turn (480 pairs, 128 poems)")
    parser.add_argument("--batch_size", type=int, help="(12 pairs, 4 poems)")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--use_gpu", action="store_true")
    args = parser.parse_args()
    paraphrase = args.task == "paraphrase"
    args.n = args.n or (480 if paraphrase else 128)
    args.batch_size = args.batch_size or (12 if paraphrase else 4)
    runtime = make_runtime(args.use_gpu, "auto")
    seed_everything(0)
    folder = find_model(args)
    names = [OURS, *["this project, batches as they come"] * paraphrase, PEFT]

    memory = {}
    spawn = multiprocessing.get_context("spawn")
    for name in names:
        receive, send = spawn.Pipe(duplex=False)
        process = spawn.Process(target=peak_memory, args=(args, folder, name, send))
        process.start()
        memory[name] = receive.recv()
        process.join()
    turns = {name: make_turn(make_work(args, folder, name), runtime) for name in names}
    unit = "pairs/s" if paraphrase else "tokens/s"
    report(take_turns(turns, args.turns), unit, PEFT, **{"MiB at most": memory})


if __name__ == "__main__":
    main()
