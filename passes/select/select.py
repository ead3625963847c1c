"""Stage 3, select: which units of which parameters train.

A `Band` is the part of a parameter's dimension that has one role, cut into units. Bands over the same axes (gate, up
and down of one layer) share one ranking of their units, so that a channel is chosen whole. A unit is free if no entry
of it, in any of these bands, is changed by an adapter that is excluded.
"""

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from numbers import Integral

import torch
from torch import Tensor

from s2ft_compile.config import CHANNELS, HEADS, NORM, ROLES, S2FTConfig, is_glob, matches
from s2ft_compile.errors import ConfigError
from s2ft_compile.layout import Layout, Leaf, Product, Sum, coordinates, end_roles, leaves, role_mask
from s2ft_compile.structure import Analysis

from .ranking import WHOLE, Band, Ranking, Taken

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """indices: int64, ascending, along `dim` of the parameter in the base model's order."""

    parameter_name: str
    dim: int
    roles: tuple[str, ...]
    indices: Tensor


def select(
    analysis: Analysis,
    config: S2FTConfig,
    parameters: Mapping[str, Tensor],
    measured: Mapping[tuple[str, int], Tensor] | None = None,
    taken: Taken | None = None,
) -> tuple[Selection, ...]:
    """One selection per targeted parameter.

    measured: for a selection that looks at data, what `calibrate` found: (parameter, dim) -> float64 (size of dim,).
    taken: what the adapters in `config.exclude` change. Raises `ConfigError` where a target cannot be met.
    """
    ranking = ranked(analysis, config, parameters, measured, taken)
    return gathered(ranking.targeted, {target: ranking.choose(target) for target in ranking.targeted})


def ranked(
    analysis: Analysis,
    config: S2FTConfig,
    parameters: Mapping[str, Tensor],
    measured: Mapping[tuple[str, int], Tensor] | None = None,
    taken: Taken | None = None,
) -> Ranking:
    """What `select` of the same arguments chooses by."""
    config = replace(config, selection=config.selection or "random")
    return Ranking.of(targeted_bands(analysis, config), config, parameters, measured or {}, taken or {})


def gathered(
    targeted: Mapping[str, list[Band]], units: Mapping[str, Mapping[tuple, Sequence[int]]]
) -> tuple[Selection, ...]:
    """Chosen units, target -> group -> numbers, as one selection per parameter."""
    chosen: dict[tuple[str, int], tuple[list[str], list[Tensor]]] = {}
    for target, bands in targeted.items():
        for band in bands:
            if units[target][band.group]:
                roles, parts = chosen.setdefault((band.parameter_name, band.dim), ([], []))
                roles.append(band.role)
                parts.append(band.positions[units[target][band.group]].reshape(-1))
    _check_one_dim_each(chosen)
    return tuple(
        Selection(name, dim, tuple(dict.fromkeys(roles)), torch.cat(parts).unique())
        for (name, dim), (roles, parts) in chosen.items()
    )


def notes(analysis: Analysis, config: S2FTConfig) -> tuple[str, ...]:
    """A line for each role of which weights train as another one, and for each ratio that stands for less than one
    unit, of which one trains."""
    lines = []
    everything = candidates(analysis, config)
    apart = _one_role_each(everything, analysis)
    for target, bands in everything.items():
        every, left = ({b.parameter_name for b in of} for of in (bands, apart.get(target, ())))
        if lost := sorted(every - left):
            lines.append(f"{target}: {len(lost)} of {len(every)} weights, such as {lost[0]}, train as another role")
    for target, bands in _of_top_layers(apart, analysis, config).items():
        amount, units = config.targets[target], {b.group: len(b.positions) for b in bands}
        pools = units.values() if config.budget == "layer" else [sum(units.values())]
        small = [n for n in pools if not isinstance(amount, Integral) and amount * n < 1 - 1e-9]
        if small:
            of = f"{min(small)}" if min(small) == max(small) else f"{min(small)} to {max(small)}"
            lines.append(f"{target}: {amount:g} of {of} units is less than one, and 1 trains")
    return tuple(lines)


