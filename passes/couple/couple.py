"""Stage 2, couple: an aten graph -> couplings and refusals, by axis inference.

One walk over the graph applies the table of rules; what nothing pinned afterwards is a symmetry of the model. Roles
come from the graph too: which axes attention runs over in parallel, which sums join a branch with what it reads.
"""

import logging
import operator
import re
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from s2ft_compile.capture import Captured
from s2ft_compile.layout import Layout, Leaf, Product, Sum, end_roles, leaf_roles, leaves
from s2ft_compile.passes.couple.rules.context import Context, Value, axes_unknown, shapes
from s2ft_compile.structure import Analysis, Coupling, Member, Refusal

from .axes import PRODUCT, Axis, Pin, atoms, find, pin
from .depth import depths
from .normalize import concretize, normalize
from .rules import rule_for

log = logging.getLogger(__name__)
aten = torch.ops.aten
INLINED = ("wrap_with_set_grad_enabled", "wrap_with_autocast", "invoke_subgraph")
MIXES = {aten.matmul.default, aten.bmm.default, aten.einsum.default}


def couple(captured: Captured, *others: Captured) -> Analysis:
    """Every coupling that every trace proves, and a refusal for each axis of a parameter that cannot be.

    All traces share the parameters' axes, so that what one of them pins or divides is so for all. Roles are those of
    the first trace that reads an axis.
    """
    inferences, origins = _infer([captured, *others])
    _pin_unread(inferences)
    roles = _FirstRoles(inferences)
    ids: dict[Axis, int] = {}
    layouts = {
        (name, dim): _freeze(axis, roles, ids)
        for name, value in inferences[0].parameters.items()
        for dim, axis in enumerate(value.dims)
    }
    members: dict[int, list[Member]] = {}
    for (name, dim), layout in layouts.items():
        for leaf, role in leaf_roles(layout):
            if leaf.size > 1:
                members.setdefault(leaf.axis, []).append(Member(name, dim, role))
    couplings, refusals = [], []
    for atom, axis in ids.items():
        listed = tuple(dict.fromkeys(members.get(axis, ())))
        if atom.pin is not None and listed:
            refusals.append(_refusal(atom, listed, origins))
        elif len(listed) > 1:
            places = {(m.parameter_name, m.dim): layouts[m.parameter_name, m.dim] for m in listed}
            couplings.append(Coupling(roles.of(atom), atom.size, listed, axis, places))
    log.info("found %d couplings, refused %d axes", len(couplings), len(refusals))
    return Analysis(
        couplings=tuple(couplings),
        refusals=tuple(refusals),
        layouts=layouts,
        heads=frozenset(ids[a] for a in roles.heads if a in ids),
        free=frozenset(c.axis for c in couplings),
        tied=captured.tied,
        depths=dict(ChainMap(*(depths(c.graph_module.graph, c.parameters) for c in (captured, *others)))),
        unread=frozenset(captured.shapes) - {name for inference in inferences for name in inference.used},
    )


def _infer(traces: Sequence[Captured]) -> tuple[list["_Inference"], dict[int, tuple[Pin, str]]]:
    """Applies the rules to every trace, over the same parameters; also id(pin) -> the pin and which trace made it."""
    inferences: list[_Inference] = []
    base: _Inference | None = None  # of which a resized trace is another size
    origins: dict[int, tuple[Pin, str]] = {}
    for captured in traces:
        for module in captured.graph_module.modules():
            if isinstance(module, fx.GraphModule):
                concretize(module.graph)
                normalize(module.graph, captured.constants)
        inference = _Inference(captured, inferences[0].parameters if inferences else None)
        before = {a: _division(a) for v in inference.parameters.values() for a in v.dims} if captured.resized else {}
        inference.run(captured.graph_module, None)
        if captured.resized:
            _pin_moved(before, base, inference)
        else:
            base = inference
        for atom in _atoms_of(axis for value in inference.parameters.values() for axis in value.dims):
            if atom.pin is not None:
                origins.setdefault(id(atom.pin), (atom.pin, captured.trace))
        inferences.append(inference)
    return inferences, origins


def _pin_moved(before: Mapping[Axis, Any], base: "_Inference", other: "_Inference") -> None:
    """What is divided, or read in part, otherwise at other sizes of the inputs has an order: any size may come."""
    read, base_read = _atoms_of(other.cx.consumed), _atoms_of(base.cx.consumed)
    for axis, division in before.items():
        inside = _atoms_of([axis])
        parts, base_parts = inside & read, inside & base_read
        if not _is_divided(axis, division) or (parts and base_parts and parts != base_parts):
            pin(axis, Pin("where it is cut depends on the inputs' sizes"))


