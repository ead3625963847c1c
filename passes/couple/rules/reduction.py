"""Rules of reductions, norms and pooling."""

from s2ft_compile.passes.couple.axes import ONE, Axis, Pin, pin, reshape, unify

from .context import Value, acted_dims, argument, name, shapes, tensors


def axes_reduce(cx, node, x, *args, **kwargs):
    """Symmetric in what it reduces: sum, mean, amax, var, norm, logsumexp."""
    gone, keep = acted_dims(node, len(x.dims)), bool(argument(node, "keepdim", False))
    cx.consumed += [x.dims[d] for d in gone]
    cx.weighted_sum(x, gone)
    dims = [ONE if d in gone else axis for d, axis in enumerate(x.dims) if keep or d not in gone]
    several = isinstance(node.meta["val"], (list, tuple))
    return [list(dims) for _ in node.meta["val"]] if several else dims


def axes_layer_norm(cx, node, x, normalized_shape, weight=None, bias=None, *args):
    why = Pin(f"{name(node)} of two axes that cannot be aligned", node)
    for param in (weight, bias):
        if isinstance(param, Value):  # rms_norm has its eps where layer_norm has the bias
            for a, b in zip(x.dims[-len(normalized_shape) :], param.dims):
                unify(a, b, why)
    if not isinstance(node.meta["val"], (list, tuple)):
        return list(x.dims)
    stats = [*x.dims[: -len(normalized_shape)], *[ONE] * len(normalized_shape)]
    return [list(x.dims), *[stats[: len(out)] for out in shapes(node)[1:]]]


def axes_group_norm(cx, node, x, groups, weight=None, bias=None, *args, **kwargs):
    why = Pin(f"{name(node)} of two axes that cannot be aligned", node)
    reshape([x.dims[1]], [groups, x.dims[1].size // groups], why)
    for param in (weight, bias):
        if param is not None:
            unify(x.dims[1], param.dims[0], why)
    return list(x.dims)


def axes_spatial(spatial: int):
    """Pooling, resizing: acts on the last `spatial` dimensions and on each of the others alike."""

    def rule(cx, node, x, *args, **kwargs):
        why = Pin(f"{name(node)} depends on the order along the axis", node)
        for axis in x.dims[-spatial:]:
            pin(axis, why)
        outputs = [[*x.dims[:-spatial], *[Axis(size, pin=why) for size in out[-spatial:]]] for out in shapes(node)]
        return outputs if isinstance(node.meta["val"], (list, tuple)) else outputs[0]

    return rule


def axes_batch_norm(cx, node, x, *args, **kwargs):
    """Each channel (dimension 1) by itself, with weights and running statistics of its own."""
    why = Pin(f"{name(node)} of two axes that cannot be aligned", node)
    for value in tensors((args, kwargs)):
        unify(x.dims[1], value.dims[0], why)
    if not isinstance(node.meta["val"], (list, tuple)):
        return list(x.dims)
    channels = x.dims[1]
    rest = [[channels] if out == [channels.size] else [Axis(n) for n in out] for out in shapes(node)[1:]]
    return [list(x.dims), *rest]


def axes_weight_norm(cx, node, v, g, dim=0):
    """v / |v| × g, the norm over all dimensions but one."""
    unify(v.dims[dim], g.dims[dim], Pin(f"{name(node)} of two axes that cannot be aligned", node))
    return [list(v.dims), list(g.dims)]


def axes_whole_weight_norm(cx, node, v, g, dim=0):
    """One result; dim = -1: one norm for all of it."""
    return list(v.dims) if dim == -1 else axes_weight_norm(cx, node, v, g, dim)[0]


def axes_prelu(cx, node, x, weight):
    if weight.sizes != [1] and weight.dims and len(x.dims) > 1:
        unify(x.dims[1], weight.dims[0], Pin(f"{name(node)} of two axes that cannot be aligned", node))
    return list(x.dims)
