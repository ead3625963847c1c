"""What each operator says about the axes of its operands: one table, keyed by operator.

A rule gets (cx, node, *args) with every tensor argument as a `Value`, states what must be equal (`unify`) or in order
(`pin`), and returns the result's dimensions (a list of axes), a `Value`, or a list of those for several results. An
operator without a rule pins whatever it touches: unknown is refused, never guessed.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Callable, Sequence

import torch

from .axes import ONE, Axis, Pin, concat, cut, pin, product, reshape, unify

aten = torch.ops.aten


@dataclass(frozen=True)
class Value:
    """A tensor as axis inference sees it.

    dims: an axis per dimension. weight: computed from parameters and constants alone. scores: comes out of a
    product of two activations (attention scores), so a product with it applies them to the values.
    """

    dims: Sequence[Axis]
    weight: bool = False
    scores: bool = False

    @property
    def sizes(self) -> list[int]:
        return [d.size for d in self.dims]


@dataclass
class Projection:
    """The axes of a weight that an operator produces and those it contracts."""

    produced: list[Axis] = field(default_factory=list)
    contracted: list[Axis] = field(default_factory=list)


@dataclass
class Context:
    """What the rules report besides equations: which axes meet in products of two activations."""

    heads: list[Axis] = field(default_factory=list)  # batch axes of such a product
    attention: list[Axis] = field(default_factory=list)  # every axis of such a product
    experts: list[Axis] = field(default_factory=list)  # batch axes of a product with a weight
    consumed: list[Axis] = field(default_factory=list)  # axes that a contraction or a reduction sums over
    projections: dict[Any, Projection] = field(default_factory=dict)  # by node

    def project(self, node, weight: Value, produced: Sequence[int], contracted: Sequence[int]) -> None:
        """Records a contraction with a weight, by the weight's dimensions."""
        for dims, use in ((produced, "in"), (contracted, "out")):
            for d in dims:
                weight.dims[d].uses.add(use)
        made = self.projections.setdefault(node, Projection())
        made.produced.extend(weight.dims[d] for d in produced)
        made.contracted.extend(weight.dims[d] for d in contracted)

    def product(self, left: Value, right: Value, batch: Sequence[Axis]) -> bool:
        """Records a contraction of two activations; returns whether its result holds attention scores."""
        self.heads += batch
        self.attention += [*left.dims, *right.dims]
        scores = left.scores or right.scores
        for value, other, role in ((left, right, "query"), (right, left, "key")):
            if not value.scores:
                mark(value.dims, "value" if other.scores else role)
        return not scores


def mark(dims: Sequence[Axis], role: str) -> None:
    """Marks handles, and the parts they were refined into, with what attention uses them as."""
    for axis in dims:
        if axis.size > 1 and axis.role is None:
            axis.role = role
            if axis.alias is None:
                mark(axis.parts, role)


# --- elementwise -----------------------------------------------------------------------------------------------


def broadcast(cx, node, *values: Value) -> list[Axis]:
    """Elementwise: aligned from the right, equal sizes are one axis, a size of 1 says nothing."""
    why = Pin(f"{name(node)} of two axes that cannot be aligned", node)
    values = sorted(values, key=lambda v: v.weight)  # keep the activation's handle
    rank = max(len(v.dims) for v in values)
    dims = []
    for d in range(-rank, 0):
        axes = [v.dims[d] for v in values if len(v.dims) >= -d]
        axes = [a for a in axes if a.size != 1] or [ONE]
        for other in axes[1:]:
            unify(axes[0], other, why)
        dims.append(axes[0])
    return dims


def pointwise_rule(cx, node, *args, **kwargs):
    dims = broadcast(cx, node, *tensors((args, kwargs)))
    several = isinstance(node.meta["val"], (list, tuple))
    return [list(dims) for _ in node.meta["val"]] if several else dims


def same_rule(cx, node, x, *args, **kwargs):
    """Alike for every position: casts, copies, softmax (symmetric), dropout (alike in distribution)."""
    several = isinstance(node.meta["val"], (list, tuple))
    return [list(x.dims) for _ in node.meta["val"]] if several else list(x.dims)


