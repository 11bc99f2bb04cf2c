"""The training loop: accumulation, schedule, dev pass per epoch, early stopping, resuming."""

import contextlib
import math
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from datasets import Batches, pad_to_few_shapes
from finetune.checkpoint import ResumeFile, finite_adapter
from finetune.early_stopping import EarlyStopper
from finetune.ending import Interrupted, deferred_signals
from finetune.progress import Fitted, Progress, bar
from finetune.runtime import STABILITY_ADVICE, DelayedMax, Runtime, random_state, set_random_state
from modules.adapters import load_adapter_state, trainable
from modules.cuda_graphs import CUDAGraphs
from modules.reft import orthonormalize
from modules.settings import UserError, check_settings, setting

Batch = dict[str, Tensor]
Log = Callable[[dict[str, float], int], None]

SMALLEST_SCALE = 1e-4  # of float16 losses, as in fairseq: reached after 30 skipped steps in a row

SCHEDULES = {  # name -> factor of the learning rate at progress 0..1 after warm-up
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
    lr_schedule: str = setting("constant", "learning rate after the warm-up", choices=SCHEDULES)
    warmup_ratio: float = setting(
        0.0, "share of all steps in which the learning rate rises linearly", least=0, below=1
    )
    save_every: int = setting(
        500, "steps between saves of the run's state, 0 saves after each epoch only", least=0
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
    log: Log = lambda values, step: None,
) -> Fitted:
    """Train the parameters that require a gradient, from scratch or from the state in `resume`.

    `evaluate()` returns the dev metrics; `save_best(record)` is called after each epoch that is
    the stopper's best so far; `log(values, step)` receives losses and metrics after each epoch, and
    the running loss once a second. Raises UserError if a loss or a weight is not finite.
    """
    batches = batches.shard(runtime.rank, runtime.world_size)
    trainer = Trainer(model, loss_function, optimizer, config, len(batches), runtime)
    report_memory(trainer, batches)
    if resume and resume.state is not None:
        resume.restore(lambda state: _load_state(state, trainer, stopper))
    progress = trainer.progress
    if progress.steps:
        print(f"resumes after step {progress.steps:,}, in epoch {progress.epoch + 1}")
    while progress.epoch < config.epochs and not stopper.should_stop:
        model.train()
        metrics = {"train_loss": _train_epoch(trainer, batches, resume, log)} | evaluate()
        record = _end_epoch(trainer, stopper, metrics)
        log(metrics, progress.steps)
        if record["is_best"]:
            save_best(record)
        _save(trainer, resume)
    if stopper.should_stop and progress.epoch < config.epochs:
        gain = f"gain of {stopper.config.min_improvement:g} in {stopper.metric}"
        print(f"stopped early: no {gain} since epoch {progress.epoch - stopper.waited}")
    return Fitted(progress.history, progress.measured(model, batches.n_examples, runtime))


@dataclass(eq=False)
class Trainer:
    """Optimizer steps: accumulation, clipping, schedule, and loss scaling for float16."""

    bare_model: nn.Module  # not wrapped in DistributedDataParallel
    loss_function: Callable[[nn.Module, Batch], Tensor]
    optimizer: torch.optim.Optimizer
    config: FitConfig
    batches_per_epoch: int
    runtime: Runtime

    def __post_init__(self):
        self.model = self.runtime.parallel(self.bare_model)
        self.trainable = trainable(self.bare_model)
        self.is_float16 = self.runtime.autocast_dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.runtime.device.type, enabled=self.is_float16)
        self.progress = Progress()
        self.graphs = None
        if self.runtime.trains_with_graphs:
            self.graphs = CUDAGraphs(self.loss_and_gradients, "training")

    def backward(self, batch: Batch, weight: float = 1.0, is_last: bool = True) -> Tensor:
        """Add a batch's gradient to those of the same step; returns the batch's loss.

        `weight` is its loss's weight in the step. Ranks all-reduce gradients with the last batch.
        """
        if self.graphs:
            n_positions = self.bare_model.gpt.config.n_positions
            if (padded := pad_to_few_shapes(batch, n_positions)) is not None:
                return self._backward_with_graph(padded, weight)
        weight = weight * self.runtime.world_size  # the all-reduce takes the mean
        reduce_later = not is_last and self.runtime.world_size > 1
        with self.model.no_sync() if reduce_later else contextlib.nullcontext():
            with self.runtime.autocast():
                loss = self.loss_function(self.model, self.runtime.to_device(batch))
            self.scaler.scale(loss * weight).backward()
        return loss.detach()

    def _backward_with_graph(self, batch: Batch, weight: float) -> Tensor:
        batch = self.runtime.to_device(batch | {"weight": torch.tensor(weight)})
        loss, *gradients = self.graphs(**batch)
        for parameter in self.trainable:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        torch._foreach_add_([parameter.grad for parameter in self.trainable], gradients)
        return loss.clone()

    def loss_and_gradients(self, weight: Tensor, **batch: Tensor) -> tuple[Tensor, ...]:
        """A batch's loss and gradients, as a function of tensors alone, for a CUDA graph."""
        with self.runtime.autocast():
            loss = self.loss_function(self.model, batch)
        gradients = torch.autograd.grad(self.scaler.scale(loss * weight), self.trainable)
        return loss.detach(), *gradients

    def step(self) -> None:
        """Update the weights by the accumulated gradient, and clear it."""
        factor = lr_factor(self.config, self.batches_per_epoch, self.progress.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * factor
        if self.config.grad_clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.trainable, self.config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=self.graphs is None)
        orthonormalize(self.bare_model)
        self.progress.steps += 1

    def read_losses(self) -> float:
        """The epoch's mean loss so far. This waits for a GPU, so it is not done at every step.

        Raises UserError for a loss that is not finite, or for float16 gradients that never are.
        """
        if self.is_float16 and self.scaler.get_scale() < SMALLEST_SCALE:
            raise UserError(
                f"step {self.progress.steps}: all gradients overflow in float16: {STABILITY_ADVICE}"
            )
        return self.progress.read_losses(skip_infinite=self.is_float16)


