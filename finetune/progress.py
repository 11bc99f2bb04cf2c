"""How far a training has come: losses, examples, tokens, seconds, and the history of its epochs."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from datasets import Share
from finetune.runtime import STEADIER, Runtime
from modules.adapters import count_parameters
from modules.settings import UserError


class Fitted(NamedTuple):
    """The result of a training."""

    history: list[dict[str, Any]]  # a record for each epoch
    measured: dict[str, float]  # sizes, rates and memory


@dataclass
class Progress:
    """How far a rank's training has come."""

    epoch: int = 0  # the current one, from 0
    batches: int = 0  # of it, as all of the following down to `tokens`
    examples: int = 0  # of all ranks
    loss_sum: float = 0.0
    weight_sum: float = 0.0  # of the losses in it
    tokens: int = 0  # without padding
    history: list[dict[str, Any]] = field(default_factory=list)  # a record for each epoch
    seconds: float = 0.0  # without the dev passes
    all_examples: int = 0
    all_tokens: int = 0  # of all ranks
    unread: list[tuple[int, float, Tensor]] = field(default_factory=list)  # step, weight, loss

    def count(self, step: int, batch: dict[str, Tensor], share: Share, loss: Tensor) -> None:
        """Count a batch of an optimizer step."""
        self.batches += 1
        self.examples += share.n_examples
        self.tokens += int(batch["attention_mask"].sum()) if share.weight else 0
        self.unread.append((step, share.n_examples * share.weight, loss))

    def read_losses(self, skip_infinite: bool) -> float:
        """Sum up the losses that are still on the device, since each read waits for a GPU.

        Returns the mean. Raises UserError for a loss that is not finite unless it is to be skipped.
        """
        unread, self.unread = self.unread, []
        values = torch.stack([loss for *_, loss in unread]).tolist() if unread else []
        for (step, weight, _), loss in zip(unread, values, strict=True):
            if math.isfinite(loss):
                self.loss_sum += weight * loss
                self.weight_sum += weight
            elif not skip_infinite:
                raise UserError(f"step {step}: the training loss is {loss}: {STEADIER}")
        return self.loss_sum / self.weight_sum if self.weight_sum else math.nan

    def end_epoch(self, runtime: Runtime) -> float:
        """Add up the epoch of all ranks; returns the mean loss of its examples."""
        sums = runtime.gather([(self.loss_sum, self.weight_sum, self.tokens)])
        loss_sum, weight_sum, tokens = map(sum, zip(*sums, strict=True))
        if not weight_sum:
            raise UserError(f"every loss of epoch {self.epoch + 1} overflows: {STEADIER}")
        self.all_examples += self.examples
        self.all_tokens += tokens
        return loss_sum / weight_sum

    def start_epoch(self) -> None:
        """Begin the next epoch."""
        self.epoch += 1
        self.batches = self.examples = self.tokens = 0
        self.loss_sum = self.weight_sum = 0.0

    def summary(self, model: nn.Module, runtime: Runtime) -> dict[str, float]:
        """Sizes, rates and memory, as the metrics file names them."""
        trainable_parameters, total_parameters = count_parameters(model)
        return {
            "trainable_parameters": trainable_parameters,
            "total_parameters": total_parameters,
            "train_seconds": round(self.seconds, 2),
            "examples_per_second": round(self.all_examples / self.seconds, 2),
            "tokens_per_second": round(self.all_tokens / self.seconds, 1),
            "peak_memory_mb": round(runtime.peak_memory_mb(), 1),
            "processes": runtime.world_size,
        }

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain values, once the losses are read."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "unread"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore from `state_dict`."""
        vars(self).update(vars(Progress(**state)))
