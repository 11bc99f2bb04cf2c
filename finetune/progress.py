"""Training progress, and the bars that show it."""

import math
import sys
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from datasets import Share
from finetune.runtime import STABILITY_ADVICE, Runtime
from modules.adapters import count_parameters
from modules.settings import UserError


class Fitted(NamedTuple):
    """The result of training."""

    history: list[dict[str, Any]]  # one record per epoch
    measured: dict[str, float]  # sizes, rates and memory


@dataclass
class Progress:
    """A rank's training progress; plain values once the losses are read."""

    history: list[dict[str, Any]] = field(default_factory=list)  # one record per finished epoch
    steps: int = 0  # of the optimizer, in all epochs
    batches: int = 0  # of the current epoch, like the two sums
    loss_sum: float = 0.0
    weight_sum: float = 0.0  # of the losses in `loss_sum`
    tokens: int = 0  # in all epochs, without padding
    seconds: float = 0.0  # in all epochs, without the dev passes
    unread: list[tuple[int, float, Tensor]] = field(default_factory=list)  # step, weight, loss

    @property
    def epoch(self) -> int:
        """The current epoch, from 0."""
        return len(self.history)

    def count(self, batch: dict[str, Tensor], share: Share, loss: Tensor) -> None:
        """Count a batch of the next optimizer step."""
        self.batches += 1
        self.tokens += int(batch["attention_mask"].sum()) if share.weight else 0
        self.unread.append((self.steps + 1, share.n_targets * share.weight, loss))

    def read_losses(self, skip_infinite: bool) -> float:
        """Add up the losses still on the device, all at once since a read waits for a GPU.

        Returns the mean. Raises UserError for a loss that is not finite, unless told to skip it.
        """
        unread, self.unread = self.unread, []
        values = torch.stack([loss for *_, loss in unread]).tolist() if unread else []
        for (step, weight, _), loss in zip(unread, values, strict=True):
            if math.isfinite(loss):
                self.loss_sum += weight * loss
                self.weight_sum += weight
            elif not skip_infinite:
                raise UserError(f"step {step}: the training loss is {loss}: {STABILITY_ADVICE}")
        return self.loss_sum / self.weight_sum if self.weight_sum else math.nan

    def mean_loss(self, runtime: Runtime) -> float:
        """The mean loss of the epoch's targets, over all ranks."""
        sums = runtime.gather([(self.loss_sum, self.weight_sum)])
        loss_sum, weight_sum = map(sum, zip(*sums, strict=True))
        if not weight_sum:
            raise UserError(f"every loss of epoch {self.epoch + 1} overflows: {STABILITY_ADVICE}")
        return loss_sum / weight_sum

    def end_epoch(self, record: dict[str, Any]) -> None:
        """Add the epoch's record and begin the next epoch."""
        self.history.append(record)
        self.batches, self.loss_sum, self.weight_sum = 0, 0.0, 0.0

    def measured(self, model: nn.Module, n_examples: int, runtime: Runtime) -> dict[str, float]:
        """Sizes, rates and memory of finished training, with `n_examples` per epoch."""
        trainable_parameters, total_parameters = count_parameters(model)
        tokens = sum(runtime.gather([self.tokens]))
        return {
            "trainable_parameters": trainable_parameters,
            "total_parameters": total_parameters,
            "train_seconds": round(self.seconds, 2),
            "examples_per_second": round(self.epoch * n_examples / self.seconds, 2),
            "tokens_per_second": round(tokens / self.seconds, 1),
            "peak_memory_mb": round(runtime.peak_memory_mb(), 1),
            "processes": runtime.world_size,
        }


def bar(*items: Any, **about: Any) -> tqdm:
    """A progress bar; if stderr is not a terminal, 80 columns wide, every 30 seconds."""
    if sys.stderr.isatty():
        return tqdm(*items, dynamic_ncols=True, **about)
    return tqdm(*items, ncols=80, mininterval=30, maxinterval=30, delay=30, **about)
