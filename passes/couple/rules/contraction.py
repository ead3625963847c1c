"""Rules of products: linear layers, matrix products, attention, convolutions."""

from collections.abc import Sequence
from dataclasses import replace
from string import ascii_letters

from torch import fx

from s2ft_compile.passes.couple.axes import ONE, Axis, Pin, pin, product, reshape, unify

from .context import Value, argument, axes_unknown, broadcast, mark, name, shape, shapes, tensors


def contract(cx, node, left: Value, right: Value, batch, contracted, left_free, right_free) -> Value:
    """sum over `contracted` of left × right. Each is a list of (dim of left, dim of right) or of dims."""
    why = Pin(f"{name(node)} of two axes that cannot be aligned", node)
    for a, b in [*batch, *contracted]:
        unify(left.dims[a], right.dims[b], why)
    cx.consumed += [left.dims[a] for a, _ in contracted]
    of_weight = [v.weight or bool(v.looked_up) for v in (left, right)]
    if of_weight[0]:
        cx.project(node, left, left_free, [a for a, _ in contracted])
    if of_weight[1]:
        cx.project(node, right, right_free, [b for _, b in contracted])
    both = [_activation(left, a, right, b) for a, b in batch]
    scores = left.scores or right.scores
    if any(of_weight):
        sides = zip((left, right), (left_free, right_free), of_weight)
        made = [v.dims[d] for v, free, is_weight in sides if is_weight for d in free]
        scores = scores and all(axis.size == 1 for axis in made)  # by a vector: one number for each pair
        cx.experts += [*both, *left.looked_up, *right.looked_up]
    else:
        if not scores and left_free and right_free:  # a sum that weights take over experts has one side
            kept = [*[left.dims[d] for d in left_free], *[right.dims[d] for d in right_free]]
            cx.pairs.append((kept, [left.dims[a] for a, _ in contracted]))
        scores = cx.product(left, right, both)
    dims = [*both, *[left.dims[d] for d in left_free], *[right.dims[d] for d in right_free]]
    return Value(dims, left.weight and right.weight, scores)


def _activation(left: Value, a: int, right: Value, b: int) -> Axis:
    """A batch axis by the handle of the activation, unless that is broadcast."""
    x, y = (right.dims[b], left.dims[a]) if left.weight else (left.dims[a], right.dims[b])
    return x if x.size != 1 else y


def axes_linear(cx, node, x, weight, bias=None):
    rank = len(x.dims)
    rows = list(range(len(weight.dims) - 1))  # a weight of one dimension makes a scalar
    out = contract(cx, node, x, weight, [], [(rank - 1, len(rows))], list(range(rank - 1)), rows)
    add_bias(bias, [weight.dims[d] for d in rows], node)
    return out


def add_bias(bias: Value | None, dims: Sequence[Axis], node) -> None:
    """Aligns a bias with the dimensions of what it is added to, from the right."""
    why = Pin(f"{name(node)} of two axes that cannot be aligned", node)
    for a, b in zip(reversed(bias.dims if bias else ()), reversed(dims)):
        unify(a, b, why)
    if bias and bias.dims and dims and bias.dims[-1].size == dims[-1].size:
        bias.dims[-1].twin = dims[-1]


def axes_mm(cx, node, left, right):
    return contract(cx, node, left, right, [], [(1, 0)], [0], [1])


def axes_addmm(cx, node, bias, left, right, **kwargs):
    add_bias(bias, [left.dims[0], right.dims[1]], node)
    return axes_mm(cx, node, left, right)


def axes_bmm(cx, node, left, right):
    return contract(cx, node, left, right, [(0, 0)], [(2, 1)], [1], [2])


def axes_grouped_mm(cx, node, x, weight, offsets=None, bias=None, *args, **kwargs):
    """Rows x[o[e-1]:o[e]] times weight[e]: rows and experts are matched by offsets, so their order matters."""
    if offsets is None or bias is not None or (len(x.dims), len(weight.dims)) != (2, 3):
        return axes_unknown(cx, node, x, weight, offsets, bias)
    why = Pin(f"{name(node)} matches rows to experts by their order", node)
    for axis in (x.dims[0], weight.dims[0], *offsets.dims):
        pin(axis, why)
    unify(x.dims[1], weight.dims[1], Pin(f"{name(node)} of two axes that cannot be aligned", node))
    cx.consumed.append(x.dims[1])
    cx.experts.append(weight.dims[0])
    if weight.weight:
        cx.project(node, weight, [2], [1])
    return Value([x.dims[0], weight.dims[2]])


def axes_baddbmm(cx, node, bias, left, right, **kwargs):
    out = axes_bmm(cx, node, left, right)
    return replace(out, dims=broadcast(cx, node, out, bias))


