"""`AdapterBank`: many adapters behind one model, switched, fused, or one for each row of a batch.

Switching writes blocks of weights in place: W[indices] = cast(W0 + delta), and W0 to go back, bit for bit. Nothing a
compiled graph depends on changes. Quantized weights are not written: an adapter's slices lie beside them while it is
active, as `load_adapter` puts them. A batch leaves the weights alone, and adds to what each linear layer gives
(`batched`); what holds vectors runs with those of each row (`vectors`).
"""

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from s2ft_compile.capture.models import unwrap
from s2ft_compile.errors import AdapterError, StateError
from s2ft_compile.plan import Slice, delta_of
from s2ft_compile.quantized import Values, settle
from s2ft_compile.slices.blocks import Beside, beside_of, blocks_in
from s2ft_compile.slices.state import is_prepared

from .apply import check_fits, summed
from .batched import Packed, Picked, Stack, places
from .format import Adapter, read_adapter
from .layers import is_linear, linear_layers, matrices, vector_modules, vectors
from .vectors import Biases, PickedBiases, PickedVectors, Vectors, tensors

Written = tuple[Tensor, int, Tensor, Tensor]  # weight, dim, indices, values
Stacks = Mapping[str, tuple[Stack | Biases | Vectors, ...]]  # of every layer
Picks = Mapping[str, tuple[Picked | Packed | PickedBiases | PickedVectors, ...]]  # what a batch takes from them
BATCHED = "in a batch"
Asked = tuple[tuple[int, ...], tuple[int, ...]]  # of packed requests: their adapters and their lengths


@dataclass(frozen=True, eq=False)
class Blocks:
    """What an adapter's blocks of the weights are with it and without, and its slices beside quantized ones."""

    tuned: tuple[Written, ...] = ()
    base: tuple[Written, ...] = ()
    beside: tuple[Beside, ...] = ()


class _Now(threading.local):
    """What the batch of this thread uses: how many rows it has, and what they take from every layer's stacks."""

    def __init__(self) -> None:  # once in every thread
        self.rows: int | None = None
        self.packed = False  # whether the rows are tokens, in one row of the model
        self.picked: Picks = {}


