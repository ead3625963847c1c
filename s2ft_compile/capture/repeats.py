"""Repeats: of layers that are equal one is recorded; the nodes of the others are copies of its nodes, with their own
weights and inputs in place of its.

Two layers are equal if nothing differs that the recorded call read: their modules' classes, the types and sizes of
their weights and inputs, and the attributes of their modules. Which attributes are read is watched, so a layer's number
may differ where the call never asks for it. A call that keeps something, writes to what it was given, draws from
Python's random numbers, or reads an attribute that is no plain value is no template, and whatever is not known to be
equal is recorded. The graph is that of the whole model, as if all of it had been recorded.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils import _pytree as pytree

from .models import holdings, holds_still

if TYPE_CHECKING:
    from .recording import Recorder

HELD = ("_parameters", "_buffers", "_modules")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
VALUES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type)
Read = tuple[str, str]  # (path of a module in a layer, attribute)


@contextmanager
def repeated(model: nn.Module, recorder: "Recorder") -> Iterator[list["Layers"]]:
    """While a model is recorded, layers of one list are copies of each other where they are equal and no gradient goes
    through them."""
    lists: list[Layers] = []
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, (nn.ModuleList, nn.Sequential)):
                alike: dict[Any, list[nn.Module]] = defaultdict(list)
                for child in dict.fromkeys(module.children()):
                    if "forward" not in vars(child) and (kind := _kind(child)) is not None:
                        alike[kind].append(child)
                for layers in alike.values():
                    if len(layers) > 1:
                        lists.append(Layers(layers, recorder))
                        lists[-1].install(stack)
        yield lists


def copies_of(lists: list["Layers"], names: dict[int, str]) -> dict[str, str]:
    """Weight -> that of the first layer every call of which was a copy of the same calls. names: of weights, by id."""
    copies = {}
    for listed in lists:
        first: dict[tuple, nn.Module] = {}
        for layer in listed.layers:
            if calls := tuple(map(id, listed.calls[id(layer)])):
                pairs = zip(layer.parameters(), first.setdefault(calls, layer).parameters())
                copies |= {names[id(a)]: names[id(b)] for a, b in pairs if a is not b}
    return copies


def _kind(layer: nn.Module) -> Any:
    """The modules of a layer, and what they hold; None of a layer without weights, or with hooks inside."""
    kind = [(path, type(m), *map(_sizes, (m._parameters, m._buffers))) for path, m in layer.named_modules()]
    hooked = any(vars(m).get(hooks) for m in layer.modules() if m is not layer for hooks in HOOKS)
    return None if hooked or not any(True for _ in layer.parameters()) else tuple(kind)


def _sizes(tensors: dict[str, Any]) -> tuple:
    return tuple((name, None if t is None else _type(t)) for name, t in tensors.items())


def _type(t: torch.Tensor) -> tuple:
    return type(t), t.shape, t.stride(), t.dtype, t.device


def _same(a: Any, b: Any) -> bool:
    """Whether two plain values are equal. Of anything else that is not known."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (set, frozenset)):
        return a == b and all(isinstance(item, VALUES) for item in a)
    return a is b if _is_fixed(a) else isinstance(a, VALUES) and a == b


def _is_fixed(value: Any) -> bool:
    """Whether it is code, or a configuration: what no forward changes."""
    return isinstance(value, type(_is_fixed)) or hasattr(value, "to_dict") and hasattr(value, "model_type")


@dataclass(frozen=True)
class _Template:
    """A recorded call. reads: the attributes that may differ, and that it asked for."""

    layer: nn.Module
    reads: frozenset[Read]
    inputs: list[Any]
    spec: Any
    before: list[Any]  # what the inputs' tensors were
    nodes: list[fx.Node]
    outputs: list[Any]
    out_spec: Any


