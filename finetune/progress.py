"""Where a training stands: what was trained on, and how far it has come."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from datasets import Share
from finetune.runtime import STEADIER, RunError, Runtime, random_state
from modules.adapters import count_parameters


@dataclass
class Progress:
    """Where a process's training stands after an optimizer step."""

    epoch: int = 0  # the one in training, from 0
    batches: int = 0  # of it, as all of the following down to `tokens`
    examples: int = 0  # of all processes
    loss_sum: float = 0.0
    weight_sum: float = 0.0  # of the losses in it
    tokens: int = 0  # real ones, padding not counted
    history: list[dict[str, Any]] = field(default_factory=list)  # a record for each epoch
    seconds: float = 0.0  # without the dev passes
    all_examples: int = 0
    all_tokens: int = 0  # of all processes
    random: dict[str, Any] = field(default_factory=dict)  # the generators' states
    unread: list[tuple[int, float, Tensor]] = field(default_factory=list)  # step, weight, loss

    def add(
        self,
        step: int,
        group: list[tuple[Tensor, Share, int]],
        seconds: float,
        runtime: Runtime,
    ) -> None:
        """Count the batches of an optimizer step: loss, share and tokens of each."""
        for loss, share, tokens in group:
            self.batches += 1
            self.examples += share.n_examples
            self.tokens += tokens
            self.unread.append((step, share.n_examples * share.weight, loss))
        self.seconds += seconds
        self.random = random_state(runtime.device)

    def read_losses(self, skip: bool) -> float:
        """Sum up the losses that are on the device still, since each reading makes a GPU wait.

        Returns the mean. A loss that is not finite is left out with `skip`, else it is a RunError.
        """
        unread, self.unread = self.unread, []
        values = torch.stack([loss for *_, loss in unread]).tolist() if unread else []
        for (step, weight, _), loss in zip(unread, values, strict=True):
            if math.isfinite(loss):
                self.loss_sum += weight * loss
                self.weight_sum += weight
            elif not skip:
                raise RunError(f"step {step}: the training loss is {loss}: {STEADIER}")
        return self.loss_sum / self.weight_sum if self.weight_sum else math.nan

    def plain(self) -> dict[str, Any]:
        """All of it as plain values and tensors, once the losses are read."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "unread"}

    def end_epoch(self, runtime: Runtime) -> float:
        """Count the whole epoch of all processes; returns the mean loss of its examples."""
        sums = runtime.gather([(self.loss_sum, self.weight_sum, self.tokens)])
        loss_sum, weight_sum, tokens = map(sum, zip(*sums, strict=True))
        if not weight_sum:
            raise RunError(f"every loss of epoch {self.epoch + 1} overflows: {STEADIER}")
        self.all_examples += self.examples
        self.all_tokens += tokens
        return loss_sum / weight_sum

    def start_epoch(self) -> None:
        """Stand at the start of the next epoch."""
        self.epoch += 1
        self.batches = self.examples = self.tokens = 0
        self.loss_sum = self.weight_sum = 0.0

    def summary(self, model: nn.Module, runtime: Runtime) -> dict[str, float]:
        """Sizes, rates and memory, as the metrics file names them."""
        trainable, total = count_parameters(model)
        return {
            "trainable_parameters": trainable,
            "total_parameters": total,
            "train_seconds": round(self.seconds, 2),
            "examples_per_second": round(self.all_examples / self.seconds, 2),
            "tokens_per_second": round(self.all_tokens / self.seconds, 1),
            "peak_memory_mb": round(runtime.peak_memory_mb(), 1),
            "processes": runtime.world_size,
        }
