"""Blocks: the slices of a prepared model while they train, each in its weight or beside it.

    W[block] == cast(W0 + D)        looked at, and written, at every read, so that a change of D by any road is in it

A weight that cannot be written, since it is quantized, stays as it is, and so do the positions of its units: the slice
lies beside it, and the layer's forward adds what it makes (`Beside`, `passes.backward.beside`). How a module reads its
blocks is `sliced`.
"""

import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from s2ft_compile.errors import StateError
from s2ft_compile.kernels import refresh as kernel
from s2ft_compile.passes.backward.beside import HELD, added, inverse_of
from s2ft_compile.passes.ranges import put, ranges, take
from s2ft_compile.quantized import Quantized, Values, same_parts, settle

from .processes import check_not_partitioned, other_process
from .sliced import reclass

Ranges = tuple[tuple[int, int], ...]
_blocks = WeakIdKeyDictionary()  # a weight or a delta -> its block
_writing = threading.Lock()  # one thread sees that a delta changed, and writes it


@dataclass(eq=False)
class Stamp:
    """What a tensor held when it was looked at: its version and, on a CPU, a checksum, as `.data` counts no version."""

    version: int
    checksum: int | None

    @classmethod
    def of(cls, tensor: Tensor, part: Callable[[], Tensor]) -> "Stamp":
        """part: what counts of the tensor. Without a checksum are memory that processes share, as another one may write
        it, and what is no plain tensor, such as a fake one."""
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and not tensor.is_shared()
        if not plain:
            return cls(tensor._version, None)
        return cls(tensor._version, zlib.crc32(part().contiguous().view(-1).view(torch.uint8).numpy()))

    def __eq__(self, other) -> bool:
        if self.checksum is None or other.checksum is None:
            return self.version == other.version
        return self.checksum == other.checksum


@dataclass(eq=False, kw_only=True)
class Block:
    """A slice while it trains: in place or beside its weight.

    delta: float32, of the weight's shape but for `dim`. places: the modules that hold the weight, each with the name it
    has there. delta_key: what the delta is called beside it.
    """

    beside: ClassVar[bool] = False  # whether the layer's forward adds what the slice makes; or its weight holds it

    name: str
    weight: nn.Parameter
    dim: int
    delta: nn.Parameter
    places: list[tuple[nn.Module, str]]
    delta_key: str
    active: bool = False  # whether reading attaches: not in the base model's order, nor in what was released
    attached: bool = False  # whether a forward has used the delta, so that it can have a gradient
    owns_gradient: bool = False
    loading: bool = False  # whether load_state_dict may put another tensor in its place
    came_from: Tensor | None = None  # since an optimizer's last step: each unit's place in the delta then, -1: new

    def __post_init__(self):
        self._register()

    def __setstate__(self, values):  # copy.deepcopy and pickle arrive here
        self.__dict__.update(values)
        self.owns_gradient = False  # copies have no hooks
        self._register()

    def _register(self) -> None:
        _blocks[self.weight] = _blocks[self.delta] = self

    @property
    def delta_name(self) -> str:
        """What the delta is called in the model, as `name` is the weight's."""
        return self.name.removesuffix(self.places[0][1]) + self.delta_key

    def install(self) -> None:
        """From now on reading the weight attaches the delta."""
        for module, key in self.places:
            module.__dict__.setdefault(HELD, {})[key] = self
            module._parameters[self.delta_key] = self.delta
            reclass(module)
        self.active = True

    def uninstall(self) -> None:
        self.active = False
        for module, key in self.places:
            if module.__dict__.get(HELD, {}).pop(key, None) is self:  # not where `install` did not get to
                del module._parameters[self.delta_key]
                reclass(module)

    def adopt(self) -> None:
        """Takes the tensors that the module holds now, after `_apply` or a load that may have replaced them."""
        module, key = self.places[0]
        self.weight, self.delta = module._parameters[key], module._parameters[self.delta_key]
        self._register()

    def own_gradient(self) -> None:
        """From now on copies the delta's gradients out of the memory they are made in."""
        if not self.owns_gradient:
            self.delta.register_hook(torch.clone)
            self.owns_gradient = True

    def follow_shards(self) -> bool:
        """Whether FSDP has replaced the tensors by shards, which are the block's from then on."""
        raise NotImplementedError

    def check_loaded(self, name: str, weight: Tensor, delta: Tensor | None = None) -> None:
        """Raises `StateError` for a weight, called `name`, that is not of this block's base."""
        raise NotImplementedError

    @torch.no_grad()
    def choose(self, mask: Tensor, again: Tensor, earlier, came_from: Tensor) -> None:
        """The block becomes other positions of the weight, those of `mask`; their deltas are zero, but for those at
        `again` in it, which have trained before and go on: `earlier` has their delta and the base's values. came_from:
        the places that they had in the block, -1 where they did not train."""
        self.delta.zero_()
        self.delta.grad = None
        self.delta.index_copy_(self.dim, again.to(self.delta.device), earlier.delta.to(self.delta.device))
        if self.came_from is not None:  # chosen twice between two steps
            came_from = torch.where(came_from >= 0, self.came_from[came_from], -1)
        self.came_from = came_from

    # --- what there is to do where the weight holds the slice (`InPlace`), and nothing where it holds the base's values

    def edited(self) -> bool:
        return False

    def put(self, trained: bool) -> None:
        pass

    def keep(self, left, times: int) -> None:
        """What trained before (a `Left`) and gave way, after units were chosen anew so many times."""

    def refresh(self) -> None:
        pass

    def refresh_shards(self) -> None:
        pass

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        pass

    def loaded(self, weight: bool, delta: bool) -> None:
        pass


