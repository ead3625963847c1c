"""What rules work on: a tensor as axis inference sees it, what a rule may read off a node, and refusal."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from s2ft_compile.passes.couple.axes import ONE, Axis, Pin, pin, unify

aten = torch.ops.aten


@dataclass(frozen=True)
class Value:
    """A tensor as axis inference sees it.

    dims: an axis per dimension. weight: computed from parameters and constants alone. scores: comes out of a
    product of two activations, or a sum of each of one with each of another (attention scores), so a product with it
    applies them to the values. looked_up: of rows of a weight that were picked by index, the axis they were picked
    along (the experts of each token). factors: the two activations that it is the elementwise product of.
    """

    dims: Sequence[Axis]
    weight: bool = False
    scores: bool = False
    looked_up: tuple[Axis, ...] = ()
    factors: tuple["Value", ...] = ()

    @property
    def sizes(self) -> list[int]:
        """The tensor's shape."""
        return [d.size for d in self.dims]


@dataclass
class Projection:
    """The axes of a weight that an operator produces and those it contracts."""

    produced: list[Axis] = field(default_factory=list)
    contracted: list[Axis] = field(default_factory=list)


@dataclass
class Context:
    """What the rules report besides equations: which axes meet in products of two activations."""

    training: bool = True  # whether the graph is one of train mode
    heads: list[Axis] = field(default_factory=list)  # batch axes of such a product
    attention: list[Axis] = field(default_factory=list)  # every axis of such a product
    experts: list[Axis] = field(default_factory=list)  # batch axes of a product with a weight
    pairs: list[tuple[list[Axis], list[Axis]]] = field(default_factory=list)  # (kept, contracted) of scores
    convolved: list[Axis] = field(default_factory=list)  # channels that kernels of several positions read or make
    filtered: list[Axis] = field(default_factory=list)  # channels that each have a filter along a sequence
    spectral: list[Axis] = field(default_factory=list)  # channels whose sequences are transformed (Fourier)
    contractions: dict[int, list[Axis]] = field(default_factory=dict)  # id of a weight's axis -> what it is made into
    consumed: list[Axis] = field(default_factory=list)  # axes that a contraction or a reduction sums over
    projections: dict[Any, Projection] = field(default_factory=dict)  # by node

    def project(self, node, weight: Value, produced: Sequence[int], contracted: Sequence[int]) -> None:
        """Records a contraction with a weight, by the weight's dimensions."""
        for dims, use in ((produced, "in"), (contracted, "out")):
            for d in dims:
                weight.dims[d].uses.add(use)
        for d in contracted:
            self.contractions.setdefault(id(weight.dims[d]), []).extend(weight.dims[p] for p in produced)
        projection = self.projections.setdefault(node, Projection())
        projection.produced.extend(weight.dims[d] for d in produced)
        projection.contracted.extend(weight.dims[d] for d in contracted)

    def product(self, left: Value, right: Value, batch: Sequence[Axis]) -> bool:
        """Records a contraction of two activations; returns whether its result holds attention scores."""
        self.heads += batch
        self.attention += [*left.dims, *right.dims]
        scores = left.scores or right.scores
        if not scores:
            self.meet(left, right)
        for value, other in ((left, right), (right, left)):
            if other.scores and not value.scores:
                mark(value.dims, "value")
        return not scores

    def meet(self, left: Value, right: Value) -> None:
        """Marks queries and keys; what one axis of a weight holds both of is neither."""
        both = {id(axis) for axis in left.dims} & {id(axis) for axis in right.dims}
        mark([axis for axis in left.dims if id(axis) in both], "in")
        mark(left.dims, "query")
        mark(right.dims, "key")

    def weighted_sum(self, source: Value, summed: Sequence[int]) -> None:
        """Records a sum of an elementwise product of two activations, if one weighs all that the other has along an
        axis that it lacks: heads are what they share."""
        for scores, value in (source.factors, source.factors[::-1]) if source.factors else ():
            rank, lacks = len(source.dims), len(source.dims) - len(scores.dims)
            sizes = [1] * lacks + scores.sizes
            kept = [d for d in range(rank) if d not in summed]
            if len(value.dims) == rank and any(sizes[d] < value.sizes[d] for d in kept):
                shared = [d for d in kept if sizes[d] == value.sizes[d] > 1]
                if shared and all(sizes[d] == value.sizes[d] for d in summed):
                    self.heads += [value.dims[d] for d in shared]
                    mark(value.dims, "value")


def mark(dims: Sequence[Axis], role: str) -> None:
    """Marks handles, and the parts they were refined into, with what attention uses them as."""
    for axis in dims:
        if axis.size > 1 and axis.role is None:
            axis.role = role
            if axis.alias is None:
                mark(axis.parts, role)


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
            unify(other, axes[0], why)
        dims.append(axes[0])
    return dims


def axes_unknown(cx, node, *args, **kwargs):
    """No rule: the order of everything it touches matters."""
    return axes_pinned(node, f"there is no rule for {name(node)}", (args, kwargs))


def axes_pinned(node, reason: str, operands: Any):
    """The axes of the results, where the order of everything that an operator touches matters."""
    why = Pin(reason, node)
    for value in tensors(operands):
        for axis in value.dims:
            pin(axis, why)
    outputs = [[Axis(size, pin=why) for size in out] for out in shapes(node)]
    return outputs if isinstance(node.meta["val"], (list, tuple)) else outputs[0]


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


def acted_dims(node, rank: int) -> list[int]:
    """The dimensions an operator names as `dim` or `dims`; all of them where it names none."""
    dim = argument(node, "dim", argument(node, "dims"))
    if dim is None or dim == []:
        return list(range(rank))
    if rank == 0:  # a dim of a 0-d tensor is its only element
        return []
    return [d % rank for d in (dim if isinstance(dim, (list, tuple)) else [dim])]
