"""Slices in disguise, as slices: what takes a part of an axis that a view made is rewritten to take it before the view.

    split, chunk, unbind           -> a slice for each piece (select where the axis goes)
    index by a constant range      -> slice
    slice with step k              -> select of the minor axis of n/k × k
    slice(permute(x), d)           -> permute(slice(x, d'))
    slice(view(x), d, a, b)        -> view(slice(x', d', a m, b m))        m: what lies below d within one axis of x

The last is why: a fused projection viewed as 3 × heads × head_dim and then taken apart would give queries, keys and
values one common `heads` and `head_dim`; taken apart first, they are three axes with nothing in common. The graph
computes the same values as before.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from math import prod
from typing import NamedTuple

import torch
from torch import fx

from s2ft_compile.passes.editor import Editor

aten = torch.ops.aten
VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unflatten.int}
COPIES = {
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
}
PRIMES = (10007, 10009, 10037, 10039, 10061, 10067, 10069, 10079, 10091, 10093, 10099, 10103, 10111, 10133, 10139)
MAX_PIECES = 64  # a loop over the positions of a sequence takes an axis apart, too, and has nothing to gain


class Part(NamedTuple):
    """What a node reads of another: `size` elements from `start` along `dim`, which goes away if `drop`."""

    source: fx.Node
    dim: int
    start: int
    size: int
    drop: bool = False


def concretize(graph: fx.Graph) -> None:
    """Gives every size that depends on data a number: a large prime of its own, so that only equal sizes are equal.

    Axes of such a size come from lookups, so they are in order already; the rules need to tell sizes apart.
    """
    chosen: dict[str, int] = {}

    def number(size) -> int:
        expression = getattr(getattr(size, "node", None), "expr", None)
        if expression is None:
            return size
        for symbol in sorted(expression.free_symbols, key=str):
            chosen.setdefault(str(symbol), PRIMES[len(chosen) % len(PRIMES)])
        value = int(expression.xreplace({s: chosen[str(s)] for s in expression.free_symbols}))
        return value if value >= 0 else chosen.setdefault(str(expression), PRIMES[len(chosen) % len(PRIMES)])

    def concrete(value, node):
        if isinstance(value, torch.Tensor) and any(not isinstance(n, int) for n in value.shape):
            node.meta["made up"] = True
            return torch.empty([number(n) for n in value.shape], dtype=value.dtype, device="meta")
        if isinstance(value, (list, tuple)):
            return type(value)([concrete(v, node) for v in value])
        node.meta["made up"] = node.meta.get("made up", False) or isinstance(value, torch.SymInt)
        return number(value) if isinstance(value, torch.SymInt) else value

    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = concrete(node.meta["val"], node)


def normalize(graph: fx.Graph, constants: dict[str, torch.Tensor]) -> None:
    """Rewrites slices in disguise, in place. constants: the values of small integer tensors, by placeholder."""
    editor = Editor(graph, nullcontext())  # sizes may be made up, which no fake mode knows
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.meta.get("val"), (torch.Tensor, list, tuple)):
            continue
        editor.at = node
        for taker, part in list(_parts(editor, node, constants)):
            rewritten = _pushed(editor, part, node)
            if rewritten is not None:
                taker.replace_all_uses_with(rewritten)
    graph.eliminate_dead_code()


def _parts(editor: Editor, node: fx.Node, constants) -> Iterator[tuple[fx.Node, Part]]:
    """(the node whose value it is, what it takes) for each value that a node takes out of another."""
    target, args = node.target, node.args
    if not args or not isinstance(args[0], fx.Node) or not isinstance(args[0].meta.get("val"), torch.Tensor):
        return
    x, shape = args[0], args[0].meta["val"].shape
    if target is aten.select.int and not isinstance(args[2], fx.Node):
        dim = args[1] % len(shape)
        yield node, Part(x, dim, args[2] % shape[dim], 1, True)
    elif target is aten.slice.Tensor and not any(isinstance(a, fx.Node) for a in args[1:]):
        yield from _sliced(editor, node, x, *args[1:])
    elif target is aten.index.Tensor:
        yield from _indexed(editor, node, x, args[1], constants)
    elif isinstance(node.meta["val"], (list, tuple)) and len(node.meta["val"]) <= MAX_PIECES:
        if target in (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int):
            yield from _split(node, x)


def _sliced(
    editor: Editor, node: fx.Node, x: fx.Node, dim: int = 0, start=None, end=None, step: int = 1
) -> Iterator[tuple[fx.Node, Part]]:
    whole = x.meta["val"].shape[dim]
    start = min(max(0, (start or 0) + (whole if (start or 0) < 0 else 0)), whole)
    dim, size = dim % x.meta["val"].dim(), node.meta["val"].shape[dim]
    if step == 1 and 0 < size < whole:
        yield node, Part(x, dim, start, size)
    elif step > 1 and whole % step == 0 and start < step and size == whole // step:
        shape = list(x.meta["val"].shape)
        pairs = editor.call(aten.reshape.default, x, [*shape[:dim], size, step, *shape[dim + 1 :]], like=node)
        rewritten = editor.call(aten.select.int, pairs, dim + 1, start, like=node)
        node.replace_all_uses_with(rewritten)


def _indexed(editor: Editor, node: fx.Node, x: fx.Node, indices, constants) -> Iterator[tuple[fx.Node, Part]]:
    used = [(d, i) for d, i in enumerate(indices) if i is not None]
    if len(used) != 1:
        return
    dim, index = used[0]
    while index.op == "call_function" and index.target in COPIES:
        index = index.args[0]
    values = constants.get(index.name)
    if values is None or values.dim() > 1 or not values.numel():
        return
    rows = [v % x.meta["val"].shape[dim] for v in values.reshape(-1).tolist()]
    if rows == list(range(rows[0], rows[0] + len(rows))):
        part = Part(x, dim, rows[0], len(rows), values.dim() == 0)
        rewritten = _taken(editor, part, node)
        node.replace_all_uses_with(rewritten)
        yield rewritten, part


def _split(node: fx.Node, x: fx.Node) -> Iterator[tuple[fx.Node, Part]]:
    arguments = {a.name: v for a, v in zip(node.target._schema.arguments, node.args)} | node.kwargs
    dim, drop, start = arguments.get("dim", 0) % x.meta["val"].dim(), node.target is aten.unbind.int, 0
    takers = {user.args[1]: user for user in node.users}
    for i, piece in enumerate(node.meta["val"]):
        size = 1 if drop else piece.shape[dim]
        if i in takers and size:
            yield takers[i], Part(x, dim, start, size, drop)
        start += size


def _taken(editor: Editor, part: Part, like: fx.Node) -> fx.Node:
    if part.drop:
        return editor.call(aten.select.int, part.source, part.dim, part.start, like=like)
    return editor.call(aten.slice.Tensor, part.source, part.dim, part.start, part.start + part.size, like=like)


def _pushed(editor: Editor, part: Part, like: fx.Node) -> fx.Node | None:
    """The same value, taken before the view that split its axis; None if no such view is near."""
    path, x, dim = [], part.source, part.dim
    while (step := _through(x, dim)) is not None:
        path.append(x)
        x, dim = step
    through = _below(x, dim) if x.op == "call_function" and x.target in VIEWS else None
    if through is None:
        return None
    source, at, below = through
    shape, m = list(x.meta["val"].shape), prod(below)
    merged = [*shape[:dim], shape[dim] * m, *shape[dim + 1 + len(below) :]]
    rewritten = editor.call(aten.reshape.default, source, merged, like=like)
    rewritten = editor.call(aten.slice.Tensor, rewritten, dim, part.start * m, (part.start + part.size) * m, like=like)
    split = [*shape[:dim], part.size, *below, *shape[dim + 1 + len(below) :]]
    rewritten = editor.call(aten.reshape.default, rewritten, split, like=like)
    for step in reversed(path):
        rewritten = editor.call(step.target, rewritten, *step.args[1:], like=like, **step.kwargs)
    return editor.call(aten.squeeze.dim, rewritten, part.dim, like=like) if part.drop else rewritten


def _through(node: fx.Node, dim: int) -> tuple[fx.Node, int] | None:
    """(its operand, the same dimension there) of a node that only reorders or copies."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    x, rank = node.args[0], node.meta["val"].dim() if isinstance(node.meta.get("val"), torch.Tensor) else 0
    if node.target in COPIES:
        return x, dim
    if node.target is aten.permute.default:
        return x, node.args[1][dim] % rank
    if node.target is aten.transpose.int:
        a, b = node.args[1] % rank, node.args[2] % rank
        return x, {a: b, b: a}.get(dim, dim)
    if node.target is aten.unsqueeze.default and dim != (at := node.args[1] % rank):
        return x, dim - (dim > at)
    if node.target is aten.squeeze.dim and x.meta["val"].dim() == rank + 1:
        return x, dim + (dim >= node.args[1] % (rank + 1))
    return None


def _below(view: fx.Node, dim: int) -> tuple[fx.Node, int, list[int]] | None:
    """(operand, its dimension, sizes below `dim`) if the view made `dim` and those by splitting one dimension."""
    source = view.args[0]
    old, new = list(source.meta["val"].shape), list(view.meta["val"].shape)
    i = j = 0
    while i < len(old) and j < len(new):
        end, size = j + 1, new[j]
        while size < old[i] and end < len(new):
            size *= new[end]
            end += 1
        if size != old[i]:
            return None
        if j <= dim < end:
            below = new[dim + 1 : end]
            return (source, i, below) if prod(below) > 1 else None
        i, j = i + 1, end
    return None