def axes_matmul(cx, node, left, right):
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
    out = contract(
        cx,
        node,
        left,
        right,
        [(a, b) for a, b in batch if left.dims[a].size == right.dims[b].size],
        [(rank - 1, rank - 2)],
        [rank - 2],
        [rank - 1],
    )
    dims = broadcast(cx, node, Value(left.dims[:-2]), Value(right.dims[:-2]))
    if not (left.weight or right.weight):  # queries of a group that share a key of size 1 run in parallel, too
        cx.heads += dims
    return replace(out, dims=[*dims, left.dims[-2], right.dims[-1]])


def axes_einsum(cx, node, equation, operands, **kwargs):
    """Of several activations as products of two, from left to right."""
    equation = equation.replace(" ", "")
    spelled = spelled_out(equation, [len(v.dims) for v in operands])
    if spelled is None:
        return axes_unknown(cx, node, *operands)
    inputs, output = spelled
    if len(inputs) != 2 and sum(not v.weight for v in operands) < 2:
        return einsum_of_any(cx, node, inputs, output, operands)
    letters, value = inputs[0], operands[0]
    for i in range(1, len(inputs)):
        later = "".join([output, *inputs[i + 1 :]])
        kept = "".join(c for c in dict.fromkeys(letters + inputs[i]) if c in later)
        kept = output if i == len(inputs) - 1 else kept
        value, letters = _einsum_of_two(cx, node, (letters, inputs[i]), kept, (value, operands[i])), kept
    return value


def _einsum_of_two(cx, node, inputs: tuple[str, str], output: str, operands: tuple[Value, Value]) -> Value:
    if any(c not in output and sum(c in i for i in inputs) == 1 for i in inputs for c in i):
        return einsum_of_any(cx, node, inputs, output, operands)
    a, b = inputs
    pairs = [(c, (a.index(c), b.index(c))) for c in a if c in b]
    batch, contracted = ([p for c, p in pairs if (c in output) == kept] for kept in (True, False))
    free = [a.index(c) for c in a if c not in b], [b.index(c) for c in b if c not in a]
    value = contract(cx, node, *operands, batch, contracted, *free)
    letters = [c for c, _ in pairs if c in output] + [c for c in a if c not in b] + [c for c in b if c not in a]
    return replace(value, dims=[value.dims[letters.index(c)] for c in output])


def spelled_out(equation: str, ranks: Sequence[int]) -> tuple[list[str], str] | None:
    """(the operands' letters, the result's), with letters for an ellipsis and an explicit result; None if a letter is
    repeated within an operand (a diagonal)."""
    left, arrow, output = equation.partition("->")
    inputs = left.split(",")
    covered = max((rank - len(i) + 3 for i, rank in zip(inputs, ranks) if "..." in i), default=0)
    spare = "".join(c for c in ascii_letters if c not in equation)[:covered]
    ends = [spare[covered - (rank - len(i) + 3) :] if "..." in i else "" for i, rank in zip(inputs, ranks)]
    inputs = [i.replace("...", end) for i, end in zip(inputs, ends)]
    if not arrow:
        letters = sorted({c for c in left if c.isalpha()})
        output = "..." + "".join(c for c in letters if left.count(c) == 1)
    output = output.replace("...", spare)
    repeated = any(len(set(i)) != len(i) for i in inputs)
    return None if repeated or not all(c in "".join(inputs) for c in output) else (inputs, output)


def einsum_of_any(cx, node, inputs: Sequence[str], output: str, operands: Sequence[Value]) -> Value:
    """A product of any number of operands, in which every letter is one axis. What is summed over is consumed."""
    why = Pin(f"{name(node)} of two axes that cannot be aligned", node)
    axes: dict[str, Axis] = {}
    for letters, value in sorted(zip(inputs, operands), key=lambda pair: pair[1].weight):  # keep activations' handles
        for c, axis in zip(letters, value.dims):
            if axes.get(c, ONE).size == 1:
                axes[c] = axis
            unify(axes[c], axis, why)
    cx.consumed += [axis for c, axis in axes.items() if c not in output]
    activations = [v for v in operands if not v.weight]
    of_activations = [i for i, v in zip(inputs, operands) if not v.weight]
    met = {c for c in axes if sum(c in i for i in of_activations) > 1}  # by two activations: no weight contracts it
    for letters, value in zip(inputs, operands):
        if value.weight and activations:
            kept = {c for c in letters if c in output or c in met}
            shared = set("".join(of_activations))  # what another weight has besides is no batch of products
            produced, gone = ([d for d, c in enumerate(letters) if (c in kept) == result] for result in (True, False))
            cx.project(node, value, [d for d in produced if letters[d] not in shared], gone)
            cx.experts += [value.dims[d] for d in produced if letters[d] in shared]
    if len(activations) > 1:
        weighed = {c for i, v in zip(inputs, operands) if v.weight for c in i} - met - set(output)
        cx.attention += [axis for i in of_activations for c, axis in axes.items() if c in i and c not in weighed]
        cx.heads += [axes[c] for c in output if all(c in i for i in of_activations)]
    return Value([axes[c] for c in output], not activations)


