"""Which units train: as tensors (`trained_state`, a part of `state_dict`), put back, and others in their place.

The new units take the places of the old ones: the blocks lie where they lay and are as large, so the same deltas, the
same graphs and the same optimizer go on, with the memory of one selection. A unit that trained before goes on from its
own delta. What gave way is kept as a `Left` on the CPU: `disabled` takes it off, and an adapter is the union of all
that moved, exact as ever:

    W[unit] == cast(W0 + D)         for every unit that trains or ever did
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from s2ft_compile.errors import StateError
from s2ft_compile.passes.permute import dense_orders, moves_for
from s2ft_compile.passes.select.anew import orders_between
from s2ft_compile.passes.select.select import Selection
from s2ft_compile.plan import Slice, delta_of
from s2ft_compile.quantized import Values

from .blocks import Block
from .state import Left, State, state_of, to_base_order

COUNT = "_s2ft_reselected"  # in a state: how often units were chosen anew, int64 (1,)
Learned = tuple[Tensor, Tensor]  # positions in the base's order, int64 (n,), and their delta


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What training has changed, as tensors for a checkpoint that is small: `state_dict` has the frozen weights, too.
    NAME being a delta's in `state_dict`:

    NAME: the delta, float32. NAME.units: int64, its positions in the base's order. NAME.earlier, NAME.earlier_units:
    the same of what trained before. _s2ft_reselected: how often units were chosen anew, int64 (1,).
    Raises `StateError` for a model that is not prepared or is sharded.
    """
    blocks = state_of(model).blocks
    if any(block.follow_shards() for block in blocks):
        raise StateError("this model is sharded (fully_shard): torch.distributed.checkpoint saves its state_dict()")
    return {**units_of(model), **{block.delta_name: block.delta.detach() for block in blocks}}


def units_of(model: nn.Module) -> dict[str, Tensor]:
    """What `trained_state` has beside the deltas."""
    state = state_of(model)
    values = {COUNT: torch.tensor([state.reselected])}
    earlier = {left.name: left for left in state.left_behind}
    for s, block in zip(state.plan.slices, state.blocks):
        values[f"{block.delta_name}.units"] = s.indices
        if left := earlier.get(block.name):
            values |= {f"{block.delta_name}.earlier": left.delta, f"{block.delta_name}.earlier_units": left.indices}
    return values


