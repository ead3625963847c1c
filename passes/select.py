"""Stage 3, select: which units of which parameters train.

A `Band` is the part of a parameter's dimension that has one role, cut into units. Bands over the same axes (gate, up
and down of one layer) share one ranking of their units, so that a channel is chosen whole.
"""

import random
from dataclasses import dataclass
from math import prod
from typing import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..config import ROLES, S2FTConfig, is_glob, matches, units_for
from ..errors import ConfigError
from ..structure import Analysis
from .layout import coordinates, end_roles, leaves, role_mask


@dataclass(frozen=True)
class Band:
    """positions: int64 (units, width), where each unit lies along `dim`. group: bands that share a ranking."""

    parameter_name: str
    dim: int
    role: str
    group: tuple
    positions: Tensor


@dataclass(frozen=True)
class Selection:
    """indices: int64, ascending, along `dim` of the parameter in the base model's order."""

    parameter_name: str
    dim: int
    roles: tuple[str, ...]
    indices: Tensor


Ranking = Callable[[Sequence[Band], Mapping[str, Tensor], S2FTConfig], Sequence[float]]


def select(analysis: Analysis, config: S2FTConfig, parameters: Mapping[str, Tensor]) -> tuple[Selection, ...]:
    """One selection per targeted parameter. Raises `ConfigError` where a target cannot be met."""
    if not analysis.couplings:
        refused = "; ".join(str(r) for r in analysis.refusals[:3]) or "its parameters are not used together"
        raise ConfigError(f"no coupled structure was found in this model, so there is nothing to select: {refused}")
    targeted = {target: _bands_of(target, analysis) for target in config.targets}
    by_group: dict[tuple, list[Band]] = {}
    for bands in targeted.values():
        for band in bands:
            by_group.setdefault(band.group, []).append(band)
    scores = {group: RANKINGS[config.selection](bands, parameters, config) for group, bands in by_group.items()}
    chosen: dict[tuple[str, int], tuple[list[str], list[Tensor]]] = {}
    for target, bands in targeted.items():
        units = _choose(target, config, {b.group: scores[b.group] for b in bands})
        for band in bands:
            if units[band.group]:
                roles, parts = chosen.setdefault((band.parameter_name, band.dim), ([], []))
                roles.append(band.role)
                parts.append(band.positions[units[band.group]].reshape(-1))
    _check_one_dim_each(chosen)
    return tuple(
        Selection(name, dim, tuple(dict.fromkeys(roles)), torch.cat(parts).unique())
        for (name, dim), (roles, parts) in chosen.items()
    )


def bands(analysis: Analysis, names: Sequence[str] | None = None) -> list[Band]:
    """Every part of every parameter that can be selected from, in the order of the model's parameters."""
    found = []
    for (name, dim), layout in analysis.layouts.items():
        if names is not None and name not in names:
            continue
        for role in end_roles(layout):
            mask = role_mask(layout, role)
            axes = [a for a in dict.fromkeys(leaf.axis for leaf in leaves(layout) if leaf.size > 1)
                    if (coordinates(layout, a)[mask] >= 0).any()]
            if role.startswith("attention."):
                axes = [a for a in axes if a in analysis.heads]  # a unit is a whole head
            elif not axes:
                continue
            units = prod(int(coordinates(layout, a).max()) + 1 for a in axes)
            if all(a in analysis.free for a in axes) and int(mask.sum()) % units == 0:  # else not one unit everywhere
                group = tuple(axes) or (name, dim)
                found.append(Band(name, dim, role, group, _unit_positions(layout, mask, axes)))
    return found


def _unit_positions(layout, mask: Tensor, axes: Sequence[int]) -> Tensor:
    unit = torch.zeros(layout.size, dtype=torch.int64)
    units = 1
    for axis in axes:
        coordinate = coordinates(layout, axis)
        size = int(coordinate.max()) + 1
        unit, units = unit * size + coordinate, units * size
    positions = mask.nonzero().squeeze(1)
    order = torch.argsort(unit[positions], stable=True)
    return positions[order].reshape(units, -1)


def _bands_of(target: str, analysis: Analysis) -> list[Band]:
    return _bands_of_glob(target, analysis) if is_glob(target) else _bands_of_role(target, analysis)


