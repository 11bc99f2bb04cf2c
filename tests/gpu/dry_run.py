"""The scripts' training and decoding steps, run on fake CUDA tensors without a GPU.

`main` runs in a separate process, which has loaded cuda_stub.so, and prints a JSON object.
"""

import contextlib
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from data.pairs import Pairs
from datasets import TokenizedPairs, TokenizedSonnet, pair_batch, sonnet_batch
from finetune.generation import LineCounter, Sequence, generate
from finetune.loop import FitConfig, Trainer
from finetune.runtime import PRECISIONS, Runtime, RuntimeConfig
from finetune.sampling import SamplingConfig
from models.config import SIZES, GPT2Config
from models.gpt2 import GPT2Model
from models.paraphrase_gpt import ParaphraseGPT, paraphrase_loss
from models.sonnet_gpt import SonnetGPT, sonnet_loss
from modules.adapters import trainable
from modules.lora import LoRAConfig, add_lora
from modules.reft import TYPES, ReFTConfig, add_reft
from tests.gpu.fake_cuda import CUDA, Kernels, fake_cuda

SMALL, GPT2 = (64, 2, 2), SIZES["gpt2"]  # width, layers, heads


@dataclass(frozen=True)
class Case:
    """A training step of a script: task, adapter, and the flags that change what it computes."""

    task: str = "paraphrase"
    adapter: str = "lora"
    precision: str = "bf16"
    positions: str = "all"
    checkpointing: bool = False
    grad_clip: float = 0.0
    size: tuple[int, int, int] = SMALL

    @property
    def name(self) -> str:
        """Task, adapter, precision, and any other setting that differs from the default."""
        default = Case()
        return " ".join(
            str(value) if isinstance(value, str) else f"{key}={value}"
            for key, value in asdict(self).items()
            if value != getattr(default, key) or key in ("task", "adapter", "precision")
        )


TASKS, ADAPTERS = ("paraphrase", "sonnet"), ("lora", *TYPES)
CASES = [Case(*case) for case in itertools.product(TASKS, ADAPTERS, PRECISIONS)]
CASES += [Case(task, adapter, checkpointing=True) for task in TASKS for adapter in ADAPTERS]
CASES += [Case(task, adapter, positions="f2+l3") for task in TASKS for adapter in TYPES]
CASES += [Case(adapter=adapter, grad_clip=1.0) for adapter in ("lora", "loreft")]
CASES += [Case(precision="fp16", grad_clip=1.0)]
STEPS = {
    "pairs, LoRA": Case(size=GPT2),
    "pairs, ReFT adapter": Case(adapter="adapter", size=GPT2),
    "pairs, LoReFT": Case(adapter="loreft", size=GPT2),
    "sonnets, LoRA": Case("sonnet", size=GPT2),
    "sonnets, ReFT adapter": Case("sonnet", "adapter", size=GPT2),
}
PEERS = ("pairs, LoRA", "sonnets, LoRA")
TOKENS = {"a token, LoRA": "lora", "a token, LoReFT": "loreft", "a token, no adapter": "none"}
WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "reads a value": lambda loss: loss * loss.item(),
    "copies to the host": lambda loss: loss + loss.detach().cpu().sum().to(CUDA),
    "mixes devices": lambda loss: (loss + torch.ones(3)).sum(),
}
ANSWERS = (3919, 8505)
NO_GRAPHS = RuntimeConfig(no_graphs=True)  # they need a GPU to be recorded


def host_batch(task: str) -> dict[str, Tensor]:
    """A batch on the host, as large as the scripts' batches, with rows of different lengths."""
    if task == "sonnet":
        return sonnet_batch([TokenizedSonnet([1] * length, 30) for length in (130, 155, 140, 120)])
    lengths = np.arange(33, 45)  # 12 rows
    starts = np.concatenate([[0], lengths.cumsum()[:-1]])
    data = TokenizedPairs(
        Pairs(None),
        labels=np.zeros(len(lengths), dtype=np.int64),
        tokens=np.ones(lengths.sum(), dtype=np.int32),
        starts=starts,
        lengths=lengths,
    )
    return pair_batch(data, np.arange(len(lengths)))


