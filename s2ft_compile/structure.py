"""What analysis finds: couplings and refusals, as frozen values."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from .layout import Layout


class Member(NamedTuple):
    """One dimension of one parameter that a coupling permutes.

    role: the coupling's role, a dot and how the dimension is used: `out` (contracted by its weight), `query`, `key`,
    `value` (produced for attention), `in` (produced) or `expert` (one weight for each).
    """

    parameter_name: str
    dim: int
    role: str


@dataclass(frozen=True)
class Coupling:
    """An axis of the model whose units may be permuted in any order without changing its outputs.

    role: attention, ffn, moe, ssm, conv, residual or other. units: how many can be permuted. members: every parameter
    dimension that a permutation has to reorder; `layouts` says where the units lie along each.
    """

    role: str
    units: int
    members: tuple[Member, ...]
    axis: int = field(repr=False)
    layouts: Mapping[tuple[str, int], Layout] = field(repr=False, compare=False, hash=False)

    def __str__(self) -> str:
        listed = ", ".join(f"{m.parameter_name}[{m.dim}] ({m.role})" for m in self.members[:8])
        more = f", and {len(self.members) - 8} more" if len(self.members) > 8 else ""
        return f"{self.role} × {self.units}: {listed}{more}"


@dataclass(frozen=True)
class Refusal:
    """An axis of parameters that must not be permuted, and why.

    operator: the operator that pinned it ("" for a source such as an input). source: where in the model that is.
    """

    members: tuple[Member, ...]
    units: int
    reason: str
    operator: str = ""
    source: str = ""

    def __str__(self) -> str:
        listed = ", ".join(f"{m.parameter_name}[{m.dim}]" for m in self.members[:4])
        more = f", and {len(self.members) - 4} more" if len(self.members) > 4 else ""
        where = f" at {self.source}" if self.source else ""
        return f"refused × {self.units}: {listed}{more}: {self.reason}{where}"


@dataclass(frozen=True)
class Analysis:
    """All couplings and refusals of a model, and the layout of each of its parameters' dimensions.

    heads: the axes that attention products run over in parallel (heads, kv groups, queries per group).
    free: the axes that may be permuted. ordered: the heads that may not, and that train where they lie (each has a
    slope or a decay of its own). tied: other names of a parameter -> the name it is listed under.
    depths: parameter -> how far down the model it is first used; layers are told apart and ordered by it.
    unread: the parameters that no trace reads. statistics: buffers that are permuted with parameters. elsewhere: the
    quantized weights that something else than their own layers reads. copies: weight -> that of a layer that every
    trace calls as it calls its own. untrained: (parameter, dim, role) whose gradients have no slice rule; `prepare`
    adds them for what it is asked to train.
    """

    couplings: tuple[Coupling, ...]
    refusals: tuple[Refusal, ...]
    layouts: Mapping[tuple[str, int], Layout] = field(repr=False)
    heads: frozenset[int] = field(repr=False)
    free: frozenset[int] = field(repr=False)
    tied: Mapping[str, str] = field(repr=False)
    depths: Mapping[str, int] = field(repr=False, default_factory=dict)
    unread: frozenset[str] = field(repr=False, default=frozenset())
    statistics: frozenset[str] = field(repr=False, default=frozenset())
    elsewhere: frozenset[str] = field(repr=False, default=frozenset())
    ordered: frozenset[int] = field(repr=False, default=frozenset())
    copies: Mapping[str, str] = field(repr=False, default_factory=dict)
    untrained: frozenset[tuple[str, int, str]] = field(repr=False, default=frozenset())

    def roles(self) -> Counter[str]:
        """How many members each role has."""
        return Counter(m.role for c in self.couplings for m in c.members)

    def __str__(self) -> str:
        counts = Counter(c.role for c in self.couplings)
        head = f"{len(self.couplings)} couplings ({', '.join(f'{n} {role}' for role, n in counts.items())})"
        lines = [head, *(f"  {c}" for c in self.couplings)]
        if self.refusals:
            lines += [f"{len(self.refusals)} refusals", *(f"  {r}" for r in self.refusals)]
        return "\n".join(lines)
