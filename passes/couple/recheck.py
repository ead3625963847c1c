"""Recheck: a graph that is about to run, inferred again in its own shapes and mode, over weights that are permuted.

The analysis proves couplings for the traces it saw. A graph that is compiled later may be another one: another branch,
an argument, a size. Here the permuted axes are the only unknowns. Whatever else a weight has is in the base order, and
so pinned, and the graph is right if afterwards every permuted axis is whole, unpinned and one with no other.

A graph may be a piece of the model (one layer, what lies between two graph breaks), so its inputs and outputs need not
be in the base order. An axis may *leave* a piece in permuted order: an output of hidden units, a cache of keys by head.
It may *enter* one only if it left another before; what else a permuted axis meets is an argument in the base order.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import fx
from torch._dynamo.utils import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from s2ft_compile.capture.capture import is_small_index
from s2ft_compile.capture.recording import Recording
from s2ft_compile.errors import CompileError
from s2ft_compile.layout import Layout, Leaf, Product, leaves
from s2ft_compile.structure import Analysis

from .axes import ATOM, PRODUCT, SUM, Axis, Pin, atoms, find, unify
from .inference import Inference, source_line, values
from .normalize import concretize, normalize
from .rules.context import Value

log = logging.getLogger(__name__)
aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Permuted:
    """What a prepared model's weights look like. axes: of `layouts`, those whose order is not the base's.

    unread: the parameters that no example given to `prepare` reads.
    """

    layouts: Mapping[tuple[str, int], Layout] = field(repr=False)
    axes: frozenset[int]
    unread: frozenset[str] = frozenset()

    @classmethod
    def of(cls, analysis: Analysis, axes: Collection[int]) -> "Permuted":
        """axes: those that were reordered, such as the keys of `dense_orders(analysis, selections)`."""
        layouts = {
            place: layout
            for place, layout in analysis.layouts.items()
            if any(leaf.axis in axes for leaf in leaves(layout))
        }
        return cls(layouts, frozenset(axes), analysis.unread)


Weights = Mapping[fx.Node, tuple[str, Permuted]]
Crossing = tuple[Permuted, int]  # an axis of a prepared model


def recheck(graph: fx.GraphModule, weights: Weights, left: Collection[Crossing] | None = frozenset()) -> set[Crossing]:
    """Proves that a graph is the same function of permuted weights as of those in base order.

    graph: dynamo's (with `example_value`s, it is traced to aten) or aten (with `val`s); it is not changed. weights: of
    its placeholders, those that are parameters or buffers of a prepared model, by (first) name; a name without a layout
    is in base order. left: the permuted axes that graphs of the same model returned, None: take all for returned.
    Returns those that this one returns. Raises `CompileError`, with the model's line, where a permuted axis is pinned,
    divided, joined with another, or meets an input in base order.
    """
    if not any(name == held for name, p in weights.values() for held, _ in p.layouts):
        return set()
    if (leaving := _quickly(graph, weights, left)) is not None:
        return leaving
    traced, known = _aten(graph, weights)
    inference = _Piece(known)
    inference.run(traced, None)
    if inference.broken(left) is not None:
        _explain(traced, known, left)
    return inference.leaving


def _quickly(graph: fx.GraphModule, weights: Weights, left: Collection[Crossing] | None) -> set[Crossing] | None:
    """The same by a graph that is cheaper to make than `make_fx`'s, of operators that are smaller and have no lines;
    None where that is not enough: what is refused is looked at again."""
    places = [n for n in graph.graph.nodes if n.op == "placeholder"]
    if not all(isinstance(_value(n), torch.Tensor) and _is_static(_value(n)) for n in places):
        return None
    recorder = _Recorder()
    try:
        with _fake(places), torch.no_grad():
            placeholders = [recorder.placeholder(_value(n)) for n in places]
            with recorder:
                result = _Through(graph, recorder).run(*map(_value, places))
        recorder.graph.output(recorder.arguments(result))
        traced = SimpleNamespace(graph=recorder.graph, **recorder.constants)  # a GraphModule would write its code
        normalize(traced.graph, _constants(traced))
        inference = _Piece({new: weights[old] for old, new in zip(places, placeholders, strict=True) if old in weights})
        inference.run(traced, None)
    except Exception as error:  # a higher-order operator, a size that depends on data
        log.debug("a graph was not recorded (%s: %s)", type(error).__name__, error)
        return None
    return inference.leaving if inference.broken(left) is None else None


def _is_static(value: torch.Tensor) -> bool:
    return all(isinstance(n, int) for n in (*value.shape, *value.stride()))


class _Recorder(Recording, TorchDispatchMode):
    """The operators that are dispatched while it is on."""

    def __init__(self):
        Recording.__init__(self)
        TorchDispatchMode.__init__(self)
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {})) if self.paused else self.record(func, args, kwargs or {})

    def record(self, func: Callable, args: Any, kwargs: Any) -> Any:
        """Calls it, as one operator."""
        self.paused = True
        output = func(*args, **kwargs)
        self.paused = False
        self.add(func, args, kwargs, output)
        return output


class _Through(fx.Interpreter):
    """Runs a checkpointed part as what it computes: where its activations come from says nothing about axes. recorder:
    gets attention as one operator, whichever a device has for it."""

    def __init__(self, graph: fx.GraphModule, recorder: "_Recorder | None" = None):
        super().__init__(graph)
        self.recorder = recorder

    def call_function(self, target, args, kwargs):
        if target is torch.ops.higher_order.tag_activation_checkpoint:
            return _Through(args[0], self.recorder).run(*args[1:])
        if target is F.scaled_dot_product_attention and self.recorder is not None:
            return self.recorder.record(aten.scaled_dot_product_attention.default, args, kwargs)
        return super().call_function(target, args, kwargs)


def _value(node: fx.Node) -> Any:
    return node.meta["val"] if "val" in node.meta else node.meta.get("example_value")


def _aten(graph: fx.GraphModule, weights: Weights) -> tuple[fx.GraphModule, Weights]:
    """The graph in the operators that the rules know, normalized, and its placeholders that are weights."""
    places = [n for n in graph.graph.nodes if n.op == "placeholder"]
    if any("example_value" in n.meta for n in places):
        with _fake(places), torch.fx.traceback.preserve_node_meta(), torch.no_grad():
            mapped = any("vmap" in str(n.target) for n in graph.graph.nodes)  # torch.vmap is resolved in dispatch
            make = make_fx(_Through(graph).run, pre_dispatch=not mapped)
            traced = make(*(_value(n) for n in places))
    else:
        traced = fx.GraphModule(graph, fx.Graph(tracer_cls=graph.graph._tracer_cls))
        copied: dict[fx.Node, fx.Node] = {}
        output = traced.graph.graph_copy(graph.graph, copied)
        traced.graph.output(output)
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    known = {new: weights[old] for old, new in zip(places, placeholders, strict=True) if old in weights}
    for module in traced.modules():
        if isinstance(module, fx.GraphModule):
            concretize(module.graph)
            normalize(module.graph, _constants(module))
    return traced, known


def _constants(module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """The values of small integer tensors that the forward made of Python numbers, by node."""
    held = {n.name: getattr(module, n.target, None) for n in module.graph.find_nodes(op="get_attr")}
    return {name: t for name, t in held.items() if isinstance(t, torch.Tensor) and is_small_index(t)}


@contextmanager
def _fake(places: Sequence[fx.Node]):
    """The mode of the graph's fake values, in which constants and fresh sizes make no trouble."""
    mode = detect_fake_mode([_value(n) for n in places])
    if mode is None:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(patch.object(mode, "allow_non_fake_inputs", True))
        if mode.shape_env is not None:
            stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
        yield stack.enter_context(mode)


