"""The training loop: accumulation, schedule, a dev pass an epoch, early stopping, resuming."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from datasets import Batches
from finetune.checkpoint import ResumeFile, finite_adapter
from finetune.early_stopping import EarlyStopper
from finetune.ending import Interrupted, held_signals
from finetune.progress import Fitted, Progress
from finetune.runtime import STEADIER, Runtime, random_state, set_random_state
from modules.adapters import load_adapter_state, trainable
from modules.reft import Intervention
from modules.settings import UserError, check_settings, setting

Batch = dict[str, Tensor]

SCHEDULES = {  # name -> share of the learning rate at progress 0..1 after warm-up
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 + 0.5 * math.cos(math.pi * progress),
}


@dataclass(frozen=True)
class FitConfig:
    """How long and how fast to train."""

    epochs: int = setting(3, "passes over the training data", least=1)
    lr: float = setting(1e-4, "learning rate of AdamW", above=0)
    weight_decay: float = setting(0.01, "AdamW's decoupled weight decay", least=0)
    grad_accum: int = setting(1, "batches per optimizer step", least=1)
    grad_clip: float = setting(0.0, "largest gradient norm, 0 is off", least=0)
    lr_schedule: str = setting(
        "constant", "of the learning rate after the warm-up", choices=SCHEDULES
    )
    warmup_ratio: float = setting(
        0.0, "share of all steps in which the learning rate rises", least=0, below=1
    )
    save_every: int = setting(
        500, "steps between two saves of the run's state, 0 saves after each epoch", least=0
    )

    def __post_init__(self):
        check_settings(self)


def fit(
    *,
    model: nn.Module,
    loss_function: Callable[[nn.Module, Batch], Tensor],
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    evaluate: Callable[[], dict[str, float]],
    stopper: EarlyStopper,
    save_best: Callable[[dict[str, Any]], None],
    config: FitConfig,
    runtime: Runtime,
    resume: ResumeFile | None = None,
    log: Callable[[dict[str, float], int], None] = lambda values, step: None,
) -> Fitted:
    """Train what requires a gradient, from the start or from the state in `resume`.

    `evaluate()` gives the dev metrics; `save_best(record)` is called after an epoch that the
    stopper finds the best so far; `log(values, step)` gets losses and metrics after each epoch, and
    the running loss once a second. Raises UserError if a loss or a weight is not finite.
    """
    trainer = Trainer(model, loss_function, optimizer, config, len(batches), runtime)
    progress = Progress()
    report_memory(trainer, batches)
    if resume and resume.state is not None:
        resume.restore(lambda state: _load_state(state, trainer, stopper, progress))
        print(f"resumes after step {trainer.steps:,}, in epoch {progress.epoch + 1}")

    def save() -> None:
        progress.read_losses(skip_infinite=trainer.scaler.is_enabled())
        if resume:
            resume.save(_state(trainer, stopper, progress))

    while progress.epoch < config.epochs and not stopper.should_stop:
        model.train()
        title = f"epoch {progress.epoch + 1}/{config.epochs}"
        train_loss = _train_epoch(trainer, batches, progress, title, save, log)
        metrics = {"train_loss": train_loss} | evaluate()
        record = _record_epoch(trainer, progress, stopper, metrics)
        shown = " ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        print(f"{title}: {shown}{' (best)' if record['is_best'] else ''}")
        log(metrics, trainer.steps)
        if record["is_best"]:
            save_best(record)
        progress.start_epoch()
        save()
        if stopper.should_stop:
            print(f"stopped early: {stopper.waited} epochs without a better {stopper.metric}")
    return Fitted(progress.history, progress.summary(model, runtime))


class Trainer:
    """An optimizer step: accumulation, clipping, schedule, and for float16 loss scaling."""

    def __init__(
        self,
        model: nn.Module,
        loss_function: Callable[[nn.Module, Batch], Tensor],
        optimizer: torch.optim.Optimizer,
        config: FitConfig,
        batches_per_epoch: int,
        runtime: Runtime,
    ):
        self.bare_model, self.model = model, runtime.parallel(model)
        self.loss_function, self.optimizer = loss_function, optimizer
        self.config, self.runtime = config, runtime
        self.trainable = trainable(model)
        factor = lr_factor(config, batches_per_epoch)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        self.interventions = [m for m in model.modules() if isinstance(m, Intervention)]
        self.steps = 0
        half = runtime.autocast_dtype == torch.float16
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=half)

    def backward(
        self, batch: Batch, weight: float = 1.0, n_accumulated: int = 1, is_last: bool = True
    ) -> Tensor:
        """Add the gradient of one of the `n_accumulated` batches of a step; returns its loss.

        `weight` is that of a `Share`. Ranks reduce their gradients with the last batch.
        """
        weight = weight * self.runtime.world_size  # the all-reduce takes the mean
        reduce_later = not is_last and self.runtime.world_size > 1
        with self.model.no_sync() if reduce_later else contextlib.nullcontext():
            with self.runtime.autocast():
                loss = self.loss_function(self.model, self.runtime.to_device(batch))
            self.scaler.scale(loss * weight / n_accumulated).backward()
        return loss.detach()

    def step(self) -> None:
        """Update the weights by the accumulated gradient, and clear it."""
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

    @property
    def skipped_steps(self) -> int:
        """Steps that the loss scaler skipped because a gradient had overflowed."""
        taken = self.optimizer.state.get(self.trainable[0], {}).get("step", 0)
        return self.steps - int(taken)

    def state_dict(self) -> dict[str, Any]:
        """The adapter and all else that a step changes, in plain values and tensors."""
        return {
            "adapter": finite_adapter(self.bare_model),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore from `state_dict`."""
        load_adapter_state(self.bare_model, state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.optimizer.zero_grad()
        self.steps = state["steps"]


def lr_factor(config: FitConfig, batches_per_epoch: int) -> Callable[[int], float]:
    """Factor of the learning rate at a step: a linear warm-up, then the schedule."""
    total = config.epochs * math.ceil(batches_per_epoch / config.grad_accum)
    warmup = math.ceil(config.warmup_ratio * total)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return SCHEDULES[config.lr_schedule]((step - warmup) / max(1, total - warmup))

    return factor


def _state(trainer: Trainer, stopper: EarlyStopper, progress: Progress) -> dict[str, Any]:
    """All that a resumed run needs; `ranks` holds what each rank has for itself."""
    runtime = trainer.runtime
    own = {"progress": progress.state_dict(), "random": random_state(runtime.device)}
    return {
        "trainer": trainer.state_dict(),
        "stopper": stopper.state_dict(),
        "ranks": runtime.gather([own]),
    }


def _load_state(
    state: dict[str, Any], trainer: Trainer, stopper: EarlyStopper, progress: Progress
) -> None:
    own = state["ranks"][trainer.runtime.rank]
    progress.load_state_dict(own["progress"])
    trainer.load_state_dict(state["trainer"])
    stopper.load_state_dict(state["stopper"])
    set_random_state(own["random"], trainer.runtime.device)


def report_memory(trainer: Trainer, batches: Batches) -> None:
    """Run a forward and backward pass on the longest examples and say how much memory it took.

    A batch too large for the memory fails now and not in the middle of an epoch. Weights and random
    generators stay as they were.
    """
    runtime, model = trainer.runtime, trainer.bare_model
    state = random_state(runtime.device)
    model.train()
    trainer.backward(batches.longest(batches.batch_size // runtime.world_size))
    trainer.optimizer.zero_grad()
    set_random_state(state, runtime.device)
    text = f"a training step takes up to {runtime.peak_memory_mb() / 1000:.1f} GB of memory"
    if runtime.device.type == "cuda":
        total = torch.cuda.get_device_properties(runtime.device).total_memory
        text += f", the GPU has {total / 1e9:.1f} GB"
    print(text)


def _record_epoch(
    trainer: Trainer, progress: Progress, stopper: EarlyStopper, metrics: dict[str, float]
) -> dict[str, Any]:
    """Have the stopper judge an epoch's metrics, and add them to the history."""
    if not all(map(math.isfinite, metrics.values())):
        raise UserError(f"epoch {progress.epoch + 1}: the metrics are {metrics}: {STEADIER}")
    record = {"epoch": progress.epoch + 1, **metrics}
    if trainer.scaler.is_enabled():
        record["skipped_steps"] = trainer.skipped_steps
    record["is_best"] = stopper.update(metrics)
    progress.history.append(record)
    return record


def _train_epoch(
    trainer: Trainer,
    batches: Batches,
    progress: Progress,
    title: str,
    save: Callable[[], None],
    log: Callable[[dict[str, float], int], None],
) -> float:
    """The rest of an epoch; returns the mean training loss of its examples.

    Saves every so many steps, at the end, and when a signal asks the run to end.
    """
    config, runtime = trainer.config, trainer.runtime
    accum, skip_infinite = config.grad_accum, trainer.scaler.is_enabled()
    started = shown = time.perf_counter()
    seconds_before = progress.seconds
    rest = islice(batches.epoch(progress.epoch), progress.batches, None)
    bar = tqdm(
        desc=title,
        total=batches.n_examples,
        initial=progress.examples,
        unit=batches.unit,
        disable=not runtime.is_main,
    )
    with bar, held_signals() as signal_came:
        for i, (batch, share) in enumerate(rest, progress.batches):
            n_accumulated = min(accum, len(batches) - i // accum * accum)
            is_last = i % accum == n_accumulated - 1
            loss = trainer.backward(batch, share.weight, n_accumulated, is_last)
            progress.count(trainer.steps + 1, batch, share, loss)
            bar.update(share.n_examples)
            if not is_last:
                continue
            trainer.step()
            now = time.perf_counter()
            progress.seconds = seconds_before + now - started
            if config.save_every and trainer.steps % config.save_every == 0:
                save()
            if signum := runtime.largest(signal_came()):
                save()
                raise Interrupted(signum)
            if now - shown > 1:
                shown = now
                if math.isfinite(running := progress.read_losses(skip_infinite)):
                    bar.set_postfix(loss=f"{running:.4f}", refresh=False)
                    log({"running_train_loss": running}, trainer.steps)
        save()
        train_loss = progress.end_epoch(runtime)
        bar.set_postfix(loss=f"{train_loss:.4f}")
    return train_loss
