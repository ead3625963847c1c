"""`reselect`: other units train from here on, and what the earlier ones learned stays (`slices.units`)."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from s2ft_compile.passes.select.anew import select_anew
from s2ft_compile.passes.select.calibrate import Loss
from s2ft_compile.passes.select.calibrate import check as check_calibration
from s2ft_compile.passes.select.select import Selection, ranked

from .capture.models import unwrap
from .errors import ConfigError
from .plan import Plan
from .preparation import measured, taken
from .slices.blocks import Trained
from .slices.state import State, disabled, merged, state_of
from .slices.units import arrange, check_can_change, learned_by

log = logging.getLogger(__name__)


def reselect(
    model: nn.Module, calibration: Iterable[Any] | None = None, loss: Loss | None = None, seed: int | None = None
) -> Plan:
    """Chooses the units of a prepared model anew, by its configuration and its present weights. Returns the plan, in
    which `slices` are what trains now.

    calibration, loss: as for `prepare`. seed: of a random selection; by default another one each time. Nothing is
    compiled again: heads of grouped queries are chosen so that they share groups as those did that trained. An
    optimizer of the deltas goes on, and forgets at its next step what it knew of those that were chosen; of what trains
    whole, such as norms, it forgets nothing. What trained before in a quantized weight lies beside it, frozen: memory
    and a thin product grow, and a graph is compiled each time that its room does, after 1, 5, 9, 13, 17, 25 choices.
    Of several processes each calls this, and they have to choose alike. Raises `StateError` for a model that is not
    prepared or is sharded, `ConfigError` for a selection that would be of another size (a budget of the whole model);
    the model is then unchanged.
    """
    state, module = state_of(model), unwrap(model)
    config = state.plan.config
    check_can_change(state)
    check_calibration(config.selection, calibration)
    config = replace(config, seed=config.seed + state.reselected + 1 if seed is None else seed)
    if config.exclude:
        with disabled(model):
            of_others = taken(module, config)
    else:
        of_others = {}
    with merged(model), torch.compiler.set_stance("force_eager"):
        scores = measured(module, state.analysis, config, calibration, loss)
        ranking = ranked(state.analysis, config, Trained(module), scores, of_others)
        selections, orders = select_anew(state.analysis, ranking, state.plan.slices, state.orders, state.unmovable)
    arrange(state, _in_order(selections, state), orders, learned_by(state), state.reselected + 1)
    state.compared = False
    log.info("chosen anew: %d slices train, %d keep what they learned", len(state.blocks), len(state.left_behind))
    return state.plan


def _in_order(selections: tuple[Selection, ...], state: State) -> list[Selection]:
    """One for each block. What `prepare` left out is left out again."""
    by_place = {(s.parameter_name, s.dim): s for s in selections}
    for block in state.blocks:
        chosen = by_place.get((block.name, block.dim))
        if chosen is None or len(chosen.indices) != block.delta.shape[block.dim]:
            raise ConfigError(
                f"{0 if chosen is None else len(chosen.indices)} positions of {block.name} would train, and "
                f"{block.delta.shape[block.dim]} do now: units are chosen anew with budget='layer', where every layer "
                f"keeps its size"
            )
    return [by_place[block.name, block.dim] for block in state.blocks]