def view_dtype_rule(cx, node, x, dtype):
    """The bits as another type; of another width, elements of the last dimension are joined or taken apart."""
    return list(x.dims) if shape(node) == x.sizes else unknown_rule(cx, node, x)


def fresh_rule(cx, node, *args, **kwargs):
    """Constant along every dimension (zeros, full, empty), so all orders are the same."""
    return [Axis(size) for size in shape(node)]


def ordered_rule(cx, node, *args, **kwargs):
    """arange and its kin: different along every dimension."""
    why = Pin(f"{name(node)} makes values that differ along the axis", node)
    return [Axis(size, pin=why) for size in shape(node)]


def acted_dims(node, rank: int) -> list[int]:
    """The dimensions an operator names as `dim` or `dims`; all of them where it names none."""
    dim = argument(node, "dim", argument(node, "dims"))
    if dim is None or dim == []:
        return list(range(rank))
    return [d % rank for d in (dim if isinstance(dim, (list, tuple)) else [dim])]


def pinned_dim_rule(cx, node, x, *args, **kwargs):
    """cumsum, flip, roll, sort, topk, ...: acts on the order along one dimension and keeps the others."""
    why = Pin(f"{name(node)} depends on the order along the axis", node)
    for d in acted_dims(node, len(x.dims)):
        pin(x.dims[d], why)
    made = [[a if a.size == size else Axis(size, pin=why) for a, size in zip(x.dims, out)] for out in shapes(node)]
    return made if isinstance(node.meta["val"], (list, tuple)) else made[0]


def argmax_rule(cx, node, x, *args, **kwargs):
    for d in acted_dims(node, len(x.dims)):
        pin(x.dims[d], Pin(f"{name(node)} depends on the order along the axis", node))
    return reduce_rule(cx, node, x)


def triangle_rule(cx, node, x, *args, **kwargs):
    for axis in x.dims[-2:]:
        pin(axis, Pin(f"{name(node)} depends on the order along the axis", node))
    return list(x.dims)


# --- shape -----------------------------------------------------------------------------------------------------


def reshape_rule(cx, node, x, *args, **kwargs):
    return reshape(x.dims, shape(node), Pin(f"{name(node)} from {x.sizes} to {shape(node)} mixes axes", node))


def permute_rule(cx, node, x, order):
    return [x.dims[d] for d in order]


def transpose_rule(cx, node, x, a=-2, b=-1):
    dims = list(x.dims)
    if len(dims) > 1:
        dims[a], dims[b] = dims[b], dims[a]
    return dims


def expand_rule(cx, node, x, *args, **kwargs):
    out = shape(node)
    old = [ONE] * (len(out) - len(x.dims)) + list(x.dims)
    return [axis if axis.size == size else Axis(size) for axis, size in zip(old, out)]


def repeat_rule(cx, node, x, repeats):
    old = [ONE] * (len(repeats) - len(x.dims)) + list(x.dims)
    return [product([Axis(times), axis]) for times, axis in zip(repeats, old)]


def repeat_interleave_rule(cx, node, x, repeats, dim=None, **kwargs):
    if dim is None:
        return unknown_rule(cx, node, x)
    dims = list(x.dims)
    dims[dim] = product([dims[dim], Axis(repeats)])
    return dims


def slice_rule(cx, node, x, dim=0, start=None, end=None, step=1):
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


def slice_scatter_rule(cx, node, x, source, dim=0, start=None, end=None, step=1):
    """x with a window of one axis replaced by `source`: that axis is the sum of what is left and of source's."""
    dims = broadcast(cx, node, *[Value([a for d, a in enumerate(v.dims) if d != dim % len(v.dims)], v.weight) for v in (x, source)])
    axis, size = x.dims[dim], source.dims[dim].size
    start = max(0, (start or 0) + (axis.size if (start or 0) < 0 else 0))
    if step != 1:
        return unknown_rule(cx, node, x, source)
    why = Pin(f"{size} of its {axis.size} elements are replaced, which crosses units", node)
    pieces = cut(axis, sorted({start, start + size} - {0, axis.size}), why) if size < axis.size else [axis]
    pieces[1 if start else 0] = source.dims[dim]
    dims.insert(dim % len(x.dims), concat(pieces))
    return dims


