"""Slice rules: how a slice of an operator's result is computed from slices of its operands.

    take ∘ f = f ∘ take          f permutes or views dimensions, or works elementwise
    take ∘ contract = contract ∘ take    rows of A·B are rows of A, columns are columns of B

A rule is (slicer, node, x, dim) -> what computes `node`, a take of x along dim, without all of x; or a `Mismatch`.
"""

import operator
from collections.abc import Callable
from itertools import product
from math import prod
from typing import Any

import torch
from torch import fx

from s2ft_compile.passes.editor import Mismatch

from . import convolution
from .along import ALONG_RULES, WEIGHT_NORM, kept_dim, push_var_mean, push_weight_norm
from .attach import TAKE, positions, runs
from .grouped import push_grouped_mm, push_output

aten = torch.ops.aten
MAX_COPIES = 64  # of a slice's ranges, one for each index of the dimensions that a view joins before it


def push_permute(editor, node, x, dim):
    order = x.args[1]
    return editor.call(aten.permute.default, editor.push(x.args[0], order[dim] % len(order), node), order, like=x)


def push_transpose(editor, node, x, dim):
    rank = x.meta["val"].ndim
    a, b = (d % rank for d in (x.args[1:3] if len(x.args) > 2 else (0, 1)))
    if rank < 2:
        return editor.push(x.args[0], dim, node)
    source = {a: b, b: a}.get(dim, dim)
    return editor.call(aten.transpose.int, editor.push(x.args[0], source, node), a, b, like=x)


def push_view(editor, node, x, dim):
    """A view keeps a dimension if as many elements lie before and after it on both sides."""
    old, new = x.args[0].meta["val"].shape, x.meta["val"].shape
    for source in range(len(old)):
        if old[source] == new[dim] and prod(old[:source]) == prod(new[:dim]):
            inner = editor.push(x.args[0], source, node)
            shape = list(new)
            shape[dim] = node.meta["val"].shape[dim]
            return editor.call(aten.reshape.default, inner, shape, like=x)
    sliced = _split_view(editor, node, x, dim)
    return _merging_view(editor, node, x, dim) if sliced is None else sliced


def _split_view(editor, node, x, dim):
    """The dimension is one of several that the view made of one: its ranges recur for each index of those before it.
    None where it is not."""
    old, new = list(x.args[0].meta["val"].shape), list(x.meta["val"].shape)
    starts, lengths = node.args[2:]
    for source, first in product(range(len(old)), range(dim + 1)):
        last = next((q for q in range(dim + 1, len(new) + 1) if prod(new[first:q]) == old[source]), None)
        if last is None or prod(old[:source]) != prod(new[:first]):
            continue
        before, after = prod(new[first:dim]), prod(new[dim + 1 : last])
        if before > MAX_COPIES:
            return Mismatch(f"its view divides a dimension into {before} before this one, above {MAX_COPIES}")
        moved = [(k * new[dim] + s) * after for k in range(before) for s in starts]
        inner = editor.push_ranges(x.args[0], source, moved, [n * after for n in lengths] * before)
        shape = [*new[:dim], node.meta["val"].shape[dim], *new[dim + 1 :]]
        return editor.call(aten.reshape.default, inner, shape, like=x)
    return None


