"""Weights of an onnx-ir graph: as ONNX's own tools expect them, and in fewer bits.

A quantized graph computes y = x W with W in blocks along the contracted axis, a scale for each: MatMulNBits, made by
ONNX Runtime's own quantizer. A CPU multiplies in int8 there, each row of x in blocks with scales of their own, so that
one large activation does not take the digits of all others, as it does after `quantize_dynamic` (one scale for all of
x), which is the faster on long prompts and twice as far from the model. Embeddings are in float16, and everything
else, the inputs of adapters too, stays as it is.
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Form:
    """block: numbers with one scale, and where not symmetric one zero. limit: how far a graph may be from the float
    graph, as the norm of the difference of an output, a share of the output's."""

    bits: int
    block: int
    symmetric: bool
    limit: float


# Blocks of 32 instead of 128: int8 at 0.8 of the speed and 0.8 of the error, int4 at 0.8 and 0.9.
FORMS = {"int8": Form(8, 128, True, 0.1), "int4": Form(4, 32, False, 0.5)}
INT8_PRODUCTS = 4  # MatMulNBits' accuracy_level
QUANTIZER = "onnxruntime.quantization.matmul_nbits_quantizer"


# --- orientation -------------------------------------------------------------------------------------------


def orient_weights(graph: Any) -> None:
    """Stores a weight that products read through a Transpose, and nothing else reads, as they take it: (in, out).

    Tools that quantize a product look for an initializer as its second input. What is read in both ways (an embedding
    that is the head too) stays as it is, since it would be there twice.
    """
    import onnx_ir as ir

    for value in list(graph.initializers.values()):
        turns = [node for node, _ in value.uses()]
        if value.is_graph_output() or not turns or not all(map(_may_go, turns)):
            continue
        _turn(value, value)
        for turn in turns:
            ir.convenience.replace_all_uses_with(turn.outputs[0], value)
            graph.remove(turn, safe=True)


def turns_over(node: Any) -> bool:
    """Whether a node exchanges the two dimensions of a matrix."""
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]


def _may_go(node: Any) -> bool:
    return turns_over(node) and not node.outputs[0].is_graph_output()


def _turn(value: Any, into: Any) -> None:
    import onnx_ir as ir

    old = value.const_value
    into.const_value = ir.tensor(old.numpy().T, dtype=old.dtype, name=into.name)  # a view: no second copy
    into.type, into.shape = value.type, into.const_value.shape


# --- fewer bits --------------------------------------------------------------------------------------------


def quantized(onnx_model: Any, kind: str) -> Any:
    """A copy of an `onnx_ir.Model` whose products of weights are in these bits; the model itself is changed too."""
    import onnx_ir as ir

    graph, before = onnx_model.graph, _bytes(onnx_model)
    for node in list(graph.all_nodes()):
        if node.op_type == "Gemm":
            _split_gemm(graph, node)
    for value in list(graph.initializers.values()):
        _untie(graph, value)
        _halve_embedding(graph, value)
    form = FORMS[kind]
    quantizer = _quantizer()(
        ir.serde.serialize_model(onnx_model),
        bits=form.bits,
        block_size=form.block,
        is_symmetric=form.symmetric,
        accuracy_level=INT8_PRODUCTS,
    )
    quantizer.process()
    result = ir.serde.deserialize_model(quantizer.model.model)
    after = _bytes(result)
    say = log.warning if 2 * after > before else log.info
    say(
        "%s: %.1f MB of weights became %.1f MB; what is no constant factor of a product (batched experts, "
        "convolutions) stays as it is, and embeddings are in float16, beside their copy where they are the head too",
        kind,
        before / 1e6,
        after / 1e6,
    )
    return result


def _quantizer() -> type:
    root, silent = logging.getLogger(), logging.NullHandler()
    root.addHandler(silent)  # its import would otherwise make the process print every message of every library
    try:
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    finally:
        root.removeHandler(silent)
    return MatMulNBitsQuantizer


def _bytes(onnx_model: Any) -> int:
    return sum(value.const_value.nbytes for value in onnx_model.graph.initializers.values())


def _split_gemm(graph: Any, node: Any) -> None:
    """Replaces x W + b as one node by two, where W is a weight: the quantizer knows products only."""
    import onnx_ir as ir

    W, y = node.inputs[1], node.outputs[0]
    number = {name: attribute.as_float() for name, attribute in node.attributes.items() if name in ("alpha", "beta")}
    turned = {name: attribute.as_int() for name, attribute in node.attributes.items() if name.startswith("trans")}
    if W.name not in graph.initializers or any(v != 1 for v in number.values()) or turned.get("transA"):
        return
    if turned.get("transB"):
        W = _beside(graph, W)
    nodes = [ir.node("MatMul", [node.inputs[0], W], name=f"{node.name}_product")]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        nodes.append(ir.node("Add", [nodes[0].outputs[0], node.inputs[2]]))
    result = nodes[-1].outputs[0]
    result.type, result.shape = y.type, y.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [y], [result])


def _untie(graph: Any, value: Any) -> None:
    """Gives the products that read a weight through a Transpose, which others read as it is, a copy to quantize."""
    import onnx_ir as ir

    for turn in [node for node, _ in value.uses() if _may_go(node)]:
        ir.convenience.replace_all_uses_with(turn.outputs[0], _beside(graph, value))
        graph.remove(turn, safe=True)


def _beside(graph: Any, value: Any) -> Any:
    """The initializer that is this one with its dimensions exchanged."""
    import onnx_ir as ir

    name = f"{value.name}.transposed"
    if name not in graph.initializers:
        turned = ir.Value(name=name)
        _turn(value, turned)
        graph.initializers.add(turned)
    return graph.initializers[name]


def _halve_embedding(graph: Any, value: Any) -> None:
    """Stores a float32 table of which rows are picked, and nothing else, in float16, where it is in its range."""
    import onnx_ir as ir

    users = list(value.uses())
    picked = users and all(node.op_type == "Gather" and at == 0 for node, at in users)
    if not picked or any(node.outputs[0].is_graph_output() for node, _ in users):
        return
    if len(value.shape) != 2 or value.dtype != ir.DataType.FLOAT or value.is_graph_output():
        return
    with np.errstate(over="ignore"):
        half = value.const_value.numpy().astype(np.float16)
    if not np.isfinite(half).all():
        return
    value.const_value = ir.tensor(half, name=value.name)
    value.type = ir.TensorType(ir.DataType.FLOAT16)
    for node, _ in users:
        rows = node.outputs[0]
        wide = ir.node("Cast", [rows], {"to": int(ir.DataType.FLOAT)})
        wide.outputs[0].type, wide.outputs[0].shape = rows.type, rows.shape
        others = list(rows.uses())
        graph.insert_after(node, wide)
        for user, at in others:
            if user is not wide:
                user.replace_input_with(at, wide.outputs[0])
        rows.type = ir.TensorType(ir.DataType.FLOAT16)