def roles_of(analysis: Analysis, taken: Taken | None = None) -> list[str]:
    """Those of `ROLES` that the model has, in their order; without norms where an excluded adapter trains those. Raises
    `ConfigError` where it has no structures, or none of a role."""
    _check_structures(analysis)
    of_norms = set(_norms(analysis)) & set(taken or ())
    roles = [role for role in offered(analysis) if role != NORM or not of_norms]
    if not roles:
        found = ", ".join(f"{n} {role}" for role, n in Counter(c.role for c in analysis.couplings).items())
        names = [b.parameter_name for b in bands(analysis, _matrices(analysis))]
        raise ConfigError(
            f"no structure of this model has a role that trains by default (of its couplings: {found or 'none'})"
            + (f"; target weights by their names, for example {{{names[0]!r}: 0.02}}" if names else "")
        )
    return roles


def targeted_bands(analysis: Analysis, config: S2FTConfig) -> Mapping[str, list[Band]]:
    """Target -> the bands it may train a part of; no role whose weights all train as others. Raises `ConfigError`
    where there are none."""
    return _of_top_layers(_one_role_each(candidates(analysis, config), analysis), analysis, config)


def _of_top_layers(
    by_target: Mapping[str, list[Band]], analysis: Analysis, config: S2FTConfig
) -> Mapping[str, list[Band]]:
    if config.top_layers is None:
        return by_target
    top = {target: _top(target, bands, config.top_layers, analysis.depths) for target, bands in by_target.items()}
    if NORM in top:  # those that are not below what else trains
        depth = {b.parameter_name: analysis.depths.get(b.parameter_name, 0) for bands in top.values() for b in bands}
        lowest = min((depth[b.parameter_name] for bands in top.values() for b in bands if b.role != WHOLE), default=0)
        top[NORM] = [b for b in top[NORM] if depth[b.parameter_name] >= lowest]
    return {target: bands for target, bands in top.items() if bands}


def _check_structures(analysis: Analysis) -> None:
    if not analysis.couplings and not analysis.ordered:
        refused = "; ".join(str(r) for r in analysis.refusals[:3]) or "its parameters are not used together"
        raise ConfigError(f"no coupled structure was found in this model, so there is nothing to select: {refused}")


def _top(target: str, bands: Sequence[Band], layers: int, depths: Mapping[str, int]) -> list[Band]:
    """The bands of a target's last layers. A layer is all structures that are first used equally deep."""
    if all(band.role == WHOLE for band in bands):
        return list(bands)
    first: dict[tuple, int] = {}
    for band in bands:
        depth = depths.get(band.parameter_name, 0)
        first[band.group] = min(depth, first.get(band.group, depth))
    layer_depths = sorted(set(first.values()))
    if layers > len(layer_depths):
        raise ConfigError(
            f"top_layers = {layers}, but target {target!r} has {len(layer_depths)} layers; use 1 to {len(layer_depths)}"
        )
    return [b for b in bands if first[b.group] >= layer_depths[-layers]]


def bands(analysis: Analysis, names: Collection[str] | None = None, role: str | None = None) -> list[Band]:
    """Every part of every parameter that can be selected from, in the order of the model's parameters, or those of one
    role: heads are whole but where a role says that it is of their channels. Layers whose layouts are alike share their
    positions."""
    base = role and role.removesuffix(CHANNELS)
    alike: dict[tuple, list[tuple[list[int], Tensor]]] = {}
    parts = []
    for (name, dim), layout in analysis.layouts.items():
        if (names is not None and name not in names) or name in analysis.statistics:
            continue
        numbers: dict[int, int] = {}
        layout = _numbered(layout, numbers)
        held = [tuple(axis in kind for kind in (analysis.heads, analysis.free, analysis.ordered)) for axis in numbers]
        for of in end_roles(layout):
            if of is not None and base in (None, of):
                key = (layout, of, *held)
                if key not in alike:
                    alike[key] = list(_units_of_part(layout, of, held, inside=base != role))
                axes = list(numbers)
                for chosen, positions in alike[key]:
                    parts.append(Band(name, dim, role or of, tuple(axes[i] for i in chosen) or (name, dim), positions))
    return parts