def select_scatter_rule(cx, node, x, source, dim, index):
    dim %= len(x.dims)
    source = Value([*source.dims[:dim], ONE, *source.dims[dim:]], source.weight)
    index %= x.dims[dim].size
    return slice_scatter_rule(cx, node, x, source, dim, index, index + 1)


def narrow_rule(cx, node, x, dim, start, length):
    return slice_rule(cx, node, x, dim, start, start + length)


def window(axis: Axis, start: int, size: int, why: Pin) -> Axis:
    pieces = cut(axis, sorted({start, start + size} - {0, axis.size}), why)
    return pieces[0] if start == 0 else pieces[1]


def select_rule(cx, node, x, dim, index):
    dims = list(x.dims)
    axis = dims.pop(dim)
    if axis.size > 1:
        why = Pin("one element of the axis is selected", node)
        window(axis, index % axis.size, 1, why)
    return dims


def unbind_rule(cx, node, x, dim=0):
    dims = list(x.dims)
    axis = dims.pop(dim)
    pin(axis, Pin("the axis is taken apart (unbind)", node))
    return [list(dims) for _ in range(axis.size)]


def split_rule(cx, node, x, sizes, dim=0):
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


def cat_rule(cx, node, values, dim=0):
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


def stack_rule(cx, node, values, dim=0):
    dims = broadcast(cx, node, *values)
    dims.insert(dim % (len(dims) + 1), Axis(len(values), pin=Pin("the axis stacks different tensors", node)))
    return dims


