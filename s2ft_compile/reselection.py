"""`reselect`: other units train from here on, and what the earlier ones learned stays.

The new units take the places of the old ones: the blocks lie where they lay and are as large, so the same deltas, the
same graphs and the same optimizer go on, with the memory of one selection. A unit that trained before goes on from its
own delta. What gave way is kept as a `Left` on the CPU: `disabled` takes it off, and an adapter is the union of all
that moved, exact as ever:

    W[unit] == cast(W0 + D)         for every unit that trains or ever did
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from s2ft_compile.passes.couple.recheck import Permuted
from s2ft_compile.passes.permute import dense_orders, moves_for, ranges
from s2ft_compile.passes.select.calibrate import Loss
from s2ft_compile.passes.select.calibrate import check as check_calibration
from s2ft_compile.passes.select.select import Selection, select

from .capture import unwrap
from .errors import ConfigError, StateError
from .plan import Plan, Slice
from .preparation import measured, taken
from .quantized import Values
from .sliced import InPlace
from .state import Left, State, disabled, merged, state_of, to_base_order

log = logging.getLogger(__name__)


def reselect(
    model: nn.Module, calibration: Iterable[Any] | None = None, loss: Loss | None = None, seed: int | None = None
) -> Plan:
    """Chooses the units of a prepared model anew, by its configuration and its present weights. Returns the plan, in
    which `slices` are what trains now.

    calibration, loss: as for `prepare`. seed: of a random selection; by default another one each time. Nothing is
    compiled again. An optimizer of the deltas goes on, and forgets at its next step what it knew of other units.
    Of several processes each calls this, and they have to choose alike. Raises `StateError` for a model that is not
    prepared, is sharded or has slices beside quantized weights, `ConfigError` for a selection that would be of another
    size (a budget of the whole model); the model is then unchanged.
    """
    state, module = state_of(model), unwrap(model)
    config = state.plan.config
    _check(state)
    check_calibration(config.selection, calibration)
    config = replace(config, seed=config.seed + state.reselected + 1 if seed is None else seed)
    if config.exclude:
        with disabled(model):
            of_others = taken(module, config)
    else:
        of_others = {}
    with merged(model):
        scores = measured(module, state.analysis, config, calibration, loss)
        selections = select(state.analysis, config, Values(module), scores, of_others)
    selections = _in_order(selections, state)
    orders = dense_orders(state.analysis, selections)
    index = moves_for(orders, state.analysis.layouts)
    before = _trained(state)
    with torch.no_grad():
        to_base_order(state, trained=True)
        state.moves = [(name, dim, order) for (name, dim), order in index.items()]
        state.permuted = Permuted.of(state.analysis, orders)
        state.move(back=False)
        pairs = [_replaced(b, s, index, before.get(b.name)) for b, s in zip(state.blocks, selections)]
    state.left_behind = [left for _, left in pairs if left is not None]
    state.reselected += 1
    state.compared = False
    state.replan(tuple(piece for piece, _ in pairs))
    state.set_active(True)
    state.refresh()
    log.info("chosen anew: %d slices train, and %d keep what they had", len(pairs), len(state.left_behind))
    return state.plan


def _check(state: State) -> None:
    if not state.active:
        raise StateError("the model is inside disabled() or merged()")
    for block in state.blocks:
        if not isinstance(block, InPlace):
            raise StateError(
                f"{block.name} is quantized: the units of a slice beside a weight cannot be chosen anew yet"
            )
        if block.follow_shards():
            raise StateError("this model is sharded (fully_shard): choose units anew before that")


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


def _trained(state: State) -> dict[str, Left]:
    """Everything that ever trained, by parameter, with the base's values."""
    earlier = {left.name: left for left in state.left_behind}
    everything = {}
    for s, block in zip(state.plan.slices, state.blocks):
        now = Left(block.name, block.dim, s.indices, block.delta.detach().cpu().clone(), block.backup.cpu())
        everything[block.name] = now.and_also(earlier.get(block.name))
    return everything


def _replaced(
    block: InPlace, selection: Selection, index: Mapping[tuple[str, int], Tensor], before: Left
) -> tuple[Slice, Left | None]:
    """Gives a block other units, in the weight's new order. Returns its slice, and what gave way in the weight."""
    shape = tuple(block.weight.shape)
    order = index.get((block.name, block.dim), torch.arange(shape[block.dim]))
    mask = torch.isin(order, selection.indices)
    indices = order[mask]
    where = torch.full((shape[block.dim],), -1)
    where[before.indices] = torch.arange(len(before.indices))
    again = where[indices] >= 0
    block.choose(ranges(mask), again.nonzero().squeeze(1), before.take(where[indices][again]))
    gone = ~torch.isin(before.indices, indices)
    left = before.take(gone.nonzero().squeeze(1)).moved()
    return Slice(block.name, block.dim, indices, shape, selection.roles, block.delta), left
