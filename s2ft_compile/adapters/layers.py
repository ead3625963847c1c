"""Where the slices of an adapter are in a model: the linear layers that hold them."""

from collections.abc import Sequence

from torch import nn

from s2ft_compile.errors import ExportError

from .format import Adapter


def linear_layers(module: nn.Module, adapter: Adapter, form: str = "a LoRA") -> dict[str, tuple[str, bool]]:
    """Parameter -> (the layer that holds it, whether its weight is stored (in, out)). form: what the slices are to
    become. Raises `ExportError` for one of anything else than the weight of a linear layer."""
    names, layers = held_as(module), {}
    for s in adapter.slices:
        layer, _, key = s.parameter_name.rpartition(".")
        refused = _why_not(module.get_submodule(layer), key, names[s.parameter_name])
        if refused:
            raise ExportError(
                f"{s.parameter_name} cannot be {form}: {refused}. `save_adapter` and `save_merged` take it"
            )
        layers[s.parameter_name] = layer, is_conv1d(module.get_submodule(layer))
    return layers


def held_as(module: nn.Module) -> dict[str, list[str]]:
    """Parameter -> all names that it has; several, where it is tied."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: names[id(parameter)] for name, parameter in module.named_parameters()}


def _why_not(layer: nn.Module, key: str, names: Sequence[str]) -> str | None:
    if len(names) > 1:
        return f"it is tied, held as {' and '.join(names)}, and one of them only would change"
    if key != "weight":
        return f"it is the {key!r} of a {type(layer).__name__}; valid: the 'weight' of linear layers"
    direct = isinstance(layer, nn.Linear) and not isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)
    if not (direct or is_conv1d(layer)):
        return f"its layer is of type {type(layer).__name__}; valid: nn.Linear, and Conv1D of transformers"
    return None


def is_conv1d(layer: nn.Module) -> bool:
    """Whether it is transformers' linear layer whose weight is stored (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)
