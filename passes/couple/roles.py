"""What axes are for: which ones attention runs over in parallel, which sums join a branch with what it reads."""

from collections.abc import Sequence

import torch
from torch import fx

from .axes import PRODUCT, Axis, find
from .inference import ModelInference, atoms_of
from .rules.context import Value

aten = torch.ops.aten
MIXES = {aten.matmul.default, aten.bmm.default, aten.einsum.default}


class Roles:
    """What each atom is for: heads and attention, experts, the residual stream, channels of sequence mixers, of
    convolutions and of FFNs."""

    def __init__(self, inference: ModelInference):
        cx, parameters = inference.cx, list(inference.parameters.values())
        produced = atoms_of(axis for p in cx.projections.values() for axis in p.produced)
        self.heads = atoms_of(cx.heads)
        for kept, contracted in cx.pairs:  # queries of several heads may share a key that has none
            summed = atoms_of(contracted)
            if summed & produced and not summed & atoms_of(cx.experts):  # and no sum over experts
                self.heads |= atoms_of(kept) & produced
        self.attention = atoms_of(cx.attention) | self.heads
        for value in parameters:
            self.attention |= {atom for axis in value.dims for atom in _beside(axis, self.heads)}
        self.experts = atoms_of(cx.experts) - self.heads  # weights of their own for each head are no experts
        self.contractions = cx.contractions
        self.projections = [(atoms_of(p.produced), atoms_of(p.contracted)) for p in cx.projections.values()]
        self.produced_at: dict[Axis, list] = {}
        self.contracted_at: dict[Axis, list] = {}
        for projection in self.projections:
            for atom in projection[0]:
                self.produced_at.setdefault(atom, []).append(projection)
            for atom in projection[1]:
                self.contracted_at.setdefault(atom, []).append(projection)
        self.residual = _residual_atoms(inference)
        self.residual |= {a for a in _residual_atoms(inference, True) - self.residual if self._is_stream(a)}
        ended = {atom for atoms, read in self.projections if read & self.attention for atom in atoms}
        self.unsummed = ended - self.attention - self.residual  # what attention made, where no sum takes it
        self.moe = set(self.experts)
        for value in parameters:
            inside = atoms_of(value.dims)
            if inside & self.experts:
                self.moe |= inside
        self.convolved = atoms_of(cx.convolved)
        self.ssm = {a for axis in cx.filtered if self._mixes(atoms_of([axis])) for a in atoms_of([axis])}
        self.ssm |= {a for a in atoms_of(cx.spectral) - self.residual if self._ends(a)}
        # what is made of the channels to steer them: steps, states
        steered = {a for atom in self.ssm for produced, _ in self.contracted_at.get(atom, ()) for a in produced}
        self.steering = {a for a in steered - self.ssm if all(read & self.ssm for _, read in self.produced_at[a])}

    def of(self, atom: Axis) -> str:
        if atom in self.residual:
            return "residual"
        if atom in self.ssm:
            return "ssm"
        if atom in self.steering:
            return "other"
        if atom in self.attention and atom not in self.experts:
            return "attention"
        if atom in self.moe:
            return "moe"
        if atom in self.convolved:
            return "conv"
        return "ffn" if self._is_ffn(atom) else "other"

    def is_output(self, handle: Axis) -> bool:
        """Whether what a weight contracts along this axis of it ends attention."""
        if (produced := self.contractions.get(id(handle))) is None:
            return True
        made = atoms_of(produced)  # nothing of a vector that makes a score of each query and key
        return bool(made) and not made & self.attention - self.residual

    def _is_stream(self, atom: Axis) -> bool:
        """Whether an axis to which one sum adds is a stream of its own, and not inside an FFN around another."""
        makers, takers = self.produced_at.get(atom, []), self.contracted_at.get(atom, [])
        around = {a for _, read in makers for a in read & self.residual}
        return atom not in self.heads and not any(produced & around for produced, _ in takers)

    def _mixes(self, atoms: set[Axis]) -> bool:
        """Whether channels that are filtered along a sequence are read for more than the way back into the residual
        stream: a state-space model's steps and states, a recurrence's gates."""
        takers = [produced for atom in atoms for produced, _ in self.contracted_at.get(atom, [])]
        returns = [bool(produced & self.residual) for produced in takers]
        return any(returns) and not all(returns) and not atoms & self.residual

    def _ends(self, atom: Axis) -> bool:
        return any(produced & self.residual for produced, _ in self.contracted_at.get(atom, []))

    def _is_ffn(self, atom: Axis) -> bool:
        """Produced from the residual stream and contracted back into it, with no attention between; in a model
        without a residual stream, produced and then contracted into anything but attention. Aside from that it may
        be contracted into what returns to it or to the stream (a low-rank adapter, a gate). Right behind attention,
        with no sum between, it is produced from what that made, and may take one projection more into the stream."""
        makers, takers = self.produced_at.get(atom, []), self.contracted_at.get(atom, [])
        if not makers or not takers:
            return False
        if not self.residual:
            return not any(produced & self.attention for produced, _ in takers)
        if any(read & self.unsummed for _, read in makers) and not any(read & self.residual for _, read in makers):
            return self._returns(atom, self.residual) or self._goes_on(takers)
        ends = self.residual | {atom}
        back = [bool(produced & self.residual) for produced, _ in takers]
        aside = [produced for (produced, _), returns in zip(takers, back) if not returns]
        returning = all(produced and all(self._returns(a, ends) for a in produced) for produced in aside)
        return any(read & self.residual for _, read in makers) and any(back) and returning

    def _goes_on(self, takers: list) -> bool:
        """Whether it is contracted only into what is contracted into the residual stream."""
        return all(produced and all(self._returns(a, self.residual) for a in produced) for produced, _ in takers)

    def _returns(self, atom: Axis, ends: set[Axis]) -> bool:
        takers = self.contracted_at.get(atom, [])
        return atom not in self.attention and bool(takers) and all(produced & ends for produced, _ in takers)


