"""Hypothesis strategies of what may be permuted and trained in a model."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from s2ft_compile.config import BUDGETS, NORM, S2FTConfig
from s2ft_compile.passes.select.select import offered
from s2ft_compile.structure import Analysis


def permutations(analysis: Analysis) -> st.SearchStrategy[dict[int, Tensor]]:
    """Axis -> an order of its units, for any couplings of a model; it shrinks to none.

    >>> from hypothesis import find
    >>> from s2ft_compile.preparation import analyze
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    >>> orders = permutations(analyze(model, (torch.ones(1, 2),)))
    >>> find(orders, lambda orders: any(order[0] > 0 for order in orders.values()))
    {0: tensor([1, 0, 2])}
    """
    orders = {c.axis: st.permutations(range(c.units)).map(torch.tensor) for c in analysis.couplings}
    return st.fixed_dictionaries({}, optional=orders)


@st.composite
def configurations(draw: Any, analysis: Analysis) -> S2FTConfig:
    """What may train of a model: any of the roles it has, with amounts that every layer has; it shrinks to one unit."""
    units = {role: min(len(band.positions) for band in bands) for role, bands in offered(analysis).items()}
    roles = draw(st.lists(st.sampled_from(sorted(units)), min_size=1, unique=True))
    amounts = {role: draw(st.integers(1, units[role])) for role in roles}
    targets = {role: n / units[role] if draw(st.booleans()) else n for role, n in amounts.items()}
    targets |= {NORM: 1.0} if NORM in targets else {}
    selection = draw(st.sampled_from(("random", "weight", "lowrank")))
    return S2FTConfig(
        targets=targets,
        selection=selection,
        largest=draw(st.booleans()),
        budget=draw(st.sampled_from(("layer", "model") if selection == "random" else BUDGETS)),
        seed=draw(st.integers(0, 99)),
    )
