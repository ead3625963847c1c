"""Adapters as inputs of an ONNX graph: one base graph, and a small file for each adapter.

Replaces y = x W, for each weight that an adapter may change, with

    columns (what is contracted)    y + Gather(x, indices) @ delta                          delta: (n, out)
    rows (what is produced)         ScatterElements-add(y, indices, x @ delta)              delta: (in, n)

where `indices` (int64 (n,)) and `delta` are initializers of size n = 0 that are inputs too: nothing is added unless
a run overrides them, by name or with an `.onnx_adapter` file. `<weight>.columns.indices` and `<weight>.columns.delta`
(or `.rows.`) are their names.
"""

import logging
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Sequence

import numpy as np
import torch
from torch import nn

from ..capture import unwrap
from ..errors import ConfigError, ExportError
from ..plan import Slice
from ..state import disabled, is_prepared, state_of
from .adapter import adapter_of, check_fits
from .files import new_files
from .format import Adapter, read_adapter
from .lora import linear_layers

log = logging.getLogger(__name__)
SUFFIX = ".onnx_adapter"


class Product(NamedTuple):
    """A node that computes x W. contracts: the dimension of the stored weight that it sums over."""

    node: Any
    contracts: int


def save_onnx_adapter(
    model: nn.Module, file: str | os.PathLike, *, adapter: str | os.PathLike | None = None
) -> Path:
    """Writes an adapter for graphs of `export_onnx(..., adapters="separate")`, and returns the file's path.

    model: prepared; or, with `adapter`, the plain base model of that adapter folder. file: a new `.onnx_adapter`.
    ONNX Runtime loads it with `LoraAdapter` and adds it to a run with `RunOptions.add_active_adapter`. Raises
    `ExportError` for a name with another ending, a file that exists, or slices that no matrix product takes.
    """
    import onnxruntime

    target, module = Path(file), unwrap(model)
    if target.suffix != SUFFIX:
        raise ExportError(f"{target} is not the name of an adapter for ONNX Runtime; {target.with_suffix(SUFFIX)} "
                          f"would be")
    source = _source(model, adapter)
    layers = linear_layers(module, source)
    parameters = {}
    for s in source.slices:
        names, transposed = _names(s, layers[s.parameter_name][1]), layers[s.parameter_name][1]
        dtype = module.get_parameter(s.parameter_name).dtype
        delta = (s.delta if transposed else s.delta.T).to(torch.float32 if dtype == torch.bfloat16 else dtype)
        for name, values in zip(names, (s.indices.numpy(), delta.contiguous().numpy())):
            parameters[name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(values))
    with new_files(target) as folder:
        written = onnxruntime.AdapterFormat()
        written.set_adapter_version(1)
        written.set_model_version(1)
        written.set_parameters(parameters)
        written.export_adapter(str(folder / target.name))
    log.info("adapter for ONNX Runtime written to %s: %d slices", target, len(source.slices))
    return target


def _source(model: nn.Module, adapter: str | os.PathLike | None) -> Adapter:
    if adapter is None:
        return adapter_of(model)
    read = read_adapter(adapter)
    check_fits(unwrap(model), read)
    return read


def _names(s: Slice, transposed: bool) -> tuple[str, str]:
    side = "columns" if (s.dim == 1) != transposed else "rows"
    return f"{s.parameter_name}.{side}.indices", f"{s.parameter_name}.{side}.delta"


# --- the graph ---------------------------------------------------------------------------------------------


@contextmanager
def untrained(model: nn.Module) -> Iterator[None]:
    """Context in which `model` is the plain base model, whatever it has trained."""
    if not is_prepared(model):
        yield
        return
    state, module = state_of(model), unwrap(model)
    with disabled(model):
        state.uninstall(module)
        try:
            yield
        finally:
            state.install(module)


