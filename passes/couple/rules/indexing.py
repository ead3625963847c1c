"""Rules of lookups and of writes by index."""

import torch

from s2ft_compile.passes.couple.axes import ONE, Axis, Pin, pin, unify

from .context import Value, axes_unknown, broadcast, node_dtype, shape


def axes_embedding(cx, node, weight, index, *args, **kwargs):
    pin(weight.dims[0], Pin("rows are looked up by index (embedding)", node))
    cx.project(node, weight, [1], [])
    return Value([*index.dims, weight.dims[1]])


def axes_index(cx, node, x, indices):
    why = Pin("elements are looked up by index", node)
    used_dims = [d for d, index in enumerate(indices) if index is not None]
    for d in used_dims:
        pin(x.dims[d], why)
    if any(node_dtype(node, d) in (torch.bool, torch.uint8) for d in used_dims):
        return masked_index(cx, node, x, indices, why)
    where = broadcast(cx, node, *[indices[d] for d in used_dims])
    rest = [axis for d, axis in enumerate(x.dims) if d not in used_dims]
    adjacent = used_dims[-1] - used_dims[0] + 1 == len(used_dims)
    first = used_dims[0] if adjacent else 0
    picked = tuple(x.dims[d] for d in used_dims) if x.weight and len(rest) > 1 else ()
    weight = x.weight and all(indices[d].weight for d in used_dims)
    return Value([*rest[:first], *where, *rest[first:]], weight, x.scores, () if weight else picked)


def masked_index(cx, node, x, indices, why):
    """x[mask]: what the mask covers becomes one axis, in order."""
    (d, mask), *more = [(d, i) for d, i in enumerate(indices) if i is not None]
    if more:
        return axes_unknown(cx, node, x, *indices)
    for axis in [*mask.dims, *x.dims[d : d + len(mask.dims)]]:
        pin(axis, why)
    return [*x.dims[:d], Axis(shape(node)[d], pin=why), *x.dims[d + len(mask.dims) :]]


def axes_index_put(cx, node, x, indices, values, *args):
    """x with values written where indices say; the dimensions between stay as they are."""
    if any(i is not None and node_dtype(node, d) in (torch.bool, torch.uint8) for d, i in enumerate(indices)):
        return axes_unknown(cx, node, x, *indices, values)
    why = Pin("elements are written by index", node)
    used_dims = [d for d, index in enumerate(indices) if index is not None]
    for d in used_dims:
        pin(x.dims[d], why)
    where = broadcast(cx, node, *[indices[d] for d in used_dims])
    for axis in where:  # where two are written to one place, the order says which stays
        pin(axis, why)
    rest = [axis for d, axis in enumerate(x.dims) if d not in used_dims]
    first = used_dims[0] if used_dims[-1] - used_dims[0] + 1 == len(used_dims) else 0
    broadcast(cx, node, Value([*rest[:first], *where, *rest[first:]]), values)
    return list(x.dims)


def axes_index_add(cx, node, x, dim, index, source, **kwargs):
    why = Pin("elements are written by index", node)
    dim %= len(x.dims)
    pin(x.dims[dim], why)
    cx.weighted_sum(source, [dim])
    for axis in index.dims:
        unify(axis, source.dims[dim], why)
    for d, (a, b) in enumerate(zip(x.dims, source.dims)):
        if d != dim:
            unify(a, b, why)
    return list(x.dims)


def axes_scatter(cx, node, x, dim, index, source=None, *args, **kwargs):
    """x with elements written at positions along one dimension; the other dimensions are aligned one to one."""
    why = Pin("elements are written by index", node)
    others = [v for v in (index, source) if isinstance(v, Value)]
    for d, axis in enumerate(x.dims):
        if d != dim % len(x.dims) and all(v.dims[d].size == axis.size for v in others):
            for v in others:
                unify(axis, v.dims[d], why)
        else:  # where two are written to one place, the order says which stays
            for v in (x, *others):
                pin(v.dims[d], why)
    return list(x.dims)


def axes_index_select(cx, node, x, dim, index):
    dims = list(x.dims)
    pin(dims[dim], Pin("elements are looked up by index", node))
    dims[dim] = index.dims[0] if index.dims else ONE
    return dims


def axes_gather(cx, node, x, dim, index, *args, **kwargs):
    if len(x.dims) != len(index.dims):  # a single element, looked up
        return axes_unknown(cx, node, x, index)
    pin(x.dims[dim], Pin("elements are looked up by index", node))
    dims = list(index.dims)
    for d, axis in enumerate(dims):
        if d != dim % len(dims):
            if axis.size == x.dims[d].size:
                unify(axis, x.dims[d])
            else:
                pin(axis, Pin("a gather reads part of the axis", node))
                pin(x.dims[d], Pin("a gather reads part of the axis", node))
    return dims


def axes_take_along(cx, node, x, index, dim=None):
    """gather, with sizes of 1 repeated."""
    if dim is None:
        return axes_unknown(cx, node, x, index)
    dim %= len(x.dims)
    pin(x.dims[dim], Pin("elements are looked up by index", node))
    dims = broadcast(cx, node, *[Value([*v.dims[:dim], ONE, *v.dims[dim + 1 :]], v.weight) for v in (x, index)])
    return [*dims[:dim], index.dims[dim], *dims[dim + 1 :]]


def axes_one_hot(cx, node, x, classes=-1):
    return [*x.dims, Axis(shape(node)[-1], pin=Pin("positions along the axis are looked up by index", node))]
