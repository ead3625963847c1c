"""Units chosen anew in the places of those that train.

Channels have one axis, and whichever are chosen, they come first. A head of grouped queries has two, its group and its
place in a group, and keys train along the group, too: whether chosen heads share one is a pattern that no order of axes
changes. So that blocks stay where they lie, and graphs fit, such heads are chosen in the pattern that trains.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from s2ft_compile.layout import coordinates, leaves
from s2ft_compile.passes.permute import Units, dense_orders, fill, movable, replaced, take
from s2ft_compile.plan import Slice
from s2ft_compile.structure import Analysis

from .ranking import Ranking
from .select import Selection, gathered

Orders = dict[int, Tensor]  # axis -> int64 (units,), as `gather_index` takes them


def select_anew(
    analysis: Analysis,
    ranking: Ranking,
    training: Sequence[Slice],
    orders: Mapping[int, Tensor],
    unmovable: Collection[str] = (),
) -> tuple[tuple[Selection, ...], Orders]:
    """What `select` chooses, but where axes cross the best that fit the places of `training`, and the orders of axes
    that bring them there. Where too few that are free fit, those that train stay.

    orders: those of `training`. unmovable: as for `dense_orders`.
    """
    units = {target: ranking.choose(target) for target in ranking.targeted}
    selections = gathered(ranking.targeted, units)
    size, new, now = _sizes(analysis), Units(), _training(ranking, training)
    crossing = _crossing(analysis, ranking, selections, unmovable)
    kept = {
        (target, group): of
        for (target, group), of in now.items()
        if group in crossing and len(of) == len(units[target][group])
    }
    for target, group in sorted(kept, key=lambda part: len(kept[part])):
        at = list(product(*(range(size[axis]) for axis in group)))
        places = [{a: u for a, u in zip(group, unit) if a in crossing[group]} for unit in at]
        best = ranking.best_first(group)
        chosen = fill([places[unit] for unit in kept[target, group]], [places[unit] for unit in best], new)
        units[target][group] = sorted(best[i] for i in chosen)
    if any(len(units[target][group]) < len(of) for (target, group), of in kept.items()):
        for (target, group), of in kept.items():
            units[target][group] = of
        new = {axis: {unit: unit for unit in range(size[axis])} for axis in new}
    selections = gathered(ranking.targeted, units)
    return selections, dense_orders(analysis, selections, unmovable) | _replaced(analysis, orders, new)


def _training(ranking: Ranking, training: Sequence[Slice]) -> dict[tuple[str, tuple], list[int]]:
    """(target, group) -> the units that train."""
    indices, now = {(s.parameter_name, s.dim): s.indices for s in training}, {}
    for target, bands in ranking.targeted.items():
        for band in bands:
            if (band.parameter_name, band.dim) in indices:
                whole = torch.isin(band.positions, indices[band.parameter_name, band.dim]).all(1)
                now[target, band.group] = whole.nonzero().squeeze(1).tolist()
    return now


def orders_between(
    analysis: Analysis,
    training: Sequence[Slice],
    orders: Mapping[int, Tensor],
    stored: Iterable[Tensor],
    unmovable: Collection[str] = (),
) -> Orders | None:
    """The orders of axes that bring other units of the slices to where `training` is in `orders`; None where none do.

    stored: of each slice the int64 positions, in the order of its delta.
    """
    new: Units = {}
    axes = movable(analysis, training, unmovable)
    for s, others in zip(training, stored):
        layout = analysis.layouts[s.parameter_name, s.dim]
        for axis in {leaf.axis for leaf in leaves(layout)} & axes:
            unit = coordinates(layout, axis)
            for a, b in set(zip(unit[s.indices].tolist(), unit[others].tolist())):
                if not take({axis: a}, {axis: b}, new):
                    return None
    if any(to.pop(-1, -1) != -1 or -1 in to.values() for to in new.values()):
        return None
    return _replaced(analysis, orders, new)


def _crossing(
    analysis: Analysis, ranking: Ranking, selections: Sequence[Selection], unmovable: Collection[str]
) -> dict[tuple, list[int]]:
    """Group -> its axes that may move, of each that has several of them, or shares one with another group."""
    axes = movable(analysis, selections, unmovable)
    groups = {band.group for bands in ranking.targeted.values() for band in bands if isinstance(band.group[0], int)}
    moving = {group: [axis for axis in group if axis in axes] for group in groups}
    held = Counter(axis for of in moving.values() for axis in of)
    crossed = {axis for of in moving.values() for axis in of if len(of) > 1 or held[axis] > 1}
    return {group: of for group, of in moving.items() if not crossed.isdisjoint(of)}


def _replaced(analysis: Analysis, orders: Mapping[int, Tensor], new: Units) -> Orders:
    size = _sizes(analysis)
    return {axis: replaced(orders.get(axis, torch.arange(size[axis])), to) for axis, to in new.items()}


def _sizes(analysis: Analysis) -> dict[int, int]:
    return {leaf.axis: leaf.size for layout in analysis.layouts.values() for leaf in leaves(layout)}
