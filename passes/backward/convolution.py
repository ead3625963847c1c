"""Gradients of convolutions: rows of dW are channels of dY, its columns input channels of X.

convolution_backward(dY, X, W, ...) returns (dX, dW, db). W: (out, in / groups, *kernel); transposed (in, out, *kernel).
A row of a grouped convolution reads the inputs of its own group alone, so each becomes a group of its own.
"""

import operator

import torch
from torch import fx

from s2ft_compile.passes.editor import Mismatch

from .attach import positions

aten = torch.ops.aten
BACKWARD = aten.convolution_backward.default


def push_convolution(editor, node: fx.Node, x: fx.Node, dim: int) -> fx.Node | Mismatch:
    maker, index = x.args
    dY, X, W, _, *geometry, transposed, padding, groups, _ = maker.args
    if index == 2:
        over = [d for d in range(dY.meta["val"].ndim) if d != 1]
        return editor.call(aten.sum.dim_IntList, editor.take(dY, 1, node), over, like=x)
    if index != 1 or dim > 1:
        return Mismatch("only channels of a convolution's kernel are sliced")
    if transposed and groups > 1:
        return Mismatch("a transposed convolution in groups has no slice rule")
    size = W.meta["val"].shape
    if groups > 1:
        dY, X, groups = _grouped(editor, node, dY, X, size, groups, dim)
    elif (dim == 0) != transposed:
        dY = editor.take(dY, 1, node)
    else:
        X = editor.take(X, 1, node)
    sliced = editor.take(W, dim, node)
    only_dW = [False, True, False]
    gradients = editor.call(BACKWARD, dY, X, sliced, [0], *geometry, transposed, padding, groups, only_dW, like=maker)
    return editor.call(operator.getitem, gradients, 1, like=x)


def _grouped(editor, node, dY, X, size, groups: int, dim: int):
    """(dY, X, groups) of what computes the rows (dim 0) or the columns of each group (dim 1)."""
    starts, lengths = node.args[2:]
    each = size[1]
    if dim == 1:
        moved = [g * each + s for g in range(groups) for s in starts]
        return dY, editor.take_ranges(X, 1, moved, [*lengths] * groups), groups
    rows, per_group = positions(node), size[0] // groups
    if per_group == 1:  # a row is a group
        read = [s * each for s in starts], [n * each for n in lengths]
    else:
        read = [r // per_group * each for r in rows], [each] * len(rows)
    return editor.take(dY, 1, node), editor.take_ranges(X, 1, *read), len(rows)


def without_weight_gradients(graph: fx.Graph) -> None:
    """Has a convolution's backward compute only what is read of it."""
    for node in graph.find_nodes(op="call_function", target=BACKWARD):
        read = {user.args[1] for user in node.users}
        *rest, mask = node.args
        wanted = [bool(asked) and i in read for i, asked in enumerate(mask)]
        node.args = (*rest, wanted)
        node.meta["val"] = tuple(v if kept else None for v, kept in zip(node.meta["val"], wanted))
