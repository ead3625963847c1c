"""Rules of views, slices and concatenations."""

from math import prod

from s2ft_compile.passes.couple.axes import ONE, Axis, Pin, concat, cut, pin, product, reshape

from .context import Value, argument, axes_unknown, broadcast, name, shape, shapes


def axes_reshape(cx, node, x, *args, **kwargs):
    return reshape(x.dims, shape(node), Pin(f"{name(node)} from {x.sizes} to {shape(node)} mixes axes", node))


def axes_diagonal(cx, node, x, *args, **kwargs):
    why = Pin("a diagonal is read", node)
    two = {argument(node, "dim1") % len(x.dims), argument(node, "dim2") % len(x.dims)}
    for d in two:
        pin(x.dims[d], why)
    return [*(axis for d, axis in enumerate(x.dims) if d not in two), Axis(shape(node)[-1], pin=why)]


def axes_permute(cx, node, x, order):
    return [x.dims[d] for d in order]


def axes_transpose(cx, node, x, a=-2, b=-1):
    dims = list(x.dims)
    if len(dims) > 1:
        dims[a], dims[b] = dims[b], dims[a]
    return dims


def axes_expand(cx, node, x, *args, **kwargs):
    out = shape(node)
    old = [ONE] * (len(out) - len(x.dims)) + list(x.dims)
    return [axis if axis.size == size else Axis(size) for axis, size in zip(old, out)]


def axes_repeat(cx, node, x, repeats):
    old = [ONE] * (len(repeats) - len(x.dims)) + list(x.dims)
    return [product([Axis(times), axis]) for times, axis in zip(repeats, old)]


def axes_tile(cx, node, x, repeats):
    return axes_repeat(cx, node, x, [1] * (len(x.dims) - len(repeats)) + list(repeats))


def axes_repeat_interleave(cx, node, x, repeats, dim=None, **kwargs):
    if dim is None:
        return axes_unknown(cx, node, x)
    dims = list(x.dims)
    dims[dim] = product([dims[dim], Axis(repeats)])
    return dims


def axes_slice(cx, node, x, dim=0, start=None, end=None, step=1):
    dims = list(x.dims)
    axis, size = dims[dim], shape(node)[dim]
    why = Pin(f"a slice of {size} of its {axis.size} elements crosses units", node)
    if size == axis.size:
        return dims
    if size == 0:
        dims[dim] = Axis(0)
        return dims
    if step != 1:
        pin(axis, Pin(f"a slice with step {step}", node))
        dims[dim] = Axis(size, pin=why)
        return dims
    start = max(0, start + axis.size if (start or 0) < 0 else (start or 0))
    dims[dim] = window(axis, start, size, why)
    return dims


def axes_slice_scatter(cx, node, x, source, dim=0, start=None, end=None, step=1):
    """x with a window of one axis replaced by `source`: that axis is the sum of what is left and of source's."""
    others = [Value([a for d, a in enumerate(v.dims) if d != dim % len(v.dims)], v.weight) for v in (x, source)]
    dims = broadcast(cx, node, *others)
    axis, size = x.dims[dim], source.dims[dim].size
    start = max(0, (start or 0) + (axis.size if (start or 0) < 0 else 0))
    if size == 0:
        dims.insert(dim % len(x.dims), axis)
        return dims
    if step != 1:
        why = Pin(f"it is written to with step {step}", node)
        for each in (axis, source.dims[dim]):
            pin(each, why)
        dims.insert(dim % len(x.dims), Axis(axis.size, pin=why))
        return dims
    why = Pin(f"{size} of its {axis.size} elements are replaced, which crosses units", node)
    pieces = cut(axis, sorted({start, start + size} - {0, axis.size}), why) if size < axis.size else [axis]
    pieces[1 if start else 0] = source.dims[dim]
    dims.insert(dim % len(x.dims), concat(pieces))
    return dims


def axes_select_scatter(cx, node, x, source, dim, index):
    dim %= len(x.dims)
    source = Value([*source.dims[:dim], ONE, *source.dims[dim:]], source.weight)
    index %= x.dims[dim].size
    return axes_slice_scatter(cx, node, x, source, dim, index, index + 1)


def axes_narrow(cx, node, x, dim, start, length):
    return axes_slice(cx, node, x, dim, start, start + length)


def window(axis: Axis, start: int, size: int, why: Pin) -> Axis:
    pieces = cut(axis, sorted({start, start + size} - {0, axis.size}), why)
    return pieces[0] if start == 0 else pieces[1]


def axes_select(cx, node, x, dim, index):
    dims = list(x.dims)
    axis = dims.pop(dim)
    if axis.size > 1:
        why = Pin("one element of the axis is selected", node)
        window(axis, index % axis.size, 1, why)
    return dims


def axes_unbind(cx, node, x, dim=0):
    dims = list(x.dims)
    axis = dims.pop(dim)
    pin(axis, Pin("the axis is taken apart (unbind)", node))
    return [list(dims) for _ in range(axis.size)]


def axes_split(cx, node, x, sizes, dim=0):
    axis = x.dims[dim]
    widths = [out[dim] for out in shapes(node)]
    offsets, why = [sum(widths[:i]) for i in range(1, len(widths))], Pin(f"a split into {widths} crosses units", node)
    if sum(widths) == axis.size:
        pieces = cut(axis, offsets, why)
    else:  # widths that depend on data
        pin(axis, why)
        pieces = [Axis(width, pin=why) for width in widths]
    dims = [list(x.dims) for _ in pieces]
    for d, piece in zip(dims, pieces):
        d[dim] = piece
    return dims