def lr_factor(config: FitConfig, batches_per_epoch: int, step: int) -> float:
    """Factor of the learning rate at a step: a linear warm-up, then the schedule."""
    total = config.epochs * math.ceil(batches_per_epoch / config.grad_accum)
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    return SCHEDULES[config.lr_schedule]((step - warmup) / (total - warmup))


def report_memory(trainer: Trainer, batches: Batches) -> None:
    """Run a forward and backward pass on the longest examples and print the memory it took.

    So a batch that is too large fails now and not in the middle of an epoch. Weights and random
    generators are left unchanged.
    """
    runtime = trainer.runtime
    state = random_state(runtime.device)
    trainer.bare_model.train()
    trainer.backward(batches.longest(batches.batch_size))
    trainer.optimizer.zero_grad()
    set_random_state(state, runtime.device)
    text = f"a training step takes up to {runtime.peak_memory_mb():,.0f} MB of memory"
    if runtime.device.type == "cuda":
        text += f", the GPU has {runtime.usable_memory_mb():,.0f} MB for this run"
    print(text)


def _train_epoch(trainer: Trainer, batches: Batches, resume: ResumeFile | None, log: Log) -> float:
    """Train for the rest of an epoch; returns the mean loss of its targets.

    Saves every `save_every` steps, at the end, and when a signal asks the run to stop.
    """
    config, runtime, progress = trainer.config, trainer.runtime, trainer.progress
    rest = islice(batches.epoch(progress.epoch), progress.batches, None)
    examples = bar(
        desc=f"epoch {progress.epoch + 1}/{config.epochs}",
        total=batches.n_examples,
        initial=min(progress.batches * batches.global_size, batches.n_examples),
        unit=batches.unit,
        disable=not runtime.is_main,
    )
    agree = DelayedMax(runtime)
    last = shown = time.perf_counter()
    with examples, deferred_signals() as signal_came:
        while group := list(islice(rest, config.grad_accum)):
            n_targets = sum(share.n_targets for _, share in group)
            for i, (batch, share) in enumerate(group, 1):
                weight = share.weight * (share.n_targets / n_targets)
                loss = trainer.backward(batch, weight, is_last=i == len(group))
                progress.count(batch, share, loss)
                examples.update(share.n_examples)
            trainer.step()
            now = time.perf_counter()
            progress.seconds += now - last
            last = now
            if config.save_every and progress.steps % config.save_every == 0:
                _save(trainer, resume)
            if signum := agree(signal_came()):
                _save(trainer, resume)
                raise Interrupted(signum)
            if now - shown > 1:
                shown = now
                running = trainer.read_losses()
                examples.set_postfix(loss=f"{running:.4f}", refresh=False)
                log({"running_train_loss": running}, progress.steps)
        _save(trainer, resume)
        return progress.mean_loss(runtime)


def _end_epoch(
    trainer: Trainer, stopper: EarlyStopper, metrics: dict[str, float]
) -> dict[str, Any]:
    """Let the stopper judge an epoch; prints and returns the epoch's record."""
    epoch = trainer.progress.epoch + 1
    if not all(map(math.isfinite, metrics.values())):
        raise UserError(f"epoch {epoch}: the metrics are {metrics}: {STABILITY_ADVICE}")
    record = {"epoch": epoch, **metrics}
    if trainer.is_float16:
        taken = int(trainer.optimizer.state.get(trainer.trainable[0], {}).get("step", 0))
        record["skipped_steps"] = trainer.progress.steps - taken  # their gradients overflowed
    record["is_best"] = stopper.update(metrics)
    trainer.progress.end_epoch(record)
    shown = " ".join(f"{name}={value:.4g}" for name, value in metrics.items())
    best = " (best)" if record["is_best"] else ""
    line = f"epoch {epoch}/{trainer.config.epochs}: {shown}{best}"
    print(textwrap.fill(line, 80, subsequent_indent="    "))
    return record


def _save(trainer: Trainer, resume: ResumeFile | None) -> None:
    """Read the losses, and save everything that a resumed run needs."""
    trainer.read_losses()
    if resume is None:
        return
    random = random_state(trainer.runtime.device)
    state = {
        "adapter": finite_adapter(trainer.bare_model),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "ranks": trainer.runtime.gather([{"progress": asdict(trainer.progress), "random": random}]),
    }
    resume.save(state)


def _load_state(state: dict[str, Any], trainer: Trainer, stopper: EarlyStopper) -> None:
    load_adapter_state(trainer.bare_model, state["adapter"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.scaler.load_state_dict(state["scaler"])
    own = state["ranks"][trainer.runtime.rank]
    trainer.progress = Progress(**own["progress"])
    for record in trainer.progress.history:
        stopper.update(record)
    set_random_state(own["random"], trainer.runtime.device)