class Layers:
    """Layers of one kind in one list, and the calls of them that were recorded."""

    def __init__(self, layers: list[nn.Module], recorder: "Recorder"):
        self.layers, self.recorder = layers, recorder
        self.templates: list[_Template] = []
        self.calls: dict[int, list[Any]] = {id(layer): [] for layer in layers}  # the template of each, or itself
        self.refused = False
        self.modules = {id(layer): dict(layer.named_modules()) for layer in layers}
        first = self.modules[id(layers[0])]
        self.differing: dict[str, set[str]] = {
            path: {
                key
                for key in {k for layer in layers for k in vars(self.modules[id(layer)][path])} - {*HELD}
                if not all(self._has_same(layer, layers[0], (path, key)) for layer in layers)
            }
            for path in first
        }

    def install(self, stack: ExitStack) -> None:
        for layer in self.layers:
            layer.__dict__["forward"] = self._forward(layer)
            stack.callback(layer.__dict__.pop, "forward", None)

    def _has_same(self, a: nn.Module, b: nn.Module, read: Read) -> bool:
        path, key = read
        x, y = (vars(self.modules[id(layer)][path]) for layer in (a, b))
        return key in x and key in y and _same(x[key], y[key])

    def _forward(self, layer: nn.Module) -> Callable:
        def forward(*args, **kwargs):
            inputs, spec = pytree.tree_flatten((args, kwargs))
            for template in self.templates:
                if (nodes := self._matched(template, layer, inputs, spec)) is not None:
                    self.calls[id(layer)].append(template)
                    return self._copied(template, inputs, nodes)
            before = len(self.templates)
            call = type(layer).forward(layer, *args, **kwargs) if self.refused else self._recorded(layer, inputs, spec)
            self.calls[id(layer)].append(self.templates[-1] if len(self.templates) > before else object())
            return call

        return forward

    # --- a call that is recorded ---------------------------------------------------------------------------------

    def _recorded(self, layer: nn.Module, inputs: list[Any], spec: Any) -> Any:
        args, kwargs = pytree.tree_unflatten(inputs, spec)
        graph, tensors = self.recorder.graph, [t for t in inputs if isinstance(t, torch.Tensor)]
        last, drawn = next(reversed(graph.nodes), None), random.getstate()
        before = [now(t) for t in inputs]
        held = [now(t) for t, _ in self.recorder.given.values()]
        kept = holdings(layer)
        with self._watched(layer) as reads:
            result = type(layer).forward(layer, *args, **kwargs)
        outputs, out_spec = pytree.tree_flatten(result)
        made = [o for o in outputs if isinstance(o, torch.Tensor) and not any(o is t for t in tensors)]
        storages = [_storage(o) for o in made]
        plain = all(isinstance(t, (FunctionalTensor, *VALUES)) for t in (*inputs, *outputs))
        nodes = _after(graph, last)
        if (
            plain
            and self._is_closed(layer, nodes, before)
            and drawn == random.getstate()
            and all(a is now(t) for a, t in zip(before, inputs))
            and all(a is now(t) for a, (t, _) in zip(held, self.recorder.given.values()))
            and all(holds_still(held, was) for held, was in kept)
            and len({*storages, *map(_storage, tensors)}) == len(storages) + len({*map(_storage, tensors)})
        ):
            template = _Template(layer, frozenset(reads), inputs, spec, before, nodes, outputs, out_spec)
            self.templates.append(template)
        else:
            self.refused = True
        return result

    def _is_closed(self, layer: nn.Module, nodes: list[fx.Node], before: list[Any]) -> bool:
        """Whether a call computed all from what it was given and its own weights."""
        own = [t for m in layer.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        given = [now(t) for t in (*own, *before) if isinstance(t, torch.Tensor)]
        known = {*nodes, *map(self.recorder.node_of, given)}
        return all(n in known for node in nodes for n in node.all_input_nodes)

    @contextmanager
    def _watched(self, layer: nn.Module) -> Iterator[set[Read]]:
        """The attributes of a layer's modules that are asked for, of those in which its kind differs."""
        reads: set[Read] = set()
        modules = self.modules[id(layer)]
        with ExitStack() as stack:
            for path, module in modules.items():
                if self.differing[path] - {"forward"}:
                    stack.callback(setattr, module, "__class__", type(module))
                    module.__class__ = _watching(type(module), path, self.differing[path], reads)
            yield reads

    # --- a call that is a copy -----------------------------------------------------------------------------------

    def _matched(
        self, template: _Template, layer: nn.Module, inputs: list[Any], spec: Any
    ) -> dict[fx.Node, fx.Node] | None:
        """The template's nodes for weights and inputs -> this layer's; None where it is not equal."""
        if spec != template.spec or not all(self._has_same(layer, template.layer, read) for read in template.reads):
            return None
        own = [t for m in self.modules[id(layer)].values() for t in m._parameters.values()]
        if any(isinstance(t, FunctionalTensor) and t.requires_grad for t in (*inputs, *own)):
            return None
        pairs = list(zip(template.inputs, template.before, inputs))
        if not all(_fits(a, was, b) for a, was, b in pairs):
            return None
        nodes: dict[fx.Node, fx.Node] = {}
        mapped = [(was, now(b)) for a, was, b in pairs if isinstance(a, torch.Tensor)]
        for a, b in zip(self.modules[id(template.layer)].values(), self.modules[id(layer)].values()):
            for own in ("_parameters", "_buffers"):
                x, y = getattr(a, own), getattr(b, own)
                mapped += [(now(x[name]), now(y[name])) for name in x if x[name] is not None]
        for x, y in mapped:
            try:
                ours, theirs = self.recorder.node_of(x), self.recorder.node_of(y)
            except Exception:  # of a weight that was replaced
                return None
            if nodes.setdefault(ours, theirs) is not theirs or x.shape != y.shape:
                return None
        return nodes

    def _copied(self, template: _Template, inputs: list[Any], nodes: dict[fx.Node, fx.Node]) -> Any:
        graph = self.recorder.graph
        for node in template.nodes:
            if node.op != "get_attr":  # a constant: the same code makes the same
                nodes[node] = graph.node_copy(node, lambda n: nodes.get(n, n))
        outputs = []
        for output in template.outputs:
            given = next((b for a, b in zip(template.inputs, inputs) if a is output), None)
            if given is not None or not isinstance(output, torch.Tensor):
                outputs.append(output if given is None else given)
                continue
            outputs.append(self.recorder.again(nodes[self.recorder.node_of(now(output))]))
        return pytree.tree_unflatten(outputs, template.out_spec)


def _fits(a: Any, was: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return _same(a, b)
    return isinstance(b, FunctionalTensor) and _type(was) == _type(now(b))


def now(t: Any) -> Any:
    """The value of a tensor of a recording; anything else as it is."""
    return t.from_functional() if isinstance(t, FunctionalTensor) else t


def _storage(t: FunctionalTensor) -> int:
    return t.elem.untyped_storage()._cdata if isinstance(t, FunctionalTensor) else id(t)


def _after(graph: fx.Graph, last: fx.Node | None) -> list[fx.Node]:
    """The nodes after one, in order."""
    nodes = []
    for node in reversed(graph.nodes):
        if node is last:
            break
        nodes.append(node)
    return nodes[::-1]


def _watching(base: type, path: str, names: set[str], reads: set[Read]) -> type:
    def asked(self, name):
        if name in names:
            reads.add((path, name))
        return base.__getattribute__(self, name)

    return type(base.__name__, (base,), {"__getattribute__": asked, "__module__": base.__module__})