def _beside(axis: Axis, heads: set[Axis]) -> set[Axis]:
    """What is inside a head: the other factors of a product with heads."""
    root = find(axis)
    if root.kind == PRODUCT and any(atoms_of([part]) & heads for part in root.parts):
        return atoms_of([root])
    return {atom for part in root.parts for atom in _beside(part, heads)}


class FirstRoles:
    """For each atom, what it is for in the first trace that reads it."""

    def __init__(self, inferences: Sequence[ModelInference]):
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

    def is_output(self, atom: Axis, handle: Axis) -> bool:
        return self._in(self._first.get(atom, 0)).is_output(handle)


def _residual_atoms(inference: ModelInference, one: bool = False) -> set[Axis]:
    """The axes along which a sum joins a tensor with what a projection made of that very tensor. one: also where that
    tensor came right out of a projection, with no sum before."""
    env, projections = inference.env, inference.cx.projections
    order = {node: i for i, node in enumerate(env)}
    made_anywhere = atoms_of(axis for p in projections.values() for axis in p.produced)
    atoms: set[Axis] = set()
    for node in env:
        if node.op != "call_function" or node.target is not aten.add.Tensor:
            continue
        operands = [a for a in node.args[:2] if isinstance(a, fx.Node) and isinstance(env.get(a), Value)]
        wanted = atoms_of(env[node].dims) & made_anywhere - atoms
        if len(operands) == 2 and not any(env[a].weight for a in operands) and wanted:
            for skip, branch in (operands, operands[::-1]):
                sources = _carried(skip, env, wanted, projections, one)
                atoms |= wanted & atoms_of(_branch_projections(sources, branch, order, projections))
    return atoms


def _carried(skip: fx.Node, env, wanted: set[Axis], projections, one: bool = False) -> set[fx.Node]:
    """The nodes that a skip connection carries: itself and, up to the sum before, what it was mixed or scaled from. A
    projection that makes another axis (a mixer of several streams) carries it, too."""
    carried, stack = set(), [skip]
    while stack:
        node = stack.pop()
        if node in carried:
            continue
        if node in projections:
            if not wanted & atoms_of(env[node].dims) - atoms_of(projections[node].produced):
                carried |= {node} if one else set()
                continue
            stack += [n for n in node.all_input_nodes if isinstance(env.get(n), Value) and not env[n].weight]
        carried.add(node)
        if node in projections:
            continue
        if node.op == "call_function" and node.target is not aten.add.Tensor:
            inputs = [n for n in node.all_input_nodes if isinstance(env.get(n), Value)]
            held = [n for n in inputs if wanted & atoms_of(env[n].dims)]
            if node.target in MIXES:  # what both operands have, neither mixes the other along (attention's heads)
                held = [n for n in held if wanted & _alone(n, inputs, env)]
            elif len(held) > 1:
                continue
            if not any(env[n].weight for n in held):
                stack += held
    return carried


def _alone(node: fx.Node, operands: Sequence[fx.Node], env) -> set[Axis]:
    """The axes that it has, and no other operand."""
    return atoms_of(env[node].dims) - {a for n in operands if n is not node for a in atoms_of(env[n].dims)}


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


def member_role(group: str, mark: str | None, uses: set[str], output: bool = True) -> str:
    if uses == {"out"} and output:
        return f"{group}.out"
    return f"{group}.{mark}" if group == "attention" and mark else f"{group}.in"