def offered(analysis: Analysis) -> dict[str, list[Band]]:
    """Role -> the bands that it may train a part of, for each role that the model has."""
    matrices = _matrices(analysis)
    found = bands(analysis, matrices)
    of_roles = {role: [b for b in found if b.role == role] for role in ROLES}
    of_roles |= {f"{role}{CHANNELS}": bands(analysis, matrices, f"{role}{CHANNELS}") for role in HEADS}
    of_roles[NORM] = [_whole(name, analysis) for name in _norms(analysis)]
    return {role: _one_dim_each(listed, analysis) for role, listed in of_roles.items() if listed}


def _matrices(analysis: Analysis) -> set[str]:
    return {name for name, dim in analysis.layouts if dim > 0}  # a bias follows its weight, it is not a target


def _norms(analysis: Analysis) -> list[str]:
    """The gains and biases of norms: of modules that hold vectors alone, and no statistics of batches."""
    names = list(dict.fromkeys(name for name, _ in analysis.layouts))
    modules = {name.rpartition(".")[0] for name in names}
    around = {module[:i] for module in modules for i, letter in enumerate(module) if letter == "."}
    matrices = {*_matrices(analysis), *analysis.statistics}
    others = {name.rpartition(".")[0] for name in matrices} | around | {""}
    return [name for name in names if name.rpartition(".")[0] not in others]


def _numbered(layout: Layout, numbers: dict[int, int]) -> Layout:
    """A layout with its axes numbered as they come; numbers: gets axis -> number."""
    if isinstance(layout, Leaf):
        return replace(layout, axis=numbers.setdefault(layout.axis, len(numbers)))
    if isinstance(layout, Product):
        return Product(tuple(_numbered(part, numbers) for part in layout.factors))
    return Sum(tuple(_numbered(part, numbers) for part in layout.terms))


def _units_of_part(
    layout: Layout, role: str, held: Sequence[tuple[bool, bool, bool]], inside: bool = False
) -> Iterator[tuple[list[int], Tensor]]:
    """(axes, positions) of each set of axes that positions of a role lie in, where those are free, or heads that train
    where they lie. A unit is a head in attention; elsewhere, and inside heads, it is what an axis may permute, whole
    along axes in a fixed order. held: for each axis whether it is of heads, free, ordered. inside: of heads."""
    mask, attention = role_mask(layout, role), role in HEADS and not inside
    axes = [a for a in dict.fromkeys(leaf.axis for leaf in leaves(layout) if leaf.size > 1)]
    axes = [a for a in axes if held[a][0 if attention else 1] and not (inside and held[a][0])]
    where = [coordinates(layout, a) >= 0 for a in axes]
    pattern = sum((lies.long() << i for i, lies in enumerate(where)), torch.zeros(layout.size, dtype=torch.int64))
    for bits in dict.fromkeys(pattern[mask].tolist()):
        chosen = [a for i, a in enumerate(axes) if bits >> i & 1]
        part = mask & (pattern == bits)
        units = prod(int(coordinates(layout, a).max()) + 1 for a in chosen)
        selectable = all(held[a][1] or attention and held[a][2] for a in chosen)
        if (chosen or attention) and selectable and int(part.sum()) % units == 0:
            yield chosen, _unit_positions(layout, part, chosen)


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


def _bands_of(target: str, amount: int | float, analysis: Analysis) -> list[Band]:
    if not is_glob(target):
        return _bands_of_role(target, analysis)
    names = _named(target, analysis)
    if isinstance(amount, Integral) or amount < 1:
        return [band for name in names for band in _bands_of_name(target, name, analysis)]
    return [_whole(name, analysis) for name in names]


def _whole(name: str, analysis: Analysis) -> Band:
    """All of a parameter: its rows, of which none moves."""
    if (name, 0) not in analysis.layouts:
        raise ConfigError(f"{name} is a single number, without a dimension to train along")
    rows = torch.arange(analysis.layouts[name, 0].size)
    return Band(name, 0, WHOLE, (name, WHOLE), rows[:, None])


def _bands_of_role(role: str, analysis: Analysis) -> list[Band]:
    if role == NORM and (names := _norms(analysis)):
        return [_whole(name, analysis) for name in names]
    base = role.removesuffix(CHANNELS)
    names = [m.parameter_name for c in analysis.couplings for m in c.members if m.role == base]
    names += [name for (name, _), layout in analysis.layouts.items() if base in end_roles(layout)]
    of_role = bands(analysis, set(names) & _matrices(analysis), role)
    if not of_role:
        valid = sorted(offered(analysis))
        raise ConfigError(
            f"no parameter of this model has the role {role!r}; roles found: {', '.join(valid) or 'none'}"
        )
    return _one_dim_each(of_role, analysis)


