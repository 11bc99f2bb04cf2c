"""Early stopping: the one place that decides which epoch is best and when to stop."""

from dataclasses import dataclass

from modules.settings import check_settings, setting


@dataclass(frozen=True)
class EarlyStoppingConfig:
    """How many epochs to wait for how much improvement; a patience of 0 never stops a run."""

    early_stopping_patience: int = setting(
        5, "stop after N epochs with a total gain below --min_improvement, 0 is off", least=0
    )
    min_improvement: float = setting(
        0.01, "smallest gain that counts, in dev accuracy (0-1) or validation loss (nats)", least=0
    )

    def __post_init__(self):
        check_settings(self)


class EarlyStopper:
    """Tracks one dev metric; `mode` is "max" if higher is better, "min" if lower is."""

    def __init__(self, metric: str, mode: str, config: EarlyStoppingConfig):
        self.metric = metric
        self.sign = {"max": 1.0, "min": -1.0}[mode]
        self.config = config
        # Signed, so that higher is better; the reference is the last value that counts as a gain.
        self.best = self.reference = float("-inf")
        self.waited = 0

    def update(self, metrics: dict[str, float]) -> bool:
        """Add an epoch's dev metrics; returns True if it is the best so far (a NaN never is)."""
        value = self.sign * metrics[self.metric]
        least = self.reference + self.config.min_improvement - 1e-9  # not missed by rounding
        if value > self.reference and value >= least:
            self.reference, self.waited = value, 0
        else:
            self.waited += 1
        is_best = value > self.best
        self.best = value if is_best else self.best
        return is_best

    @property
    def should_stop(self) -> bool:
        """True once the patience is used up."""
        return 0 < self.config.early_stopping_patience <= self.waited