@dataclass(eq=False, kw_only=True)
class InPlace(Block):
    """A slice in its weight, whose block holds cast(W0 + D).

    ranges: the (start, length) it occupies along `dim` of the permuted weight. backup: W0 of the block, the weight's
    dtype.
    """

    ranges: Ranges
    backup: Tensor = field(default_factory=lambda: torch.empty(0))
    seen: tuple[Stamp, Stamp] | None = None  # weight and delta when the block was last written

    def __post_init__(self):
        super().__post_init__()
        self._lie_in(self.ranges)

    def _lie_in(self, ranges: Ranges) -> None:
        self.ranges = ranges
        self.starts, self.lengths = [s for s, _ in ranges], [n for _, n in ranges]

    def __setstate__(self, values):
        super().__setstate__(values)
        self.seen = None  # copies count versions anew

    def adopt(self) -> None:
        super().adopt()
        self.seen = None

    def follow_shards(self) -> bool:
        """Whether FSDP has replaced weight and delta by shards, which are the block's from then on."""
        module, key = self.places[0]
        held = module._parameters.get(key)
        if held is not self.weight and hasattr(held, "placements"):
            self.adopt()
        return hasattr(self.weight, "placements")

    @torch.no_grad()
    def choose(self, mask: Tensor, again: Tensor, earlier, came_from: Tensor) -> None:
        super().choose(mask, again, earlier, came_from)
        self._lie_in(ranges(mask))
        self.backup = self.read()  # the base's values, but at `again`
        self.backup.index_copy_(self.dim, again.to(self.backup.device), earlier.backup.to(self.backup.device))
        self.seen = None

    # --- the weight's values -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def write(self, values: Tensor, quietly: bool = False) -> None:
        """Copies a block of the delta's shape into the weight; quietly, without its version counter."""
        self.write_to(self.weight.data if quietly else self.weight, values)

    def write_to(self, weight: Tensor, values: Tensor) -> None:
        """The same into another tensor of the weight's shape."""
        put(weight, self.dim, self.ranges, values)

    @torch.no_grad()
    def read(self) -> Tensor:
        return self.part_of(self.weight).clone()

    def part_of(self, weight: Tensor) -> Tensor:
        return take(weight, self.dim, self.ranges)

    @torch.no_grad()
    def trained(self, delta: Tensor | None = None) -> Tensor:
        """cast(W0 + delta), of shards the whole: the sum in the wider of the two types, rounded once. delta: by default
        the block's own."""
        delta = whole(self.delta if delta is None else delta).to(self.backup.device)
        return self._wide(self.backup).add(self._wide(delta)).to(self.backup.dtype)

    def _wide(self, x: Tensor) -> Tensor:
        return x.to(torch.promote_types(self.backup.dtype, self.delta.dtype))

    def refresh(self) -> None:
        refresh([self])

    def write_own(self, values: Tensor) -> None:
        """Copies a whole block into what this process has of the weight, without its version counter."""
        if not self.follow_shards():
            self.write(values, quietly=True)
        else:
            for local, part in self._local_parts(self.weight, values):
                local.copy_(part)

    @torch.no_grad()
    def put(self, trained: bool) -> None:
        """Writes the trained block into the weight, or the base's."""
        self.write_own(self.trained() if trained else self.backup)

    @torch.no_grad()
    def refresh_shards(self) -> None:
        """Writes this process's part of the block. Gathers the delta, so every process has to get here."""
        self.write_own(self.trained())

    def _local_parts(self, weight: Tensor, whole: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What this process holds of the block in a sharded weight, beside the same part of the whole block."""
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        local = weight.to_local()
        _, offsets = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
        for dim in range(whole.ndim):
            if dim != self.dim:
                whole = whole.narrow(dim, min(offsets[dim], whole.shape[dim]), local.shape[dim])
        first, size, at = offsets[self.dim], local.shape[self.dim], 0
        for start, length in self.ranges:
            low, high = max(start, first), min(start + length, first + size)
            if low < high:
                yield (
                    local.narrow(self.dim, low - first, high - low),
                    whole.narrow(self.dim, at + low - start, high - low),
                )
            at += length

    @torch.no_grad()
    def take_as_trained(self) -> None:
        """The delta becomes what the weight holds now. Of shards, every process has to get here."""
        delta = self._wide(self.part_of(whole(self.weight))) - self._wide(self.backup)
        self.delta.copy_(as_sharded(delta, self.delta))
        self.seen = None
        self.refresh()

    def loaded(self, weight: bool, delta: bool) -> None:
        """After a load of either or both. The base's block is what was loaded, where the model had no values before."""
        if self.backup.is_meta and weight and not self.weight.is_meta:
            if delta and whole(self.delta).any():
                raise StateError(
                    f"{self.name} was prepared without values (on the meta device), so the base model's weights have "
                    f"to be loaded before those of a checkpoint"
                )
            self.backup = self.part_of(whole(self.weight.detach())).clone()
        if self.weight.is_meta or self.delta.is_meta:
            return
        if delta:
            self.refresh_shards() if self.follow_shards() else self.refresh()
        elif weight and not self._is_trained(self.weight, self.delta, exact=True):
            self.take_as_trained()

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """After `_apply` of fn to weight and delta. What has no values has none after `to_empty` either."""
        moved = fn(self.backup)
        self.backup = self.backup.to(moved.dtype) if self.backup.is_meta else moved
        self.refresh()

    @torch.no_grad()
    def look(self) -> tuple[Stamp, Stamp]:
        """What weight and delta hold now."""
        return Stamp.of(self.weight, self.read), Stamp.of(self.delta, self.delta.detach)

    def edited(self, now: tuple[Stamp, Stamp] | None = None) -> bool:
        """Whether something else wrote the weight, and left another block in it than the present one. A running average
        of all of a model moves both, and leaves the weight between the base's and what the averaged delta says."""
        if self.seen is None:
            return False
        (weight, delta), (last_weight, last_delta) = now or self.look(), self.seen
        if weight == last_weight or torch.equal(self.read(), self.trained()):
            return False
        return delta == last_delta or not self._is_trained(self.weight, self.delta, room=self.delta.abs().max())

    def check_loaded(self, name: str, weight: Tensor, delta: Tensor | None = None) -> None:
        """Raises `StateError` for a weight that differs from this one outside of the block, or in the block from the
        base's with this delta."""
        if any(t.is_meta for t in (weight, self.weight, self.backup)) or weight.shape != self.weight.shape:
            return
        frozen = torch.ones(weight.shape[self.dim], dtype=torch.bool)
        for start, length in self.ranges:
            frozen[start : start + length] = False
        check_same(name, weight, self.weight, self.dim, frozen.nonzero().squeeze(1))
        if delta is not None and delta.shape == self.delta.shape and weight.dtype == self.backup.dtype:
            if not self._is_trained(weight, delta):
                raise StateError(
                    f"the weights to load are not of this prepared model's base, or train other units of it: {name} is "
                    f"not the base's with the delta beside it. Prepare the same base with the same configuration"
                )

    @torch.no_grad()
    def _is_trained(self, weight: Tensor, delta: Tensor, exact: bool = False, room: Tensor | float = 0) -> bool:
        """Whether a weight's block is cast(W0 + delta): up to the rounding of means over checkpoints and `room`, or
        exactly. Of a sharded weight each process looks at its own part."""
        trained = self.trained(delta)
        if hasattr(weight, "placements"):
            parts = list(self._local_parts(weight, trained))
        else:
            parts = [(self.part_of(weight.detach()).to(trained.device), trained)]
        if exact:
            return all(torch.equal(held, part) for held, part in parts)
        room = room + 4 * torch.finfo(trained.dtype).eps * trained.abs().max()
        return all(((held - part).abs() <= room).all() for held, part in parts)


@dataclass(eq=False, kw_only=True)
class Beside(Block):
    """A slice beside a weight that is never written.

    size: of the weight's values along `dim`. index: int64, the slice's positions there, in the base model's order.
    earlier: a `Left`, what trained before units were chosen anew, `times` times; a second slice, which is frozen.
    """

    beside = True
    size: int
    index: Tensor
    earlier: Any = None
    times: int = 0

    def _register(self) -> None:
        _blocks[self.delta] = self  # a weight that is known by weak references cannot be moved to another device

    @property
    def buffers(self) -> dict[str, Tensor]:
        """What the module holds besides, by name, and moves to another device: the positions and their inverse, and the
        same of what trained before, with its delta in the type of the weight's values."""
        held = {"index": self.index, "inverse": inverse_of(self.index, self.size)}
        if self.earlier is not None:
            delta, index, inverse = padded(self.earlier, room(len(self.index), self.times, self.size), self.size)
            held |= {"earlier": delta, "earlier_index": index, "earlier_inverse": inverse}
        return {f"{self.delta_key}_{part}": t.to(self.delta.device) for part, t in held.items()}

    def install(self) -> None:
        for module, key in self.places:
            if "forward" in module.__dict__:
                raise StateError(
                    f"{self.name}: the forward of its layer was replaced in that object (by hooks of accelerate, for a "
                    f"model on several devices?), and the slice beside a quantized weight would be left out. Load the "
                    f"model on one device"
                )
            settle(module, key)
        self._hold(self.buffers)
        super().install()

    def uninstall(self) -> None:
        super().uninstall()
        self._hold({})

    def _hold(self, buffers: Mapping[str, Tensor]) -> None:
        """The modules hold these from now on; in the same memory, where they have as much of it."""
        for module, _ in self.places:
            held = {f"{self.delta_key}_{part}" for part in PARTS} & module._buffers.keys()
            for name in held - buffers.keys():
                del module._buffers[name]
                module._non_persistent_buffers_set.discard(name)
            for name, t in buffers.items():
                if name in held and (module._buffers[name].shape, module._buffers[name].dtype) == (t.shape, t.dtype):
                    module._buffers[name].copy_(t)
                else:
                    module.register_buffer(name, t.clone(), persistent=False)

    def choose(self, mask: Tensor, again: Tensor, earlier, came_from: Tensor) -> None:
        super().choose(mask, again, earlier, came_from)
        self.index = mask.nonzero().squeeze(1).to(self.index.device)

    def keep(self, left, times: int) -> None:
        self.earlier, self.times = left, times
        self._hold(self.buffers)

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        self._hold(self.buffers)  # `fn` may have rounded them

    def add_to(self, y: Tensor, x: Tensor, module: nn.Module) -> Tensor:
        """What the layer gives for x, of what it gives without the slice."""
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            self.attached = True
        key, held = self.delta_key, module._buffers
        y = added(x, y, module._parameters[key], self.dim, held[f"{key}_index"], held[f"{key}_inverse"])
        if f"{key}_earlier" in held:
            of = (held[f"{key}_earlier{part}"] for part in ("", "_index", "_inverse"))
            delta, index, inverse = of
            y = added(x, y, delta, self.dim, index, inverse)
        return y

    @torch.no_grad()
    def trained(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """cast(W0 + D), of shards the whole: the sum in the wider of the two types, rounded once. values: the weight's,
        dequantized. dtype: of the result; by default theirs."""
        return self._sum(values, self.index, whole(self.delta), dtype)

    def _sum(self, values: Tensor, index: Tensor, delta: Tensor, dtype: torch.dtype | None) -> Tensor:
        delta = delta.to(values.device)
        wide = torch.promote_types(values.dtype, delta.dtype)
        block = values.index_select(self.dim, index.to(values.device))
        return block.to(wide).add(delta.to(wide)).to(dtype or values.dtype)

    @torch.no_grad()
    def with_all(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The weight's values, dequantized, with all that trains or ever did: each sum rounded once, to `dtype`."""
        result = values.to(dtype or values.dtype, copy=True)
        for index, delta in self.all_of_it():
            result.index_copy_(self.dim, index.to(result.device), self._sum(values, index, delta, dtype))
        return result

    def all_of_it(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(positions, delta) of what trains, and of what trained before."""
        yield self.index, whole(self.delta)
        if self.earlier is not None and len(self.earlier.indices):
            yield self.earlier.indices, self.earlier.delta

    def follow_shards(self) -> bool:
        held = self.places[0][0]._parameters.get(self.delta_key)
        if held is not None and held is not self.delta:
            self.adopt()
        return hasattr(self.delta, "placements")

    def check_loaded(self, name: str, weight: Tensor, delta: Tensor | None = None) -> None:
        """Raises `StateError` for another weight than this one: it is compared, never loaded."""
        if not weight.is_meta and not same_parts(self.weight.detach(), weight.detach()):
            raise _other_base(name)


PARTS = ("index", "inverse", "earlier", "earlier_index", "earlier_inverse")  # of a slice beside a weight


def room(n: int, times: int, size: int) -> int:
    """How many units there is room for, of `size`, that trained before `n` others were chosen so many times: 4, 8, 12,
    16, 24, 32, 48, ... times `n`. A graph is compiled for each; so the room is not that of what a weight needs."""
    step = 1 << max(2, times.bit_length() - 2)
    return min(size - n, n * (-(-times // step) * step))


def padded(left, room: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What trained before as a slice of `room` units: its delta, zero where it has fewer, positions, their inverse."""
    shape = [*left.delta.shape[: left.dim], room, *left.delta.shape[left.dim + 1 :]]
    delta, index = left.delta.new_zeros(shape, dtype=left.backup.dtype), torch.zeros(room, dtype=torch.int64)
    delta.narrow(left.dim, 0, len(left.indices)).copy_(left.delta)
    index[: len(left.indices)] = left.indices
    return delta, index, inverse_of(left.indices, size)


def _other_base(name: str) -> StateError:
    return StateError(
        f"the weights to load are not of this prepared model's base: {name}, which is quantized, differs. Load the "
        f"same quantized model, and prepare it with the same configuration"
    )


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor: of shards, gathered, so every process has to get here."""
    return tensor.full_tensor() if hasattr(tensor, "placements") else tensor


def as_sharded(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as the shards of another, if that has some."""
    if not hasattr(like, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def check_extra(weight: Quantized, state_dict: dict[str, Tensor], prefix: str = "") -> None:
    """Takes out of a state dict what a quantized weight has there besides itself, which not every library loads. Raises
    `StateError` where that differs from what it has now."""
    path = prefix + weight.name.removesuffix(weight.key)
    for name, t in weight.saved().items():
        if name not in weight.layer._parameters and (given := state_dict.get(path + name)) is not None:
            if not same_parts(t, given):
                raise _other_base(path + name)
            if name not in weight.layer._buffers:
                del state_dict[path + name]


def check_same(name: str, given: Tensor, held: Tensor, dim: int, index: Tensor) -> None:
    if hasattr(given, "placements") or hasattr(held, "placements"):
        return
    given, held = (t.index_select(dim, index.to(t.device)) for t in (given, held.detach()))
    if not torch.equal(given.to(held), held):
        raise StateError(
            f"the weights to load are not in this prepared model's order or not of its base: {name} differs where "
            f"nothing trains. Load them before s2ft.prepare, or with s2ft.exporters.load_adapter if they are an adapter"
        )


def block_of(tensor: Any) -> Block | None:
    """The block whose weight or delta this very tensor is."""
    block = _blocks.get(tensor) if isinstance(tensor, Tensor) else None
    return block if block is not None and (tensor is block.weight or tensor is block.delta) else None


def trains_slices(inputs: Iterable[Any]) -> bool:
    """Whether a graph of these inputs, traced now, trains slices."""
    return torch.is_grad_enabled() and any(block_of(x) is not None and x.requires_grad for x in inputs)


def refresh(blocks: Iterable[Block]) -> None:
    """Writes the deltas into their weights: on a GPU in one launch, elsewhere one after another.

    Where no delta has changed nothing is written, or, where that cannot be seen, the same values: one may have changed
    behind its version counter (`.data`). Autograd need not know of that, or a checkpoint's recomputation would spoil
    what the forward saved.
    """
    with _writing:
        together = []
        for block in blocks:
            if (
                not isinstance(block, InPlace)
                or not block.active
                or block.weight.is_meta
                or block.backup.is_meta
                or block.follow_shards()
            ):
                continue  # shards are written where all processes are: after an optimizer's step
            check_not_partitioned(block.name, block.weight)
            now = block.look()
            if block.edited(now):
                raise StateError(
                    f"{block.name} was changed in place, and the next write of its slice would undo a part of that. "
                    f"Change weights before s2ft.prepare, or by load_state_dict; s2ft.release(model) keeps them as they"
                    f" are now{other_process()}"
                )
            quietly = block.seen is not None and block.seen[1].version == now[1].version
            if kernel.fits(block.weight, block.backup, block.delta):
                together.append((block, quietly))
            elif now != block.seen or now[0].checksum is None:
                block.write(values := block.trained(), quietly)
                block.seen = Stamp.of(block.weight, lambda values=values: values), now[1]
        if together:
            kernel.refresh(
                [(b.weight.data if q else b.weight, b.backup, b.delta, b.dim, b.ranges) for b, q in together]
            )
        for block, _ in together:
            block.seen = block.look()


def blocks_in(module: nn.Module) -> list[Block]:
    """The blocks of a module and of all below it, each once."""
    held = (m.__dict__.get(HELD) for m in module.modules())
    return list({id(block): block for blocks in held if blocks for block in blocks.values()}.values())


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The named parameters that the model has itself: all but the deltas."""
    deltas = {id(block.delta) for block in blocks_in(model)}
    return {name: p for name, p in model.named_parameters() if id(p) not in deltas}


def beside_of(model: nn.Module, weight: Quantized, dim: int, index: Tensor, delta: Tensor | None = None) -> Beside:
    """A slice beside a quantized weight, not yet installed. index: int64 (n,). delta: of values that stay; by default
    zeros that train."""
    shape = [*weight.shape[:dim], len(index), *weight.shape[dim + 1 :]]
    held, places = weight.held, places_of(model, weight.held)
    values = torch.zeros(shape, dtype=torch.float32) if delta is None else delta.detach().clone()
    parameter = nn.Parameter(values.to(held.device), requires_grad=delta is None)
    return Beside(
        name=weight.name,
        weight=held,
        dim=dim,
        delta=parameter,
        places=places,
        delta_key=free_key(places),
        size=weight.shape[dim],
        index=index.to(torch.int64),
    )


class Trained(Values):
    """The same with all that slices beside quantized weights have learned."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.blocks = {block.name: block for block in blocks_in(model) if isinstance(block, Beside)}

    def __getitem__(self, name: str) -> Tensor:
        values = super().__getitem__(name)
        return self.blocks[name].with_all(values) if name in self.blocks else values


def places_of(model: nn.Module, weight: nn.Parameter) -> list[tuple[nn.Module, str]]:
    """The modules that hold a weight, each with the name it has there."""
    return [(m, key) for m in model.modules() for key, p in m._parameters.items() if p is weight]


def free_key(places: list[tuple[nn.Module, str]]) -> str:
    """A name for the delta beside its weight that no module uses for something else."""
    key = f"{places[0][1]}_delta"
    while any(hasattr(module, key) for module, _ in places):
        key += "_"
    return key
