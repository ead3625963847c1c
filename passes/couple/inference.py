"""Axis inference: the rules applied to every node of a graph once, from its inputs to its outputs."""

import logging
import operator
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from s2ft_compile import quantized
from s2ft_compile.capture import capture, models, recording
from s2ft_compile.capture.capture import Captured, uniform_dims
from s2ft_compile.passes.couple.rules.context import Context, Value, axes_pinned, axes_unknown, shapes
from s2ft_compile.passes.couple.rules.context import name as operator_name

from .apart import taken_apart
from .axes import Axis, Pin, atoms, pin, unify
from .rules import rule_for

OURS = {module.__file__ for module in (recording, capture, models, quantized)}  # frames below the model
log = logging.getLogger(__name__)
INLINED = ("wrap_with_set_grad_enabled", "wrap_with_autocast", "invoke_subgraph")


class Inference:
    """Applies the rules to every node once. `env` maps nodes to values (or lists of them)."""

    def __init__(self, cx: Context | None = None):
        self.cx = cx or Context()
        self.env: dict[fx.Node, Any] = {}

    def run(self, module: fx.GraphModule, inputs: list | None) -> Any:
        """Interprets a graph. inputs: values of its placeholders; None where they are sources, which end in outputs."""
        placeholders = iter(inputs or ())
        for node in module.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = next(placeholders) if inputs is not None else self._source(node)
            elif node.op == "get_attr":
                held = getattr(module, node.target, None)
                self.env[node] = held if isinstance(held, fx.GraphModule) else self._constant(node, held)
            elif node.op == "call_function":
                self.env[node] = self._call(node)
            elif node.op == "output":
                result = fx.node.map_arg(node.args[0], lambda n: self.env[n])
                if inputs is None:
                    self._returned(node.args[0], result)
                return result

    def _source(self, node: fx.Node) -> Any:
        raise NotImplementedError

    def _returned(self, nodes: Any, result: Any) -> None:
        """What the graph returns: `nodes`, and their values."""

    def _constant(self, node: fx.Node, held: Any) -> Any:
        """held: its value, of which the dimensions matter along which it varies."""
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor):
            return val
        why = Pin(f"it meets {node.name}, which varies along it")
        alike = uniform_dims(held) if isinstance(held, torch.Tensor) else ()
        return Value([Axis(s, pin=None if d in alike else why) for d, s in enumerate(val.shape)], weight=True)

    def _call(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.env[n])
        if node.target is operator.getitem:
            return args[0][args[1]] if isinstance(args[0], (list, tuple)) else None
        graphs = [i for i, a in enumerate(args) if isinstance(a, fx.GraphModule)]
        if len(graphs) == 1 and isinstance(node.target, torch._ops.HigherOrderOperator) and _inlines(node):
            return self.run(args[graphs[0]], [a for a in args[graphs[0] + 1 :] if not isinstance(a, str)])
        if not _has_tensor(node.meta.get("val")):
            return None
        if rule_for(node.target) is axes_unknown and (parts := taken_apart(node)) is not None:
            return self.run(parts, [self.env[n] for n in node.all_input_nodes])
        result = self._apply(node, args, kwargs)
        operands = list(values((args, kwargs)))
        weight = all(v.weight for v in operands)
        scores = any(v.scores for v in operands)
        if isinstance(result, Value):
            return result
        rows = [v.looked_up for v in operands if not v.weight and v.dims]
        looked_up = rows[0] if rows and all(rows) else ()
        if isinstance(node.meta["val"], (list, tuple)):
            return [Value(d, weight, scores, looked_up) for d in result]
        return Value(result, weight, scores, looked_up)

    def _apply(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        """The rule's result. What a rule cannot take (sizes that depend on data can contradict each other) is refused:
        all that the operator touches is pinned, whatever the rule has stated before."""
        try:
            result = rule_for(node.target)(self.cx, node, *args, **kwargs)
            several = result if isinstance(node.meta["val"], (list, tuple)) else [result]
            sizes = [[d.size for d in (m.dims if isinstance(m, Value) else m)] for m in several]
            if sizes[: len(shapes(node))] != shapes(node):
                raise ValueError(f"it gives sizes {sizes} where the graph has {shapes(node)}")
            return result
        except Exception as error:
            if not any(n.meta.get("made up") for n in (node, *node.all_input_nodes)):
                log.warning("the rule for %s failed, so its axes are refused: %r", node.target, error)
            why = f"the rule for {operator_name(node)} failed ({type(error).__name__}: {error})"
            return axes_pinned(node, why, (args, kwargs))


class ModelInference(Inference):
    """Inference over a model's own graph: parameters start free, inputs and outputs are pinned."""

    def __init__(self, captured: Captured, parameters: dict[str, Value] | None = None):
        super().__init__(Context(captured.training))
        self.parameters = parameters or {
            name: Value([Axis(size) for size in shape], weight=True) for name, shape in captured.shapes.items()
        }
        for name, other in captured.overlapping.items():
            what = f"it shares memory with {other}, which is not the same parameter"
            what = "elements of it share memory (it is expanded)" if other == name else what
            pin_all(self.parameters[name], Pin(what, closed=True))
        for name, why in captured.refused.items():
            pin_all(self.parameters[name], Pin(why, closed=True))
        self.border, self.buffers = captured.border, captured.buffers
        held = {place: name for place, name in captured.buffers.items() if name in self.parameters}
        self.names, self.uniform = {**captured.parameters, **held}, captured.uniform
        self.written = {out: name for out, name in captured.written.items() if name in self.parameters}
        placeholders = (n for n in captured.graph_module.graph.nodes if n.op == "placeholder" and n.users)
        self.used = {self.names[n.name] for n in placeholders if n.name in self.names}

    def _source(self, node: fx.Node) -> Any:
        if node.name in self.names:
            return self.parameters[self.names[node.name]]
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor):
            return val
        fixed = node.name.startswith(("b_", "c_"))
        buffer = self.buffers.get(node.name, node.name)
        why = Pin(f"it meets {buffer}, which varies along it" if fixed else f"it is an input of {self.border}")
        alike = self.uniform.get(node.name, ())  # zeros are the same in any order
        return Value([Axis(n, pin=None if d in alike else why) for d, n in enumerate(val.shape)], weight=fixed)

    def _returned(self, nodes: Any, result: Any) -> None:
        pin_all(self._without_statistics(nodes) if self.written else result, Pin(f"it is an output of {self.border}"))

    def _without_statistics(self, outputs: Any) -> Any:
        """What a forward returns to its caller. The next value of a buffer has the axes of the one before."""
        for node in [n for n in outputs if isinstance(n, fx.Node) and n.name in self.written]:
            why = Pin(f"it is the next value of {self.written[node.name]}", node)
            for a, b in zip(self.env[node].dims, self.parameters[self.written[node.name]].dims, strict=True):
                unify(a, b, why)
        given = tuple(n for n in outputs if not (isinstance(n, fx.Node) and n.name in self.written))
        return fx.node.map_arg(given, lambda n: self.env[n])


