"""Stage 3, permute: weights reordered in place along their layouts, and orders that make a selection dense.

Inverse of `move(p, dim, index)`: `move(p, dim, argsort(index))`.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from s2ft_compile.layout import coordinates, gather_index, leaves
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

    What can be one range becomes one; heads chosen inside different groups become a few ranges of whole heads. An
    axis that some selected weight has along another dimension stays in base order, and with it that weight's delta.
    So does every axis of a parameter in `unmovable`.
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
    return {axis: torch.argsort(-count, stable=True) for axis, count in counts.items()}


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