def candidates(analysis: Analysis, config: S2FTConfig) -> dict[str, list[Band]]:
    """Target -> the bands of it, those included that train as another role. Raises `ConfigError` where there are
    none."""
    _check_structures(analysis)
    return {target: _bands_of(target, amount, analysis) for target, amount in config.targets.items()}


def _one_role_each(by_target: Mapping[str, list[Band]], analysis: Analysis) -> dict[str, list[Band]]:
    """The same, but of a weight in the middle of a chain, whose roles lie along several dimensions, those along one."""
    of_roles = [band for target, bands in by_target.items() if not is_glob(target) for band in bands]
    kept = {(band.parameter_name, band.dim) for band in _one_dim_each(of_roles, analysis)}
    left = {
        target: [b for b in bands if is_glob(target) or (b.parameter_name, b.dim) in kept]
        for target, bands in by_target.items()
    }
    return {target: bands for target, bands in left.items() if bands}


def _one_dim_each(several: Sequence[Band], analysis: Analysis) -> list[Band]:
    """Of a weight that could train along several dimensions, the bands along the one with the most units that do."""
    units: dict[str, dict[int, int]] = {}
    for band in several:
        dims = units.setdefault(band.parameter_name, {})
        trains = (band.parameter_name, band.dim, band.role) not in analysis.untrained
        dims[band.dim] = dims.get(band.dim, 0) + trains * len(band.positions)
    best = {name: max(dims, key=dims.__getitem__) for name, dims in units.items()}
    for name in (name for name, dims in units.items() if len(dims) > 1):
        log.debug("%s could train along dims %s; it does along %d", name, sorted(units[name]), best[name])
    return [band for band in several if band.dim == best[band.parameter_name]]


def _named(glob: str, analysis: Analysis) -> list[str]:
    trained = [name for name, _ in analysis.layouts if name not in analysis.statistics]
    canonical = {**{name: name for name in trained}, **analysis.tied}
    names = list(dict.fromkeys(first for name, first in canonical.items() if matches(glob, name)))
    if not names:
        examples = list(dict.fromkeys(trained))
        raise ConfigError(
            f"target {glob!r} is neither a role ({', '.join(ROLES)}) nor a glob that matches a "
            f"parameter; parameters are named like {', '.join(examples[:3])}"
        )
    return names


def _bands_of_name(glob: str, name: str, analysis: Analysis) -> list[Band]:
    best = _preferred(bands(analysis, {name}))
    dims = sorted({b.dim for b in best})
    if not best:
        reasons = "; ".join(r.reason for r in analysis.refusals if any(m.parameter_name == name for m in r.members))
        raise ConfigError(
            f"target {glob!r} matches {name}, which has no axis that may be permuted"
            + (f": {reasons}" if reasons else "")
            + f". {{{glob!r}: 1.0}} trains all of it"
        )
    if len(dims) > 1:
        roles = ", ".join(f"{b.role} (dim {b.dim})" for b in best)
        raise ConfigError(
            f"target {glob!r} matches {name}, which could train along dims {dims}; "
            f"name one of its roles instead: {roles}"
        )
    return best


def _preferred(several: Sequence[Band]) -> list[Band]:
    """The bands of attention, FFN and experts before other ones, and those before the residual stream's."""

    def tier(band: Band) -> int:
        group = band.role.split(".")[0]
        return 1 if band.role == "moe.expert" else {"other": 1, "residual": 2}.get(group, 0)

    best = min(map(tier, several), default=0)
    return [b for b in several if tier(b) == best]


def _check_one_dim_each(chosen) -> None:
    seen: dict[str, int] = {}
    for name, dim in chosen:
        if seen.setdefault(name, dim) != dim:
            roles = dict.fromkeys(r for place in chosen if place[0] == name for r in chosen[place][0])
            raise ConfigError(
                f"{name} is targeted along both of its dimensions ({seen[name]} and {dim}); "
                f"target one of them: {', '.join(roles)}"
            )
