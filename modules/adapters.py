"""What all adapters share: which weights are theirs, freezing, counting, saving, loading."""

from torch import Tensor, nn

from modules.settings import UserError


def is_adapter(name: str) -> bool:
    """True for the name of an adapter's parameter: it decides what trains, counts and is saved."""
    return name.rpartition(".")[2].startswith(("lora_", "reft_"))


def freeze_base(model: nn.Module) -> None:
    """Let adapter parameters train and nothing else."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    if not trainable(model):
        raise UserError("nothing is left to train: the model has no adapter")


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters, all parameters."""
    return tuple(sum(p.numel() for p in group) for group in (trainable(model), model.parameters()))


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapter's tensors on the CPU, by parameter name."""
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if is_adapter(name)
    }


def load_adapter_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy saved adapter tensors into the model; raises UserError unless names and shapes fit."""
    own = {name: p for name, p in model.named_parameters() if is_adapter(name)}
    if own.keys() != state.keys():
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        raise UserError(
            f"the saved adapter does not fit: {len(missing)} weights missing {missing[:2]}, "
            f"{len(unexpected)} unexpected {unexpected[:2]}"
        )
    for name, parameter in own.items():
        if parameter.shape != state[name].shape:
            raise UserError(
                f"the saved adapter does not fit: {name} is {list(state[name].shape)} in the "
                f"file and {list(parameter.shape)} in the model"
            )
    for name, parameter in own.items():
        parameter.data.copy_(state[name])


def chosen_layers(layers: tuple[int, ...] | None, n_layer: int) -> tuple[int, ...]:
    """The layers that get an adapter: those listed, or all of them for None."""
    for layer in layers or ():
        if not 0 <= layer < n_layer:
            raise UserError(f"layer {layer} is not one of the model's, 0 to {n_layer - 1}")
    return tuple(range(n_layer)) if layers is None else tuple(sorted(set(layers)))
