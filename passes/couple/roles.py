"""What axes are for: which ones attention runs over in parallel, which sums join a branch with what it reads."""

from collections.abc import Sequence

import torch
from torch import fx

from .axes import Axis
from .inference import Inference, atoms_of
from .rules.context import Value

aten = torch.ops.aten
MIXES = {aten.matmul.default, aten.bmm.default, aten.einsum.default}


class Roles:
    """What each atom is for: which axes are heads, attention, experts or the residual stream."""

    def __init__(self, inference: Inference):
        cx = inference.cx
        self.heads = atoms_of(cx.heads)
        self.attention = atoms_of(cx.attention) | self.heads
        self.experts = atoms_of(cx.experts) - self.heads  # weights of their own for each head are no experts
        self.projections = [(atoms_of(p.produced), atoms_of(p.contracted)) for p in cx.projections.values()]
        self.residual = _residual_atoms(inference)
        self.moe = set(self.experts)
        for value in inference.parameters.values():
            inside = atoms_of(value.dims)
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


class FirstRoles:
    """For each atom, what it is for in the first trace that reads it."""

    def __init__(self, inferences: Sequence[Inference]):
        self._inferences = inferences
        self._made: dict[int, Roles] = {}
        self._first: dict[Axis, int] = {}
        for i, inference in enumerate(inferences):
            for name in inference.used:
                for atom in atoms_of(inference.parameters[name].dims):
                    self._first.setdefault(atom, i)
        self.heads = {atom for i in {0, *self._first.values()} for atom in self._in(i).heads}
        self.experts = {atom for i in {0, *self._first.values()} for atom in self._in(i).experts}

    def _in(self, trace: int) -> Roles:
        if trace not in self._made:
            self._made[trace] = Roles(self._inferences[trace])
        return self._made[trace]

    def of(self, atom: Axis) -> str:
        return self._in(self._first.get(atom, 0)).of(atom)


def _residual_atoms(inference: Inference) -> set[Axis]:
    """The axes along which a sum joins a tensor with what a projection made of that very tensor."""
    env, projections = inference.env, inference.cx.projections
    order = {node: i for i, node in enumerate(env)}
    made_anywhere = atoms_of(axis for p in projections.values() for axis in p.produced)
    found: set[Axis] = set()
    for node in env:
        if node.op != "call_function" or node.target is not aten.add.Tensor:
            continue
        operands = [a for a in node.args[:2] if isinstance(a, fx.Node) and isinstance(env.get(a), Value)]
        wanted = atoms_of(env[node].dims) & made_anywhere - found
        if len(operands) == 2 and not any(env[a].weight for a in operands) and wanted:
            for skip, branch in (operands, operands[::-1]):
                sources = _carried(skip, env, wanted, projections)
                found |= wanted & atoms_of(_branch_projections(sources, branch, order, projections))
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
            held = [n for n in inputs if wanted & atoms_of(env[n].dims)]
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


def member_role(group: str, mark: str | None, uses: set[str]) -> str:
    if uses == {"out"}:
        return f"{group}.out"
    return f"{group}.{mark}" if group == "attention" and mark else f"{group}.in"
