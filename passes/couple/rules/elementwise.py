"""Rules of operators that treat positions alike, make new tensors, or act on the order along one dimension."""

import torch

from s2ft_compile.passes.couple.axes import Axis, Pin, cut, pin, unify

from .context import Value, acted_dims, axes_unknown, broadcast, name, shape, shapes, tensors
from .reduction import axes_reduce

aten = torch.ops.aten


def axes_pointwise(cx, node, *args, **kwargs):
    operands = tensors((args, kwargs))
    dims = broadcast(cx, node, *operands)
    if isinstance(node.meta["val"], (list, tuple)):
        return [list(dims) for _ in node.meta["val"]]
    if len(operands) == 2 and not any(v.weight for v in operands):
        if node.target is aten.mul.Tensor:
            return Value(dims, False, any(v.scores for v in operands), factors=tuple(operands))
        if node.target is aten.add.Tensor and _each_with_each(*operands):
            cx.attention += [axis for v in operands for axis in v.dims]
            cx.meet(*operands)
            return Value(dims, scores=True)
    return dims


def _each_with_each(left: Value, right: Value) -> bool:
    """Whether two tensors have an axis each that the other has not."""
    pairs = list(zip(left.sizes[::-1], right.sizes[::-1]))
    return any(a > b for a, b in pairs) and any(a < b for a, b in pairs)


def axes_same(cx, node, x, *args, **kwargs):
    """Alike for every position: casts, copies, softmax (symmetric), dropout (alike in distribution)."""
    several = isinstance(node.meta["val"], (list, tuple))
    return [list(x.dims) for _ in node.meta["val"]] if several else list(x.dims)


def axes_view_dtype(cx, node, x, dtype):
    """The bits as another type; of another width, elements of the last dimension are joined or taken apart."""
    return list(x.dims) if shape(node) == x.sizes else axes_unknown(cx, node, x)


def axes_fresh(cx, node, *args, **kwargs):
    """Constant along every dimension (zeros, full, empty), so all orders are the same."""
    return [Axis(size) for size in shape(node)]


def axes_random(cx, node, *args, **kwargs):
    """Independent draws of one distribution. Any order of them is as likely as another, so in train mode a permuted
    model is the same in distribution (as with dropout). In eval mode outputs have to stay the same for a given seed."""
    return axes_fresh(cx, node) if cx.training else axes_ordered(cx, node)


def axes_ordered(cx, node, *args, **kwargs):
    """arange and its kin: different along every dimension."""
    why = Pin(f"{name(node)} makes values that differ along the axis", node)
    return [Axis(size, pin=why) for size in shape(node)]


def axes_pinned_dim(cx, node, x, *args, **kwargs):
    """cumsum, flip, roll, sort, topk, ...: acts on the order along one dimension and keeps the others."""
    why = Pin(f"{name(node)} depends on the order along the axis", node)
    for d in acted_dims(node, len(x.dims)):
        pin(x.dims[d], why)
    outputs = [[a if a.size == size else Axis(size, pin=why) for a, size in zip(x.dims, out)] for out in shapes(node)]
    return outputs if isinstance(node.meta["val"], (list, tuple)) else outputs[0]


def axes_fourier(cx, node, x, *args, **kwargs):
    """Each output along the dimensions is made of all inputs along them; the others are transformed one by one."""
    dims = acted_dims(node, len(x.dims))
    cx.spectral += [axis for d, axis in enumerate(x.dims) if d not in dims]
    return axes_pinned_dim(cx, node, x, *args, **kwargs)


def axes_argmax(cx, node, x, *args, **kwargs):
    for d in acted_dims(node, len(x.dims)):
        pin(x.dims[d], Pin(f"{name(node)} depends on the order along the axis", node))
    return axes_reduce(cx, node, x)


def axes_triangle(cx, node, x, *args, **kwargs):
    for axis in x.dims[-2:]:
        pin(axis, Pin(f"{name(node)} depends on the order along the axis", node))
    return list(x.dims)


def axes_as_complex(cx, node, x):
    pin(x.dims[-1], Pin("real and imaginary parts", node))
    return list(x.dims[:-1])


def axes_as_real(cx, node, x):
    return [*x.dims, Axis(2, pin=Pin("real and imaginary parts", node))]


def axes_glu(cx, node, x, dim=-1):
    """The first half of an axis times the sigmoid of the second."""
    dims, why = list(x.dims), Pin("the two halves of the axis meet", node)
    first, second = cut(dims[dim], [dims[dim].size // 2], why)
    unify(first, second, why)
    dims[dim] = first
    return dims