@torch.no_grad()
def load_trained_state(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Puts what `trained_state` returned into the model it was taken from, or into one that was prepared alike; the
    units are then those of `values`, and nothing is compiled again.

    An optimizer of the deltas is loaded by itself. Raises `StateError` for values of other slices; the model is then
    unchanged.
    """
    state, times = state_of(model), int(values.get(COUNT, 0))
    given = [_given(values, s, block) for s, block in zip(state.plan.slices, state.blocks)]
    names = {name for block in state.blocks for name in _names(block)} | {COUNT}
    if strange := sorted(values.keys() - names):
        raise StateError(f"{strange[0]} is none of this model's slices, which are {_some_names(state)}")
    moved = any(not torch.equal(one.units, s.indices.cpu()) for one, s in zip(given, state.plan.slices))
    if moved or state.left_behind or any(one.earlier is not None for one in given):
        check_can_change(state)
        selections = [
            Selection(s.parameter_name, s.dim, s.roles, one.units.sort().values)
            for one, s in zip(given, state.plan.slices)
        ]
        of, units = (state.analysis, state.plan.slices, state.orders), [one.units for one in given]
        orders = orders_between(*of, units, state.unmovable)
        if orders is None:
            orders = dense_orders(state.analysis, selections, state.unmovable)
        learned = {s.parameter_name: one.all() for one, s in zip(given, state.plan.slices)}
        arrange(state, selections, orders, learned, times)
        for block in state.blocks:
            block.came_from = None  # an optimizer's state comes from the same checkpoint
    else:
        for one, block in zip(given, state.blocks):
            block.delta.copy_(one.delta)
        state.reselected = times
        state.refresh()


# --- a part of state_dict() --------------------------------------------------------------------------------------


def follow_units(model: nn.Module, state_dict: MutableMapping[str, Tensor], prefix: str) -> Callable[[], None]:
    """Has the units train that did where a state dict was taken, of which it takes out what says so, before all else is
    loaded. Returns what undoes it. Raises `StateError` where that is not all there."""
    state = state_of(model)
    names = [*(name for block in state.blocks for name in _names(block)[1:]), COUNT]
    values = {name: state_dict.pop(prefix + name) for name in names if prefix + name in state_dict}
    deltas = [block.delta_name for block in state.blocks]
    if not values:  # taken before units were chosen anew
        if not state.reselected or any(prefix + name not in state_dict for name in deltas):
            return lambda: None
        values = {_names(block)[1]: units for block, units in zip(state.blocks, state.first)}
    now = units_of(model)
    if values.keys() == now.keys() and all(torch.equal(t.cpu(), now[name].cpu()) for name, t in values.items()):
        return lambda: None
    before = {name: t.clone() for name, t in trained_state(model).items()}
    given = {name: state_dict[prefix + name] for name in deltas if prefix + name in state_dict}
    load_trained_state(model, {**values, **given})
    return lambda: load_trained_state(model, before)


@dataclass(frozen=True)
class _Given:
    """Of one slice: what trains and what trained before, each a delta and its positions; on the CPU."""

    dim: int
    delta: Tensor
    units: Tensor
    earlier: Tensor | None
    earlier_units: Tensor | None

    def all(self) -> Learned:
        if self.earlier is None or self.earlier_units is None:
            return self.units, self.delta
        return torch.cat([self.units, self.earlier_units]), torch.cat([self.delta, self.earlier], self.dim)


def _names(block: Block) -> list[str]:
    return [block.delta_name, *(f"{block.delta_name}.{part}" for part in ("units", "earlier", "earlier_units"))]


def _given(values: Mapping[str, Tensor], s: Slice, block: Block) -> _Given:
    """The part of a trained state that is a slice's. Raises `StateError` where it is none of this slice's size."""
    delta, units, earlier, earlier_units = (values.get(name) for name in _names(block))
    if delta is None:
        raise StateError(f"{block.delta_name} is missing, the delta of {s.parameter_name}")
    if (earlier is None) != (earlier_units is None):
        raise StateError(f"{block.delta_name} has earlier units without their deltas, or deltas without their units")
    one = _Given(s.dim, delta, s.indices if units is None else units, earlier, earlier_units)
    pairs = [(delta, one.units)]
    if earlier is not None and earlier_units is not None:
        pairs.append((earlier, earlier_units))
    for tensor, places in pairs:
        n = len(s.indices) if tensor is delta else len(places)
        shape = (*s.shape[: s.dim], n, *s.shape[s.dim + 1 :])
        if tensor.dtype != torch.float32 or tensor.shape != shape or not _positions(places, n, s.shape[s.dim]):
            raise StateError(
                f"{block.delta_name} is {tuple(tensor.shape)} of {tensor.dtype}, and this model's slice of "
                f"{s.parameter_name} has a float32 delta of {shape}, at {n} positions below {s.shape[s.dim]}"
            )
    if not _positions(one.all()[0], len(one.all()[0]), s.shape[s.dim]):
        raise StateError(f"{block.delta_name} has a position twice")
    return one


def _positions(places: Tensor, n: int, size: int) -> bool:
    """Whether these are n positions below `size`, each once."""
    fits = places.dtype == torch.int64 and places.shape == (n,) and bool(((0 <= places) & (places < size)).all())
    return fits and len(set(places.tolist())) == n


def _some_names(state: State) -> str:
    names = [block.delta_name for block in state.blocks]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


# --- other units in the same places ----------------------------------------------------------------------------------


@torch.no_grad()
def arrange(
    state: State,
    selections: Sequence[Selection],
    orders: Mapping[int, Tensor],
    learned: Mapping[str, Learned],
    times: int,
) -> None:
    """The selections train from here on, with axes in these orders; of all units of a parameter that have learned
    something, those keep it that do not train. times: how often units have been chosen anew, so that all have room."""
    index = moves_for(orders, state.analysis.layouts)
    to_base_order(state, trained=False)
    now, values = state.tensors(), Values(state.model)
    before: dict[str, Left] = {}
    for block in state.blocks:
        indices, delta = (t.detach().cpu() for t in learned[block.name])
        backup = values[block.name].detach().index_select(block.dim, indices.to(block.weight.device)).cpu()
        before[block.name] = Left(block.name, block.dim, indices, delta, backup, block.beside)
        before[block.name].put(now[block.name], None, trained=True)
    state.reorder(orders)
    state.move(back=False)
    pairs = [
        _replaced(block, s, selection, index, before[block.name], times)
        for block, s, selection in zip(state.blocks, state.plan.slices, selections)
    ]
    state.left_behind = [left for _, left in pairs if left is not None]
    state.replan(tuple(piece for piece, _ in pairs))
    state.reselected = times
    state.set_active(True)
    state.refresh()


def check_can_change(state: State) -> None:
    if not state.active:
        raise StateError("the model is inside disabled() or merged()")
    if any(block.follow_shards() for block in state.blocks):
        raise StateError("this model is sharded (fully_shard): choose units anew before that")


def learned_by(state: State) -> dict[str, Learned]:
    """Of each parameter all that ever trained."""
    return {s.parameter_name: (s.indices, delta_of(s).detach().clone()) for s in state.all_trained.slices}


def _places(units: Tensor, among: Tensor, size: int) -> Tensor:
    """Where each of the units, positions below size, stands among others; -1: it is none of them."""
    where = torch.full((size,), -1)
    where[among] = torch.arange(len(among))
    return where[units]


def _replaced(
    block: Block, piece: Slice, selection: Selection, index: Mapping[tuple[str, int], Tensor], before: Left, times: int
) -> tuple[Slice, Left | None]:
    """Gives a block other units than those of its slice, in the weight's new order. before: all that ever trained in
    the weight. Returns its new slice, and what gave way."""
    size = piece.shape[block.dim]
    order = index.get((block.name, block.dim), torch.arange(size))
    mask = torch.isin(order, selection.indices)
    indices = order[mask]
    where = _places(indices, before.indices, size)
    again = where >= 0
    # What is chosen starts afresh, where it trained before too: so restarted, AdamW learns more.
    came_from = _places(indices, piece.indices.cpu(), size) if mask.all() else torch.full_like(indices, -1)
    block.choose(mask, again.nonzero().squeeze(1), before.take(where[again]), came_from)
    gone = ~torch.isin(before.indices, indices)
    kept = before.take(gone.nonzero().squeeze(1))
    left = kept.moved()
    block.keep(left or kept.take(torch.arange(0)), times)
    return replace(piece, indices=indices, roles=selection.roles, delta=block.delta), left
