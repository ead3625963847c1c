"""A slice belongs to its weight: the module that holds a weight holds the delta, and reading the weight attaches it.

`Sliced` is mixed into a class derived for that module, in which the weight's name is a property (as in
`torch.nn.utils.parametrize`); the weight itself keeps its place and name in `_parameters`, the delta lies beside it.
So every way of reading has the delta, whoever calls: another method, a submodule, a checkpoint's recomputation, a graph
of one layer, a frame that a compiler gave up. Compiled, the read is the operator `attach`; eager, `attached` of
`passes.backward.eager`. With gradients off it is the weight, which always holds its value:

    W[block] == cast(W0 + D)        looked at, and written, at every read, so that a change of D by any road is in it

A weight that cannot be written, since it is quantized, stays as it is, and so do the positions of its units: the slice
lies beside it, and the layer's forward adds what it makes (`Beside`, `passes.backward.beside`).
"""

import copyreg
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from s2ft_compile.errors import StateError
from s2ft_compile.passes.backward.attach import attach
from s2ft_compile.passes.backward.beside import HELD, with_slices
from s2ft_compile.passes.backward.eager import attached, composed, read_from

from .processes import replacing

if TYPE_CHECKING:
    from .blocks import Block


def _read(module: nn.Module, key: str) -> Tensor:
    block = getattr(module, HELD)[key]
    weight, delta = module._parameters[key], module._parameters[block.delta_key]
    if not block.active or hasattr(weight, "placements"):  # a DTensor outside of its layer's forward
        return weight
    if torch.compiler.is_compiling():
        if torch.is_grad_enabled():
            return attach(weight, delta, block.dim, block.starts, block.lengths)
        return weight
    return _read_eagerly(block, weight, delta)


@torch._dynamo.disable
def _read_eagerly(block: "Block", weight: Tensor, delta: Tensor) -> Tensor:
    """Who replaced a tensor (`functional_call`, FSDP's unsharded ones) means what it gave: a delta alone is added to
    the base's block, a weight alone is the weight, and a pair belongs together."""
    own_weight, own_delta = weight is block.weight, delta is block.delta
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if own_delta and not own_weight:
        return weight
    if own_weight and own_delta and not transformed:  # a transform may write nothing that it captured
        block.refresh()
    if transformed or (own_weight and not own_delta):
        return composed(weight, block.backup, delta, block.dim, block.ranges)
    if not torch.is_grad_enabled():
        return weight
    block.attached = True
    return attached(weight, delta, block.dim, block.ranges, block.name)


def _property(key: str) -> property:
    def replaced(module: nn.Module, value: Any) -> None:
        raise _taken(module, key)

    return property(lambda module: _read(module, key), replaced)


def _taken(module: nn.Module, key: str) -> StateError:
    return StateError(
        f"{module.__dict__[HELD][key].name} has a slice that trains, and cannot be replaced, pruned or parametrized: "
        f"do that before s2ft.prepare or after s2ft.release(model); load_state_dict changes its values{replacing()}"
    )


_classes: dict[tuple[type, tuple[str, ...], bool], type] = {}


def reclass(module: nn.Module) -> None:
    """Gives a module the class in which its sliced weights, and no others, are properties, or its forward adds the
    slices beside them."""
    base, held = getattr(type(module), "_s2ft_base", type(module)), module.__dict__[HELD]
    module.__class__ = _class(base, *_ways(held))
    if not held:
        del module.__dict__[HELD]


def _ways(held: dict[str, "Block"]) -> tuple[tuple[str, ...], bool]:
    """What `_class` is told of the blocks that a module holds."""
    keys = tuple(key for key, block in held.items() if not block.beside)
    return keys, len(held) > len(keys)


def _class(base: type, keys: tuple[str, ...], adds: bool) -> type:
    """keys: of the weights that are properties. adds: whether the forward adds slices."""
    if not keys and not adds:
        return base
    if (base, keys, adds) not in _classes:
        named = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        readers: dict[str, Any] = {key: _property(key) for key in keys}
        forward = {"forward": _adding(base)} if adds else {}
        cls = type(base.__name__, (Sliced, base), {**named, **readers, **forward, "_s2ft_base": base})
        _classes[base, keys, adds] = cls
    return _classes[base, keys, adds]


def _adding(base: type) -> Callable:
    def forward(self, *args, **kwargs):
        x = args[0] if args else next(iter(kwargs.values()))
        return with_slices(base.forward(self, *args, **kwargs), x, self)

    return forward


def _new(base: type, keys: tuple[str, ...], adds: bool = False) -> nn.Module:
    cls = _class(base, keys, adds)
    return cls.__new__(cls)


class Sliced:
    """What a module with sliced weights does otherwise: keys, loading, moving and copying."""

    def __reduce_ex__(self, protocol):
        make, arguments, *rest = super().__reduce_ex__(protocol)
        if make is copyreg.__newobj__:  # a class that is made here has no name to be found under
            make, arguments = _new, (self._s2ft_base, *_ways(self.__dict__[HELD]))
        return (make, arguments, *rest)

    def _sliced(self) -> "list[Block]":
        return list(self.__dict__[HELD].values())

    def register_parameter(self, name, param):
        """`module.weight = ...` arrives here too. Who gives back what was read (tying weights) changes nothing."""
        read = read_from(param)
        held = self.__dict__[HELD].get(name)
        if held is not None and not held.loading and param is not self._parameters.get(name):
            if read is not self._parameters.get(name):
                raise _taken(self, name)
            return
        if read is not None:  # under another name, as `torch.nn.utils.prune` keeps what it masks
            raise _taken(self, next(k for k, b in self.__dict__[HELD].items() if b.weight is read))
        super().register_parameter(name, param)

    def __delattr__(self, name):
        if name in self.__dict__[HELD]:
            raise _taken(self, name)
        super().__delattr__(name)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """The float32 deltas are a part of the state: the weights alone, rounded, would not resume bit for bit."""
        for block in self._sliced():
            block.refresh()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for block in self._sliced():
            if block.places[0][0] is not self:  # of a tied weight it is stored once
                destination.pop(prefix + block.delta_key, None)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        """A delta that is loaded is the delta; a block that is loaded without one is taken as trained."""
        keys = dict(self.__dict__[HELD])
        for key, block in keys.items():
            if prefix + key in state_dict:
                block.check_loaded(prefix + key, state_dict[prefix + key], state_dict.get(prefix + block.delta_key))
        compared = {prefix + key for key, block in keys.items() if block.beside}
        state_dict = {name: t for name, t in state_dict.items() if name not in compared}
        for block in keys.values():
            block.loading = True
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors)
        for block in keys.values():
            block.loading = False
        missing_keys[:] = [key for key in missing_keys if key not in compared]
        for key, block in keys.items():
            if prefix + block.delta_key in missing_keys:
                missing_keys.remove(prefix + block.delta_key)
            for module, other in block.places:  # of a tied weight that was assigned
                module._parameters[other] = self._parameters[key]
                module._parameters[block.delta_key] = self._parameters[block.delta_key]
            block.adopt()
            block.loaded(weight=prefix + key in state_dict, delta=prefix + block.delta_key in state_dict)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        """Deltas move with their weights, but stay float32 under `model.half()` and its kin."""
        deltas = {id(block.delta) for block in self._sliced()}

        def moved(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            return tensor.to(applied.device) if id(tensor) in deltas and applied.dtype != tensor.dtype else applied

        super()._apply(moved, recurse)
        for block in self._sliced():
            block.adopt()
            block.move(fn)
        return self
