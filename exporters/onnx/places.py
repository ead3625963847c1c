"""Replaces y = x W in an onnx-ir graph, for each weight that an adapter may change, with one of two forms.

As slices, the least work:

    columns (what is contracted)    y + Gather(x, indices) @ delta                          delta: (n, out)
    rows (what is produced)         y with y[indices] + x @ delta at indices                delta: (in, n)

As a LoRA, which takes the adapters of others too:

    y + (x A) B                                                                             A: (in, r), B: (r, out)

A vector, such as a norm's gain or a bias, is the sum of what it is and of its delta wherever it is read:

    W + delta                                                                               delta: (d,)

`indices` (int64 (n,)), `delta`, A and B are initializers of size n = r = 0, or zeros, that are inputs too: nothing is
added unless a run overrides them, by name or with an `.onnx_adapter` file. Their names are `<weight>.columns.indices`
and `<weight>.columns.delta` (or `.rows.`), or `<layer>.lora_A.weight` and `<layer>.lora_B.weight`, as Olive's; of a
vector `<weight>.delta`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from s2ft_compile.errors import ConfigError, ExportError

from .weights import turns_over

NAMES = ("model", "genai")  # how values are named: as the model names them, or as onnxruntime-genai and Olive do
GENAI = NAMES[1]
SAME_SHAPE = "adapter.shape"  # zeros: to Reshape, a dimension of 0 is one that stays


class Product(NamedTuple):
    """A node that computes x W. contracts: the dimension of the stored weight that it sums over."""

    node: Any
    contracts: int


def check_names(names: str) -> None:
    """Raises `ConfigError` for names that are not known."""
    if names not in NAMES:
        raise ConfigError(f"unknown names {names!r}; valid: {', '.join(NAMES)}")


def slice_names(weight: str, columns: bool) -> tuple[str, str]:
    """The inputs that hold a slice of a weight: its indices, and its numbers."""
    side = "columns" if columns else "rows"
    return f"{weight}.{side}.indices", f"{weight}.{side}.delta"


def lora_names(weight: str) -> tuple[str, str]:
    """The inputs that hold the A and B of the layer of a weight."""
    layer = weight.rpartition(".")[0]
    return f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"


def vector_name(weight: str) -> str:
    """The input that holds the delta of a vector."""
    return f"{weight}.delta"


def add_places(graph: Any, places: Sequence[tuple[str, int]], lora: bool = False) -> None:
    """Makes room in an onnx-ir graph for adapters of these (weight, dim), as slices or as LoRAs. Raises
    `ExportError`, with the node."""
    vectors = [name for name, _ in places if len(_initializer(graph, name).shape) == 1]
    places = [(name, dim) for name, dim in places if name not in vectors]
    products = {name: _products(graph, name) for name, _ in places}
    for name in vectors:
        _add_vector(graph, name)
    for name in products if lora else ():
        for product in products[name]:
            _add_lora(graph, name, product)
    for name, dim in places if not lora else ():
        for product in products[name]:
            _add_slices(graph, name, product, columns=product.contracts == dim)


def _initializer(graph: Any, name: str) -> Any:
    if name not in graph.initializers:
        raise ExportError(f"{name} has no adapter input: the graph does not use it under this name")
    return graph.initializers[name]


def _add_vector(graph: Any, name: str) -> None:
    """Reads the sum of a vector and its delta in the vector's place."""
    import onnx_ir as ir

    W = graph.initializers[name]
    users, delta = list(W.uses()), vector_name(name)
    node = ir.node("Add", [W, _empty(graph, delta, W.shape, delta, W.dtype.numpy())])
    node.outputs[0].type, node.outputs[0].shape = W.type, W.shape
    graph.insert_before(graph[0], node)
    for user, index in users:
        user.replace_input_with(index, node.outputs[0])


def _products(graph: Any, name: str) -> list[Product]:
    """Every node that multiplies by a weight; no other may use it."""
    products = []
    for node, at in list(_initializer(graph, name).uses()):
        flipped = turns_over(node)
        for user, index in list(node.outputs[0].uses()) if flipped else [(node, at)]:
            kind = user.op_type if user.domain in ("", "ai.onnx") else f"{user.domain}.{user.op_type}"
            if kind not in ("MatMul", "Gemm") or index != 1 or _is_set(user, "transA"):
                raise ExportError(
                    f"{name} has no adapter input: node {user.name} ({kind}) uses it other than as the "
                    f"weight of a matrix product"
                )
            products.append(Product(user, 1 if flipped != _is_set(user, "transB") else 0))
    return products