def axes_attention(cx, node, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
    """softmax(q kᵀ + mask) v over (..., heads, length, head_dim); k and v may have fewer heads (enable_gqa)."""
    why = Pin("attention over two axes that cannot be aligned", node)
    if not len(q.dims) == len(k.dims) == len(v.dims):
        return axes_unknown(cx, node, q, k, v, attn_mask)
    heads = [a if a.size == size else Axis(size) for a, size in zip(q.dims, shape(node)[:-2])]
    cx.attention += [*q.dims, *k.dims, *v.dims]
    cx.consumed += [q.dims[-1], v.dims[-2]]
    cx.heads += heads
    cx.meet(q, k)
    mark(v.dims, "value")
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


def axes_convolution(cx, node, x, weight, bias=None, *args, **kwargs):
    groups, transposed = argument(node, "groups", 1), argument(node, "transposed", False)
    if transposed and groups == 1 and len(x.dims) == len(weight.dims):
        weight = replace(weight, dims=[weight.dims[1], weight.dims[0], *weight.dims[2:]])
    elif transposed or len(x.dims) != len(weight.dims):
        return axes_unknown(cx, node, x, weight, *([bias] if bias else []))
    why = Pin(f"{name(node)} slides along the axis", node)
    for axis in [*x.dims[2:], *weight.dims[2:]]:
        pin(axis, why)
    group_x, inner = reshape([x.dims[1]], [groups, x.dims[1].size // groups], why)
    group_w, _ = reshape([weight.dims[0]], [groups, weight.dims[0].size // groups], why)
    unify(group_x, group_w, why)
    unify(inner, weight.dims[1], why)
    cx.consumed.append(inner)
    spread = any(axis.size > 1 for axis in weight.dims[2:])
    if inner.size > 1 or groups == 1:
        cx.project(node, weight, [0], [1])
        cx.convolved += [weight.dims[0], inner] if spread else []
    elif spread and len(weight.dims) == 3:
        cx.filtered.append(weight.dims[0])
    add_bias(bias, [weight.dims[0]], node)
    spatial = [Axis(size, pin=why) for size in shape(node)[2:]]
    depthwise = inner.size == 1 and x.dims[1].size == weight.dims[0].size
    return Value([x.dims[0], x.dims[1] if depthwise else weight.dims[0], *spatial], x.weight and weight.weight)


def axes_conv_transpose(cx, node, x, weight, bias=None, *args, **kwargs):
    if argument(node, "groups", 1) != 1 or len(x.dims) != len(weight.dims):
        return axes_unknown(cx, node, x, weight, bias)
    return axes_convolution(cx, node, x, replace(weight, dims=[weight.dims[1], weight.dims[0], *weight.dims[2:]]), bias)


def axes_mv(cx, node, left, right):
    return contract(cx, node, left, right, [], [(1, 0)], [0], [])


def axes_dot(cx, node, left, right):
    return contract(cx, node, left, right, [], [(0, 0)], [], [])


def axes_inner(cx, node, left, right):
    if not left.dims or not right.dims:
        return broadcast(cx, node, left, right)
    a, b = len(left.dims) - 1, len(right.dims) - 1
    return contract(cx, node, left, right, [], [(a, b)], list(range(a)), list(range(b)))


def axes_outer(cx, node, left, right):
    return contract(cx, node, left, right, [], [], [0], [0])


def axes_tensordot(cx, node, left, right, dims_left, dims_right):
    pairs = [(a % len(left.dims), b % len(right.dims)) for a, b in zip(dims_left, dims_right)]
    free = [
        [d for d in range(len(v.dims)) if d not in {p[side] for p in pairs}] for side, v in enumerate((left, right))
    ]
    return contract(cx, node, left, right, [], pairs, *free)


def axes_bilinear(cx, node, left, right, weight, bias=None):
    """sum over i, j of left_i weight_oij right_j."""
    why = Pin(f"{name(node)} of two axes that cannot be aligned", node)
    unify(left.dims[-1], weight.dims[1], why)
    unify(right.dims[-1], weight.dims[2], why)
    cx.consumed += [left.dims[-1], right.dims[-1]]
    cx.project(node, weight, [0], [1, 2])
    add_bias(bias, [weight.dims[0]], node)
    return [*broadcast(cx, node, Value(left.dims[:-1]), Value(right.dims[:-1])), weight.dims[0]]


def axes_distance(cx, node, left, right, *args, **kwargs):
    """cdist: of each row of (..., P, M) from each row of (..., R, M)."""
    unify(left.dims[-1], right.dims[-1], Pin(f"{name(node)} of two axes that cannot be aligned", node))
    cx.consumed.append(left.dims[-1])
    batch = broadcast(cx, node, Value(left.dims[:-2]), Value(right.dims[:-2]))
    return [*batch, left.dims[-2], right.dims[-2]]


def axes_similarity(cx, node, left, right, *args, **kwargs):
    """vecdot, cosine_similarity: a reduction of a product of two along one dimension."""
    dims = broadcast(cx, node, left, right)
    gone = dims.pop(argument(node, "dim"))
    cx.consumed.append(gone)
    return dims


def axes_matrix(cx, node, x, *args, **kwargs):
    """inv, cholesky, svd, eigh, det, ...: of each matrix of a batch, whose order is kept."""
    why = Pin(f"{name(node)} depends on the order along the axis", node)
    tolerances = [axis for value in tensors((args, kwargs)) for axis in value.dims]
    for axis in (*x.dims[-2:], *tolerances):
        pin(axis, why)
    batch, sizes = x.dims[:-2], x.sizes[:-2]
    kept = [len(batch) if out[: len(batch)] == sizes else 0 for out in shapes(node)]  # what is not computed is empty
    outputs = [[*batch[:n], *(Axis(size, pin=why) for size in out[n:])] for n, out in zip(kept, shapes(node))]
    return outputs if isinstance(node.meta["val"], (list, tuple)) else outputs[0]


def axes_solve(cx, node, matrix, right, *args, **kwargs):
    """Solves matrix @ x = right, or x @ matrix = right: each column, or row, of `right` by itself."""
    why = Pin(f"{name(node)} depends on the order along the axis", node)
    is_vector = right.sizes == matrix.sizes[:-1]
    solved = -2 if argument(node, "left", True) and not is_vector else -1
    for axis in (*matrix.dims[-2:], right.dims[solved]):
        pin(axis, why)
    rank = 1 if is_vector else 2
    solution = [*broadcast(cx, node, Value(matrix.dims[:-2]), Value(right.dims[:-rank])), *right.dims[-rank:]]
    if not isinstance(node.meta["val"], (list, tuple)):
        return solution
    return [solution, *(matrix.dims[: len(out)] for out in shapes(node)[1:])]  # the factors, the pivots, the status


def axes_grid_sample(cx, node, x, grid, *args, **kwargs):
    """Each position of the grid (batch, ..., 2 or 3) looks up all channels of x (batch, channels, ...)."""
    why = Pin(f"{name(node)} depends on the order along the axis", node)
    for axis in (*x.dims[2:], grid.dims[-1]):
        pin(axis, why)
    unify(x.dims[0], grid.dims[0], why)
    return [*x.dims[:2], *grid.dims[1:-1]]


def axes_flex_attention(cx, node, q, k, v, score=None, mask=(), *args, **kwargs):
    """Attention with a function of (score, batch, head, query, key) and a mask of blocks: an axis that either looks at
    is in order. What else they read is."""
    why = Pin("flex_attention's score or mask function looks at the axis", node)
    others = [x for x in tensors((mask, args, kwargs))]
    for value in others:
        for axis in value.dims:
            pin(axis, why)
    read = [_positions_read(f) for f in (score, mask[-1] if mask else None)]
    batch_and_heads = {d for dims in read for d in dims if d < 2}
    batch_and_heads |= {d for d in (0, 1) for x in others if len(x.dims) > d and x.dims[d].size == q.dims[d].size > 1}
    heads = q.dims[1]
    unify(q.dims[0], k.dims[0], why)
    unify(q.dims[0], v.dims[0], why)
    for value in (k, v):
        kv = value.dims[1]
        unify(heads, kv if kv.size == heads.size else product([kv, Axis(heads.size // kv.size)]), why)
    unify(q.dims[3], k.dims[3], why)
    unify(k.dims[2], v.dims[2], why)
    for axis in (q.dims[2], k.dims[2], *[q.dims[d] for d in batch_and_heads]):
        pin(axis, why)
    cx.attention += [*q.dims, *k.dims, *v.dims]
    cx.consumed += [q.dims[3], v.dims[2]]
    cx.heads += [q.dims[0], heads]
    cx.meet(q, k)
    mark(v.dims, "value")
    rows = [q.dims[0], heads, q.dims[2]]
    return [[*rows, v.dims[3]], rows, rows][: len(shapes(node))]


def _positions_read(function) -> set[int]:
    """Which of (batch, head, query, key), 0 to 3, a score or a mask function reads; all where it cannot be seen."""
    if function is None:
        return set()
    if not isinstance(function, fx.GraphModule):
        return {0, 1, 2, 3}
    inputs = function.graph.find_nodes(op="placeholder")
    first = 1 if inputs and inputs[0].meta["val"].dtype.is_floating_point else 0
    return {d for d, node in enumerate(inputs[first : first + 4]) if node.users}