class AdapterBank:
    """Adapters for one plain model in its ordinary order, which must not be trained or prepared meanwhile.

    Safe to use from several threads: batches run side by side, each with its thread's own adapters; what changes
    weights waits for them. A forward that depends on `activate` belongs inside `using`, which keeps others out.
    Raises `StateError` for a prepared model, and for one with an adapter beside its quantized weights.
    """

    def __init__(self, model: nn.Module):
        if is_prepared(model):
            raise StateError(
                "an AdapterBank holds adapters for a plain model; this one is prepared: call "
                "s2ft.release(model), or load the base model again"
            )
        self.model = unwrap(model)
        if blocks_in(self.model):
            raise StateError(
                "an adapter's slices lie beside this model's quantized weights already; "
                "s2ft.exporters.unload_adapter(model) takes them off, and the bank holds that adapter as any other"
            )
        for weight in Values(self.model).quantized.values():
            settle(weight.layer, weight.key)
        self.active: tuple[str, ...] = ()  # the names whose sum the weights hold
        self._adapters: dict[str, Adapter] = {}  # on the model's device
        self._blocks: dict[str, Blocks] = {}  # of those that were activated
        self._written = Blocks()  # of those that are active; what they wrote is in the weights
        self._stacks: Stacks | None = None
        self._last: tuple[Stacks, Asked, Picks] | None = None  # of packed requests; steps of decoding repeat it
        self._token_axes: dict[str, int] = {}  # of the inputs of modules with vectors
        self._hooked: set[str] = set()
        self._batches = 0
        self._free = threading.Condition(threading.RLock())
        self._now = _Now()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters, in the order in which they came."""
        return tuple(self._adapters)

    # --- which adapters there are ---

    def add(self, name: str, adapter: Adapter | str | os.PathLike[str]) -> None:
        """adapter: a folder of `save_adapter`. Raises `AdapterError` for a name in use, or another base's adapter."""
        read = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
        if not isinstance(name, str) or not name:
            raise AdapterError(f"an adapter's name is a text, got {name!r}")
        with self._exclusive():
            if name in self._adapters:
                raise AdapterError(f"there is an adapter {name!r} already; remove it first")
            before = self._state()
            self._switch((), Blocks())
            try:
                check_fits(self.model, read)
                self._adapters = {**self._adapters, name: _placed(self.model, read)}
            finally:
                self._switch(*before)
            self._stacks = self._last = None

    def remove(self, name: str) -> None:
        """Forgets an adapter, and frees its memory; the base model's weights are back if it was active."""
        with self._exclusive():
            self._adapter(name)
            if name in self.active:
                self._switch((), Blocks())
            self._adapters = {n: a for n, a in self._adapters.items() if n != name}
            self._blocks.pop(name, None)
            self._stacks = self._last = None

    def _adapter(self, name: str) -> Adapter:
        if name not in self._adapters:
            raise AdapterError(f"no adapter {name!r}; there are: {', '.join(map(repr, self._adapters)) or 'none'}")
        return self._adapters[name]

    # --- in the weights ---

    def activate(self, name: str | None) -> None:
        """Makes the weights those of one adapter, or with None the base model's, in place and bit for bit."""
        with self._exclusive():
            if name is None:
                self._switch((), Blocks())
            else:
                self._switch((name,), self._blocks_of(name))

    def _blocks_of(self, name: str) -> Blocks:
        """Made when an adapter is first activated: a bank that runs batches only does not hold them."""
        adapter = self._adapter(name)
        if name not in self._blocks:
            before = self._state()
            self._switch((), Blocks())
            try:
                self._blocks[name] = _blocks(self.model, [(adapter, 1.0)])
            finally:
                self._switch(*before)
        return self._blocks[name]

    def fuse(self, weights: Mapping[str, float]) -> dict[tuple[str, str], int]:
        """Makes the weights cast(W0 + sum of weight * delta), and returns how many entries each two adapters share.

        The paper's fusion without interference is the one where all of these are 0. Raises `AdapterError` for an
        unknown name, a weight that is not finite, a sum that is not, and rows and columns of one quantized weight.
        """
        if not isinstance(weights, Mapping) or not all(map(_finite, weights.values())):
            raise AdapterError(f"a sum maps names to finite numbers, as {{'law': 1.0}}; got {weights!r}")
        with self._exclusive():
            adapters, before = {name: self._adapter(name) for name in weights}, self._state()
            self._switch((), Blocks())
            try:
                fused = _blocks(self.model, [(adapters[name], float(weight)) for name, weight in weights.items()])
            except AdapterError as error:
                self._switch(*before)
                raise AdapterError(f"with {dict(weights)} {error}") from None
            self._switch(tuple(weights), fused)
            return {(a, b): _shared(adapters[a], adapters[b]) for a, b in combinations(adapters, 2)}

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """`activate(name)` for a block, in which no other thread changes weights or runs a batch."""
        with self._exclusive():
            before = self._state()
            self.activate(name)
            try:
                yield
            finally:
                self._switch(*before)

    def _state(self) -> tuple[tuple[str, ...], Blocks]:
        """What `_switch` takes to bring back the weights as they are now."""
        now = tuple((W, dim, i, W.detach().index_select(dim, i)) for W, dim, i, _ in self._written.base)
        return self.active, replace(self._written, tuned=now)

    def _switch(self, names: tuple[str, ...], blocks: Blocks) -> None:
        _write(self._written.base)
        for block in self._written.beside:
            block.uninstall()
        _write(blocks.tuned)
        for block in blocks.beside:
            block.install()
        self.active, self._written = names, replace(blocks, tuned=())

    # --- one for each row ---

    @contextmanager
    def batch(self, ids: Sequence[str | None], lengths: Sequence[int] | None = None) -> Iterator[None]:
        """A block in which row i of every forward uses the adapter ids[i], or the base model where it is None.

        Rows may be repeated (beams) or flattened with their tokens. lengths: of requests that are packed, one after the
        other, into the one row of the model; ids[i] is then that of the lengths[i] tokens of request i. Raises
        `AdapterError` for an unknown name or lengths that do not fit, `StateError` while an adapter is active,
        `ExportError` for slices of what is neither a linear layer's weight nor a vector of a module of its own.
        """
        listed = isinstance(ids, Sequence) and not isinstance(ids, str) and len(ids) > 0
        if not listed or not all(name is None or isinstance(name, str) for name in ids):
            raise AdapterError(f"a batch takes a list with a name or None for each row, got {ids!r}")
        if lengths is not None and (len(lengths) != len(ids) or not all(n > 0 for n in lengths)):
            raise AdapterError(f"packed requests have a positive length each, {len(ids)} in all; got {lengths!r}")
        with self._free:
            if self.active:
                raise StateError(f"{', '.join(self.active)} is active; call activate(None) before a batch")
            if self._now.rows is not None:
                raise StateError("a batch inside another one")
            for name in ids:
                if name is not None:
                    self._adapter(name)
            chosen = {name: k for k, name in enumerate(self._adapters, 1)}
            rows = [0 if name is None else chosen[name] for name in ids]
            stacks = self._prepared_stacks()
            self._batches += 1
        try:
            self._now.picked = self._pick(stacks, rows, lengths)
            self._now.rows, self._now.packed = sum(lengths or ()) or len(rows), lengths is not None
            yield
        finally:
            self._now.rows, self._now.packed, self._now.picked = None, False, {}
            with self._free:
                self._batches -= 1
                self._free.notify_all()

    def _pick(self, stacks: Stacks, rows: Sequence[int], lengths: Sequence[int] | None) -> Picks:
        device = next(self.model.parameters()).device
        terms: dict[tuple[Any, ...], Tensor] = {}
        ids = torch.tensor(rows, device=device)
        if lengths is None:
            return {name: tuple(s.picked(ids, terms) for s in several) for name, several in stacks.items()}
        asked, last = (tuple(rows), tuple(lengths)), self._last
        if last is None or last[0] is not stacks or last[1] != asked:
            each = ids.repeat_interleave(torch.tensor(lengths, device=device))
            tokens = places(each, len(rows))
            picked = {name: tuple(s.packed(each, tokens, terms) for s in several) for name, several in stacks.items()}
            self._last = last = stacks, asked, picked
        return last[2]

    @torch.no_grad()
    def learn_token_axes(self, forward: Callable[[int], Any]) -> None:
        """Finds out where the tokens are in what modules with vectors take, which packed requests cannot tell
        where two dimensions are of one size. forward: runs the model on one row of so many tokens."""
        shapes: dict[str, list[torch.Size]] = {}

        def look(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                shapes.setdefault(name, []).extend(t.shape for t in tensors((args, kwargs))[:1])

            return hook

        held = {name.rpartition(".")[0] for name, p in self.model.named_parameters() if p.dim() == 1}
        hooks = [
            self.model.get_submodule(name).register_forward_pre_hook(look(name), with_kwargs=True) for name in held
        ]
        try:
            forward(5)
            forward(7)
        finally:
            for hook in hooks:
                hook.remove()
        for name, (first, *_, last) in ((n, s) for n, s in shapes.items() if len(s) > 1):
            moved = [axis for axis, (a, b) in enumerate(zip(first, last)) if (a, b) == (5, 7)]
            if len(first) == len(last) and len(moved) == 1:
                self._token_axes[name] = moved[0]
        self._stacks = self._last = None

    def _prepared_stacks(self) -> Stacks:
        """Every layer's stacks, and a hook on each; a batch that runs keeps the ones it began with."""
        if self._stacks is None:
            self._stacks = _stacks(self.model, list(self._adapters.values()), self._token_axes)
        for name in self._stacks.keys() - self._hooked:
            self._hooked.add(name)
            self.model.get_submodule(name).register_forward_hook(_hook(self._now, name), with_kwargs=True)
        return self._stacks

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._free:
            if self._now.rows is not None:
                raise StateError("the weights are in use: this is inside a batch")
            while self._batches:
                self._free.wait()
            yield


def _finite(weight: Any) -> bool:
    try:
        return math.isfinite(weight)
    except (TypeError, OverflowError):
        return False


def _hook(now: _Now, name: str) -> Callable[..., Any]:
    def change(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
        for picked in now.picked.get(name, ()):
            if isinstance(picked, PickedVectors):
                y = picked.instead((args, kwargs), y)
            else:
                y = picked.add(_checked(now, args[0] if args else next(iter(kwargs.values()))), y)
        return y

    return change


def _checked(now: _Now, x: Tensor) -> Tensor:
    """The input of a linear layer, which has to be a batch of these rows."""
    assert now.rows is not None  # nothing is picked otherwise
    rows = x.numel() // x.shape[-1] if now.packed else x.shape[0]
    if rows != now.rows if now.packed else rows % now.rows:
        raise StateError(f"a batch of {now.rows} {'tokens' if now.packed else 'adapters'}, and {rows} rows")
    return x


@torch.no_grad()
def _write(blocks: Sequence[Written]) -> None:
    for W, dim, indices, values in blocks:
        W.index_copy_(dim, indices, values)


def _placed(model: nn.Module, adapter: Adapter) -> Adapter:
    held = dict(model.named_parameters())
    slices = [replace(s, delta=delta_of(s).to(held[s.parameter_name].device)) for s in adapter.slices]
    return replace(adapter, plan=replace(adapter.plan, slices=tuple(slices)))


@torch.no_grad()
def _blocks(model: nn.Module, adapters: Sequence[tuple[Adapter, float]]) -> Blocks:
    """A sum of adapters, each times its weight. model: the base. Raises `AdapterError`."""
    parts: dict[str, list[tuple[Slice, float]]] = {}
    for adapter, weight in adapters:
        for s in adapter.slices:
            parts.setdefault(s.parameter_name, []).append((s, weight))
    values, tuned, beside = Values(model), [], []
    sums: dict[str, Tensor] = {}
    for name, several in parts.items():
        if name in values.quantized:
            dim, indices, sums[name] = _delta(name, several)
            beside.append(beside_of(model, values.quantized[name], dim, indices, sums[name]))
        else:
            dim, indices, sums[name] = summed(values[name], several)
            tuned.append((values[name], dim, indices, sums[name]))
    if over := [name for name, block in sums.items() if not block.isfinite().all()]:
        raise AdapterError(f"the sum is not finite in {over[0]}, of {values.dtype(over[0])}")
    base = tuple((W, dim, indices, W.index_select(dim, indices)) for W, dim, indices, _ in tuned)
    return Blocks(tuple(tuned), base, tuple(beside))


def _delta(name: str, parts: Sequence[tuple[Slice, float]]) -> tuple[int, Tensor, Tensor]:
    """(dim, indices, delta) of the sum of slices, each times its weight. Raises `AdapterError` for rows and columns:
    what lies beside a weight is one slice."""
    if len({s.dim for s, _ in parts}) > 1:
        raise AdapterError(
            f"{name} is quantized, and one adapter changes rows of it, another one columns, which are no one slice "
            f"beside it; a batch runs both, and the base model without quantization holds their sum"
        )
    (first, _), *_ = parts
    dtype = reduce(torch.promote_types, (delta_of(s).dtype for s, _ in parts))
    return summed(torch.zeros((), dtype=dtype, device=delta_of(first).device).expand(first.shape), parts)


def _shared(a: Adapter, b: Adapter) -> int:
    """How many entries of weights both change."""
    theirs, count = {s.parameter_name: s for s in b.slices}, 0
    for s in a.slices:
        other = theirs.get(s.parameter_name)
        if other is not None:
            size = torch.Size(s.shape).numel()
            if s.dim == other.dim:
                count += int(torch.isin(s.indices, other.indices).sum()) * size // s.shape[s.dim]
            else:
                count += len(s.indices) * len(other.indices) * size // (s.shape[s.dim] * s.shape[other.dim])
    return count


def check_batched(model: nn.Module, slices: Sequence[Slice]) -> None:
    """That a batch can hold them. Raises `ExportError`."""
    linear_layers(model, matrices(slices), BATCHED)
    vector_modules(model, vectors(slices), BATCHED)


def _stacks(
    model: nn.Module, adapters: Sequence[Adapter], token_axes: Mapping[str, int]
) -> dict[str, tuple[Stack | Biases | Vectors, ...]]:
    by_layer: dict[tuple[str, bool], list[tuple[int, Slice, Tensor]]] = {}
    values = Values(model)
    for k, adapter in enumerate(adapters, 1):
        layers = linear_layers(model, found := matrices(adapter.slices), BATCHED)
        for s in found:
            layer, transposed = layers[s.parameter_name]
            delta = delta_of(s) if transposed else delta_of(s).T
            by_layer.setdefault((layer, (s.dim == 1) != transposed), []).append((k, s, delta))
    stacks: dict[str, tuple[Stack | Biases | Vectors, ...]] = {}
    for (layer, contracts), parts in by_layer.items():
        name = parts[0][1].parameter_name
        like = torch.empty(0, dtype=values.dtype(name), device=values.own[name].device)
        stacks[layer] = (*stacks.get(layer, ()), _stack(contracts, parts, len(adapters) + 1, like))
    for layer, tables in _tables(model, adapters).items():
        module = model.get_submodule(layer)
        if is_linear(module):
            stacks[layer] = (*stacks.get(layer, ()), Biases(tables["bias"] - tables["bias"][0]))
        else:
            stacks[layer] = (Vectors(layer, module, tables, token_axes.get(layer)),)
    return stacks


@torch.no_grad()
def _tables(model: nn.Module, adapters: Sequence[Adapter]) -> dict[str, dict[str, Tensor]]:
    """Module -> key -> what its vector is with each adapter, after what it is without."""
    tables: dict[str, dict[str, Tensor]] = {}
    for k, adapter in enumerate(adapters, 1):
        held = vector_modules(model, found := vectors(adapter.slices), BATCHED)
        for s in found:
            layer, key = held[s.parameter_name], s.parameter_name.rpartition(".")[2]
            W = model.get_parameter(s.parameter_name).detach()
            table = tables.setdefault(layer, {}).setdefault(key, W.repeat(len(adapters) + 1, 1))
            _, indices, values = summed(W, [(s, 1.0)])
            table[k].index_copy_(0, indices, values)
    return tables


def _stack(contracts: bool, parts: Sequence[tuple[int, Slice, Tensor]], rows: int, like: Tensor) -> Stack:
    """like: a tensor of the weight's type, on its device."""
    n = max(len(s.indices) for _, s, _ in parts)
    other = parts[0][2].shape[1 if contracts else 0]
    index, ranks = torch.zeros(rows, n, dtype=torch.int64), [0] * rows
    delta = like.new_zeros((rows, n, other) if contracts else (rows, other, n))
    for k, s, d in parts:
        ranks[k] = len(s.indices)
        index[k, : len(s.indices)] = s.indices
        delta[k].narrow(0 if contracts else 1, 0, len(s.indices)).copy_(d)
    return Stack.of(contracts, index.to(like.device), delta, ranks)
