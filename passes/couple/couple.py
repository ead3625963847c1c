"""Stage 2, couple: an aten graph -> couplings and refusals, by axis inference.

One walk over the graph applies the table of rules; what nothing pinned afterwards is a symmetry of the model. Roles
come from the graph too: which axes attention runs over in parallel, which sums join a branch with what it reads.
"""

import logging
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from s2ft_compile.capture.capture import Captured
from s2ft_compile.layout import Layout, Leaf, Product, Sum, end_roles, leaf_roles, leaves
from s2ft_compile.structure import Analysis, Coupling, Member, Refusal

from .axes import PRODUCT, Axis, Pin, atoms, find, pin
from .depth import depths
from .inference import ModelInference, atoms_of, source_line
from .normalize import concretize, normalize
from .roles import FirstRoles, member_role
from .rules import AXIS_RULES
from .rules.reduction import axes_batch_norm

log = logging.getLogger(__name__)


def couple(captured: Captured, *others: Captured) -> Analysis:
    """Every coupling that every trace proves, and a refusal for each axis of a parameter that cannot be.

    All traces share the parameters' axes, so that what one of them pins or divides is so for all. Roles are those of
    the first trace that reads an axis.
    """
    statistics = _statistics([captured, *others])
    captured = replace(captured, shapes={**captured.shapes, **statistics})
    inferences, origins = _infer([captured, *others])
    read = _pin_unread(inferences)
    roles = FirstRoles(inferences)
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
        ordered=frozenset(ids[a] for a in roles.heads & read if a in ids and a.pin and not a.pin.closed),
        tied=captured.tied,
        depths=dict(ChainMap(*map(_depths, (captured, *others)))),
        statistics=frozenset(statistics),
        elsewhere=frozenset().union(*(c.elsewhere for c in (captured, *others))),
        unread=frozenset(captured.shapes) - {name for inference in inferences for name in inference.used},
        copies=dict(frozenset.intersection(*(frozenset(c.copies.items()) for c in (captured, *others)))),
    )


def _depths(captured: Captured) -> dict[str, int]:
    depth_of = depths(captured.graph_module.graph, captured.parameters)
    return {name: captured.start + depth for name, depth in depth_of.items()}


def _statistics(traces: Sequence[Captured]) -> dict[str, tuple[int, ...]]:
    """The buffers that hold state with an entry per channel, with their shapes: what a forward writes the next value
    of, and what a batch norm reads."""
    shapes = {}
    written = {name for captured in traces for name in captured.written.values()}
    for captured in traces:
        for place in captured.graph_module.graph.find_nodes(op="placeholder"):
            of_norm = any(AXIS_RULES.get(n.target) is axes_batch_norm for n in place.users)
            of_state = of_norm or captured.buffers.get(place.name) in written
            if place.name in captured.buffers and of_state and place.meta["val"].dim():
                shapes[captured.buffers[place.name]] = tuple(place.meta["val"].shape)
    return shapes


def _infer(traces: Sequence[Captured]) -> tuple[list[ModelInference], dict[int, tuple[Pin, str]]]:
    """Applies the rules to every trace, over the same parameters; also id(pin) -> the pin and which trace made it."""
    inferences: list[ModelInference] = []
    base: ModelInference | None = None  # of which a resized trace is another size
    origins: dict[int, tuple[Pin, str]] = {}
    for captured in traces:
        for module in captured.graph_module.modules():
            if isinstance(module, fx.GraphModule):
                concretize(module.graph)
                normalize(module.graph, captured.constants)
        inference = ModelInference(captured, inferences[0].parameters if inferences else None)
        before = {a: _division(a) for v in inference.parameters.values() for a in v.dims} if captured.resized else {}
        inference.run(captured.graph_module, None)
        if captured.resized:
            _pin_moved(before, base, inference)
        else:
            base = inference
        for atom in atoms_of(axis for value in inference.parameters.values() for axis in value.dims):
            if atom.pin is not None:
                origins.setdefault(id(atom.pin), (atom.pin, captured.trace))
        inferences.append(inference)
    return inferences, origins


def _pin_moved(before: Mapping[Axis, Any], base: ModelInference, other: ModelInference) -> None:
    """What is divided, or read in part, otherwise at other sizes of the inputs has an order: any size may come."""
    read, base_read = atoms_of(other.cx.consumed), atoms_of(base.cx.consumed)
    for axis, division in before.items():
        inside = atoms_of([axis])
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


def _pin_unread(inferences: Sequence[ModelInference]) -> set[Axis]:
    """An axis that stays free is summed over in the end; one that is not was cut off by the example's sizes. Returns
    those that are."""
    read = atoms_of(axis for inference in inferences for axis in inference.cx.consumed)
    for value in inferences[0].parameters.values():
        for atom in atoms_of(value.dims) - read:
            if atom.pin is None:
                pin(atom, Pin("nothing that the example inputs reach reads it"))
    return read


# --- freezing --------------------------------------------------------------------------------------------------


def _freeze(axis: Axis, roles: FirstRoles, ids: dict[Axis, int]) -> Layout:
    """The layout of a parameter's dimension. A role that a handle on the way down carries holds for all below it, and
    where there is none that of its other factors."""

    def walk(
        handle: Axis, marks: tuple[str | None, str | None], uses: set[str], own: bool, last: Axis | None
    ) -> Layout:
        if own:
            marks, uses = (marks[0] or handle.role, marks[1]), uses | handle.uses
            last = handle if "out" in handle.uses else last  # what contracts it
        own = own and handle.alias is None
        root = find(handle)
        if root.parts:
            beside = next((p.role for p in root.parts if p.role), None) if own and root.kind == PRODUCT else None
            parts = [walk(p, (marks[0], marks[1] or beside), uses, own, last) for p in root.parts]
            if root.kind == PRODUCT and all(map(_is_part_of_a_unit, leaves(parts[-1]))):
                parts[-1] = _with_role(parts[-1], end_roles(parts[-2])[0])
            parts = tuple(parts)
            return Product(parts) if root.kind == PRODUCT else Sum(parts)
        group = roles.of(root)
        whole = group == "moe" and root in roles.experts  # an expert, not a channel of it
        output = group != "attention" or last is None or roles.is_output(root, last)
        role = "moe.expert" if whole else member_role(group, marks[0] or marks[1], uses, output)
        return Leaf(ids.setdefault(root, len(ids)), root.size, role)

    return walk(axis.twin or axis, (None, None), set(), True, None)


def _is_part_of_a_unit(leaf: Leaf) -> bool:
    """Whether what lies inside a larger unit is for nothing by itself: one number of it (every other element), or what
    no product reads (the pieces of a maxout, the places of a channel that were made one row)."""
    return leaf.size == 1 or str(leaf.role).startswith("other.")


def _with_role(layout: Layout, role: str | None) -> Layout:
    if isinstance(layout, Leaf):
        return replace(layout, role=role)
    parts = tuple(_with_role(part, role) for part in (layout.factors if isinstance(layout, Product) else layout.terms))
    return Product(parts) if isinstance(layout, Product) else Sum(parts)


def _refusal(atom: Axis, members: tuple[Member, ...], origins: Mapping[int, tuple[Pin, str]]) -> Refusal:
    node, (_, trace) = atom.pin.node, origins.get(id(atom.pin), (None, ""))
    operator_name = "" if node is None else str(node.target)
    reason = f"{atom.pin.reason} ({trace})" if trace else atom.pin.reason
    return Refusal(members, atom.size, reason, operator_name, source_line(node))