def _bands_of_role(role: str, analysis: Analysis) -> list[Band]:
    matrices = {name for name, dim in analysis.layouts if dim > 0}  # a bias follows its weight, it is not a target
    names = [m.parameter_name for c in analysis.couplings for m in c.members if m.role == role]
    names += [name for (name, _), layout in analysis.layouts.items() if role in end_roles(layout)]
    found = [b for b in bands(analysis, set(names) & matrices) if b.role == role]
    if not found:
        valid = sorted({b.role for b in bands(analysis, matrices)} & set(ROLES))
        raise ConfigError(f"no parameter of this model has the role {role!r}; roles found: {', '.join(valid) or 'none'}")
    return found


def _bands_of_glob(glob: str, analysis: Analysis) -> list[Band]:
    canonical = {**{name: name for name, _ in analysis.layouts}, **analysis.tied}
    names = list(dict.fromkeys(first for name, first in canonical.items() if matches(glob, name)))
    if not names:
        some = list(dict.fromkeys(name for name, _ in analysis.layouts))
        raise ConfigError(f"target {glob!r} is neither a role ({', '.join(ROLES)}) nor a glob that matches a parameter; "
                          f"parameters are named like {', '.join(some[:3])}")
    found = []
    for name in names:
        best = _preferred(bands(analysis, {name}))
        dims = sorted({b.dim for b in best})
        if not best:
            reasons = "; ".join(r.reason for r in analysis.refusals if any(m.parameter_name == name for m in r.members))
            raise ConfigError(f"target {glob!r} matches {name}, which has no axis that may be permuted"
                              + (f": {reasons}" if reasons else ""))
        if len(dims) > 1:
            roles = ", ".join(f"{b.role} (dim {b.dim})" for b in best)
            raise ConfigError(f"target {glob!r} matches {name}, which could train along dims {dims}; "
                              f"name one of its roles instead: {roles}")
        found += best
    return found


def _preferred(candidates: Sequence[Band]) -> list[Band]:
    """The bands of attention, FFN and experts before other ones, and those before the residual stream's."""
    def tier(band: Band) -> int:
        return {"other": 1, "residual": 2}.get(band.role.split(".")[0], 0)

    best = min(map(tier, candidates), default=0)
    return [b for b in candidates if tier(b) == best]


def _choose(target: str, config: S2FTConfig, scores: Mapping[tuple, Sequence[float]]) -> dict[tuple, list[int]]:
    """The chosen units of each group, those with the highest scores (lowest where not `largest`)."""
    pools = [list(scores)] if config.budget == "model" else [[group] for group in scores]
    chosen: dict[tuple, list[int]] = {group: [] for group in scores}
    sign = -1 if config.largest or config.selection == "random" else 1
    for pool in pools:
        units = [(group, unit) for group in pool for unit in range(len(scores[group]))]
        wanted = units_for(config.targets[target], len(units), f"target {target!r}")
        units.sort(key=lambda gu: sign * scores[gu[0]][gu[1]])  # stable: ties go to the first
        for group, unit in units[:wanted]:
            chosen[group].append(unit)
    return {group: sorted(units) for group, units in chosen.items()}


def _check_one_dim_each(chosen) -> None:
    seen: dict[str, int] = {}
    for name, dim in chosen:
        if seen.setdefault(name, dim) != dim:
            raise ConfigError(f"{name} is targeted along both of its dimensions ({seen[name]} and {dim}); "
                              f"target one of them: {', '.join(dict.fromkeys(r for d in chosen if d[0] == name for r in chosen[d][0]))}")


# --- rankings: a score per unit, high ones first ---------------------------------------------------------------


def random_ranking(group: Sequence[Band], parameters: Mapping[str, Tensor], config: S2FTConfig) -> Sequence[float]:
    """R: any order, from the seed alone; Python's generator gives the same one everywhere."""
    draw = random.Random(f"{config.seed}:{group[0].group}")
    return [draw.random() for _ in range(len(group[0].positions))]


def weight_ranking(group: Sequence[Band], parameters: Mapping[str, Tensor], config: S2FTConfig) -> Sequence[float]:
    """W: the squared Frobenius norm of a unit's part of the targeted weights."""
    total = torch.zeros(len(group[0].positions), dtype=torch.float64)
    for band in {(b.parameter_name, b.dim, b.role): b for b in group}.values():
        weight = parameters[band.parameter_name].detach()
        others = [d for d in range(weight.ndim) if d != band.dim]
        norms = torch.linalg.vector_norm(weight, dim=others, dtype=torch.float64) if others else weight.double()
        total += norms.square().cpu()[band.positions].sum(1)
    return total.tolist()


RANKINGS: Mapping[str, Ranking] = {"random": random_ranking, "weight": weight_ranking}