def make_gpt(adapter: str, size: tuple[int, int, int], positions: str = "all") -> GPT2Model:
    """A GPT-2 with fake weights on the device."""
    with CUDA:
        gpt = GPT2Model(GPT2Config(50257, 1024, *size))
        if adapter == "lora":
            add_lora(gpt, LoRAConfig())
        elif adapter != "none":
            add_reft(gpt, ReFTConfig(adapter, positions=positions))
    return gpt


def train(
    model: nn.Module, loss: Callable[..., Tensor], batch: dict[str, Tensor], case: Case
) -> dict:
    """The faults of a training step, and the number of kernels that it launches.

    At gpt2 size the second step is counted, because the first creates the optimizer's state.
    """
    faults = set()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-4, eps=1e-6, fused=True)
    config = FitConfig(grad_clip=case.grad_clip)
    runtime = Runtime(CUDA, PRECISIONS[case.precision], config=NO_GRAPHS)
    trainer = Trainer(model.train(), loss, optimizer, config, 10, runtime)
    for _ in range(2 if case.size == GPT2 else 1):
        with Kernels() as kernels:
            trainer.backward(batch)
            for grad in (parameter.grad for parameter in trainer.trainable):
                if (grad.dtype, grad.device) != (torch.float32, CUDA):
                    faults.add(f"a gradient is {grad.dtype} on {grad.device}")
            trainer.step()
        faults |= kernels.copied_to_host
    if "labels" in batch and not case.checkpointing:
        batch = runtime.to_device(batch)
        with Kernels() as recorded:  # what a CUDA graph would record
            trainer.loss_and_gradients(torch.ones((), device=CUDA), **batch)
        faults |= recorded.copied_to_host | recorded.copied_from_host
    return {"launches": kernels.launched, "faults": sorted(faults)}


def our_step(case: Case, change: Callable[[Tensor], Tensor] = lambda loss: loss) -> dict:
    """A training step of this project, with `change` applied to its loss."""
    batch = host_batch(case.task)
    with fake_cuda() as mode:
        gpt = make_gpt(case.adapter, case.size, case.positions)
        gpt.gradient_checkpointing = case.checkpointing
        is_sonnet = case.task == "sonnet"
        model = SonnetGPT(gpt) if is_sonnet else ParaphraseGPT(gpt, ANSWERS)
        Runtime(CUDA, PRECISIONS[case.precision]).prepare(model)
        batch = {name: mode.from_tensor(tensor) for name, tensor in batch.items()}
        loss = sonnet_loss if is_sonnet else paraphrase_loss
        return train(model, lambda *inputs: change(loss(*inputs)), batch, case)


def peft_step(case: Case) -> dict:
    """A training step of transformers + PEFT on the same batch."""
    import peft
    import transformers

    batch, (width, layers, heads) = host_batch(case.task), case.size
    is_sonnet = case.task == "sonnet"
    config = transformers.GPT2Config(n_embd=width, n_layer=layers, n_head=heads)
    lora = peft.LoraConfig(
        r=8,
        lora_dropout=0.1,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
    )
    with fake_cuda() as mode:
        with CUDA:
            peer = peft.get_peft_model(transformers.GPT2LMHeadModel(config), lora)
        batch = {name: mode.from_tensor(tensor) for name, tensor in batch.items()}
        return train(peer, peft_sonnet_loss if is_sonnet else peft_pair_loss, batch, case)


