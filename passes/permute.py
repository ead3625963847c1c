"""Stage 3, permute: weights reordered in place along their layouts, and orders that make a selection dense.

Inverse of `move(p, dim, index)`: `move(p, dim, argsort(index))`.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from s2ft_compile.layout import coordinates, gather_index, leaves
from s2ft_compile.passes.select.select import Selection
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
    selected = {s.parameter_name: s.dim for s in selections}
    crossing = {
        leaf.axis
        for (name, dim), layout in analysis.layouts.items()
        if selected.get(name, dim) != dim or name in unmovable
        for leaf in leaves(layout)
    }
    for selection in selections:
        layout = analysis.layouts[selection.parameter_name, selection.dim]
        for axis in {leaf.axis for leaf in leaves(layout)} & analysis.free - crossing:
            unit = coordinates(layout, axis)
            size = int(unit.max()) + 1
            taken = unit[selection.indices]
            if len(taken) and (taken >= 0).any():
                hit = torch.zeros(size, dtype=torch.int64)
                hit[taken[taken >= 0].unique()] = 1
                if not hit.all():  # an axis inside the unit is taken whole
                    counts[axis] = counts.get(axis, 0) + hit
    return {axis: torch.argsort(-count, stable=True) for axis, count in counts.items()}