def pad_rule(cx, node, x, pad, *args, **kwargs):
    if argument(node, "mode", "constant") != "constant":
        return unknown_rule(cx, node, x)
    dims = list(x.dims)
    for i in range(len(pad) // 2):
        before, after = pad[2 * i], pad[2 * i + 1]
        axis = dims[-1 - i]
        if before < 0 or after < 0:
            pin(axis, Pin("a negative pad cuts the axis", node))
            dims[-1 - i] = Axis(shape(node)[-1 - i], pin=Pin("a negative pad cuts the axis", node))
        elif before or after:
            dims[-1 - i] = concat([Axis(before), axis, Axis(after)])
    return dims


# --- reductions ------------------------------------------------------------------------------------------------


def reduce_rule(cx, node, x, *args, **kwargs):
    """Symmetric in what it reduces: sum, mean, amax, var, norm, logsumexp."""
    gone, keep = acted_dims(node, len(x.dims)), bool(argument(node, "keepdim", False))
    cx.consumed += [x.dims[d] for d in gone]
    dims = [ONE if d in gone else axis for d, axis in enumerate(x.dims) if keep or d not in gone]
    several = isinstance(node.meta["val"], (list, tuple))
    return [list(dims) for _ in node.meta["val"]] if several else dims


def layer_norm_rule(cx, node, x, normalized_shape, weight=None, bias=None, *args):
    why = Pin(f"{name(node)} of two axes that cannot be aligned", node)
    for param in (weight, bias):
        if isinstance(param, Value):  # rms_norm has its eps where layer_norm has the bias
            for a, b in zip(x.dims[-len(normalized_shape):], param.dims):
                unify(a, b, why)
    if not isinstance(node.meta["val"], (list, tuple)):
        return list(x.dims)
    stats = [*x.dims[: -len(normalized_shape)], *[ONE] * len(normalized_shape)]
    return [list(x.dims), *[stats[: len(out)] for out in shapes(node)[1:]]]


def group_norm_rule(cx, node, x, groups, weight=None, bias=None, *args, **kwargs):
    why = Pin(f"{name(node)} of two axes that cannot be aligned", node)
    reshape([x.dims[1]], [groups, x.dims[1].size // groups], why)
    for param in (weight, bias):
        if param is not None:
            unify(x.dims[1], param.dims[0], why)
    return list(x.dims)


# --- contractions ----------------------------------------------------------------------------------------------


def contract(cx, node, left: Value, right: Value, batch, contracted, left_free, right_free) -> Value:
    """sum over `contracted` of left × right. Each is a list of (dim of left, dim of right) or of dims."""
    why = Pin(f"{name(node)} of two axes that cannot be aligned", node)
    for a, b in [*batch, *contracted]:
        unify(left.dims[a], right.dims[b], why)
    cx.consumed += [left.dims[a] for a, _ in contracted]
    if left.weight:
        cx.project(node, left, left_free, [a for a, _ in contracted])
    if right.weight:
        cx.project(node, right, right_free, [b for _, b in contracted])
    both = [_activation(left, a, right, b) for a, b in batch]
    scores = False
    if left.weight or right.weight:
        cx.experts += both
    else:
        scores = cx.product(left, right, both)
    dims = [*both, *[left.dims[d] for d in left_free], *[right.dims[d] for d in right_free]]
    return Value(dims, left.weight and right.weight, scores)


def _activation(left: Value, a: int, right: Value, b: int) -> Axis:
    """A batch axis by the handle of the activation, unless that is broadcast."""
    x, y = (right.dims[b], left.dims[a]) if left.weight else (left.dims[a], right.dims[b])
    return x if x.size != 1 else y


def linear_rule(cx, node, x, weight, bias=None):
    rank = len(x.dims)
    made = list(range(len(weight.dims) - 1))  # a weight of one dimension makes a scalar
    out = contract(cx, node, x, weight, [], [(rank - 1, len(made))], list(range(rank - 1)), made)
    add_bias(bias, [weight.dims[d] for d in made], node)
    return out


def add_bias(bias: Value | None, dims: Sequence[Axis], node) -> None:
    """Aligns a bias with the dimensions of what it is added to, from the right."""
    why = Pin(f"{name(node)} of two axes that cannot be aligned", node)
    for a, b in zip(reversed(bias.dims if bias else ()), reversed(dims)):
        unify(a, b, why)
    if bias and bias.dims and dims and bias.dims[-1].size == dims[-1].size:
        bias.dims[-1].twin = dims[-1]


def mm_rule(cx, node, left, right):
    return contract(cx, node, left, right, [], [(1, 0)], [0], [1])


def addmm_rule(cx, node, bias, left, right, **kwargs):
    add_bias(bias, [left.dims[0], right.dims[1]], node)
    return mm_rule(cx, node, left, right)


def bmm_rule(cx, node, left, right):
    return contract(cx, node, left, right, [(0, 0)], [(2, 1)], [1], [2])


def grouped_mm_rule(cx, node, x, weight, offsets=None, bias=None, *args, **kwargs):
    """Rows x[o[e-1]:o[e]] times weight[e]: rows and experts are matched by offsets, so their order matters."""
    if offsets is None or bias is not None or (len(x.dims), len(weight.dims)) != (2, 3):
        return unknown_rule(cx, node, x, weight, offsets, bias)
    why = Pin(f"{name(node)} matches rows to experts by their order", node)
    for axis in (x.dims[0], weight.dims[0], *offsets.dims):
        pin(axis, why)
    unify(x.dims[1], weight.dims[1], Pin(f"{name(node)} of two axes that cannot be aligned", node))
    cx.consumed.append(x.dims[1])
    cx.experts.append(weight.dims[0])
    if weight.weight:
        cx.project(node, weight, [2], [1])
    return Value([x.dims[0], weight.dims[2]])


def baddbmm_rule(cx, node, bias, left, right, **kwargs):
    out = bmm_rule(cx, node, left, right)
    return replace(out, dims=broadcast(cx, node, out, bias))


def matmul_rule(cx, node, left, right):
    if len(right.dims) == 1:
        return contract(cx, node, left, right, [], [(len(left.dims) - 1, 0)], list(range(len(left.dims) - 1)), [])
    if len(left.dims) == 1:
        free = [d for d in range(len(right.dims)) if d != len(right.dims) - 2]
        return contract(cx, node, left, right, [], [(0, len(right.dims) - 2)], [], free)
    if len(right.dims) == 2:
        rank = len(left.dims)
        return contract(cx, node, left, right, [], [(rank - 1, 0)], list(range(rank - 1)), [1])
    rank = max(len(left.dims), len(right.dims))
    left, right = (replace(v, dims=[ONE] * (rank - len(v.dims)) + list(v.dims)) for v in (left, right))
    batch = [(d, d) for d in range(rank - 2)]
    out = contract(cx, node, left, right, [(a, b) for a, b in batch if left.dims[a].size == right.dims[b].size],
                   [(rank - 1, rank - 2)], [rank - 2], [rank - 1])
    dims = broadcast(cx, node, Value(left.dims[:-2]), Value(right.dims[:-2]))
    return replace(out, dims=[*dims, left.dims[-2], right.dims[-1]])


def einsum_rule(cx, node, equation, operands, **kwargs):
    equation = equation.replace(" ", "")
    if "->" not in equation or "." in equation or len(operands) != 2:
        return unknown_rule(cx, node, *operands)
    inputs, output = equation.split("->")
    a, b = inputs.split(",")
    if any(len(set(s)) != len(s) for s in (a, b)) or any(c not in output and not (c in a and c in b) for c in a + b):
        return unknown_rule(cx, node, *operands)
    pairs = [(c, (a.index(c), b.index(c))) for c in a if c in b]
    value = contract(cx, node, *operands, [p for c, p in pairs if c in output], [p for c, p in pairs if c not in output],
                     [a.index(c) for c in a if c not in b], [b.index(c) for c in b if c not in a])
    made = [c for c, _ in pairs if c in output] + [c for c in a if c not in b] + [c for c in b if c not in a]
    return replace(value, dims=[value.dims[made.index(c)] for c in output])


def attention_rule(cx, node, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
    """softmax(q kᵀ + mask) v over (..., heads, length, head_dim); k and v may have fewer heads (enable_gqa)."""
    why = Pin("attention over two axes that cannot be aligned", node)
    if not len(q.dims) == len(k.dims) == len(v.dims):
        return unknown_rule(cx, node, q, k, v, attn_mask)
    heads = [a if a.size == size else Axis(size) for a, size in zip(q.dims, shape(node)[:-2])]
    cx.attention += [*q.dims, *k.dims, *v.dims]
    cx.consumed += [q.dims[-1], v.dims[-2]]
    cx.heads += heads
    for value, role in ((q, "query"), (k, "key"), (v, "value")):
        mark(value.dims, role)
    for value in (q, k, v):
        for a, b in zip(heads, value.dims):
            unify(a, b if a.size == b.size or b.size == 1 else product([b, Axis(a.size // b.size)]), why)
    unify(q.dims[-1], k.dims[-1], why)
    unify(k.dims[-2], v.dims[-2], why)
    if is_causal:
        for axis in (q.dims[-2], k.dims[-2]):
            pin(axis, Pin("causal attention depends on the order along the axis", node))
    if attn_mask is not None:
        broadcast(cx, node, Value([*heads, q.dims[-2], k.dims[-2]]), attn_mask)
    return Value([*heads, q.dims[-2], v.dims[-1]])


def convolution_rule(cx, node, x, weight, bias=None, *args, **kwargs):
    groups, transposed = argument(node, "groups", 1), argument(node, "transposed", False)
    if transposed and groups == 1 and len(x.dims) == len(weight.dims):
        weight = replace(weight, dims=[weight.dims[1], weight.dims[0], *weight.dims[2:]])
    elif transposed or len(x.dims) != len(weight.dims):
        return unknown_rule(cx, node, x, weight, *([bias] if bias else []))
    why = Pin(f"{name(node)} slides along the axis", node)
    for axis in [*x.dims[2:], *weight.dims[2:]]:
        pin(axis, why)
    group_x, inner = reshape([x.dims[1]], [groups, x.dims[1].size // groups], why)
    group_w, _ = reshape([weight.dims[0]], [groups, weight.dims[0].size // groups], why)
    unify(group_x, group_w, why)
    unify(inner, weight.dims[1], why)
    cx.consumed.append(inner)
    if inner.size > 1 or groups == 1:
        cx.project(node, weight, [0], [1])
    add_bias(bias, [weight.dims[0]], node)
    spatial = [Axis(size, pin=why) for size in shape(node)[2:]]
    depthwise = inner.size == 1 and x.dims[1].size == weight.dims[0].size
    return Value([x.dims[0], x.dims[1] if depthwise else weight.dims[0], *spatial], x.weight and weight.weight)


# --- indexing --------------------------------------------------------------------------------------------------


def conv_transpose_rule(cx, node, x, weight, bias=None, *args, **kwargs):
    if argument(node, "groups", 1) != 1 or len(x.dims) != len(weight.dims):
        return unknown_rule(cx, node, x, weight, bias)
    return convolution_rule(cx, node, x, replace(weight, dims=[weight.dims[1], weight.dims[0], *weight.dims[2:]]), bias)


def embedding_rule(cx, node, weight, index, *args, **kwargs):
    pin(weight.dims[0], Pin("rows are looked up by index (embedding)", node))
    cx.project(node, weight, [1], [])
    return Value([*index.dims, weight.dims[1]])


def index_rule(cx, node, x, indices):
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
    return [*rest[:first], *where, *rest[first:]]


def masked_index(cx, node, x, indices, why):
    """x[mask]: what the mask covers becomes one axis, in order."""
    (d, mask), *more = [(d, i) for d, i in enumerate(indices) if i is not None]
    if more:
        return unknown_rule(cx, node, x, *indices)
    for axis in [*mask.dims, *x.dims[d : d + len(mask.dims)]]:
        pin(axis, why)
    return [*x.dims[:d], Axis(shape(node)[d], pin=why), *x.dims[d + len(mask.dims):]]


def index_put_rule(cx, node, x, indices, values, *args):
    """x with values written where indices say; the dimensions between stay as they are."""
    if any(i is not None and node_dtype(node, d) in (torch.bool, torch.uint8) for d, i in enumerate(indices)):
        return unknown_rule(cx, node, x, *indices, values)
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


def index_add_rule(cx, node, x, dim, index, source, **kwargs):
    why = Pin("elements are written by index", node)
    dim %= len(x.dims)
    pin(x.dims[dim], why)
    for axis in index.dims:
        unify(axis, source.dims[dim], why)
    for d, (a, b) in enumerate(zip(x.dims, source.dims)):
        if d != dim:
            unify(a, b, why)
    return list(x.dims)


def scatter_rule(cx, node, x, dim, index, source=None, *args, **kwargs):
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


def index_select_rule(cx, node, x, dim, index):
    dims = list(x.dims)
    pin(dims[dim], Pin("elements are looked up by index", node))
    dims[dim] = index.dims[0] if index.dims else ONE
    return dims


def gather_rule(cx, node, x, dim, index, *args, **kwargs):
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


# --- complex numbers, windows, gates ---------------------------------------------------------------------------


def as_complex_rule(cx, node, x):
    pin(x.dims[-1], Pin("real and imaginary parts", node))
    return list(x.dims[:-1])


def as_real_rule(cx, node, x):
    return [*x.dims, Axis(2, pin=Pin("real and imaginary parts", node))]


def unfold_rule(cx, node, x, dim, size, step):
    dims, dim, why = list(x.dims), dim % len(x.dims), Pin(f"{name(node)} slides along the axis", node)
    pin(dims[dim], why)
    dims[dim] = Axis(shape(node)[dim], pin=why)
    return [*dims, Axis(size, pin=why)]


def glu_rule(cx, node, x, dim=-1):
    """The first half of an axis times the sigmoid of the second."""
    dims, why = list(x.dims), Pin("the two halves of the axis meet", node)
    first, second = cut(dims[dim], [dims[dim].size // 2], why)
    unify(first, second, why)
    dims[dim] = first
    return dims


def spatial_rule(spatial: int):
    """Pooling, resizing: acts on the last `spatial` dimensions and on each of the others alike."""

    def rule(cx, node, x, *args, **kwargs):
        why = Pin(f"{name(node)} depends on the order along the axis", node)
        for axis in x.dims[-spatial:]:
            pin(axis, why)
        made = [[*x.dims[:-spatial], *[Axis(size, pin=why) for size in out[-spatial:]]] for out in shapes(node)]
        return made if isinstance(node.meta["val"], (list, tuple)) else made[0]

    return rule


def batch_norm_rule(cx, node, x, *args, **kwargs):
    """Each channel (dimension 1) by itself, with weights and running statistics of its own."""
    why = Pin(f"{name(node)} of two axes that cannot be aligned", node)
    for value in tensors((args, kwargs)):
        unify(x.dims[1], value.dims[0], why)
    if not isinstance(node.meta["val"], (list, tuple)):
        return list(x.dims)
    return [list(x.dims), *[[x.dims[1]] if out == [x.dims[1].size] else [Axis(n) for n in out] for out in shapes(node)[1:]]]


def weight_norm_rule(cx, node, v, g, dim=0):
    """v / |v| × g, the norm over all dimensions but one."""
    unify(v.dims[dim], g.dims[dim], Pin(f"{name(node)} of two axes that cannot be aligned", node))
    return [list(v.dims), list(g.dims)]


def unknown_rule(cx, node, *args, **kwargs):
    """No rule: the order of everything it touches matters."""
    why = Pin(f"there is no rule for {name(node)}", node)
    for value in tensors((args, kwargs)):
        for axis in value.dims:
            pin(axis, why)
    made = [[Axis(size, pin=why) for size in out] for out in shapes(node)]
    return made if isinstance(node.meta["val"], (list, tuple)) else made[0]


# --- what rules read off a node --------------------------------------------------------------------------------


def name(node) -> str:
    return str(getattr(node.target, "_overloadpacket", node.target)).removeprefix("aten.")


def shapes(node) -> list[list[int]]:
    values = node.meta["val"] if isinstance(node.meta["val"], (list, tuple)) else [node.meta["val"]]
    return [list(v.shape) for v in values if isinstance(v, torch.Tensor)]


def shape(node) -> list[int]:
    return shapes(node)[0]


def node_dtype(node, position: int) -> torch.dtype:
    return node.args[1][position].meta["val"].dtype


def argument(node, key: str, default: Any = None) -> Any:
    """The value that an operator's argument has, by its name in the schema, wherever it was given."""
    if key in node.kwargs:
        return node.kwargs[key]
    for i, arg in enumerate(node.target._schema.arguments):
        if arg.name == key:
            return node.args[i] if i < len(node.args) else (arg.default_value if arg.has_default_value() else default)
    return default


def tensors(tree: Any) -> list[Value]:
    if isinstance(tree, Value):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [v for item in tree for v in tensors(item)] if isinstance(tree, (list, tuple)) else []


# --- the table -------------------------------------------------------------------------------------------------


def family(rule: Callable, *names: str) -> dict:
    """All overloads of the named aten operators, where this torch has them."""
    packets = [getattr(aten, n) for n in names if hasattr(aten, n)]
    return {getattr(p, o): rule for p in packets for o in p.overloads()}


RULES: dict[Any, Callable] = {
    **family(pointwise_rule, "where", "masked_fill", "lerp", "addcmul", "addcdiv", "clamp", "maximum", "minimum",
             "rsub", "pow", "bitwise_and", "bitwise_or", "logical_and", "logical_or", "logical_not", "eq", "ne",
             "copy", "multiply", "polar", "log_sigmoid"),
    **family(same_rule, "clone", "alias", "detach", "contiguous", "to", "_to_copy", "type_as", "lift_fresh_copy",
             "lift_fresh", "dropout", "native_dropout", "feature_dropout", "alpha_dropout", "softmax", "_softmax",
             "log_softmax", "_log_softmax", "_safe_softmax", "bernoulli", "nan_to_num"),
    **family(fresh_rule, "full", "zeros", "ones", "empty", "new_full", "new_zeros", "new_ones", "new_empty",
             "full_like", "zeros_like", "ones_like", "empty_like", "scalar_tensor"),
    **family(ordered_rule, "arange", "linspace", "eye", "tril_indices", "triu_indices", "rand", "randn", "randint"),
    **family(pinned_dim_rule, "cumsum", "cumprod", "logcumsumexp", "flip", "roll", "sort", "topk"),
    **family(argmax_rule, "argmax", "argmin"),
    **family(triangle_rule, "tril", "triu"),
    **family(reshape_rule, "view", "_unsafe_view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze",
             "view_as"),
    aten.view.dtype: view_dtype_rule,
    **family(permute_rule, "permute"),
    **family(transpose_rule, "transpose", "t", "swapaxes", "mT"),
    **family(expand_rule, "expand", "expand_as", "broadcast_to"),
    **family(repeat_rule, "repeat"),
    aten.repeat_interleave.self_int: repeat_interleave_rule,
    **family(slice_rule, "slice"),
    **family(slice_scatter_rule, "slice_scatter"),
    **family(select_scatter_rule, "select_scatter"),
    **family(narrow_rule, "narrow"),
    aten.select.int: select_rule,
    **family(unbind_rule, "unbind"),
    **family(split_rule, "split", "split_with_sizes", "chunk"),
    **family(cat_rule, "cat", "concat", "concatenate"),
    **family(stack_rule, "stack"),
    **family(pad_rule, "constant_pad_nd"),
    aten.pad.default: pad_rule,
    aten.max.other: pointwise_rule,
    aten.min.other: pointwise_rule,
    aten.max.default: reduce_rule,
    aten.min.default: reduce_rule,
    aten.max.dim: argmax_rule,
    aten.min.dim: argmax_rule,
    **family(reduce_rule, "sum", "mean", "amax", "amin", "var", "std", "var_mean", "std_mean", "logsumexp", "any",
             "all", "linalg_vector_norm", "prod"),
    **family(layer_norm_rule, "layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"),
    **family(group_norm_rule, "group_norm"),
    aten.linear.default: linear_rule,
    aten.mm.default: mm_rule,
    aten.addmm.default: addmm_rule,
    aten.bmm.default: bmm_rule,
    aten.baddbmm.default: baddbmm_rule,
    **family(grouped_mm_rule, "_grouped_mm"),
    aten.matmul.default: matmul_rule,
    aten.einsum.default: einsum_rule,
    **family(attention_rule, "scaled_dot_product_attention"),
    **family(convolution_rule, "conv1d", "conv2d", "conv3d", "convolution"),
    **family(embedding_rule, "embedding"),
    **family(index_rule, "index"),
    **family(index_select_rule, "index_select"),
    **family(gather_rule, "gather"),
    **family(index_put_rule, "index_put", "_unsafe_index_put"),
    **family(index_add_rule, "index_add"),
    **family(scatter_rule, "scatter", "scatter_add", "scatter_reduce"),
    **family(as_complex_rule, "view_as_complex"),
    **family(as_real_rule, "view_as_real"),
    **family(unfold_rule, "unfold"),
    **family(glu_rule, "glu"),
    **family(spatial_rule(1), "avg_pool1d", "max_pool1d", "adaptive_avg_pool1d", "upsample_linear1d", "upsample_nearest1d"),
    **family(spatial_rule(2), "avg_pool2d", "max_pool2d", "max_pool2d_with_indices", "adaptive_avg_pool2d",
             "_adaptive_avg_pool2d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest2d"),
    **family(batch_norm_rule, "batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_no_update"),
    **family(weight_norm_rule, "_weight_norm_interface"),
    **family(conv_transpose_rule, "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
}


# operators of other libraries, which exist only once those are imported
NAMED_RULES: dict[str, Callable] = {"transformers::grouped_mm_fallback": grouped_mm_rule}


def rule_for(target: Any) -> Callable:
    """The rule of an operator: its own, the shared one of elementwise operators, or refusal."""
    if target in RULES:
        return RULES[target]
    if isinstance(target, torch._ops.OpOverload) and target._schema.name in NAMED_RULES:
        return NAMED_RULES[target._schema.name]
    pointwise = torch.Tag.pointwise in getattr(target, "tags", ())
    return pointwise_rule if pointwise else unknown_rule