def axes_cat(cx, node, values, dim=0):
    values = [v for v in values if 0 not in v.sizes]
    if not values:
        return [Axis(size) for size in shape(node)]
    rank = len(values[0].dims)
    dim %= rank
    dims = [ONE] * rank
    for d in range(rank):
        if d == dim:
            dims[d] = concat(v.dims[d] for v in values)
        else:
            dims[d] = broadcast(cx, node, *[Value([v.dims[d]], v.weight) for v in values])[0]
    return dims


def axes_stack(cx, node, values, dim=0):
    dims = broadcast(cx, node, *values)
    dims.insert(dim % (len(dims) + 1), Axis(len(values), pin=Pin("the axis stacks different tensors", node)))
    return dims


def axes_pad(cx, node, x, pad, *args, **kwargs):
    """With a constant before and behind an axis; what is mirrored or repeated there depends on its order."""
    dims, mode = list(x.dims), argument(node, "mode", "constant")
    for i in range(len(pad) // 2):
        before, after = pad[2 * i], pad[2 * i + 1]
        axis = dims[-1 - i]
        if before < 0 or after < 0:
            pin(axis, Pin("a negative pad cuts the axis", node))
            dims[-1 - i] = Axis(shape(node)[-1 - i], pin=Pin("a negative pad cuts the axis", node))
        elif mode != "constant" and (before or after):
            why = Pin(f"{name(node)} depends on the order along the axis ({mode})", node)
            pin(axis, why)
            dims[-1 - i] = Axis(shape(node)[-1 - i], pin=why)
        elif before or after:
            dims[-1 - i] = concat([Axis(before), axis, Axis(after)])
    return dims


def axes_as_strided(cx, node, x, size, stride, offset=None):
    """A dimension of a contiguous x stays one where the result steps along it as x does, from its first index to its
    last, and no other step carries into it. The others are read in windows."""
    val, why = node.args[0].meta["val"], Pin("windows of the axis are read (as_strided)", node)
    steps = [(n, step) for n, step in zip(size, stride)]
    inside = sum((n - 1) * step for n, step in steps if n) < val.numel()
    if offset or val.storage_offset() or not val.is_contiguous() or not inside:
        return axes_unknown(cx, node, x)
    dims = [Axis(n, pin=why) for n in size]
    for axis, n, step in zip(x.dims, x.sizes, val.stride()):
        others = [other for other in steps if other[0] > 1 and other != (n, step)]
        carried = sum((m - 1) * t for m, t in others if t < step) >= step
        if (n, step) in steps and not carried and all(t % (n * step) == 0 for _, t in others if t >= step):
            dims[steps.index((n, step))] = axis
        else:
            pin(axis, why)
    return dims


def axes_unfold(cx, node, x, dim, size, step):
    dims, dim, why = list(x.dims), dim % len(x.dims), Pin(f"{name(node)} slides along the axis", node)
    pin(dims[dim], why)
    dims[dim] = Axis(shape(node)[dim], pin=why)
    return [*dims, Axis(size, pin=why)]


def axes_pixel_shuffle(cx, node, x, factor):
    """(..., C r r, H, W) -> (..., C, H r, W r)."""
    why = Pin(f"{name(node)} depends on the order along the axis", node)
    channels, inner = reshape([x.dims[-3]], [x.dims[-3].size // factor**2, factor**2], why)
    for axis in (inner, *x.dims[-2:]):
        pin(axis, why)
    return [*x.dims[:-3], channels, *[Axis(size, pin=why) for size in shape(node)[-2:]]]


def axes_pixel_unshuffle(cx, node, x, factor):
    why = Pin(f"{name(node)} depends on the order along the axis", node)
    for axis in x.dims[-2:]:
        pin(axis, why)
    channels = product([x.dims[-3], Axis(factor**2, pin=why)])
    return [*x.dims[:-3], channels, *[Axis(size, pin=why) for size in shape(node)[-2:]]]


def axes_im2col(cx, node, x, kernel, *args):
    """(N, C, H, W) -> (N, C × kernel, windows)."""
    why = Pin(f"{name(node)} slides along the axis", node)
    for axis in x.dims[-2:]:
        pin(axis, why)
    channels = product([x.dims[-3], Axis(prod(kernel), pin=why)])
    return [*x.dims[:-3], channels, Axis(shape(node)[-1], pin=why)]


def axes_col2im(cx, node, x, size, kernel, *args):
    """(N, C × kernel, windows) -> (N, C, H, W)."""
    why = Pin(f"{name(node)} slides along the axis", node)
    channels, inner = reshape([x.dims[-2]], [x.dims[-2].size // prod(kernel), prod(kernel)], why)
    for axis in (inner, x.dims[-1]):
        pin(axis, why)
    return [*x.dims[:-2], channels, *[Axis(n, pin=why) for n in shape(node)[-2:]]]


def axes_channel_shuffle(cx, node, x, groups):
    """Channels (groups, each) -> (each, groups)."""
    why = Pin(f"{name(node)} into {groups} groups", node)
    group, each = reshape([x.dims[1]], [groups, x.dims[1].size // groups], why)
    return [x.dims[0], product([each, group]), *x.dims[2:]]
