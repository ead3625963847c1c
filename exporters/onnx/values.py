"""How an ONNX graph is called: the names of its inputs and outputs, and of their dynamic dimensions."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, TensorArgument

from s2ft_compile.capture.examples import Inputs
from s2ft_compile.errors import ExportError

from .check import named_tensors, tensors

log = logging.getLogger(__name__)
AXES = {0: "batch", 1: "sequence"}  # the names of an input's first two dimensions


@dataclass(frozen=True)
class Call:
    """What a graph is traced and checked with.

    axes: for each tensor of `inputs` the names of the dimensions that are to be dynamic; none: `AXES` for all.
    names: of the inputs; none: those of the forward's arguments. separator: between the keys of nested outputs.
    checks: inputs of other sizes; none: such as are made from `inputs`. sums: what a sum of two axes is called.
    """

    inputs: Inputs
    axes: tuple[Mapping[int, str], ...] = ()
    names: tuple[str, ...] = ()
    separator: str = "_"
    checks: tuple[Inputs, ...] = ()
    sums: Mapping[str, str] | None = None

    def dynamic(self) -> list[tuple[Tensor, Mapping[int, str]]]:
        """Each input tensor with the names of its dynamic dimensions."""
        given = tensors(self.inputs)
        axes = self.axes or [{d: n for d, n in AXES.items() if d < t.dim()} for t in given]
        return list(zip(given, axes, strict=True))


def name_values(graph: Any, module: nn.Module, program: torch.export.ExportedProgram, call: Call) -> None:
    """Names inputs, outputs and dynamic dimensions. Raises `ExportError` where `call.axes` asks for one that is not."""
    args, kwargs = call.inputs
    with torch.no_grad():
        names = [name for name, _ in named_tensors(module(*args, **kwargs), separator=call.separator)]
    inputs = call.names or [
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument)
    ]
    for value, name in zip(graph.outputs, names, strict=True):
        value.name = f"{name}_out" if name in inputs or name in graph.initializers else name
    dims: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for value, name, (tensor, axes) in zip(graph.inputs, inputs, call.dynamic(), strict=True):
        value.name = name
        for at, axis in axes.items():
            dim, size = str(value.shape[at]), tensor.shape[at]
            if dim.isdigit():
                _report_fixed(name, at, axis, tensor, refuse=bool(call.axes))
            elif dim not in dims:
                shared = sizes.setdefault(axis, size) == size
                dims[dim] = axis if shared else f"{axis}_{name}"
    for value in chain(graph.inputs, (v for node in graph.all_nodes() for v in node.outputs)):
        _rename_dims(value, dims, call.sums or {})


def _report_fixed(name: str, at: int, axis: str, tensor: Tensor, refuse: bool) -> None:
    """A feature dimension is meant to be fixed; a batch is not, nor is the length of what holds tokens."""
    if refuse:
        raise ExportError(
            f"the model's code fixes the {axis} of input {name} to {tensor.shape[at]}, and one graph for "
            f"prefill and decoding needs it dynamic; without a KV cache (cache=False) it exports"
        )
    if tensor.shape[at] > 1 and (at == 0 or not tensor.is_floating_point()):
        log.warning("the model's code fixes the %s of input %s to %d", axis, name, tensor.shape[at])


def _rename_dims(value: Any, dims: Mapping[str, str], sums: Mapping[str, str]) -> None:
    import onnx_ir as ir

    def renamed(dim: Any) -> int | str | None:
        text = dims.get(str(dim)) or re.sub(r"\w+", lambda m: dims.get(m[0], m[0]), str(dim))
        if text.isdigit():  # torch leaves "2" for what it fixed
            return int(text)
        return None if text == "None" else sums.get(text, text)

    if value.shape is not None:
        value.shape = ir.Shape([renamed(dim) for dim in value.shape])
