"""Example inputs: a call's arguments, several such calls, and the same call at another batch size and length.

A size of the inputs is a variable of the model, unless its code fixes it. What is found for one value of it may be a
coincidence (a length that equals the number of heads, a table cut at the length), so a second value is looked at: a
prime that divides no size of the model's parameters, and so can equal neither a number of heads nor a size of them.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from s2ft_compile.errors import ConfigError

PRIMES = (
    3,
    5,
    7,
    11,
    13,
    17,
    19,
    23,
    29,
    31,
    37,
    41,
    43,
    47,
)  # small, to fall short of tables that are cut at a length


class Inputs(NamedTuple):
    """A call's arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def arguments(example_inputs: Any) -> Inputs:
    """`example_inputs`, a tuple or a dict of the forward's arguments, as (args, kwargs)."""
    if isinstance(example_inputs, Inputs):
        return example_inputs
    if isinstance(example_inputs, Tensor):
        return Inputs((example_inputs,), {})
    if isinstance(example_inputs, Mapping):
        return Inputs((), dict(example_inputs))
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return Inputs(tuple(example_inputs), {})
    raise ConfigError(
        f"example_inputs is a tuple or a dict of the forward's arguments, got {type(example_inputs).__name__}"
    )


def several(example_inputs: Any) -> list[Inputs]:
    """The calls in `example_inputs`: a list of tuples and dicts is one each, anything else a single one."""
    if isinstance(example_inputs, list) and example_inputs:
        if all(isinstance(item, (tuple, Mapping)) for item in example_inputs):
            return [arguments(item) for item in example_inputs]
    return [arguments(example_inputs)]


@dataclass(frozen=True)
class Resized:
    """A call at other sizes. label: which ones, in words. whole: all that vary do."""

    inputs: Inputs
    label: str
    whole: bool


def resized(model: nn.Module, inputs: Inputs) -> list[Resized]:
    """The call at another batch size and length at once, then at each of them alone; [] where it has neither."""
    batch, lengths = _batch(inputs), _lengths(inputs)
    taken = {n for p in model.parameters() for n in p.shape} | {n for t in _tensors(inputs) for n in t.shape}
    new = _primes(taken)
    others = dict(zip(lengths, new))
    batches = {} if batch is None else {batch: next(new)}
    choices = [(batches, others), (batches, {}), ({}, others)] if batches and others else [(batches, others)]
    return [Resized(_at(inputs, b, n), _label(b, n), (b, n) == (batches, others)) for b, n in choices if b or n]


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [t for t in tree_leaves(tuple(inputs)) if isinstance(t, Tensor)]


def _batch(inputs: Inputs) -> int | None:
    """The size that most inputs have in front."""
    tensors = [t for t in _tensors(inputs) if t.dim() > 1] or [t for t in _tensors(inputs) if t.dim() == 1]
    sizes = Counter(t.shape[0] for t in tensors if t.shape[0])
    return sizes.most_common(1)[0][0] if sizes else None


def _lengths(inputs: Inputs) -> list[int]:
    """Dimension 1 of what holds integers; where nothing does, of sequences of vectors."""
    tensors = [t for t in _tensors(inputs) if t.dim() > 1 and not t.is_floating_point() and not t.is_complex()]
    tensors = tensors or [t for t in _tensors(inputs) if t.dim() == 3]
    return list(dict.fromkeys(t.shape[1] for t in tensors if t.shape[1]))


def _primes(taken: Collection[int]) -> Iterator[int]:
    free = [p for p in PRIMES if all(n % p for n in taken if n > 1)]
    return iter(dict.fromkeys([*free, *(p for p in PRIMES if p not in taken), *PRIMES]))


def _at(inputs: Inputs, batches: Mapping[int, int], lengths: Mapping[int, int]) -> Inputs:
    def resize(t: Tensor) -> Tensor:
        resized = t.detach()
        for dim, size in enumerate(t.shape):
            new = batches.get(size) if dim == 0 else None
            if new is None and size in lengths and _is_length(t, dim, lengths):
                new = lengths[size]
            if new is not None:
                resized = resized.index_select(dim, torch.arange(new, device=t.device) % size)
        return resized.requires_grad_(t.requires_grad)

    return Inputs(*tree_map_only(Tensor, resize, tuple(inputs)))


def _is_length(t: Tensor, dim: int, lengths: Collection[int]) -> bool:
    """Whether a dimension whose size is a length runs along it: a hidden size may happen to equal it."""
    if t.dim() == 1 or dim == 1:
        return True
    if t.is_floating_point():  # a mask added to scores
        return dim >= t.dim() - 2 and t.shape[-1] in lengths and t.shape[-2] in lengths
    return dim > 0 and t.shape[dim] > 1


def _label(batches: Mapping[int, int], lengths: Mapping[int, int]) -> str:
    said = [f"a batch of {n}" for n in batches.values()] + [f"a length of {n}" for n in lengths.values()]
    return "with " + " and ".join(said)
