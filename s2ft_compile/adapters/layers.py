"""Where the slices of an adapter are in a model: the linear layers that hold matrices, and the modules of vectors."""

from collections.abc import Iterable, Sequence

from torch import nn

from s2ft_compile.errors import ExportError
from s2ft_compile.plan import Slice
from s2ft_compile.quantized import is_conv1d

ELSEWHERE = "`save_adapter` and `save_merged` take it"


def is_vector(s: Slice) -> bool:
    """Whether it is a part of a norm's gain, a bias, or another parameter of one dimension."""
    return len(s.shape) == 1


def matrices(slices: Iterable[Slice]) -> list[Slice]:
    """All that are no vectors."""
    return [s for s in slices if not is_vector(s)]


def vectors(slices: Iterable[Slice]) -> list[Slice]:
    """All that are vectors."""
    return [s for s in slices if is_vector(s)]


def linear_layers(module: nn.Module, slices: Iterable[Slice], form: str = "a LoRA") -> dict[str, tuple[str, bool]]:
    """Parameter -> (the layer that holds it, whether its weight is stored (in, out)). form: what the slices are to
    become. Raises `ExportError` for one of anything else than the weight of a linear layer."""
    names, layers = held_as(module), {}
    for s in slices:
        layer, _, key = s.parameter_name.rpartition(".")
        if refused := why_not_linear(module, s.parameter_name, names[s.parameter_name]):
            raise ExportError(f"{s.parameter_name} cannot be {form}: {refused}. {ELSEWHERE}")
        layers[s.parameter_name] = layer, is_conv1d(module.get_submodule(layer))
    return layers


def vector_modules(module: nn.Module, slices: Iterable[Slice], form: str) -> dict[str, str]:
    """Vector -> the module that holds it. Raises `ExportError` for one that is tied, or that lies in a module that
    holds others, since running that again would run them again."""
    names, layers = held_as(module), {}
    for s in slices:
        layer, _, key = s.parameter_name.rpartition(".")
        holder, refused = module.get_submodule(layer), None
        if len(names[s.parameter_name]) > 1:
            refused = tied(names[s.parameter_name])
        elif is_linear(holder) and key != "bias":
            refused = f"it is the {key!r} of a {type(holder).__name__}; valid: its 'bias'"
        elif any(True for _ in holder.children()):
            refused = f"it lies in a {type(holder).__name__}, which holds other modules too"
        elif "forward" in vars(holder):
            refused = f"the forward of {layer} was replaced, so it does not run with other parameters"
        if refused:
            raise ExportError(f"{s.parameter_name} cannot be {form}: {refused}. {ELSEWHERE}")
        layers[s.parameter_name] = layer
    return layers


def held_as(module: nn.Module) -> dict[str, list[str]]:
    """Parameter -> all names that it has; several, where it is tied."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: names[id(parameter)] for name, parameter in module.named_parameters()}


def tied(names: Sequence[str]) -> str:
    """Why a parameter of several names cannot change under one of them, for a person."""
    return f"it is tied, held as {' and '.join(names)}, and one of them only would change"


def why_not_linear(module: nn.Module, name: str, names: Sequence[str]) -> str | None:
    """Why a parameter is not the weight of a linear layer. names: all that it has."""
    path, _, key = name.rpartition(".")
    layer = module.get_submodule(path)
    if len(names) > 1:
        return tied(names)
    if key != "weight":
        return f"it is the {key!r} of a {type(layer).__name__}; valid: the 'weight' of linear layers"
    if not is_linear(layer):
        return f"its layer is of type {type(layer).__name__}; valid: nn.Linear, and Conv1D of transformers"
    return None


def is_linear(layer: nn.Module) -> bool:
    """Whether it multiplies by its weight where it is called, and does nothing else."""
    direct = isinstance(layer, nn.Linear) and not isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return direct or is_conv1d(layer)
