"""Slice rules of operators that act along some dimensions and treat the others alike.

    take ∘ f = f ∘ take     along any dimension that f does not act along (a cumulative sum of rows, row by row)

Along a dimension of which f keeps a window (slice, pad) the ranges move with it.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch

from s2ft_compile.passes.editor import Mismatch

from .attach import positions, runs

aten = torch.ops.aten
WEIGHT_NORM = aten._weight_norm_interface_backward.default


def acts_along(*positions: int, last: int = 0) -> Callable:
    """The rule of an operator f(x, ...) of x's shape that acts along what the arguments at `positions` say, or along
    the `last` dimensions."""

    def rule(editor, node, x, dim):
        rank = x.meta["val"].ndim
        given = [a for p in positions if len(x.args) > p for a in _listed(x.args[p])]
        acted = {d % rank for d in given} | set(range(rank - last, rank))
        if dim in acted or not acted:
            return Mismatch("it acts along the slice's dimension")
        return editor.call(x.target, editor.sliced(x.args[0], dim, node), *x.args[1:], like=x, **x.kwargs)

    return rule


def _listed(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def kept_dim(x, dim: int) -> int | None:
    """The dimension that `dim` of a reduction (x, dims, keepdim) is of its operand; None where that is reduced."""
    rank, given = x.args[0].meta["val"].ndim, x.args[1] if len(x.args) > 1 else None
    keepdim = bool(x.kwargs.get("keepdim", x.args[2] if len(x.args) > 2 else False))
    gone = {d % rank for d in ([] if given is None else _listed(given))} or set(range(rank))
    kept = list(range(rank)) if keepdim else [d for d in range(rank) if d not in gone]
    return None if kept[dim] in gone else kept[dim]


def push_reduced(editor, node, x, dim):
    """mean, amax, var, ... of (x, dims, keepdim): what is reduced is not sliced."""
    kept = kept_dim(x, dim)
    if kept is None:
        return Mismatch("it reduces the slice's dimension")
    return editor.call(x.target, editor.sliced(x.args[0], kept, node), *x.args[1:], like=x, **x.kwargs)


def push_slice(editor, node, x, dim):
    source, at, start, end, step = [*x.args, *(0, None, None, 1)[len(x.args) - 1 :]]
    at %= x.meta["val"].ndim
    if at != dim:
        return editor.call(x.target, editor.sliced(source, dim, node), at, start, end, step, like=x)
    size = source.meta["val"].shape[dim]
    start = min(max(0, (start or 0) + (size if (start or 0) < 0 else 0)), size)
    starts, lengths = node.args[2:]
    if step != 1:
        return Mismatch(f"it takes every {step}th position of the slice's dimension")
    return editor.push_ranges(source, dim, [start + s for s in starts], lengths)


def push_select(editor, node, x, dim):
    source, at, index = x.args
    at %= source.meta["val"].ndim
    return editor.call(x.target, editor.sliced(source, dim + (dim >= at), node), at, index, like=x)


def push_index(editor, node, x, dim):
    """One dimension in the order of a list of positions."""
    source, indices = x.args
    used = [d for d, index in enumerate(indices) if index is not None]
    if len(used) != 1 or dim == used[0] or indices[used[0]].meta["val"].ndim != 1:
        return Mismatch("it looks up along the slice's dimension, or along several")
    return editor.call(x.target, editor.sliced(source, dim, node), indices, like=x)


def push_pad(editor, node, x, dim):
    source, pad, *value = x.args
    rank = x.meta["val"].ndim
    place = 2 * (rank - 1 - dim)
    before, after = pad[place : place + 2] if place < len(pad) else (0, 0)
    if not before and not after:
        return editor.call(x.target, editor.sliced(source, dim, node), pad, *value, like=x)
    size, taken = source.meta["val"].shape[dim], positions(node)
    inside = [p - before for p in taken if before <= p < before + size]
    if not inside:
        return Mismatch("the slice lies in its padding")
    sliced = editor.push_ranges(source, dim, *runs(inside))
    around = [sum(p < before for p in taken), sum(p >= before + size for p in taken)]
    return editor.call(x.target, sliced, [*pad[:place], *around, *pad[place + 2 :]], *value, like=x)


def push_scatter_add(editor, node, x, dim):
    base, at, index, values = x.args
    sizes = {n.meta["val"].shape[dim] for n in (base, index, values)}
    if at % x.meta["val"].ndim == dim or len(sizes) > 1:
        return Mismatch("it scatters along the slice's dimension, or a part of that")
    base, values = editor.sliced(base, dim, node), editor.sliced(values, dim, node)
    return editor.call(x.target, base, at, editor.take(index, dim, node), values, like=x)


def push_var_mean(editor, node, x, dim):
    """var_mean of (x, dims): (variances, means), each reduced."""
    maker, index = x.args
    kept = kept_dim(maker, dim)
    if kept is None:
        return Mismatch("it reduces the slice's dimension")
    source = editor.sliced(maker.args[0], kept, node)
    both = editor.call(maker.target, source, *maker.args[1:], like=maker, **maker.kwargs)
    return editor.call(operator.getitem, both, index, like=x)


def push_weight_norm(editor, node, x, dim):
    """v / |v| × g, each of the norms along all dimensions but one: (dv, dg) along that one."""
    maker, index = x.args
    dW, v, g, norms, at = maker.args
    if at != dim:
        return Mismatch("its norms are taken along the slice's dimension")
    operands = [editor.sliced(dW, dim, node), *(editor.take(t, dim, node) for t in (v, g, norms))]
    return editor.call(operator.getitem, editor.call(WEIGHT_NORM, *operands, at, like=maker), index, like=x)


ALONG_RULES: dict[Any, Callable] = {
    **{op: acts_along(1) for op in (aten.cumsum.default, aten.cumprod.default, aten.flip.default)},
    torch.ops.prims.rev.default: acts_along(1),
    aten.roll.default: acts_along(2),
    aten.tril.default: acts_along(last=2),
    aten.triu.default: acts_along(last=2),
    aten.mean.dim: push_reduced,
    aten.amax.default: push_reduced,
    aten.amin.default: push_reduced,
    aten.slice.Tensor: push_slice,
    aten.select.int: push_select,
    aten.index.Tensor: push_index,
    aten.constant_pad_nd.default: push_pad,
    aten.scatter_add.default: push_scatter_add,
}
