"""Shared by LoRA and ReFT: find adapter parameters, freeze the rest, count them, copy them."""

from torch import Tensor, nn

from modules.settings import UserError


def is_adapter(name: str) -> bool:
    """True for adapter parameters. This decides what is trained, counted and saved."""
    return name.rpartition(".")[2].startswith(("lora_", "reft_"))


def freeze_base(model: nn.Module) -> None:
    """Freeze all but the adapter parameters; raises UserError if there are none."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    if not trainable(model):
        raise UserError("nothing is left to train: the model has no adapter")


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """The numbers of trainable parameters and of all parameters."""
    return tuple(sum(p.numel() for p in group) for group in (trainable(model), model.parameters()))


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """CPU copies of the adapter's tensors, keyed by parameter name."""
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if is_adapter(name)
    }


def load_adapter_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy saved adapter tensors into the model; raises UserError unless names and shapes match."""
    own = {name: p for name, p in model.named_parameters() if is_adapter(name)}
    if own.keys() != state.keys():
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        raise UserError(
            f"the saved adapter does not match the model: {len(missing)} missing {missing[:2]}, "
            f"{len(unexpected)} unexpected {unexpected[:2]}"
        )
    for name, parameter in own.items():
        if parameter.shape != state[name].shape:
            raise UserError(
                f"the saved adapter does not match the model: {name} is "
                f"{list(state[name].shape)} in the file but {list(parameter.shape)} in the model"
            )
    model.load_state_dict(state, strict=False)


def chosen_layers(layers: tuple[int, ...] | None, n_layer: int) -> tuple[int, ...]:
    """The sorted indices of the layers to adapt, where None means all of them."""
    for layer in layers or ():
        if layer >= n_layer:
            raise UserError(f"there is no block {layer}: the model has blocks 0 to {n_layer - 1}")
    return tuple(range(n_layer)) if layers is None else tuple(sorted(set(layers)))
