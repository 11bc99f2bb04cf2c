"""The training loop: accumulation, schedule, a dev pass an epoch, early stopping."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from datasets import Share
from finetune.early_stopping import EarlyStopper
from finetune.memory import describe_memory
from finetune.runtime import RunError, Runtime
from modules.adapters import count_parameters

Batch = dict[str, Tensor]

SCHEDULES = {  # name -> share of the learning rate at progress 0..1 after warm-up
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 + 0.5 * math.cos(math.pi * progress),
}


class Batches(Protocol):
    """Training data: `len()` batches an epoch, in an order of its own in every epoch."""

    unit: str  # what an example is called
    n_examples: int
    batch_size: int  # of all processes

    def __len__(self) -> int: ...

    def longest(self, n: int) -> Batch: ...

    def epoch(self, number: int) -> Iterator[tuple[Batch, Share]]: ...


@dataclass(frozen=True)
class FitConfig:
    """How long and how fast to train; an optimizer step takes `grad_accum` batches."""

    epochs: int = 3
    lr: float = 1e-4
    weight_decay: float = 0.01
    grad_accum: int = 1
    grad_clip: float = 0.0  # largest gradient norm, 0 is off
    lr_schedule: str = "constant"
    warmup_ratio: float = 0.0


@dataclass
class Throughput:
    """What was trained on, and how long that took without the dev passes."""

    seconds: float = 0.0
    examples: int = 0
    tokens: int = 0  # real ones, padding not counted

    def summary(self, model: nn.Module, runtime: Runtime) -> dict[str, float]:
        """Sizes, rates and memory, as the metrics file names them."""
        trainable, total = count_parameters(model)
        return {
            "trainable_parameters": trainable,
            "total_parameters": total,
            "train_seconds": round(self.seconds, 2),
            "examples_per_second": round(self.examples / self.seconds, 2),
            "tokens_per_second": round(self.tokens / self.seconds, 1),
            "peak_memory_mb": round(runtime.peak_memory_mb(), 1),
            "processes": runtime.world_size,
        }


class Fitted(NamedTuple):
    """What came of a training."""

    history: list[dict[str, Any]]  # a record for each epoch
    measured: dict[str, float]  # sizes, rates and memory


def fit(
    model: nn.Module,
    loss_function: Callable[[nn.Module, Batch], Tensor],
    train_batches: Batches,
    evaluate: Callable[[], dict[str, float]],
    save_best: Callable[[dict[str, Any]], None],
    config: FitConfig,
    stopper: EarlyStopper,
    runtime: Runtime,
    log: Callable[[dict[str, float], int], None] = lambda values, step: None,
) -> Fitted:
    """Train what requires a gradient.

    `evaluate()` gives the dev metrics; `save_best(record)` is called where the stopper finds an
    epoch the best so far; `log(values, step)` gets the losses and metrics after each epoch, and
    the running loss once a second. Raises RunError where a loss is not finite.
    """
    batch_size = train_batches.batch_size // runtime.world_size
    print(describe_memory(model, loss_function, train_batches.longest, batch_size, runtime))
    updater = Updater(model, loss_function, config, len(train_batches), runtime)
    history, throughput = [], Throughput()
    for epoch in range(config.epochs):
        model.train()
        title = f"epoch {epoch + 1}/{config.epochs}"
        train_loss = _train_epoch(updater, train_batches, epoch, title, throughput, log)
        metrics = evaluate() if math.isfinite(train_loss) else {}
        if not metrics or not all(map(math.isfinite, metrics.values())):
            raise RunError(
                f"{title}: training loss {train_loss}, dev metrics {metrics}: a loss is not "
                "finite, try a lower --lr"
            )
        is_best = stopper.update(metrics)
        record = {"epoch": epoch + 1, "train_loss": train_loss, **metrics, "is_best": is_best}
        history.append(record)
        losses = {name: value for name, value in record.items() if isinstance(value, float)}
        shown = " ".join(f"{name} {value:.4f}" for name, value in losses.items())
        print(f"{title}: {shown}{' (best)' if is_best else ''}")
        log(losses, updater.steps)
        if is_best:
            save_best(record)
        if stopper.should_stop:
            print(f"stopped early: {stopper.waited} epochs without a better {stopper.metric}")
            break
    return Fitted(history, throughput.summary(model, runtime))


class Updater:
    """The optimizer with its schedule, clipping, accumulation and, for float16, loss scaling."""

    def __init__(
        self,
        model: nn.Module,
        loss_function: Callable[[nn.Module, Batch], Tensor],
        config: FitConfig,
        batches_per_epoch: int,
        runtime: Runtime,
    ):
        self.model, self.loss_function = runtime.parallel(model), loss_function
        self.config, self.runtime = config, runtime
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trainable, lr=config.lr, weight_decay=config.weight_decay, eps=1e-6, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lr_factor(config, batches_per_epoch)
        )
        # Modules that hold their weights to a constraint, as LoReFT does, mend them after a step.
        modules = (m for m in model.modules() if hasattr(m, "after_step"))
        self.constrained = list(modules)
        self.steps = 0
        half = runtime.autocast_dtype == torch.float16
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=half)

    def backward(
        self, batch: Batch, weight: float = 1.0, n_accumulated: int = 1, is_last: bool = True
    ) -> Tensor:
        """Add the gradient of one of the `n_accumulated` batches of a step; gives its loss.

        `weight` is that of a `Share`. Processes exchange their gradients with the last batch.
        """
        weight = weight * self.runtime.world_size  # the exchange takes the mean
        exchange_later = not is_last and self.runtime.world_size > 1
        with self.model.no_sync() if exchange_later else contextlib.nullcontext():
            with self.runtime.autocast():
                loss = self.loss_function(self.model, self.runtime.to_device(batch))
            self.scaler.scale(loss * weight / n_accumulated).backward()
        return loss.detach()

    def step(self) -> None:
        """Change the weights by the gradient gathered so far, and clear it."""
        if self.config.grad_clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.trainable, self.config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        for module in self.constrained:
            module.after_step()
        self.schedule.step()
        self.steps += 1


def lr_factor(config: FitConfig, batches_per_epoch: int) -> Callable[[int], float]:
    """Factor of the learning rate at a step: a straight warm-up, then the schedule."""
    total = config.epochs * math.ceil(batches_per_epoch / config.grad_accum)
    warmup = math.ceil(config.warmup_ratio * total)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return SCHEDULES[config.lr_schedule]((step - warmup) / max(1, total - warmup))

    return factor


def _train_epoch(
    updater: Updater,
    train_batches: Batches,
    epoch: int,
    title: str,
    throughput: Throughput,
    log: Callable[[dict[str, float], int], None],
) -> float:
    """One pass over the data; returns the mean training loss of its examples."""
    started = shown = time.perf_counter()
    loss_sum, examples, tokens, n_batches = 0.0, 0, 0, len(train_batches)
    grad_accum, runtime = updater.config.grad_accum, updater.runtime
    total, unit = train_batches.n_examples, train_batches.unit
    with tqdm(total=total, desc=title, unit=unit, disable=not runtime.is_main) as bar:
        for i, (batch, share) in enumerate(train_batches.epoch(epoch)):
            in_group = min(grad_accum, n_batches - i // grad_accum * grad_accum)
            is_last = i % grad_accum == in_group - 1
            loss = updater.backward(batch, share.weight, in_group, is_last)
            loss_sum = loss_sum + share.n_examples * share.weight * loss  # stays on the device
            if is_last:
                updater.step()
            examples += share.n_examples
            tokens += int(batch["attention_mask"].sum()) if share.weight else 0
            bar.update(share.n_examples)
            if time.perf_counter() - shown > 1:  # reading the loss makes a GPU wait
                running = float(loss_sum) * runtime.world_size / examples
                bar.set_postfix(loss=f"{running:.4f}", refresh=False)
                log({"running_train_loss": running}, updater.steps)
                shown = time.perf_counter()
        loss_sums, tokens = zip(*runtime.gather([(float(loss_sum), tokens)]), strict=True)
        train_loss = sum(loss_sums) / examples
        bar.set_postfix(loss=f"{train_loss:.4f}")
    throughput.seconds += time.perf_counter() - started
    throughput.examples += examples
    throughput.tokens += sum(tokens)
    return train_loss
