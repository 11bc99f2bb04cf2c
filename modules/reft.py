"""ReFT, representation fine-tuning (Wu et al. 2024, arXiv 2404.03592), for a finished GPT-2.

The weights stay as they are; what is learned edits the residual stream h, after the attention
sub-block or after the feed-forward sub-block of a layer, at all positions or at some of the prompt.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.adapters import AdapterError, chosen_layers, freeze_base
from modules.dropout import Dropout

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    # Not F.relu, whose slope at 0 is 0: (No)DiReFT starts at 0 and would stay there.
    "relu": lambda x: x.clamp(min=0),
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}
LOCATIONS = {"attention": "after_attention", "ffn": "after_ffn"}  # -> the place in a GPT2Layer


@dataclass(frozen=True)
class ReFTConfig:
    """Which intervention is put where, and its size."""

    method: ClassVar[str] = "reft"
    type: str = "adapter"
    rank: int = 4
    alpha: float = 16.0  # `adapter` alone is scaled, by alpha/rank
    dropout: float = 0.0  # on what is added to h
    activation: str | None = None  # None is relu for `adapter`, else linear, as in the paper
    locations: tuple[str, ...] = tuple(LOCATIONS)
    layers: tuple[int, ...] | None = None  # None is every layer
    positions: str = "all"

    def __post_init__(self):
        if self.activation is None:
            activation = "relu" if self.type == "adapter" else "linear"
            object.__setattr__(self, "activation", activation)
        for name, chosen, allowed in (
            ("type", [self.type], INTERVENTIONS),
            ("activation", [self.activation], ACTIVATIONS),
            ("locations", self.locations, LOCATIONS),
        ):
            if not chosen or set(chosen) - set(allowed):
                raise AdapterError(f"ReFT {name} {list(chosen)}: allowed are {', '.join(allowed)}")
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise AdapterError(
                f"ReFT rank {self.rank} has to be 1 or more, dropout {self.dropout} in [0, 1)"
            )
        Positions.parse(self.positions)


@dataclass(frozen=True)
class Positions:
    """The first and the last positions of a prompt, each at most half of it."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> "Positions | None":
        """`fN+lM`, `fN` or `lM`; None for `all`: every position, of the prompt and after it."""
        if text == "all":
            return None
        match = re.fullmatch(r"f([0-9]+)(?:\+l([0-9]+))?|l([0-9]+)", text)
        first, *last = match.groups(default="0") if match else "000"
        positions = cls(int(first), max(map(int, last)))
        if positions == cls(0, 0):
            raise AdapterError(f"ReFT positions {text!r}: allowed are all, fN+lM, fN and lM")
        return positions

    def of(self, position_ids: Tensor, prompt_lengths: Tensor) -> Tensor:
        """Bool [B,T,1]; `position_ids` [B,T] or [T] count within a row, `prompt_lengths` [B]."""
        length = prompt_lengths[:, None]
        first, last = ((length // 2).clamp(max=n) for n in (self.first, self.last))
        to_end = length - position_ids  # 1 for the last position of the prompt
        return ((position_ids < first) | ((to_end > 0) & (to_end <= last)))[..., None]


class Intervention(nn.Module):
    """h + dropout(edit(h)) where h is to be edited. The types below say what `edit` is.

    It is computed in float32, autocast or not: edits are small beside h.
    """

    def __init__(self, width: int, config: ReFTConfig):
        super().__init__()
        self.width, self.rank, self.scale = width, config.rank, config.alpha / config.rank
        self.act = ACTIVATIONS[config.activation]
        self.dropout = Dropout(config.dropout)

    def forward(self, h: Tensor, edited: Tensor | None = None) -> Tensor:
        """[B,T,C] to [B,T,C]; `edited` is a bool [B,T,1], None for everywhere."""
        with torch.autocast(h.device.type, enabled=False):
            edit = self.dropout(self.edit(h.float()))
            return h + (edit if edited is None else edit * edited)

    def zeros(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(*shape))

    def orthonormal(self) -> nn.Parameter:
        """[R,C] with orthonormal rows."""
        return nn.Parameter(nn.init.orthogonal_(torch.empty(self.rank, self.width)))


class Adapter(Intervention):
    """h + (alpha/r) W_up act(W_down h), with W_up = 0 at first. This project's own form."""

    def __init__(self, width: int, config: ReFTConfig):
        super().__init__(width, config)
        self.reft_W_down = nn.Parameter(torch.empty(self.rank, width))
        self.reft_W_up = self.zeros(width, self.rank)
        nn.init.kaiming_uniform_(self.reft_W_down, a=math.sqrt(5))

    def edit(self, h: Tensor) -> Tensor:
        return F.linear(self.scale * self.act(F.linear(h, self.reft_W_down)), self.reft_W_up)


class LoReFT(Intervention):
    """h + R^T (act(W h + b) - R h), rows of R orthonormal, with W = R and b = 0 at first.

    Fresh, it is the identity for the linear activation, the paper's; none else can be.
    """

    def __init__(self, width: int, config: ReFTConfig):
        super().__init__(width, config)
        self.reft_R = self.orthonormal()
        self.reft_W = nn.Parameter(self.reft_R.detach().clone())
        self.reft_b = self.zeros(self.rank)

    def edit(self, h: Tensor) -> Tensor:
        Wh, Rh = F.linear(h, torch.cat([self.reft_W, self.reft_R])).chunk(2, -1)
        return (self.act(Wh + self.reft_b) - Rh) @ self.reft_R

    def after_step(self) -> None:
        """Make the rows of R orthonormal again."""
        orthonormalize_(self.reft_R)


class NoReFT(Intervention):
    """h + W2^T (act(W1 h + b) - W2 h): LoReFT without orthonormal rows; W1 = W2, b = 0 at first."""

    def __init__(self, width: int, config: ReFTConfig):
        super().__init__(width, config)
        self.reft_W2 = self.orthonormal()
        self.reft_W1 = nn.Parameter(self.reft_W2.detach().clone())
        self.reft_b = self.zeros(self.rank)

    def edit(self, h: Tensor) -> Tensor:
        W1h, W2h = F.linear(h, torch.cat([self.reft_W1, self.reft_W2])).chunk(2, -1)
        return (self.act(W1h + self.reft_b) - W2h) @ self.reft_W2


class DiReFT(Intervention):
    """h + R^T act(W h + b), rows of R orthonormal, with W = 0 and b = 0 at first."""

    def __init__(self, width: int, config: ReFTConfig):
        super().__init__(width, config)
        self.reft_R = self.orthonormal()
        self.reft_W = self.zeros(self.rank, width)
        self.reft_b = self.zeros(self.rank)

    def edit(self, h: Tensor) -> Tensor:
        return self.act(F.linear(h, self.reft_W, self.reft_b)) @ self.reft_R

    def after_step(self) -> None:
        """Make the rows of R orthonormal again."""
        orthonormalize_(self.reft_R)


class NoDiReFT(Intervention):
    """h + W2^T act(W1 h + b): DiReFT without orthonormal rows; W1 = 0 and b = 0 at first."""

    def __init__(self, width: int, config: ReFTConfig):
        super().__init__(width, config)
        self.reft_W2 = self.orthonormal()
        self.reft_W1 = self.zeros(self.rank, width)
        self.reft_b = self.zeros(self.rank)

    def edit(self, h: Tensor) -> Tensor:
        return self.act(F.linear(h, self.reft_W1, self.reft_b)) @ self.reft_W2


INTERVENTIONS: dict[str, type[Intervention]] = {
    "adapter": Adapter,
    "loreft": LoReFT,
    "noreft": NoReFT,
    "direft": DiReFT,
    "nodireft": NoDiReFT,
}


@torch.no_grad()
def orthonormalize_(R: Tensor) -> None:
    """Make the rows of R [R,C] orthonormal in place: Gram-Schmidt, by the Cholesky factor of RR^T.

    After an optimizer step R is nearly orthonormal still, so one pass is exact to rounding. It
    takes R x R numbers; a parametrization would do as much in every forward and backward.
    """
    L = torch.linalg.cholesky_ex(R @ R.T).L  # cholesky itself makes a GPU wait for its check
    R.copy_(torch.linalg.solve_triangular(L, R, upper=False))


def add_reft(gpt: nn.Module, config: ReFTConfig) -> None:
    """Fill the empty places of a loaded GPT-2's layers and freeze all its weights."""
    width = gpt.config.n_embd
    if config.rank > width:
        raise AdapterError(f"ReFT rank {config.rank} is more than the model's width, {width}")
    for index in chosen_layers(config.layers, len(gpt.gpt_layers)):
        layer = gpt.gpt_layers[index]
        device = layer.out_dense.weight.device
        for location in config.locations:
            intervention = INTERVENTIONS[config.type](width, config).to(device)
            setattr(layer, LOCATIONS[location], intervention.train(layer.training))
    gpt.edit_positions = Positions.parse(config.positions)
    freeze_base(gpt)