def _merging_view(editor, node, x, dim):
    """The dimension joins several: the indices of the first of them that the ranges touch, and the ranges in those."""
    old, new = list(x.args[0].meta["val"].shape), list(x.meta["val"].shape)
    ends = product(range(len(old)), range(2, len(old) + 1))
    fits = [(i, j) for i, j in ends if prod(old[i:j]) == new[dim] and prod(old[:i]) == prod(new[:dim]) and j - i > 1]
    if not fits:
        return Mismatch("its view joins and divides dimensions at once")
    source, inner = fits[0][0], new[dim] // old[fits[0][0]]
    taken = positions(node)
    touched = sorted({p // inner for p in taken})
    if len(touched) == old[source]:
        inside = [p for p in taken if p < inner]
        if taken != [i * inner + p for i in touched for p in inside] or fits[0][1] - source > 2:
            return Mismatch("its view joins dimensions, and the slice touches every index of the first of them")
        sliced = editor.push_ranges(x.args[0], source + 1, *runs(inside))  # the same of each
        return editor.call(aten.reshape.default, sliced, [*new[:dim], len(taken), *new[dim + 1 :]], like=x)
    sliced = editor.push_ranges(x.args[0], source, *runs(touched))
    sliced = editor.call(aten.reshape.default, sliced, [*new[:dim], len(touched) * inner, *new[dim + 1 :]], like=x)
    if len(taken) == len(touched) * inner:
        return sliced
    local = runs([touched.index(p // inner) * inner + p % inner for p in taken])
    pieces = [editor.call(aten.slice.Tensor, sliced, dim, s, s + n, like=x) for s, n in zip(*local)]
    return editor.call(aten.cat.default, pieces, dim, like=x)


def push_mm(editor, node, x, dim):
    a, b = x.args
    a, b = (editor.take(a, 0, node), b) if dim == 0 else (a, editor.take(b, 1, node))
    return editor.call(aten.mm.default, a, b, like=x)


def push_bmm(editor, node, x, dim):
    a, b = x.args
    if dim in (0, 1):
        a = editor.take(a, dim, node)
    if dim in (0, 2):
        b = editor.take(b, dim, node)
    return editor.call(aten.bmm.default, a, b, like=x)


def push_addmm(editor, node, x, dim):
    bias, a, b = x.args
    size, kept = bias.meta["val"].shape, bias.meta["val"].ndim - 2 + dim
    if kept >= 0 and size[kept] != 1:
        bias = editor.take(bias, kept, node)
    a, b = (editor.take(a, 0, node), b) if dim == 0 else (a, editor.take(b, 1, node))
    return editor.call(aten.addmm.default, bias, a, b, like=x, **x.kwargs)


def push_sum(editor, node, x, dim):
    source, kept = x.args[0], kept_dim(x, dim)
    if kept is None:
        return Mismatch("it is summed over the slice's dimension")
    sliced = editor.sliced(source, kept, node)
    if isinstance(sliced, Mismatch):  # dY, whose gradient makes it in full: attention's, for a bias of the lowest layer
        sliced = editor.take(source, kept, node)
    return editor.call(x.target, sliced, *x.args[1:], like=x, **x.kwargs)


def push_embedding(editor, node, x, dim):
    grad, *rest = x.args
    if dim != 1:
        return Mismatch("any row of an embedding may be read, so its rows cannot be told apart before the step")
    return editor.call(aten.embedding_dense_backward.default, editor.take(grad, -1, node), *rest, like=x)


def push_index_put(editor, node, x, dim):
    """Values added at indexed places, [mask,] indices, values: along dimensions without an index both can be sliced."""
    base, *rest = x.args
    at = next(i for i, arg in enumerate(rest) if isinstance(arg, (list, tuple)))
    indices, values, rank = rest[at], rest[at + 1], base.meta["val"].ndim
    used = [d for d, index in enumerate(indices) if index is not None]
    inside = max(indices[d].meta["val"].ndim for d in used) - len(used)  # the indexed dimensions become the indices'
    from_end = dim - rank - (inside if dim < used[0] else 0)
    size, apart = values.meta["val"].shape, len(used) <= used[-1] - used[0]
    if dim in used or apart or at and used[0] or size[max(from_end, -len(size))] != base.meta["val"].shape[dim]:
        return Mismatch("rows are added along an indexed dimension, which the indices of a step decide")
    values = editor.take(values, from_end, node)
    return editor.call(x.target, editor.push(base, dim, node), *rest[: at + 1], values, *rest[at + 2 :], like=x)


def push_slice_scatter(editor, node, x, dim):
    base, values, at, *rest = x.args if len(x.args) > 2 else (*x.args, 0)
    if at % base.meta["val"].ndim == dim:
        return Mismatch("the slice lies along the dimension that is written to")
    values = editor.take(values, dim, node)
    return editor.call(x.target, editor.push(base, dim, node), values, at, *rest, like=x)


def push_slice_backward(editor, node, x, dim):
    values, size, at, *rest = x.args
    at %= len(size)
    if at == dim:
        return _window(editor, node, x, dim)
    size = [*size[:dim], node.meta["val"].shape[dim], *size[dim + 1 :]]
    return editor.call(x.target, editor.take(values, dim, node), size, at, *rest, like=x)


def _window(editor, node, x, dim):
    """Ranges of zeros with values in a window of the same dimension: those of the values, and zeros around them."""
    values, size, _, start, end, step = x.args
    if step != 1:
        return Mismatch(f"it is written to in steps of {step} along the slice's dimension")
    start, end = (min(p + size[dim] if p < 0 else p, size[dim]) for p in (start, end))
    taken = positions(node)
    inside = [p - start for p in taken if start <= p < end]
    before, after = sum(p < start for p in taken), sum(p >= end for p in taken)
    sliced = editor.push_ranges(values, dim, *runs(inside or [0]))
    if not inside:
        return editor.call(aten.new_zeros.default, sliced, list(node.meta["val"].shape), like=x)
    pad = [0, 0] * (len(size) - 1 - dim) + [before, after]
    return editor.call(aten.constant_pad_nd.default, sliced, pad, like=x) if before or after else sliced


def push_select_backward(editor, node, x, dim):
    """Zeros with values at one index of another dimension."""
    values, size, at, index = x.args
    at %= len(size)
    if at == dim:
        return Mismatch("the slice lies along the dimension of the selected index")
    values = editor.push(values, dim - (at < dim), node)
    size = [*size[:dim], node.meta["val"].shape[dim], *size[dim + 1 :]]
    return editor.call(x.target, values, size, at, index, like=x)


def push_select_scatter(editor, node, x, dim):
    base, values, at, index = x.args
    at %= base.meta["val"].ndim
    if at == dim:
        return Mismatch("the slice lies along the dimension of the selected index")
    values = editor.push(values, dim - (at < dim), node)
    return editor.call(x.target, editor.push(base, dim, node), values, at, index, like=x)


def push_cat(editor, node, x, dim):
    """Along another dimension each part's slice; along the same, what the ranges take of each part."""
    parts, at = x.args[0], (x.args[1] if len(x.args) > 1 else 0) % x.meta["val"].ndim
    if at != dim:
        return editor.call(x.target, [editor.push(part, dim, node) for part in parts], at, like=x)
    taken = positions(node)
    sliced, offset = [], 0
    for part in parts:
        size = part.meta["val"].shape[dim]
        if inside := [p - offset for p in taken if offset <= p < offset + size]:
            sliced.append(editor.push_ranges(part, dim, *runs(inside)))
        offset += size
    return sliced[0] if len(sliced) == 1 else editor.call(x.target, sliced, dim, like=x)


def push_result(editor, node, x, dim):
    """One of an operator's several results."""
    rules = {
        convolution.BACKWARD: convolution.push_convolution,
        WEIGHT_NORM: push_weight_norm,
        aten.var_mean.correction: push_var_mean,
    }
    return rules.get(x.args[0].target, push_output)(editor, node, x, dim)


def push_constant(editor, node, x, dim):
    """full(size, value) and new_zeros(like, size): the same of another size."""
    size = list(node.meta["val"].shape)
    args = [size if isinstance(arg, (list, tuple)) else arg for arg in x.args]
    return editor.call(x.target, *args, like=x, **x.kwargs)


def push_elementwise(editor, node, x, dim):
    """Casts, sums of several uses' gradients, scalings: slice every operand that has the dimension."""
    rank = x.meta["val"].ndim

    def sliced(arg):
        if not isinstance(arg, fx.Node) or not isinstance(arg.meta.get("val"), torch.Tensor):
            return arg
        value = arg.meta["val"]
        source = dim - rank + value.ndim
        if source < 0 or value.shape[source] == 1:
            return arg
        return editor.sliced(arg, source, node)

    return editor.call(x.target, *[sliced(a) for a in x.args], like=x, **x.kwargs)


def push_expand(editor, node, x, dim):
    """What is repeated along the dimension is repeated less often; the rest is sliced before it is repeated."""
    source, size = x.args[0], list(node.meta["val"].shape)
    inner = dim - len(size) + source.meta["val"].ndim
    if inner >= 0 and source.meta["val"].shape[inner] != 1:
        source = editor.push(source, inner, node)
    return editor.call(aten.expand.default, source, size, like=x)


def push_complex(editor, node, x, dim):
    """A view of complex numbers as real ones, or of real ones as complex: both have the dimensions before the last."""
    old, new = x.args[0].meta["val"].shape, x.meta["val"].shape
    if dim >= len(old) or old[dim] != new[dim]:
        return Mismatch("it holds real and imaginary parts")
    return editor.call(x.target, editor.push(x.args[0], dim, node), *x.args[1:], like=x)


def push_take(editor, node, x, dim):
    """A slice of a slice along another dimension: they commute."""
    if x.args[1] == dim:
        return Mismatch("it is a slice along the same dimension")
    return editor.call(TAKE, editor.push(x.args[0], dim, node), *x.args[1:], like=x)


SLICE_RULES: dict[Any, Callable] = {
    aten.permute.default: push_permute,
    aten.transpose.int: push_transpose,
    aten.t.default: push_transpose,
    aten.view.default: push_view,
    aten.reshape.default: push_view,
    aten._unsafe_view.default: push_view,
    aten.unsqueeze.default: push_view,
    aten.squeeze.dim: push_view,
    aten.squeeze.dims: push_view,
    aten.mm.default: push_mm,
    aten.bmm.default: push_bmm,
    aten._grouped_mm.default: push_grouped_mm,
    operator.getitem: push_result,
    aten.cat.default: push_cat,
    aten.select_backward.default: push_select_backward,
    aten.select_scatter.default: push_select_scatter,
    aten.addmm.default: push_addmm,
    aten.sum.dim_IntList: push_sum,
    aten.embedding_dense_backward.default: push_embedding,
    aten.index_put.default: push_index_put,
    aten._unsafe_masked_index_put_accumulate.default: push_index_put,
    aten.slice_scatter.default: push_slice_scatter,
    aten.slice_backward.default: push_slice_backward,
    aten.full.default: push_constant,
    aten.new_zeros.default: push_constant,
    aten.expand.default: push_expand,
    aten.view_as_real.default: push_complex,
    aten.view_as_complex.default: push_complex,
    aten.view.dtype: push_complex,
    aten._conj.default: push_elementwise,
    aten.complex.default: push_elementwise,
    aten._to_copy.default: push_elementwise,
    aten.clone.default: push_elementwise,
    aten.alias.default: push_elementwise,
    aten.detach.default: push_elementwise,
    torch.ops.prims.convert_element_type.default: push_elementwise,
    TAKE: push_take,
    **ALONG_RULES,
}


NAMED_SLICE_RULES: dict[str, Callable] = {}  # of other libraries' operators, by name (`s2ft_compile.rules`)


def rule_for(target: Any) -> Callable | None:
    if target in SLICE_RULES:
        return SLICE_RULES[target]
    if isinstance(target, torch._ops.OpOverload) and target._schema.name in NAMED_SLICE_RULES:
        return NAMED_SLICE_RULES[target._schema.name]
    return push_elementwise if torch.Tag.pointwise in getattr(target, "tags", ()) else None
