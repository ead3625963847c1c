"""Axis rules against the operators that they are for."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from s2ft_compile.capture.recording import Recorder
from s2ft_compile.errors import ConfigError
from s2ft_compile.layout import Layout, Leaf, Product, Sum, gather_index
from s2ft_compile.passes.couple.axes import PRODUCT, SUM, Axis, atoms, find
from s2ft_compile.passes.couple.inference import Inference
from s2ft_compile.passes.couple.normalize import concretize, normalize
from s2ft_compile.passes.couple.rules import rule_for
from s2ft_compile.passes.couple.rules.context import Context, Value, axes_unknown


class Solution:
    """A random order for every free atom of some axes, and what it does to the positions along any of them."""

    def __init__(self, axes: Iterable[Axis], seed: int = 0):
        self.ids: dict[Axis, int] = {}
        random = torch.Generator().manual_seed(seed)
        free = {atom: None for axis in axes for atom in atoms(axis) if atom.pin is None}
        self.orders = {}
        for atom in free:
            self.orders[self.ids.setdefault(atom, len(self.ids))] = torch.randperm(atom.size, generator=random)

    def index(self, axis: Axis) -> Tensor:
        """int64 (size of axis,): where each position takes its value from."""
        return gather_index(frozen(axis, self.ids), self.orders)

    def flat(self, dims: Iterable[Axis]) -> Tensor:
        """Where each element of a row-major tensor of these dimensions comes from."""
        index = torch.zeros(1, dtype=torch.int64)
        for axis in dims:
            index = (index[:, None] * axis.size + self.index(axis)[None, :]).reshape(-1)
        return index

    def move(self, x: Tensor, dims: Iterable[Axis]) -> Tensor:
        """x, whose dimensions are these axes, in the random orders."""
        for d, axis in enumerate(dims):
            assert axis.size == x.shape[d], f"the rule says size {axis.size} for dim {d} of {list(x.shape)}"
            x = x.index_select(d, self.index(axis))
        return x


def frozen(axis: Axis, ids: dict[Axis, int]) -> Layout:
    """An axis as a layout. ids: of the atoms; new ones are added."""
    root = find(axis)
    if root.kind == PRODUCT:
        return Product(tuple(frozen(p, ids) for p in root.parts))
    if root.kind == SUM:
        return Sum(tuple(frozen(p, ids) for p in root.parts))
    return Leaf(ids.setdefault(root, len(ids)), root.size)


def infer(op: Callable, args: Sequence, kwargs: Mapping[str, Any]) -> tuple[list, list, list, Context]:
    """The verdict of an operator's rule on one call: (inputs, their axes, the outputs' axes, the context)."""
    graph, inputs, axes = fx.Graph(), [], []

    def placeholder(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        node = graph.placeholder(f"x{len(inputs)}")
        node.meta["val"] = t
        inputs.append(t)
        axes.append([Axis(n) for n in t.shape])
        return node

    node_args = fx.node.map_aggregate(tuple(args), placeholder)
    node_kwargs = fx.node.map_aggregate(dict(kwargs), placeholder)
    node = graph.call_function(op, node_args, node_kwargs)
    node.meta["val"] = op(*args, **kwargs)
    values = {p: Value(a, weight=False) for p, a in zip(graph.find_nodes(op="placeholder"), axes)}
    rule_args, rule_kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    context = Context()
    if rule_for(op) is axes_unknown:
        graph.output(node)
        results = Inference(context).run(SimpleNamespace(graph=graph), list(values.values()))
    else:
        results = rule_for(op)(context, node, *rule_args, **rule_kwargs)
    several = isinstance(node.meta["val"], (list, tuple))
    results = [results.dims if isinstance(results, Value) else results] if not several else results
    return inputs, axes, [list(m.dims) if isinstance(m, Value) else list(m) for m in results], context


def check_rule(op: Callable, args: Sequence, kwargs: Mapping[str, Any], seed: int = 0) -> int:
    """Checks a rule on one call; returns how many atoms of size > 1 it left free.

    Every atom gets a random order: op(permuted inputs) has to be permuted op(inputs).
    """
    inputs, axes, results, _ = infer(op, args, kwargs)

    def call(*moved: Tensor) -> Any:
        of = iter(moved)
        given = fx.node.map_aggregate((tuple(args), dict(kwargs)), lambda a: next(of) if isinstance(a, Tensor) else a)
        return op(*given[0], **given[1])

    return _moves_as_said(call, inputs, axes, results, seed)


def check_function(function: Callable, inputs: Sequence[Tensor], seed: int = 0) -> int:
    """The same of a function of tensors, looked at as a model's code is: recorded, inferred operator by operator."""
    recorder = Recorder()
    given = [recorder.input(t)[0] for t in inputs]
    with torch.no_grad(), recorder.on():
        result = function(*given)
    graph = recorder.returns([t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)])
    concretize(graph)
    normalize(graph, {})
    axes = [[Axis(n) for n in t.shape] for t in inputs]
    returned = Inference().run(SimpleNamespace(graph=graph, **recorder.constants), [Value(dims) for dims in axes])
    return _moves_as_said(function, inputs, axes, [list(value.dims) for value in returned], seed)


def _moves_as_said(call: Callable, inputs: Sequence[Tensor], axes: list, results: list, seed: int) -> int:
    solution = Solution([a for dims in [*axes, *results] for a in dims], seed)
    after, before = (
        [t for t in pytree.tree_leaves(v) if isinstance(t, Tensor)]
        for v in (call(*map(solution.move, inputs, axes)), call(*inputs))
    )
    for a, b, dims in zip(after, before, results, strict=True):
        torch.testing.assert_close(a, solution.move(b, dims), rtol=1e-9, atol=1e-9, equal_nan=True)
    return sum(1 for dims in axes for axis in dims for atom in set(atoms(axis)) if atom.pin is None and atom.size > 1)


def rulecheck(operator: str, samples: Iterable[Sequence], seeds: int = 5) -> int:
    """An operator's axis rule against the operator itself; returns how many atoms it left free, over all samples.

    operator: "ns::op" (its default overload) or with an overload, "ns::op.out". samples: tuples of its arguments, best
    in float64 and with sizes that differ. 0 means that the rule pins everything, as where there is none.
    Raises `AssertionError` where the outputs do not move as the rule says.
    """
    namespace, _, name = operator.partition("::")
    op: Any = getattr(getattr(torch.ops, namespace, None), name.partition(".")[0], None)
    op = getattr(op, name.partition(".")[2] or "default", None)
    if not isinstance(op, torch._ops.OpOverload):
        raise ConfigError(f"no operator {operator!r}; it is named 'namespace::operator', once its library is imported")
    samples = [tuple(sample) for sample in samples]
    if not samples:
        raise ConfigError(f"rulecheck of {operator} needs samples: tuples of its arguments")
    free = 0
    for sample in samples:
        free += [check_rule(op, sample, {}, seed) for seed in range(seeds)][0]
    return free
