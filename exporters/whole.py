"""Modules that PEFT's files hold whole, its `modules_to_save`: what no LoRA and no SHiRA has a place for.

Norms, embeddings, convolutions: the module's parameters and buffers as they are with the adapter, in the base's type,
so that PEFT puts a copy of the module in the place of the base's, and takes it away again.
"""

import re
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from s2ft_compile.adapters.apply import summed
from s2ft_compile.adapters.format import Adapter
from s2ft_compile.adapters.layers import ELSEWHERE, held_as, is_linear, tied, why_not_linear
from s2ft_compile.capture.models import unwrap
from s2ft_compile.errors import ExportError
from s2ft_compile.plan import Slice
from s2ft_compile.quantized import quantized_in

from .adapter import untrained

PREFIX = "base_model.model."  # of names in PEFT's files


def partition(module: nn.Module, slices: Iterable[Slice]) -> tuple[list[Slice], list[Slice], list[Slice]]:
    """(weights of linear layers, their biases, all others)."""
    names = held_as(module)
    parts: tuple[list[Slice], list[Slice], list[Slice]] = ([], [], [])
    for s in slices:
        layer, _, key = s.parameter_name.rpartition(".")
        several = names[s.parameter_name]
        if why_not_linear(module, s.parameter_name, several) is None:
            parts[0].append(s)
        elif key == "bias" and len(several) == 1 and is_linear(module.get_submodule(layer)):
            parts[1].append(s)
        else:
            parts[2].append(s)
    return parts


def layer_of(s: Slice) -> str:
    """The module that holds the parameter."""
    return s.parameter_name.rpartition(".")[0]


def whole_modules(module: nn.Module, slices: Sequence[Slice], targets: Collection[str], form: str) -> list[str]:
    """The `modules_to_save` for these slices. targets: the layers that PEFT wraps otherwise.

    PEFT takes every module whose name ends like one of them; where those are more, all are in the list. Raises
    `ExportError` for a parameter that the model itself holds, that is tied or quantized, or beside such a layer.
    """
    names, quantized, asked = held_as(module), quantized_in(module), {layer_of(s): s for s in slices}
    for layer, s in asked.items():
        refused = None
        inside = [n for n in names if n.startswith(f"{layer}.")]
        several = next((names[n] for n in inside if not all(m.startswith(f"{layer}.") for m in names[n])), None)
        if not layer or len(names[s.parameter_name]) > 1:
            refused = tied(names[s.parameter_name]) if layer else "the model itself holds it"
        elif several:
            refused = f"PEFT would store {layer} whole, of which {tied(several)}"
        elif any(n in quantized for n in inside):
            refused = f"PEFT would store {layer} whole, and its weight is quantized"
        elif within := [t for t in targets if f"{t}.".startswith(f"{layer}.")]:
            refused = f"PEFT would store {layer} whole, and {within[0]} in it is {form}"
        if refused:
            raise ExportError(f"{s.parameter_name} cannot be {form}: {refused}. {ELSEWHERE}")
    outermost = [n for n in asked if not any(n.startswith(f"{other}.") for other in asked)]
    paths = [path for path, _ in module.named_modules() if path]
    found = [path for path in paths if any(f"{PREFIX}{path}".endswith(name) for name in outermost)]
    for a in found:
        nested = next((b for b in found if b.startswith(f"{a}.")), None)
        wrapped = next((t for t in targets if re.match(rf"(^|.*\.){a}($|\..*)", t)), None)
        if nested or wrapped:
            raise ExportError(
                f"{a} cannot be stored whole beside {form}: PEFT would take {nested or wrapped} for it too, by its "
                f"name. {ELSEWHERE}"
            )
    return found


@torch.no_grad()
def whole_tensors(model: nn.Module, source: Adapter, names: Sequence[str]) -> dict[str, Tensor]:
    """What PEFT's files hold of these modules: copies, with the adapter."""
    if not names:
        return {}
    tensors: dict[str, Tensor] = {}
    slices = {s.parameter_name: s for s in source.slices}
    with untrained(model):
        for name in names:
            for key, value in unwrap(model).get_submodule(name).state_dict().items():
                tensors[f"{PREFIX}{name}.{key}"] = copied = value.detach().cpu().clone()
                if s := slices.get(f"{name}.{key}"):
                    dim, indices, block = summed(copied, [(s, 1.0)])
                    copied.index_copy_(dim, indices, block)
    return tensors


@torch.no_grad()
def moved(module: nn.Module, slices: Iterable[Slice]) -> dict[str, float]:
    """Parameter -> how far its slice moved it, as a share of its norm; of one that was zero, infinity."""
    shares = {}
    for s in slices:
        size = float(module.get_parameter(s.parameter_name).detach().double().norm())
        step = float(s.delta.double().norm()) if s.delta is not None else 0.0
        shares[s.parameter_name] = step / size if size else float("inf") if step else 0.0
    return shares