def _is_set(node: Any, attribute: str) -> bool:
    return attribute in node.attributes and bool(node.attributes[attribute].as_int())


def _add_slices(graph: Any, name: str, product: Product, columns: bool) -> None:
    """Adds the slice's part to the product's result."""
    import onnx_ir as ir

    x, y = product.node.inputs[0], product.node.outputs[0]
    size_in, size_out, dtype = _sizes(graph, name, product)
    first, second = slice_names(name, columns)
    indices = _empty(graph, first, (0,), first, np.int64)
    if columns:
        delta = _empty(graph, second, (0, size_out), first, dtype)
        picked = ir.node("Gather", [x, indices], {"axis": -1})
        kept = _kept(graph, delta)
        more = ir.node("MatMul", [picked.outputs[0], kept.outputs[0]])
        nodes = [picked, kept, more, ir.node("Add", [y, more.outputs[0]])]
    else:
        # not ScatterElements with reduction "add", for which ONNX Runtime has no float16 kernel on a CPU
        kept = _kept(graph, _empty(graph, second, (size_in, 0), first, dtype))
        new = ir.node("MatMul", [x, kept.outputs[0]])
        picked = ir.node("Gather", [y, indices], {"axis": -1})
        summed = ir.node("Add", [picked.outputs[0], new.outputs[0]])
        sizes = ir.node("Shape", [summed.outputs[0]])
        places = ir.node("Expand", [indices, sizes.outputs[0]])
        scattered = ir.node("ScatterElements", [y, places.outputs[0], summed.outputs[0]], {"axis": -1})
        nodes = [kept, new, picked, summed, sizes, places, scattered]
    _insert(graph, product, nodes)


def _add_lora(graph: Any, name: str, product: Product) -> None:
    """Adds (x A) B to the product's result."""
    import onnx_ir as ir

    x, y = product.node.inputs[0], product.node.outputs[0]
    size_in, size_out, dtype = _sizes(graph, name, product)
    first, second = lora_names(name)
    A, B = (_empty(graph, n, s, first, dtype) for n, s in ((first, (size_in, 0)), (second, (0, size_out))))
    kept_A, kept_B = _kept(graph, A), _kept(graph, B)
    down = ir.node("MatMul", [x, kept_A.outputs[0]])
    up = ir.node("MatMul", [down.outputs[0], kept_B.outputs[0]])
    _insert(graph, product, [kept_A, down, kept_B, up, ir.node("Add", [y, up.outputs[0]])])


def _kept(graph: Any, value: Any) -> Any:
    """A node that gives the value as it is, without a copy: what quantizes a graph takes the initializer that a product
    reads for a weight, and would replace it by integers of no numbers. Optimizers remove an Identity, not this."""
    import onnx_ir as ir

    if SAME_SHAPE not in graph.initializers:
        tensor = ir.tensor(np.zeros(2, np.int64), name=SAME_SHAPE)
        new = ir.Value(name=SAME_SHAPE, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        graph.initializers.add(new)
    return ir.node("Reshape", [value, graph.initializers[SAME_SHAPE]])


def _sizes(graph: Any, name: str, product: Product) -> tuple[int, int, Any]:
    """(in, out) of the product, and its dtype."""
    W = graph.initializers[name]
    return int(W.shape[product.contracts]), int(W.shape[1 - product.contracts]), W.dtype.numpy()


def _insert(graph: Any, product: Product, nodes: Sequence[Any]) -> None:
    """Puts the nodes, the last of which makes the sum, between a product's result and what uses it."""
    y, result = product.node.outputs[0], nodes[-1].outputs[0]
    users = list(y.uses())
    graph.insert_after(product.node, nodes)
    result.type, result.shape = y.type, y.shape
    for user, index in users:
        if user not in nodes:
            user.replace_input_with(index, result)
    for i, output in enumerate(graph.outputs):
        if output is y:
            graph.outputs[i] = result
            result.name, y.name = y.name, f"{y.name}.base"


def _empty(graph: Any, name: str, shape: Sequence[int], free: str, dtype: Any) -> Any:
    """The overridable initializer of this name, which is an input of the graph too. free: names what is 0 in `shape`;
    not the same for all, since ONNX Runtime takes dimensions of one name for equal."""
    import onnx_ir as ir

    if name not in graph.initializers:
        tensor = ir.tensor(np.zeros(shape, dtype), name=name)
        dims = ir.Shape([d or f"{free}.n" for d in shape])
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=dims, const_value=tensor)
        graph.initializers.add(value)
        graph.inputs.append(value)
    return graph.initializers[name]
