"""The training loop: accumulation, schedule, a dev pass an epoch, early stopping, resuming."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from datasets import Share
from finetune.checkpoint import ResumeFile, finite_adapter
from finetune.early_stopping import EarlyStopper
from finetune.ending import Interrupted, held_signals
from finetune.memory import describe_memory
from finetune.progress import Progress
from finetune.runtime import STEADIER, RunError, Runtime, random_state, set_random_state
from modules.adapters import load_adapter_state
from modules.reft import Intervention

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
    save_every: int = 500  # steps from one save of the run's state to the next, 0 is epochs alone


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
    unfinished: ResumeFile | None = None,
    log: Callable[[dict[str, float], int], None] = lambda values, step: None,
) -> Fitted:
    """Train what requires a gradient, from the start or from where `unfinished` stands.

    `evaluate()` gives the dev metrics; `save_best(record)` is called where the stopper finds an
    epoch the best so far; `log(values, step)` gets the losses and metrics after each epoch, and
    the running loss once a second. Raises RunError where a loss or a weight is not finite.
    """
    batch_size = train_batches.batch_size // runtime.world_size
    print(describe_memory(model, loss_function, train_batches.longest, batch_size, runtime))
    updater = Updater(model, loss_function, config, len(train_batches), runtime)
    progress = _where_it_stands(updater, stopper, train_batches, unfinished)
    save = partial(_save, updater, stopper, progress, unfinished)
    while progress.epoch < config.epochs and not stopper.should_stop:
        model.train()
        title = f"epoch {progress.epoch + 1}/{config.epochs}"
        train_loss = _train_epoch(updater, train_batches, progress, title, save, log)
        metrics = evaluate()
        record = _record_epoch(updater, progress, stopper, {"train_loss": train_loss} | metrics)
        losses = {name: value for name, value in record.items() if isinstance(value, float)}
        shown = " ".join(f"{name} {value:.4f}" for name, value in losses.items())
        print(f"{title}: {shown}{' (best)' if record['is_best'] else ''}")
        log(losses, updater.steps)
        if record["is_best"]:
            save_best(record)
        progress.start_epoch()
        save()
        if stopper.should_stop:
            print(f"stopped early: {stopper.waited} epochs without a better {stopper.metric}")
    return Fitted(progress.history, progress.summary(model, runtime))


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
        self.bare_model, self.model = model, runtime.parallel(model)
        self.loss_function = loss_function
        self.config, self.runtime = config, runtime
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trainable, lr=config.lr, weight_decay=config.weight_decay, eps=1e-6, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lr_factor(config, batches_per_epoch)
        )
        self.interventions = [m for m in model.modules() if isinstance(m, Intervention)]
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
        for intervention in self.interventions:
            intervention.after_step()
        self.schedule.step()
        self.steps += 1

    def state(self) -> dict[str, Any]:
        """Plain values and tensors: the adapter and all that a step changes."""
        return {
            "adapter": finite_adapter(self.bare_model),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "steps": self.steps,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Stand where `state` was taken."""
        load_adapter_state(self.bare_model, state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.optimizer.zero_grad()
        self.steps = state["steps"]

    @property
    def skipped_steps(self) -> int:
        """Steps that the loss scaler left out since a gradient had overflowed."""
        taken = self.optimizer.state.get(self.trainable[0], {}).get("step", 0)
        return self.steps - int(taken)


def lr_factor(config: FitConfig, batches_per_epoch: int) -> Callable[[int], float]:
    """Factor of the learning rate at a step: a straight warm-up, then the schedule."""
    total = config.epochs * math.ceil(batches_per_epoch / config.grad_accum)
    warmup = math.ceil(config.warmup_ratio * total)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return SCHEDULES[config.lr_schedule]((step - warmup) / max(1, total - warmup))

    return factor


def _where_it_stands(
    updater: "Updater",
    stopper: EarlyStopper,
    train_batches: Batches,
    unfinished: ResumeFile | None,
) -> Progress:
    """Set updater, stopper and random generators to where the run was saved, if it was."""
    device = updater.runtime.device
    progress = Progress(random=random_state(device))

    def go_on(common: dict[str, Any], own: dict[str, Any]) -> None:
        nonlocal progress
        progress = Progress(**own)
        updater.load_state(common["updater"])
        stopper.load_state(common["stopper"])
        set_random_state(progress.random, device)

    if unfinished and unfinished.saved and updater.runtime.world_size > 1:
        # DistributedDataParallel orders its sums by the first pass; with three processes and more
        # their last bits would differ without one here.
        updater.backward(train_batches.longest(1))
    if unfinished and unfinished.restore(go_on):
        print(f"going on after step {updater.steps:,}, in epoch {progress.epoch + 1}")
    return progress


def _save(
    updater: "Updater", stopper: EarlyStopper, progress: Progress, unfinished: ResumeFile | None
) -> None:
    progress.read_losses(skip=updater.scaler.is_enabled())
    if unfinished:
        common = {"updater": updater.state(), "stopper": stopper.state()}
        unfinished.save(common, progress.plain())


def _record_epoch(
    updater: Updater, progress: Progress, stopper: EarlyStopper, metrics: dict[str, float]
) -> dict[str, Any]:
    """Have the stopper judge an epoch's metrics, and put them down in the history."""
    if not all(map(math.isfinite, metrics.values())):
        raise RunError(f"epoch {progress.epoch + 1}: the metrics are {metrics}: {STEADIER}")
    record = {"epoch": progress.epoch + 1, **metrics}
    if updater.scaler.is_enabled():
        record["skipped_steps"] = updater.skipped_steps
    record["is_best"] = stopper.update(metrics)
    progress.history.append(record)
    return record


def _train_epoch(
    updater: Updater,
    train_batches: Batches,
    progress: Progress,
    title: str,
    save: Callable[[], None],
    log: Callable[[dict[str, float], int], None],
) -> float:
    """The rest of an epoch; returns the mean training loss of its examples.

    Saves every so many steps, at the end, and when a signal asks the run to end.
    """
    config, runtime = updater.config, updater.runtime
    accum, n_batches = config.grad_accum, len(train_batches)
    skip = updater.scaler.is_enabled()
    counted = shown = time.perf_counter()
    group: list[tuple[Tensor, Share, int]] = []  # what the next step is made of
    batches = islice(train_batches.epoch(progress.epoch), progress.batches, None)
    total, done, unit = train_batches.n_examples, progress.examples, train_batches.unit
    bar = tqdm(None, title, total, initial=done, unit=unit, disable=not runtime.is_main)
    with bar, held_signals() as signal_came:
        for i, (batch, share) in enumerate(batches, progress.batches):
            in_group = min(accum, n_batches - i // accum * accum)
            is_last = i % accum == in_group - 1
            loss = updater.backward(batch, share.weight, in_group, is_last)
            tokens = int(batch["attention_mask"].sum()) if share.weight else 0
            group.append((loss, share, tokens))
            bar.update(share.n_examples)
            now = time.perf_counter()
            if is_last:
                updater.step()
                progress.add(updater.steps, group, now - counted, runtime)
                counted, group = now, []
                if config.save_every and updater.steps % config.save_every == 0:
                    save()
            if signum := runtime.largest(signal_came()):
                save()
                raise Interrupted(signum)
            if now - shown > 1:
                if math.isfinite(running := progress.read_losses(skip)):
                    bar.set_postfix(loss=f"{running:.4f}", refresh=False)
                    log({"running_train_loss": running}, updater.steps)
                shown = now
        save()
        progress.seconds += time.perf_counter() - counted
        train_loss = progress.end_epoch(runtime)
        bar.set_postfix(loss=f"{train_loss:.4f}")
    return train_loss
