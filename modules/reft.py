"""ReFT, representation fine-tuning (Wu et al. 2024, arXiv 2404.03592), of a pretrained GPT-2.

The weights stay frozen. ReFT learns interventions on the residual stream h, after the attention or
the feed-forward sub-block of a layer, at all positions or only at the prompt's first and last.
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
    # Not F.relu, whose gradient at 0 is 0: (No)DiReFT starts at 0 and would stay there.
    "relu": lambda x: F.threshold(x, -torch.finfo(x.dtype).tiny, 0.0),
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}
TYPES = ("adapter", "loreft", "noreft", "direft", "nodireft")
LOCATIONS = {"attention": "after_attention", "ffn": "after_ffn"}  # -> hook point of a GPT2Layer


@dataclass(frozen=True)
class Positions:
    """The first and the last positions of a prompt, at most half of it each."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> "Positions | None":
        """Parse `fN+lM`, `fN` or `lM`; `all` gives None: every position in and after the prompt."""
        if text == "all":
            return None
        match = re.fullmatch(r"f(?P<first>[0-9]+)|(?:f(?P<f>[0-9]+)\+)?l(?P<last>[0-9]+)", text)
        first = int(match["first"] or match["f"] or 0) if match else 0
        last = int(match["last"] or 0) if match else 0
        if first == last == 0:
            raise UserError(f"ReFT positions must be all, fN+lM, fN or lM, not {text!r}")
        return cls(first, last)

    def of(self, position: Tensor, prompt_length: Tensor) -> Tensor:
        """Bool [N,1], True for tokens to intervene on; `position` and `prompt_length` are [N].

        In a prompt of 7 tokens, f2+l3 are positions 0, 1, 4, 5, 6; in one of 3, positions 0 and 2.
        """
        half = prompt_length // 2
        to_end = prompt_length - position  # 1 for the last position of the prompt
        first = position < half.clamp(max=self.first)
        last = (to_end > 0) & (to_end <= half.clamp(max=self.last))
        return (first | last)[:, None]


@dataclass(frozen=True)
class ReFTConfig:
    """Which interventions to add, where, and how large; raises UserError for invalid values."""

    method: ClassVar[str] = "reft"
    type: str = setting("adapter", f"{', '.join(TYPES)} [%(default)s]", choices=TYPES)
    rank: int = setting(4, "dimensions of the subspace to intervene in", least=1)
    alpha: float = setting(16.0, "type adapter only: scales it by alpha / rank", above=0)
    dropout: float = setting(0.0, "dropout on what is added to the hidden states", least=0, below=1)
    activation: str | None = setting(
        None,
        "of the edit [relu for type adapter; linear for the others, as in the paper]",
        choices=ACTIVATIONS,
    )
    locations: tuple[str, ...] = setting(
        ("attention",), "intervene after attention, ffn or both [attention]", choices=LOCATIONS
    )
    layers: tuple[int, ...] | None = setting(
        None, "transformer blocks to intervene in, counted from 0 [all]", least=0
    )
    positions: str = setting(
        "all",
        "all, or the first N and last M of the prompt, each at most half: fN+lM, fN, lM [all]",
        check=Positions.parse,
    )

    def __post_init__(self):
        if self.activation is None:
            activation = "relu" if self.type == "adapter" else "linear"
            object.__setattr__(self, "activation", activation)
        check_settings(self)


class Intervention(nn.Module):
    """h + dropout(edit(h)), where each subclass defines `edit`.

    Edits are computed in float32 even under autocast, because they are small compared with h.
    """

    def __init__(self, width: int, config: ReFTConfig):
        super().__init__()
        self.width, self.rank = width, config.rank
        self.act = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h: Tensor, intervened: Tensor | None = None) -> Tensor:
        """[N,C] -> [N,C]; where `intervened`, bool [N,1], is False, h is unchanged."""
        with torch.autocast(h.device.type, enabled=False):
            edit = self.dropout(self.edit(h.float()))
            return h + (edit if intervened is None else edit * intervened)

    def zeros(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(*shape))

    def orthonormal(self) -> nn.Parameter:
        """A random [R,C] matrix with orthonormal rows."""
        return nn.Parameter(nn.init.orthogonal_(torch.empty(self.rank, self.width)))


class Adapter(Intervention):
    """h + (alpha/r) W_up act(W_down h); initially W_up = 0.

    A bottleneck adapter (Houlsby et al. 2019, arXiv 1902.00751) without biases, scaled as in LoRA.
    """

    def __init__(self, width: int, config: ReFTConfig):
        super().__init__(width, config)
        self.scale = config.alpha / config.rank
        self.reft_W_down = nn.Parameter(torch.empty(self.rank, width))
        self.reft_W_up = self.zeros(width, self.rank)
        nn.init.kaiming_uniform_(self.reft_W_down, a=math.sqrt(5))

    def edit(self, h: Tensor) -> Tensor:
        return F.linear(self.scale * self.act(F.linear(h, self.reft_W_down)), self.reft_W_up)


