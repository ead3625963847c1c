"""Stage 3, permute: weights reordered in place along their layouts, and orders that make a selection dense.

Inverse of `move(p, dim, index)`: `move(p, dim, argsort(index))`.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from s2ft_compile.layout import Layout, coordinates, gather_index, leaves
from s2ft_compile.passes.select.select import Selection
from s2ft_compile.plan import Slice
from s2ft_compile.structure import Analysis


@torch.no_grad()
def move(parameter: Tensor, dim: int, index: Tensor) -> None:
    """parameter[..., i, ...] = old parameter[..., index[i], ...] along `dim`, in place."""
    parameter.copy_(parameter.index_select(dim, index.to(parameter.device)))


def moves_for(orders: Mapping[int, Tensor], layouts) -> dict[tuple[str, int], Tensor]:
    """The gather index of every parameter dimension that reordering these axes changes."""
    return {
        place: gather_index(layout, orders)
        for place, layout in layouts.items()
        if any(leaf.axis in orders for leaf in leaves(layout))
    }


def dense_orders(
    analysis: Analysis, selections: Sequence[Selection], unmovable: Collection[str] = ()
) -> dict[int, Tensor]:
    """For each axis, its selected units first, those that most selections share in front, else in base order.

    What can be one range becomes one; heads chosen inside different groups become a few ranges of whole heads, the same
    in all layers whose heads share groups alike. An axis that some selected weight has along another dimension stays in
    base order, and with it that weight's delta. So does every axis of a parameter in `unmovable`.
    """
    counts: dict[int, Tensor] = {}
    may_move = movable(analysis, selections, unmovable)
    for selection in selections:
        layout = analysis.layouts[selection.parameter_name, selection.dim]
        for axis in {leaf.axis for leaf in leaves(layout)} & may_move:
            unit = coordinates(layout, axis)
            taken = unit[selection.indices]
            number = torch.bincount(taken[taken >= 0], minlength=int(unit.max()) + 1)
            hit = (number > number.min()).long()  # beside channels of every head, the heads of which more trains
            if hit.any():  # an axis inside the unit is taken whole
                counts[axis] = counts.get(axis, 0) + hit
    orders = {axis: torch.argsort(-count, stable=True) for axis, count in counts.items()}
    return orders | _alike(analysis, selections, orders)


def movable(
    analysis: Analysis, selections: Iterable[Selection | Slice], unmovable: Collection[str] = ()
) -> Collection[int]:
    """The axes that may be put in another order: not those that a selected weight has along another dimension."""
    selected = {s.parameter_name: s.dim for s in selections}
    crossing = {
        leaf.axis
        for (name, dim), layout in analysis.layouts.items()
        if selected.get(name, dim) != dim or name in unmovable
        for leaf in leaves(layout)
    }
    return analysis.free - crossing


# --- units that lie along several axes, in places of others --------------------------------------------------------

Unit = dict[int, int]  # axis -> its number there
Units = dict[int, dict[int, int]]  # axis -> unit -> the one that takes its place


def fill(places: Sequence[Unit], units: Iterable[Unit], new: Units) -> list[int]:
    """Which units, the first before others, take places, one each, together with all in `new`; it gets them, too."""
    left, chosen = list(places), []
    for number, unit in enumerate(units):
        if (place := next((place for place in left if take(place, unit, new)), None)) is not None:
            left.remove(place)
            chosen.append(number)
    return chosen


def take(place: Unit, unit: Unit, new: Units) -> bool:
    """Whether a unit takes a place along each axis; then `new` says so."""
    for axis, a in place.items():
        to = new.setdefault(axis, {})
        if axis not in unit or (to[a] != unit[axis] if a in to else unit[axis] in to.values()):
            return False
    for axis, a in place.items():
        new[axis][a] = unit[axis]
    return len(place) == len(unit)


def replaced(order: Tensor, new: Mapping[int, int]) -> Tensor:
    """The order in which new[u] lies where u does in `order`, and the others, in base order, around them."""
    others = iter(sorted({*order.tolist()} - {*new.values()}))
    return torch.tensor([new[unit] if unit in new else next(others) for unit in order.tolist()])


def _alike(analysis: Analysis, selections: Sequence[Selection], orders: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """For axes that cross, orders in which the units lie where those of an earlier structure do, if one is like it."""
    parts = [_units(analysis.layouts[s.parameter_name, s.dim], s.indices, orders) for s in selections]
    seen: dict[tuple, list[tuple[list[list[Unit]], list[Tensor]]]] = {}
    result: dict[int, Tensor] = {}
    for axes, structure in _connected(parts):
        number = {axis: i for i, axis in enumerate(axes)}
        units = sorted(([{number[a]: u for a, u in one.items()} for one in part] for part in structure), key=len)
        like = (*(len(orders[axis]) for axis in axes), *(tuple(map(tuple, part)) for part in units))
        for places, first in seen.setdefault(like, []):
            new: Units = {}
            if all(len(fill(at, part, new)) == len(part) for at, part in zip(places, units)):
                result |= {axis: replaced(first[i], new[i]) for axis, i in number.items()}
                break
        else:
            seen[like].append((units, [orders[axis] for axis in axes]))
    return result


def _units(layout: Layout, indices: Tensor, axes: Collection[int]) -> list[Unit]:
    """The units along these axes of which more is selected than of others."""
    held = [axis for axis in dict.fromkeys(leaf.axis for leaf in leaves(layout)) if axis in axes]
    if not held:
        return []
    every, unit = torch.stack([coordinates(layout, axis) for axis in held], 1).unique(dim=0, return_inverse=True)
    number = torch.bincount(unit[indices], minlength=len(every))
    rows = every[number > number.min()].tolist()
    return [{axis: n for axis, n in zip(held, row) if n >= 0} for row in rows]


def _connected(parts: Sequence[list[Unit]]) -> list[tuple[list[int], list[list[Unit]]]]:
    """(axes, parts) of those that share axes, where these are several."""
    structures: list[tuple[list[int], list[list[Unit]]]] = []
    for part in parts:
        axes, of = [axis for unit in part for axis in unit], [part]
        for other in [s for s in structures if not set(axes).isdisjoint(s[0])]:
            structures.remove(other)
            axes, of = other[0] + axes, other[1] + of
        structures.append((list(dict.fromkeys(axes)), of))
    return [(axes, of) for axes, of in structures if len(axes) > 1]
