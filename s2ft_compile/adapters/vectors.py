"""What a batch makes of a module that holds vectors (a norm's gain, a bias), where every row has an adapter of its own.

What a linear layer gives has the row's change of its bias added. Any other module runs again, on parameters of a row
each:

    y[i] = module(x[i]; W[ids[i]])          W: (adapters + 1, d), whole vectors, and those of id 0 are the base model's

by `torch.func.vmap`, of which a compiler makes plain products. Eager calls go a shorter way where one is found, tried
once on random numbers: the module called with vectors broadcast along the rows, (rows, 1, ..., d), if that gives the
bits of each row alone; or with ones and zeros, and its result times the gain plus the bias, if that gives vmap's.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from s2ft_compile.errors import StateError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a forward: its args and kwargs


@dataclass(frozen=True, eq=False)
class Biases:
    """The deltas of a linear layer's bias, of all adapters, (adapters + 1, out), in its type; row 0 is zeros."""

    delta: Tensor

    def picked(self, ids: Tensor, terms: object = None) -> "PickedBiases":
        """ids: (N,), of the rows."""
        return PickedBiases(self.delta.index_select(0, ids.to(self.delta.device)))

    def packed(self, each: Tensor, tokens: object, terms: object) -> "PickedBiases":
        """each: the id of every token."""
        return self.picked(each)


@dataclass(frozen=True, eq=False)
class PickedBiases:
    """delta: (N, out), of the rows of one batch or of its tokens."""

    delta: Tensor

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """y (N * times, ..., out), or all tokens (1, N, out), with the delta of each row added."""
        return (y.reshape(self.delta.shape[0], -1, y.shape[-1]) + self.delta[:, None].to(y.dtype)).view(y.shape)


@dataclass(frozen=True, eq=False)
class Vectors:
    """The vectors of one module, of all adapters. tables: key -> (adapters + 1, d), in the parameter's type. axis: of
    the module's input, that of the tokens of packed requests, where it is known."""

    name: str
    module: nn.Module
    tables: Mapping[str, Tensor]
    axis: int | None = None
    twin: nn.Module = field(init=False)  # the module without hooks
    ways: dict[tuple[int, ...], Callable[..., Tensor]] = field(default_factory=dict)  # by the ranks of the inputs

    def __post_init__(self) -> None:
        object.__setattr__(self, "twin", self.with_(self.module._parameters))

    def with_(self, parameters: Mapping[str, Any]) -> nn.Module:
        """A copy of the module, which shares all with it but its parameters, and has no hooks. One of its own for each
        call, since several threads may run the module."""
        twin = copy.copy(self.module)
        twin._parameters = dict(parameters)
        twin._forward_hooks, twin._forward_pre_hooks = {}, {}  # type: ignore[assignment]
        return twin

    def picked(self, ids: Tensor, terms: object = None) -> "PickedVectors":
        """ids: (N,), of the rows."""
        return PickedVectors(self, ids.to(next(iter(self.tables.values())).device))

    def packed(self, each: Tensor, tokens: object, terms: object) -> "PickedVectors":
        """each: the id of every token."""
        return PickedVectors(self, self.picked(each).ids, packed=True)

    def run(self, ids: Tensor, axis: int, given: Arguments) -> Tensor:
        """The module's result, of an input whose i-th part along `axis` has the vectors of ids[i]."""
        own = {key: table.index_select(0, ids) for key, table in self.tables.items()}
        if torch.compiler.is_compiling():
            return self._by_row(own, axis, given)
        key = axis, *(t.dim() for t in tensors(given))
        if key not in self.ways:
            self.ways[key] = self._shortest(axis, given)
        return self.ways[key](own, axis, given)

    def _call(self, own: Mapping[str, Tensor], given: Arguments) -> Tensor:
        args, kwargs = given
        if torch.compiler.is_compiling():
            return functional_call(self.twin, dict(own), args, kwargs)
        return self.with_({**self.module._parameters, **own})(*args, **kwargs)

    def _broadcast(self, own: Mapping[str, Tensor], axis: int, given: Arguments) -> Tensor:
        return self._call({key: _along(axis, tensors(given)[0], vector) for key, vector in own.items()}, given)

    def _affine(self, own: Mapping[str, Tensor], axis: int, given: Arguments) -> Tensor:
        held = {key: p for key, p in self.module._parameters.items() if p is not None}
        neutral = {key: torch.zeros_like(p) if key == "bias" else torch.ones_like(p) for key, p in held.items()}
        y = self._call(neutral, given)
        spread = {key: _along(axis, y, own[key]) if key in own else p for key, p in held.items()}
        bias = spread.pop("bias", None)
        for gain in spread.values():
            y = y * gain
        return y if bias is None else y + bias

    def _by_row(self, own: Mapping[str, Tensor], axis: int, given: Arguments) -> Tensor:
        leaves, tree = pytree.tree_flatten(given)
        split = [isinstance(leaf, Tensor) for leaf in leaves]

        def one(own: Mapping[str, Tensor], *parts: Any) -> Tensor:
            return self._call(own, pytree.tree_unflatten(list(parts), tree))

        parts = [x.movedim(axis, 0).unsqueeze(axis + 1) if is_split else x for x, is_split in zip(leaves, split)]
        dims = (0, *(0 if is_split else None for is_split in split))
        y: Tensor = torch.func.vmap(one, in_dims=dims, randomness="different")(own, *parts)
        return y.squeeze(axis + 1).movedim(0, axis)

    @torch.no_grad()
    def _shortest(self, axis: int, given: Arguments) -> Callable[..., Tensor]:
        """Which way to go with inputs of these ranks: what random numbers are given is what they are to be."""
        inputs = tensors(given)
        if axis >= inputs[0].dim() - 1 or not all(t.is_floating_point() for t in inputs):
            return self._by_row
        sizes = {size for t in inputs for size in t.shape}
        rows = next(n for n in range(3, 3 + len(sizes) + 1) if n not in sizes)  # told apart from all other dimensions
        random = torch.Generator(inputs[0].device).manual_seed(0)

        def drawn(x: Any, dim: int) -> Any:
            if not isinstance(x, Tensor):
                return x
            shape = [rows if d == dim else size for d, size in enumerate(x.shape)]
            return torch.randn(shape, generator=random, device=x.device).to(x.dtype)

        whole = pytree.tree_map(lambda x: drawn(x, axis), given)
        own = {key: drawn(table, 0) for key, table in self.tables.items()}
        alone = []
        for i in range(rows):
            part = pytree.tree_map(lambda x: x.narrow(axis, i, 1) if isinstance(x, Tensor) else x, whole)
            alone.append(self._call({key: vector[i] for key, vector in own.items()}, part))
        for way, wanted in (
            (self._broadcast, lambda: torch.cat(alone, axis)),
            (self._affine, lambda: self._by_row(own, axis, whole)),
        ):
            try:
                if torch.equal(way(own, axis, whole), wanted()):
                    return way
            except (RuntimeError, ValueError, TypeError):  # what operators say of a vector of more dimensions
                pass
        return self._by_row


