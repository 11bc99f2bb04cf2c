"""Early stopping: the one place that says which epoch is best and when to stop."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EarlyStoppingConfig:
    """Stop after `patience` epochs (0: never) that together gain less than `min_improvement`."""

    early_stopping_patience: int = 5
    min_improvement: float = 0.01


class EarlyStopper:
    """Follows one dev metric; `mode` is "max" where more is better, "min" where less is."""

    def __init__(self, metric: str, mode: str, config: EarlyStoppingConfig):
        self.metric = metric
        self.sign = {"max": 1.0, "min": -1.0}[mode]
        self.config = config
        self.best = self.reference = float("-inf")  # signed: more is better
        self.waited = 0

    def update(self, metrics: dict[str, float]) -> bool:
        """Take an epoch's dev metrics; True where it is the best so far (a NaN never is)."""
        value = self.sign * metrics[self.metric]
        if value >= self.reference + self.config.min_improvement:
            self.reference, self.waited = value, 0
        else:
            self.waited += 1
        is_best = value > self.best
        self.best = max(self.best, value) if is_best else self.best
        return is_best

    def state(self) -> dict[str, float]:
        """What `update` changes."""
        return {name: getattr(self, name) for name in ("best", "reference", "waited")}

    def load_state(self, state: dict[str, float]) -> None:
        """Stand where `state` was taken."""
        self.best, self.reference, self.waited = (
            state[name] for name in ("best", "reference", "waited")
        )

    @property
    def should_stop(self) -> bool:
        """True once `patience` epochs have passed without a gain of `min_improvement`."""
        return 0 < self.config.early_stopping_patience <= self.waited