class NoReFT(Intervention):
    """h + W2^T (act(W1 h + b) - W2 h): LoReFT with W2 unconstrained; initially W1 = W2, b = 0."""

    def __init__(self, width: int, config: ReFTConfig):
        super().__init__(width, config)
        self.reft_W2 = self.orthonormal()
        self.reft_W1 = nn.Parameter(self.reft_W2.detach().clone())
        self.reft_b = self.zeros(self.rank)

    def edit(self, h: Tensor) -> Tensor:
        W1h, W2h = F.linear(h, self.reft_W1, self.reft_b), F.linear(h, self.reft_W2)
        return (self.act(W1h) - W2h) @ self.reft_W2


class NoDiReFT(Intervention):
    """h + W2^T act(W1 h + b): DiReFT with W2 unconstrained; initially W1 = 0, b = 0."""

    def __init__(self, width: int, config: ReFTConfig):
        super().__init__(width, config)
        self.reft_W2 = self.orthonormal()
        self.reft_W1 = self.zeros(self.rank, width)
        self.reft_b = self.zeros(self.rank)

    def edit(self, h: Tensor) -> Tensor:
        return self.act(F.linear(h, self.reft_W1, self.reft_b)) @ self.reft_W2


class Orthonormal(Intervention):
    """An intervention in the row space of R [R,C], whose rows are kept orthonormal."""

    def __init__(self, width: int, config: ReFTConfig):
        super().__init__(width, config)
        self.reft_R = self.orthonormal()
        self.reft_b = self.zeros(self.rank)


class LoReFT(Orthonormal):
    """h + R^T (act(W h + b) - R h), with R's rows orthonormal; initially W = R, b = 0.

    With the linear activation, which is the paper's and the default, it is initially the identity.
    """

    def __init__(self, width: int, config: ReFTConfig):
        super().__init__(width, config)
        self.reft_W = nn.Parameter(self.reft_R.detach().clone())

    def edit(self, h: Tensor) -> Tensor:
        Wh, Rh = F.linear(h, self.reft_W, self.reft_b), F.linear(h, self.reft_R)
        return (self.act(Wh) - Rh) @ self.reft_R


class DiReFT(Orthonormal):
    """h + R^T act(W h + b), with R's rows orthonormal; initially W = 0, b = 0."""

    def __init__(self, width: int, config: ReFTConfig):
        super().__init__(width, config)
        self.reft_W = self.zeros(self.rank, width)

    def edit(self, h: Tensor) -> Tensor:
        return self.act(F.linear(h, self.reft_W, self.reft_b)) @ self.reft_R


INTERVENTIONS: dict[str, type[Intervention]] = {  # by the names in TYPES
    "adapter": Adapter,
    "loreft": LoReFT,
    "noreft": NoReFT,
    "direft": DiReFT,
    "nodireft": NoDiReFT,
}


@torch.no_grad()
def orthonormalize_(matrices: list[Tensor]) -> None:
    """Make the rows of each R [R,C] orthonormal in place, all matrices in one batch.

    This is Gram-Schmidt, via the Cholesky factor of RR^T. After an optimizer step R is still nearly
    orthonormal, so one pass is exact up to rounding. Only R x R matrices are factored; a
    parametrization would do as much work in every forward and backward.
    """
    R = torch.stack(matrices)  # [M,R,C]
    L = torch.linalg.cholesky_ex(R @ R.mT).L  # cholesky would wait for the GPU to check for errors
    R = torch.linalg.solve_triangular(L, R, upper=False)
    torch._foreach_copy_(matrices, R.unbind())


def orthonormalize(model: nn.Module) -> None:
    """Make the rows of every R in a model orthonormal again after an optimizer step."""
    matrices = [module.reft_R for module in model.modules() if isinstance(module, Orthonormal)]
    if matrices:
        orthonormalize_(matrices)


def add_reft(gpt: nn.Module, config: ReFTConfig) -> None:
    """Install interventions at the hook points of a loaded GPT-2 and freeze all its weights.

    LoReFT and DiReFT also need `orthonormalize(gpt)` after each optimizer step, as in `fit`.
    """
    width = gpt.config.n_embd
    if config.rank > width:
        raise UserError(f"ReFT rank {config.rank} exceeds the model's width, {width}")
    for index in chosen_layers(config.layers, len(gpt.gpt_layers)):
        layer = gpt.gpt_layers[index]
        device = layer.out_dense.weight.device
        for location in config.locations:
            intervention = INTERVENTIONS[config.type](width, config).to(device)
            setattr(layer, LOCATIONS[location], intervention.train(layer.training))
    gpt.intervention_positions = Positions.parse(config.positions)
    freeze_base(gpt)