def _along(axis: int, like: Tensor, vector: Tensor) -> Tensor:
    """Vectors (rows, d) of an input's rows along `axis`, and of its last dimension, to be broadcast."""
    shape = [1] * (like.dim() - 1)
    shape[axis] = -1
    return vector.view(*shape, vector.shape[-1])


@dataclass(frozen=True, eq=False)
class PickedVectors:
    """ids: (N,), of the rows of one batch, each of which may stand for several; packed: of its tokens."""

    stack: Vectors
    ids: Tensor
    packed: bool = False

    def instead(self, given: Arguments, y: Any) -> Tensor:
        """What the module gives in place of y. Raises `StateError` where its input is no batch of these rows."""
        inputs = tensors(given)
        what = f"{self.stack.name}, a {type(self.stack.module).__name__} with vectors of an adapter,"
        if not inputs or not isinstance(y, Tensor):
            raise StateError(f"{what} takes no tensors, or gives several; merge or activate that adapter instead")
        axis, shape = self._axis(what, inputs[0].shape), tuple(inputs[0].shape)
        rows = shape[axis]
        if any(t.dim() <= axis or t.shape[axis] != rows for t in (*inputs, y)):
            others = ", ".join(str(tuple(t.shape)) for t in (*inputs[1:], y))
            raise StateError(
                f"{what} has {rows} rows in an input of shape {shape}, and not in what else it takes or gives: "
                f"{others}; merge or activate that adapter instead"
            )
        times, rest = divmod(rows, self.ids.shape[0])
        if rest:
            raise StateError(f"a batch of {self.ids.shape[0]} adapters, and {rows} rows, in {what} of shape {shape}")
        ids = self.ids if times == 1 else self.ids.repeat_interleave(times)
        return self.stack.run(ids, axis, given)

    def _axis(self, what: str, shape: Sequence[int]) -> int:
        tokens, known = self.ids.shape[0], self.stack.axis
        if not self.packed or tokens == 1:
            return 0
        found = [a for a, size in enumerate(shape[:-1]) if size == tokens and (a == 0 or shape[0] == 1)]
        if known is not None and known in found:
            return known
        if known is not None or len(found) != 1:
            raise StateError(
                f"a batch of {tokens} tokens, and {what} has an input of shape {tuple(shape)}, in which "
                f"{'several dimensions may be' if found else 'no dimension is'} that of the tokens"
            )
        return found[0]


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