def _division(axis: Axis) -> Any:
    """How an axis is divided, as a tree."""
    root = find(axis)
    return root.kind, [_division(part) for part in root.parts]


def _is_divided(axis: Axis, division: Any) -> bool:
    """Whether an axis is still divided so, where anything in it may be permuted."""
    root, (kind, parts) = find(axis), division
    if all(atom.pin for atom in atoms(root)):
        return True
    return (root.kind, len(root.parts)) == (kind, len(parts)) and all(map(_is_divided, root.parts, parts))


class _Inference:
    """Applies the rules to every node once. `env` maps nodes to values (or lists of them)."""

    def __init__(self, captured: Captured, parameters: dict[str, Value] | None = None):
        self.cx = Context()
        self.env: dict[fx.Node, Any] = {}
        self.parameters = parameters or {
            name: Value([Axis(size) for size in shape], weight=True) for name, shape in captured.shapes.items()
        }
        for name, other in captured.overlapping.items():
            what = f"it shares memory with {other}, which is not the same parameter"
            what = "elements of it share memory (it is expanded)" if other == name else what
            _pin_all(self.parameters[name], Pin(what))
        self.names, self.uniform = captured.parameters, captured.uniform
        placeholders = (n for n in captured.graph_module.graph.nodes if n.op == "placeholder" and n.users)
        self.used = {self.names[n.name] for n in placeholders if n.name in self.names}

    def run(self, module: fx.GraphModule, inputs: list | None) -> Any:
        """Interprets a graph; `inputs` are a subgraph's arguments, None for the model's own graph."""
        placeholders = iter(inputs or ())
        for node in module.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = next(placeholders) if inputs is not None else self._source(node)
            elif node.op == "get_attr":
                held = getattr(module, node.target, None)
                self.env[node] = held if isinstance(held, fx.GraphModule) else self._constant(node)
            elif node.op == "call_function":
                self.env[node] = self._call(node)
            elif node.op == "output":
                result = fx.node.map_arg(node.args[0], lambda n: self.env[n])
                if inputs is None:
                    self._returned(result)
                return result

    def _returned(self, result: Any) -> None:
        _pin_all(result, Pin("it is an output of the model"))

    def _source(self, node: fx.Node) -> Any:
        if node.name in self.names:
            return self.parameters[self.names[node.name]]
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor):
            return val
        fixed = node.name.startswith(("b_", "c_"))
        why = Pin(f"it meets {node.name}, which varies along it" if fixed else "it is an input of the model")
        alike = self.uniform.get(node.name, ())  # zeros are the same in any order
        return Value([Axis(n, pin=None if d in alike else why) for d, n in enumerate(val.shape)], weight=fixed)

    def _constant(self, node: fx.Node) -> Any:
        val = node.meta.get("val")
        why = Pin(f"it meets {node.name}, which varies along it")
        return Value([Axis(s, pin=why) for s in val.shape], weight=True) if isinstance(val, torch.Tensor) else val

    def _call(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.env[n])
        if node.target is operator.getitem:
            return args[0][args[1]] if isinstance(args[0], (list, tuple)) else None
        graphs = [i for i, a in enumerate(args) if isinstance(a, fx.GraphModule)]
        if len(graphs) == 1 and isinstance(node.target, torch._ops.HigherOrderOperator) and _inlines(node):
            return self.run(args[graphs[0]], [a for a in args[graphs[0] + 1 :] if not isinstance(a, str)])
        if not _has_tensor(node.meta.get("val")):
            return None
        made = self._apply(node, args, kwargs)
        operands = list(_values((args, kwargs)))
        weight = all(v.weight for v in operands)
        scores = any(v.scores for v in operands)
        if isinstance(made, Value):
            return made
        if isinstance(node.meta["val"], (list, tuple)):
            return [Value(d, weight, scores) for d in made]
        return Value(made, weight, scores)

    def _apply(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        """The rule's result; where sizes depend on data, sums of made-up sizes can contradict a real one: refused."""
        try:
            made = rule_for(node.target)(self.cx, node, *args, **kwargs)
            several = made if isinstance(node.meta["val"], (list, tuple)) else [made]
            found = [[d.size for d in (m.dims if isinstance(m, Value) else m)] for m in several]
            if found[: len(shapes(node))] != shapes(node):
                raise ValueError(f"rule for {node.target} made {found} where the graph has {shapes(node)}")
            return made
        except (IndexError, ValueError, AttributeError):
            if not any(n.meta.get("made up") for n in (node, *node.all_input_nodes)):
                raise
            return axes_unknown(self.cx, node, *args, **kwargs)


def _inlines(node: fx.Node) -> bool:
    """Whether a higher-order operator runs its graph once, on the arguments after it (no_grad, autocast, regions)."""
    return node.target.name().startswith(INLINED)


def _values(tree: Any) -> Iterator[Value]:
    if isinstance(tree, Value):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _values(item)
    elif isinstance(tree, dict):
        yield from _values(list(tree.values()))


def _has_tensor(val: Any) -> bool:
    return any(isinstance(v, torch.Tensor) for v in (val if isinstance(val, (list, tuple)) else [val]))


def _pin_unread(inferences: Sequence[_Inference]) -> None:
    """An axis that stays free is summed over in the end; one that is not was cut off by the example's sizes."""
    read = _atoms_of(axis for inference in inferences for axis in inference.cx.consumed)
    for value in inferences[0].parameters.values():
        for atom in _atoms_of(value.dims) - read:
            pin(atom, Pin("nothing that the example inputs reach reads it"))


def _pin_all(tree: Any, why: Pin) -> None:
    for value in _values(tree):
        for axis in value.dims:
            pin(axis, why)


# --- roles -----------------------------------------------------------------------------------------------------


class _Roles:
    """What each atom is for: which axes are heads, attention, experts or the residual stream."""

    def __init__(self, inference: _Inference):
        cx = inference.cx
        self.heads = _atoms_of(cx.heads)
        self.attention = _atoms_of(cx.attention) | self.heads
        self.experts = _atoms_of(cx.experts) - self.heads  # weights of their own for each head are no experts
        self.projections = [(_atoms_of(p.produced), _atoms_of(p.contracted)) for p in cx.projections.values()]
        self.residual = _residual_atoms(inference)
        self.moe = set(self.experts)
        for value in inference.parameters.values():
            inside = _atoms_of(value.dims)
            if inside & self.experts:
                self.moe |= inside
        self.produced_at: dict[Axis, list] = {}
        self.contracted_at: dict[Axis, list] = {}
        for projection in self.projections:
            for atom in projection[0]:
                self.produced_at.setdefault(atom, []).append(projection)
            for atom in projection[1]:
                self.contracted_at.setdefault(atom, []).append(projection)

    def of(self, atom: Axis) -> str:
        if atom in self.residual:
            return "residual"
        if atom in self.attention and atom not in self.experts:
            return "attention"
        if atom in self.moe:
            return "moe"
        return "ffn" if self._is_ffn(atom) else "other"

    def _is_ffn(self, atom: Axis) -> bool:
        """Produced from the residual stream and contracted back into it, with no attention between; in a model
        without a residual stream, produced and then contracted into anything but attention."""
        makers, takers = self.produced_at.get(atom, []), self.contracted_at.get(atom, [])
        if not makers or not takers:
            return False
        if not self.residual:
            return not any(made & self.attention for made, _ in takers)
        return any(read & self.residual for _, read in makers) and all(made & self.residual for made, _ in takers)


class _FirstRoles:
    """For each atom, what it is for in the first trace that reads it."""

    def __init__(self, inferences: Sequence[_Inference]):
        self._inferences = inferences
        self._made: dict[int, _Roles] = {}
        self._first: dict[Axis, int] = {}
        for i, inference in enumerate(inferences):
            for name in inference.used:
                for atom in _atoms_of(inference.parameters[name].dims):
                    self._first.setdefault(atom, i)
        self.heads = {atom for i in {0, *self._first.values()} for atom in self._in(i).heads}
        self.experts = {atom for i in {0, *self._first.values()} for atom in self._in(i).experts}

    def _in(self, trace: int) -> _Roles:
        if trace not in self._made:
            self._made[trace] = _Roles(self._inferences[trace])
        return self._made[trace]

    def of(self, atom: Axis) -> str:
        return self._in(self._first.get(atom, 0)).of(atom)


def _atoms_of(axes) -> set[Axis]:
    return {atom for axis in axes for atom in atoms(axis) if atom.size > 1}


def _residual_atoms(inference: _Inference) -> set[Axis]:
    """The axes along which a sum joins a tensor with what a projection made of that very tensor."""
    env, projections = inference.env, inference.cx.projections
    order = {node: i for i, node in enumerate(env)}
    made_anywhere = _atoms_of(axis for p in projections.values() for axis in p.produced)
    found: set[Axis] = set()
    for node in env:
        if node.op != "call_function" or node.target is not aten.add.Tensor:
            continue
        operands = [a for a in node.args[:2] if isinstance(a, fx.Node) and isinstance(env.get(a), Value)]
        wanted = _atoms_of(env[node].dims) & made_anywhere - found
        if len(operands) == 2 and not any(env[a].weight for a in operands) and wanted:
            for skip, branch in (operands, operands[::-1]):
                sources = _carried(skip, env, wanted, projections)
                found |= wanted & _atoms_of(_branch_projections(sources, branch, order, projections))
    return found


def _carried(skip: fx.Node, env, wanted: set[Axis], projections) -> set[fx.Node]:
    """The nodes that a skip connection carries: itself and, up to the sum before, what it was mixed or scaled from."""
    found, stack = set(), [skip]
    while stack:
        node = stack.pop()
        if node in found or node in projections:
            continue
        found.add(node)
        if node.op == "call_function" and node.target is not aten.add.Tensor:
            inputs = [n for n in node.all_input_nodes if isinstance(env.get(n), Value)]
            held = [n for n in inputs if wanted & _atoms_of(env[n].dims)]
            if not any(env[n].weight for n in held) and (len(held) == 1 or node.target in MIXES):
                stack += held
    return found


def _branch_projections(sources: set[fx.Node], branch, order, projections) -> list[Axis]:
    """What the last projections on the way from `sources` to `branch` produce; [] if `branch` reads none of them."""
    produced, seen, reads = [], set(), False
    first, stack = min((order[n] for n in sources), default=0), [(branch, True)]
    while stack:
        node, last = stack.pop()
        if node in sources:
            reads = True
            continue
        if (node, last) in seen or order[node] < first:
            continue
        seen.add((node, last))
        if last and node in projections:
            produced += projections[node].produced
            last = False
        stack += [(n, last) for n in node.all_input_nodes if n in order]
    return produced if reads else []


# --- freezing --------------------------------------------------------------------------------------------------


def _freeze(axis: Axis, roles: _Roles, ids: dict[Axis, int]) -> Layout:
    """The layout of a parameter's dimension. A role that a handle on the way down carries holds for all below it."""

    def walk(handle: Axis, mark: str | None, uses: set[str], own: bool) -> Layout:
        if own:
            mark, uses = mark or handle.role, uses | handle.uses
        own = own and handle.alias is None
        root = find(handle)
        if root.parts:
            parts = [walk(p, mark, uses, own) for p in root.parts]
            if root.kind == PRODUCT and all(leaf.size == 1 for leaf in leaves(parts[-1])):
                parts[-1] = _with_role(parts[-1], end_roles(parts[-2])[0])  # every other element of a larger unit
            parts = tuple(parts)
            return Product(parts) if root.kind == PRODUCT else Sum(parts)
        group = roles.of(root)
        whole = group == "moe" and root in roles.experts  # an expert, not a channel of it
        role = "moe.expert" if whole else _member_role(group, mark, uses)
        return Leaf(ids.setdefault(root, len(ids)), root.size, role)

    return walk(axis.twin or axis, None, set(), True)


def _with_role(layout: Layout, role: str | None) -> Layout:
    if isinstance(layout, Leaf):
        return replace(layout, role=role)
    made = tuple(_with_role(part, role) for part in (layout.factors if isinstance(layout, Product) else layout.terms))
    return Product(made) if isinstance(layout, Product) else Sum(made)


def _member_role(group: str, mark: str | None, uses: set[str]) -> str:
    if uses == {"out"}:
        return f"{group}.out"
    return f"{group}.{mark}" if group == "attention" and mark else f"{group}.in"


def _refusal(atom: Axis, members: tuple[Member, ...], origins: Mapping[int, tuple[Pin, str]]) -> Refusal:
    node, (_, trace) = atom.pin.node, origins.get(id(atom.pin), (None, ""))
    operator_name = "" if node is None else str(node.target)
    reason = f"{atom.pin.reason} ({trace})" if trace else atom.pin.reason
    return Refusal(members, atom.size, reason, operator_name, _source_line(node))


def _source_line(node: fx.Node | None) -> str:
    """The innermost line of the model's own code that made the node."""
    if node is None or not node.meta.get("stack_trace"):
        return ""
    frames = re.findall(r'File "([^"]+)", line (\d+)(?:, in \S+)?\n\s*(.*)', node.meta["stack_trace"])
    mine = [f for f in frames if "/torch/" not in f[0]] or frames
    return f"{mine[-1][0]}:{mine[-1][1]} ({mine[-1][2].strip()})" if mine else ""