def _inlines(node: fx.Node) -> bool:
    """Whether a higher-order operator runs its graph once, on the arguments after it (no_grad, autocast, regions)."""
    return node.target.name().startswith(INLINED)


def values(tree: Any) -> Iterator[Value]:
    if isinstance(tree, Value):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from values(item)
    elif isinstance(tree, dict):
        yield from values(list(tree.values()))


def _has_tensor(val: Any) -> bool:
    return any(isinstance(v, torch.Tensor) for v in (val if isinstance(val, (list, tuple)) else [val]))


def pin_all(tree: Any, why: Pin) -> None:
    for value in values(tree):
        for axis in value.dims:
            pin(axis, why)


def atoms_of(axes: Iterable[Axis]) -> set[Axis]:
    return {atom for axis in axes for atom in atoms(axis) if atom.size > 1}


def source_line(node: fx.Node | None) -> str:
    """The innermost line of the model's own code that made the node."""
    meta = {} if node is None else node.meta
    if "traceback" in meta:  # of a recording
        frames = [(f.filename, f.lineno, f.line) for f in meta["traceback"].summary() if f.filename not in OURS]
    else:
        matches = re.findall(r'File "([^"]+)", line (\d+)(?:, in \S+)?\n\s*(.*)', meta.get("stack_trace") or "")
        frames = [(name, line, text) for name, line, text in matches]
    mine = [f for f in frames if "/torch/" not in f[0]] or frames
    return f"{mine[-1][0]}:{mine[-1][1]} ({mine[-1][2].strip()})" if mine else ""
