"""Gradients of batched experts: grouped products, dW[g] = X_gᵀ · dY_g over the rows of each group g.

X: (rows, m), dY: (rows, n), dW: (groups, m, n). A slice of dW along m is one of X's columns, along n one of dY's. Two
operators compute this: `aten._grouped_mm` of two matrices, whose operands have strides of whole 16 bytes, and the
backward of transformers' fallback for what that does not take, which returns (dX, dW) at once.
"""

import operator
from typing import Any

import torch
from torch import fx

from s2ft_compile.passes.editor import Mismatch

aten = torch.ops.aten
BACKWARD, FORWARD = "transformers::grouped_mm_fallback_backward", "grouped_mm_fallback"
WHOLE = "the rows of an expert are known in the step only, so a slice of experts cannot be told apart"
ALIGNED = 16  # bytes: of the strides that aten._grouped_mm takes


def push_grouped_mm(editor, node: fx.Node, x: fx.Node, dim: int) -> fx.Node | Mismatch:
    """A slice of Xᵀ · dY by groups is that of the operand whose columns it takes, filled up to a stride that works."""
    a, b, *rest = x.args
    if a.meta["val"].ndim != 2 or b.meta["val"].ndim != 2:
        return Mismatch("it is no product of two matrices")
    if dim == 0:
        return Mismatch(WHOLE)
    columns = editor.call(aten.permute.default, a, [1, 0], like=x) if dim == 1 else b
    sliced, size = editor.take(columns, 1, node), node.meta["val"].shape[dim]
    if missing := -size % (ALIGNED // sliced.meta["val"].itemsize):
        sliced = editor.call(aten.constant_pad_nd.default, sliced, [0, missing], like=x)
    pair = (editor.call(aten.permute.default, sliced, [1, 0], like=x), b) if dim == 1 else (a, sliced)
    result = editor.call(x.target, *pair, *rest, like=x, **x.kwargs)
    return editor.call(aten.slice.Tensor, result, dim, 0, size, like=x) if missing else result


def push_output(editor, node: fx.Node, x: fx.Node, dim: int) -> fx.Node | Mismatch:
    """dW of the fallback's backward(X, W, offsets, dY): the same of sliced operands."""
    maker, index = x.args
    if not _is_backward(maker) or index != 1:
        return Mismatch("it is one of several results, and has no slice rule")
    if dim == 0:
        return Mismatch(WHOLE)
    X, W, offsets, dY = maker.args
    X, dY = (editor.take(X, 1, node), dY) if dim == 1 else (X, editor.take(dY, 1, node))
    result = editor.call(maker.target, X, editor.take(W, dim, node), offsets, dY, like=maker)
    return editor.call(operator.getitem, result, 1, like=x)


def without_weight_gradients(editor, graph: fx.Graph) -> None:
    """Replaces a backward of the fallback of which only dX is read: dX = dY · Wᵀ by groups."""
    for node in list(graph.nodes):
        if not _is_backward(node) or any(user.args[1] == 1 for user in node.users):
            continue
        editor.at = node
        _, W, offsets, dY = node.args
        transposed = editor.call(aten.permute.default, W, [0, 2, 1], like=node)
        dX = editor.call(getattr(torch.ops.transformers, FORWARD).default, dY, transposed, offsets, like=node)
        for user in list(node.users):
            user.replace_all_uses_with(dX)


def _is_backward(node: Any) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name == BACKWARD