def peft_pair_loss(peer: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The cross-entropy of the two answers, from the last token's logits."""
    gpt, mask = peer.base_model.model, batch["attention_mask"]
    h = gpt.transformer(batch["input_ids"], attention_mask=mask).last_hidden_state
    rows = torch.arange(len(h), device=h.device)
    logits = gpt.lm_head(h[rows, mask.sum(1) - 1])
    answers = torch.stack([logits[:, answer] for answer in ANSWERS], 1)
    return F.cross_entropy(answers.float(), batch["labels"])


def peft_sonnet_loss(peer: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The usual language-model loss."""
    logits = peer(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    states = logits.flatten(0, 1)[batch["token_index"][: len(batch["targets"])]]
    return F.cross_entropy(states.float(), batch["targets"])


class Enough(Exception):
    """Raised to stop generating."""


def a_token(adapter: str) -> dict:
    """Kernels and host reads of `generate` for the third token of 12 rows."""
    counter = LineCounter(frozenset(), lambda ids: "")
    sequences = [Sequence([1] * 30, (row,), 100, counter) for row in range(12)]
    kernels, marks, reads = Kernels(), [(0, 0)], []

    def tolist(tensor: Tensor) -> list:
        reads.append(tensor)
        return np.zeros(tensor.shape, dtype=int).tolist()

    def nonzero(tensor: Tensor) -> Tensor:  # the prompts' mask is all ones
        return torch.arange(tensor.numel(), device=tensor.device)[:, None]

    def mark(gpt: nn.Module, inputs: object) -> None:
        marks.append((kernels.launched, len(reads)))
        if len(marks) > 4:
            raise Enough
        kernels.copied_from_host.clear()  # such as the random numbers for all tokens

    fakes = mock.patch.multiple(FakeTensor, tolist=tolist, nonzero=nonzero)
    with fake_cuda(), fakes, contextlib.suppress(Enough):
        gpt = make_gpt(adapter, GPT2).eval()
        runtime = Runtime(CUDA, torch.bfloat16, config=NO_GRAPHS)
        runtime.prepare(SonnetGPT(gpt))
        gpt.register_forward_pre_hook(mark)
        with kernels:
            generate(gpt, sequences, 50256, SamplingConfig(), runtime)
    (launched, n_reads), (later, n_later) = marks[-2:]
    faults = sorted(kernels.copied_to_host | kernels.copied_from_host)
    return {"launches": later - launched, "host_reads": n_later - n_reads, "faults": faults}


@torch.no_grad()
def hf_token() -> dict:
    """Kernels that `transformers` launches for the third token of 12 rows, sampled as in `a_token`.

    Its own `generate` cannot run here, because it reads values, which fake tensors do not have.
    """
    import transformers

    width, layers, heads = GPT2
    config = transformers.GPT2Config(n_embd=width, n_layer=layers, n_head=heads)
    prompts = torch.ones(12, 30, dtype=torch.long)
    with fake_cuda() as mode:
        with CUDA:
            peer = transformers.GPT2LMHeadModel(config).eval()
        for parameter in peer.parameters():
            parameter.data = parameter.data.bfloat16()
        ids = new = mode.from_tensor(prompts).to(CUDA)
        mask, cache = torch.ones_like(ids), transformers.DynamicCache(config=config)
        warpers = [transformers.TemperatureLogitsWarper(1.2), transformers.TopPLogitsWarper(0.9)]
        for _ in range(3):
            with Kernels() as kernels:
                position = (mask.cumsum(1) - 1)[:, -new.shape[1] :]
                out = peer(new, attention_mask=mask, position_ids=position, past_key_values=cache)
                scores = out.logits[:, -1].float()
                for warper in warpers:
                    scores = warper(ids, scores)
                new = torch.multinomial(scores.softmax(1), 1)
                ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    return {"launches": kernels.launched, "faults": sorted(kernels.copied_to_host)}


def attempt(step: Callable[..., dict], *arguments: object) -> dict:
    """The step's report, or its error, for example for mixed devices or for reading a value."""
    try:
        return step(*arguments)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        return {"launches": 0, "host_reads": 0, "faults": [f"{type(error).__name__}: {reason}"]}


def main() -> None:
    """Print the reports of all cases by name, as the last line."""
    torch.set_num_threads(1)
    reports = {case.name: attempt(our_step, case) for case in CASES}
    reports |= {name: attempt(our_step, case) for name, case in STEPS.items()}
    reports |= {name: attempt(our_step, Case(), change) for name, change in WRONG.items()}
    reports |= {name: attempt(a_token, adapter) for name, adapter in TOKENS.items()}
    reports |= {f"PEFT: {name}": attempt(peft_step, STEPS[name]) for name in PEERS}
    reports["transformers: a token"] = attempt(hf_token)
    print(json.dumps(reports))
