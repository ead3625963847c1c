"""Fresh weights for a rollout engine: what training has changed is known by construction, so nothing is compared.

A patch is what vLLM's sparse weight transfer takes (`SparseWeightPatch`): a checkpoint's name, flat int32 positions in
the base model's order, the trained values there, and the whole shape. The positions stay the same from step to step.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from s2ft_compile.capture.models import unwrap
from s2ft_compile.errors import ExportError
from s2ft_compile.plan import Slice
from s2ft_compile.quantized import Quantized, quantized_in
from s2ft_compile.slices.blocks import Beside, Block, InPlace
from s2ft_compile.slices.state import Left, State, state_of

from .conversion import as_stored
from .merged import dtype_of_others


@dataclass(frozen=True, eq=False)
class Patch:
    """W.view(-1)[indices] = values. indices: int32 (n,). values: (n,), of the weight's type. full_shape: W's."""

    name: str
    indices: Tensor
    values: Tensor
    full_shape: tuple[int, ...]

    def apply(self, weight: Tensor) -> None:
        """Writes it into a plain, contiguous weight of the base model's order."""
        weight.detach().view(-1)[self.indices.to(weight.device).long()] = self.values.to(weight)


@dataclass(frozen=True, eq=False)
class _Place:
    """Where entries of a block lie in a checkpoint. picked: which, None for all of them in order."""

    name: str
    shape: tuple[int, ...]
    block: Block | Left
    indices: Tensor
    picked: Tensor | None


_places: "WeakKeyDictionary[State, tuple[int, list[_Place]]]" = WeakKeyDictionary()  # by how often units were chosen


@torch.no_grad()
def patches(model: nn.Module) -> Iterator[Patch]:
    """What a prepared model has trained, as patches of its base's checkpoint: set, not added, so one may be repeated.

    What trains beside quantized weights is added to these, dequantized: for an engine that holds what `save_merged(...,
    dequantize=True)` writes of the base, not the model that was quantized. Of a sharded model every process calls this,
    and each gets all of the (small) patches. Raises `StateError` for a model that is not prepared, `ExportError` for a
    weight of 2^31 numbers or more.
    """
    state = state_of(model)
    quantized = quantized_in(state.model)
    others = dtype_of_others(state.model) if quantized else None
    if _places.get(state, (-1, []))[0] != state.arranged:
        _places[state] = state.arranged, list(_places_of(state, unwrap(model)))
    trained: dict[int, Tensor] = {}
    for place in _places[state][1]:
        if id(place.block) not in trained:
            trained = {id(place.block): _trained(place.block, quantized, others).reshape(-1)}
        values = trained[id(place.block)]
        if place.picked is not None:
            values = values[place.picked.to(values.device)]
        yield Patch(place.name, place.indices.to(values.device), values, place.shape)


def _trained(block: Block | Left, quantized: Mapping[str, Quantized], others: torch.dtype | None) -> Tensor:
    """What a block is with its delta: the sum, rounded once. others: the type of what is not quantized."""
    if isinstance(block, Left):
        return block.trained(others if block.beside else None)
    if isinstance(block, InPlace):
        return block.trained()
    assert isinstance(block, Beside)
    return block.trained(quantized[block.name].values(), others)


def _places_of(state: State, module: nn.Module) -> Iterator[_Place]:
    shapes = {s.parameter_name: s.shape for s in state.plan.slices}
    turned = {name for name, weight in quantized_in(module).items() if weight.turned}
    pairs: list[tuple[Slice, Block | Left]] = [*zip(state.plan.slices, state.blocks)]
    pairs += [(Slice(b.name, b.dim, b.indices, shapes[b.name], ()), b) for b in state.left_behind]
    for s, block in pairs:
        if prod(s.shape) >= 1 << 31:
            raise ExportError(f"{s.parameter_name} has {prod(s.shape):,} numbers, and positions are int32")
        flat = _flat(s.shape, s.dim, s.indices)
        if not hasattr(module, "save_pretrained"):
            yield _Place(s.parameter_name, s.shape, block, flat.int(), None)
            continue
        marks = torch.full((prod(s.shape),), -1, dtype=torch.int32)  # which entry of the block each number is
        marks[flat] = torch.arange(len(flat), dtype=torch.int32)
        with state.names_as_stored(module):
            held = marks.view(s.shape)
            stored = as_stored(module, {s.parameter_name: held.T if s.parameter_name in turned else held})
        for name, entries in stored.items():
            at = (entries.reshape(-1) >= 0).nonzero().squeeze(1)
            if len(at):
                yield _Place(name, tuple(entries.shape), block, at.int(), entries.reshape(-1)[at].long())


def _flat(shape: tuple[int, ...], dim: int, indices: Tensor) -> Tensor:
    """The positions of a block in a contiguous tensor, in the block's own row-major order: int64."""
    flat, stride = torch.zeros((), dtype=torch.int64), 1
    for d in reversed(range(len(shape))):
        along = (indices.cpu() if d == dim else torch.arange(shape[d])) * stride
        flat = flat + along.view(-1, *[1] * (len(shape) - 1 - d))
        stride *= shape[d]
    return flat.reshape(-1)
