"""ReFT, representation fine-tuning (Wu et al. 2024, arXiv 2404.03592), for a finished GPT-2.

The weights stay as they are. What is learned is an intervention on the residual stream h, after the
attention or the feed-forward sub-block of a layer, at all positions or at some of the prompt's.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.adapters import chosen_layers, freeze_base
from modules.settings import UserError, check_settings, setting

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    # Not F.relu, whose slope at 0 is 0: (No)DiReFT starts at 0 and would stay there.
    "relu": lambda x: F.threshold(x, -torch.finfo(x.dtype).tiny, 0.0),
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}
TYPES = ("adapter", "loreft", "noreft", "direft", "nodireft")
LOCATIONS = {"attention": "after_attention", "ffn": "after_ffn"}  # -> hook point of a GPT2Layer


@dataclass(frozen=True)
class ReFTConfig:
    """Which intervention is put where, and its size; raises UserError for other values."""

    method: ClassVar[str] = "reft"
    type: str = setting("adapter", f"{', '.join(TYPES)} [%(default)s]", choices=TYPES)
    rank: int = setting(4, "dimensions of the subspace that is intervened on", least=1)
    alpha: float = setting(16.0, "only the type adapter is scaled, by alpha / rank", above=0)
    dropout: float = setting(0.0, "on what is added to the states", least=0, below=1)
    activation: str | None = setting(
        None,
        "[relu for the type adapter, linear, as in the paper, for the others]",
        choices=ACTIVATIONS,
    )
    locations: tuple[str, ...] = setting(
        ("attention",), "intervene after attention, ffn or both [attention]", choices=LOCATIONS
    )
    layers: tuple[int, ...] | None = setting(
        None, "blocks with interventions, counted from 0 [all]", least=0
    )
    positions: str = setting(
        "all",
        "all, or the prompt's first N and last M, each half of it at most: fN+lM, fN, lM [all]",
        check=lambda text: Positions.parse(text),
    )

    def __post_init__(self):
        if self.activation is None:
            activation = "relu" if self.type == "adapter" else "linear"
            object.__setattr__(self, "activation", activation)
        check_settings(self)


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
        match = re.fullmatch(r"f(?P<first>[0-9]+)|(?:f(?P<f>[0-9]+)\+)?l(?P<last>[0-9]+)", text)
        first = int(match["first"] or match["f"] or 0) if match else 0
        last = int(match["last"] or 0) if match else 0
        if first == last == 0:
            raise UserError(f"ReFT positions {text!r}: allowed are all, fN+lM, fN and lM")
        return cls(first, last)

    def of(self, position: Tensor, prompt_length: Tensor) -> Tensor:
        """Bool [N,1] of tokens at `position` [N] in rows whose prompts have `prompt_length` [N]."""
        half = prompt_length // 2
        to_end = prompt_length - position  # 1 for the last position of the prompt
        first = position < half.clamp(max=self.first)
        last = (to_end > 0) & (to_end <= half.clamp(max=self.last))
        return (first | last)[:, None]


class Intervention(nn.Module):
    """h + dropout(edit(h)). The classes below say what `edit` is.

    It is computed in float32, autocast or not: edits are small beside h.
    """

    def __init__(self, width: int, config: ReFTConfig):
        super().__init__()
        self.width, self.rank, self.scale = width, config.rank, config.alpha / config.rank
        self.act = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h: Tensor, intervened: Tensor | None = None) -> Tensor:
        """[N,C] to [N,C]; where `intervened`, bool [N,1], is False, h stays as it is."""
        with torch.autocast(h.device.type, enabled=False):
            edit = self.dropout(self.edit(h.float()))
            return h + (edit if intervened is None else edit * intervened)

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


class NoReFT(Intervention):
    """h + W2^T (act(W1 h + b) - W2 h): LoReFT without orthonormal rows; W1 = W2, b = 0 at first."""

    def __init__(self, width: int, config: ReFTConfig):
        super().__init__(width, config)
        self.reft_W2 = self.orthonormal()
        self.reft_W1 = nn.Parameter(self.reft_W2.detach().clone())
        self.reft_b = self.zeros(self.rank)

    def edit(self, h: Tensor) -> Tensor:
        W1h, W2h = F.linear(h, self.reft_W1, self.reft_b), F.linear(h, self.reft_W2)
        return (self.act(W1h) - W2h) @ self.reft_W2


class NoDiReFT(Intervention):
    """h + W2^T act(W1 h + b): DiReFT without orthonormal rows; W1 = 0 and b = 0 at first."""

    def __init__(self, width: int, config: ReFTConfig):
        super().__init__(width, config)
        self.reft_W2 = self.orthonormal()
        self.reft_W1 = self.zeros(self.rank, width)
        self.reft_b = self.zeros(self.rank)

    def edit(self, h: Tensor) -> Tensor:
        return self.act(F.linear(h, self.reft_W1, self.reft_b)) @ self.reft_W2


class Orthonormal(Intervention):
    """An intervention through a matrix R [R,C] whose rows are orthonormal after every step."""

    def __init__(self, width: int, config: ReFTConfig):
        super().__init__(width, config)
        self.reft_R = self.orthonormal()
        self.reft_b = self.zeros(self.rank)


class LoReFT(Orthonormal):
    """h + R^T (act(W h + b) - R h), rows of R orthonormal, with W = R and b = 0 at first.

    Fresh, it is the identity for the linear activation, the paper's; none else can be.
    """

    def __init__(self, width: int, config: ReFTConfig):
        super().__init__(width, config)
        self.reft_W = nn.Parameter(self.reft_R.detach().clone())

    def edit(self, h: Tensor) -> Tensor:
        Wh, Rh = F.linear(h, self.reft_W, self.reft_b), F.linear(h, self.reft_R)
        return (self.act(Wh) - Rh) @ self.reft_R


class DiReFT(Orthonormal):
    """h + R^T act(W h + b), rows of R orthonormal, with W = 0 and b = 0 at first."""

    def __init__(self, width: int, config: ReFTConfig):
        super().__init__(width, config)
        self.reft_W = self.zeros(self.rank, width)

    def edit(self, h: Tensor) -> Tensor:
        return self.act(F.linear(h, self.reft_W, self.reft_b)) @ self.reft_R


INTERVENTIONS: dict[str, type[Intervention]] = dict(
    zip(TYPES, (Adapter, LoReFT, NoReFT, DiReFT, NoDiReFT), strict=True)
)


@torch.no_grad()
def orthonormalize_(matrices: list[Tensor]) -> None:
    """Make the rows of each R [R,C] orthonormal in place, of all in one batch.

    This is Gram-Schmidt, by the Cholesky factor of RR^T. After an optimizer step R is nearly
    orthonormal still, so one pass is exact to rounding. It takes R x R numbers; a parametrization
    would do as much in every forward and backward.
    """
    R = torch.stack(matrices)  # [M,R,C]
    L = torch.linalg.cholesky_ex(R @ R.mT).L  # cholesky itself makes a GPU wait for its check
    R = torch.linalg.solve_triangular(L, R, upper=False)
    torch._foreach_copy_(matrices, R.unbind())


def orthonormalize(model: nn.Module) -> None:
    """Make the rows of every R of a model orthonormal again, after an optimizer step."""
    matrices = [module.reft_R for module in model.modules() if isinstance(module, Orthonormal)]
    if matrices:
        orthonormalize_(matrices)


def add_reft(gpt: nn.Module, config: ReFTConfig) -> None:
    """Put interventions at the hook points of a loaded GPT-2 and freeze all its weights."""
    width = gpt.config.n_embd
    if config.rank > width:
        raise UserError(f"ReFT rank {config.rank} is more than the model's width, {width}")
    for index in chosen_layers(config.layers, len(gpt.gpt_layers)):
        layer = gpt.gpt_layers[index]
        device = layer.out_dense.weight.device
        for location in config.locations:
            intervention = INTERVENTIONS[config.type](width, config).to(device)
            setattr(layer, LOCATIONS[location], intervention.train(layer.training))
    gpt.intervention_positions = Positions.parse(config.positions)
    freeze_base(gpt)