def places_of(model: nn.Module, adapters: str | Sequence[str | os.PathLike]) -> list[tuple[str, int]]:
    """(weight, dim) of everything that the adapters change: those of a prepared model, or of adapter folders.

    Raises `ConfigError` where there are none.
    """
    if isinstance(adapters, str):
        if adapters != "separate":
            raise ConfigError(f"adapters must be 'separate' or a list of adapter folders, got {adapters!r}")
        if not is_prepared(model):
            raise ConfigError("adapters='separate' makes room for what a prepared model trains, and this one is not "
                              "prepared; give a list of adapter folders instead")
        slices = list(state_of(model).plan.slices)
    else:
        slices = [s for folder in adapters for s in read_adapter(folder).slices]
    if not slices:
        raise ConfigError("no adapter was given, so there is nothing that the graph could make room for")
    return list(dict.fromkeys((s.parameter_name, s.dim) for s in slices))


def add_places(graph: Any, places: Sequence[tuple[str, int]]) -> None:
    """Makes room in an onnx-ir graph for adapters of these (weight, dim). Raises `ExportError`, with the node."""
    found = {name: _products(graph, name) for name, _ in places}
    for name, dim in places:
        for product in found[name]:
            _insert(graph, name, product, columns=product.contracts == dim)


def _products(graph: Any, name: str) -> list[Product]:
    """Every node that multiplies by a weight; no other may use it."""
    if name not in graph.initializers:
        raise ExportError(f"{name} has no adapter input: the graph does not use it under this name")
    found = []
    for node, at in list(graph.initializers[name].uses()):
        flipped = node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]
        for user, index in list(node.outputs[0].uses()) if flipped else [(node, at)]:
            kind = user.op_type if user.domain in ("", "ai.onnx") else f"{user.domain}.{user.op_type}"
            if kind not in ("MatMul", "Gemm") or index != 1 or _is_set(user, "transA"):
                raise ExportError(f"{name} has no adapter input: node {user.name} ({kind}) uses it other than as the "
                                  f"weight of a matrix product")
            found.append(Product(user, 1 if flipped != _is_set(user, "transB") else 0))
    return found


def _is_set(node: Any, attribute: str) -> bool:
    return attribute in node.attributes and bool(node.attributes[attribute].as_int())


def _insert(graph: Any, name: str, product: Product, columns: bool) -> None:
    """Adds the adapter's part to the product's result, before what was added to it already."""
    import onnx_ir as ir

    W, (x, y) = graph.initializers[name], (product.node.inputs[0], product.node.outputs[0])
    side = "columns" if columns else "rows"
    other = W.shape[1 - product.contracts] if columns else W.shape[product.contracts]
    indices = _empty(graph, f"{name}.{side}.indices", np.zeros(0, np.int64), ["n"])
    shape = (0, int(other)) if columns else (int(other), 0)
    delta = _empty(graph, f"{name}.{side}.delta", np.zeros(shape, W.dtype.numpy()),
                   ["n", int(other)] if columns else [int(other), "n"])
    users = list(y.uses())
    if columns:
        picked = ir.node("Gather", [x, indices], {"axis": -1})
        more = ir.node("MatMul", [picked.outputs[0], delta])
        total = ir.node("Add", [y, more.outputs[0]])
        nodes = [picked, more, total]
    else:
        made = ir.node("MatMul", [x, delta])
        sizes = ir.node("Shape", [made.outputs[0]])
        places = ir.node("Expand", [indices, sizes.outputs[0]])
        total = ir.node("ScatterElements", [y, places.outputs[0], made.outputs[0]], {"axis": -1, "reduction": "add"})
        nodes = [made, sizes, places, total]
    graph.insert_after(product.node, nodes)
    result = total.outputs[0]
    result.type, result.shape = y.type, y.shape
    for user, index in users:
        user.replace_input_with(index, result)
    for i, output in enumerate(graph.outputs):
        if output is y:
            graph.outputs[i] = result
            result.name, y.name = y.name, f"{y.name}.base"


def _empty(graph: Any, name: str, content: np.ndarray, shape: Sequence[int | str]) -> Any:
    """The overridable initializer of this name, which is an input of the graph too."""
    import onnx_ir as ir

    if name not in graph.initializers:
        tensor = ir.tensor(content, name=name)
        dims = ir.Shape([f"{name}.{d}" if d == "n" else d for d in shape])
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=dims, const_value=tensor)
        graph.initializers.add(value)
        graph.inputs.append(value)
    return graph.initializers[name]