class _Piece(Inference):
    """Axis inference over a graph whose inputs and outputs are free."""

    def __init__(self, weights: Weights):
        super().__init__()
        self.weights = weights
        self.permuted: dict[Crossing, Axis] = {}
        self.borders: list[tuple[fx.Node, Axis]] = []
        self.leaving: set[Crossing] = set()

    def _source(self, node: fx.Node) -> Any:
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor):
            return val
        if node in self.weights:
            return self._weight(node, val.shape, *self.weights[node])
        dims = [Axis(size) for size in val.shape]
        self.borders += [(node, axis) for axis in dims]
        return Value(dims)

    def _weight(self, node: fx.Node, shape: Sequence[int], name: str, permuted: Permuted) -> Value:
        unread = name in permuted.unread
        fixed = Pin(
            f"it meets {name}, " + ("which no example given to prepare reads" if unread else "whose order is fixed")
        )
        layouts = [permuted.layouts.get((name, d)) for d in range(len(shape))]
        dims = [
            Axis(n, pin=fixed) if layout is None else self._thaw(layout, permuted, fixed)
            for n, layout in zip(shape, layouts)
        ]
        if [d.size for d in dims] != list(shape):
            raise CompileError(f"{name} has shape {list(shape)} in a graph, and {[d.size for d in dims]} in its plan")
        return Value(dims, weight=True)

    def _thaw(self, layout: Layout, permuted: Permuted, fixed: Pin) -> Axis:
        if isinstance(layout, Leaf):
            if layout.axis not in permuted.axes:
                return Axis(layout.size, pin=fixed)
            axis = self.permuted.setdefault((permuted, layout.axis), Axis(layout.size))
            handle = Axis(layout.size)
            handle.alias = find(axis)
            return handle
        parts = layout.factors if isinstance(layout, Product) else layout.terms
        kind = PRODUCT if isinstance(layout, Product) else SUM
        return Axis(layout.size, kind, [self._thaw(part, permuted, fixed) for part in parts])

    def _apply(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        """An operator in place has the rule of the one that is not, and its result is its operand from then on."""
        plain = _out_of_place(node.target)
        if plain is None:
            return super()._apply(node, args, kwargs)
        node.target = plain
        result = super()._apply(node, args, kwargs)
        dims = result.dims if isinstance(result, Value) else result
        for before, after in zip(args[0].dims, dims):
            unify(before, after, Pin(f"{plain} in place of two axes that cannot be aligned", node))
        return result

    def _returned(self, nodes: Any, result: Any) -> None:
        """The permuted axes in what the graph returns leave."""
        roots = {find(axis): key for key, axis in self.permuted.items()}
        for value in values(result):
            self.leaving |= {roots[atom] for axis in value.dims for atom in atoms(axis) if atom in roots}

    def broken(self, left: Collection[Crossing] | None) -> tuple[Axis | None, str] | None:
        """The first permuted axis that is not what it has to be, and why."""
        roots: dict[Axis, Crossing] = {}
        for key, axis in self.permuted.items():
            root = find(axis)
            if root.kind != ATOM:
                return root, "it is divided into parts, which its order does not keep together"
            if root.pin is not None:
                return root, root.pin.reason
            if root in roots:
                return root, "two axes of different orders meet"
            roots[root] = key
        for node, axis in self.borders if left is not None else ():
            for atom in atoms(axis):
                if atom in roots and roots[atom] not in left:
                    return atom, f"it meets {node.name}, an argument in the base order"
        return None


def _out_of_place(target: Any) -> Any:
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return None
    plain = getattr(aten, target._opname.removesuffix("_"), None) if target.namespace == "aten" else None
    return getattr(plain, target._overloadname, None)


class _Stepped(_Piece):
    """The same, which stops after the first node that breaks an axis."""

    def __init__(self, weights: Weights, left: Collection[Crossing] | None):
        super().__init__(weights)
        self.left = left

    def _call(self, node: fx.Node) -> Any:
        result = super()._call(node)
        self._check(node)
        return result

    def _check(self, node: fx.Node) -> None:
        if (crossing := self.broken(self.left)) is not None:
            root, why = crossing
            places = [
                f"{name}[{d}]"
                for name, p in dict.fromkeys(self.weights.values())
                for d in range(8)
                for leaf in leaves(p.layouts.get((name, d), Leaf(-1, 1)))
                if leaf.axis in p.axes and find(self.permuted.get((p, leaf.axis), root)) is root
            ]
            line = source_line(node)
            raise CompileError(
                f"this graph is not the one that was prepared: {', '.join(dict.fromkeys(places[:4]))} is in training "
                f"order, and {why}: {node.target}{f' at {line}' if line else ''}. Give prepare an example that takes "
                "this path (it takes several: prepare(model, [a, b], ...)), or leave this structure out of the targets"
            )


def _explain(traced: fx.GraphModule, weights: Weights, left: Collection[Crossing] | None) -> None:
    stepped = _Stepped(weights, left)
    stepped.run(traced, None)
    raise CompileError(f"this graph is not the one that was prepared: {stepped.broken(left)}")
