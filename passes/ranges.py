"""Where a slice lies along a dimension: ranges, as (start, length), ascending.

Those of channels of heads are *spaced*: the same part of each head. They are read and written as one part of a view.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Ranges = Sequence[tuple[int, int]]


def ranges(mask: Tensor) -> tuple[tuple[int, int], ...]:
    """The runs of True in a bool (size,)."""
    zero = torch.zeros(1, dtype=torch.int8)
    edges = torch.diff(mask.to(torch.int8), prepend=zero, append=zero)
    starts, ends = (edges == 1).nonzero().squeeze(1), (edges == -1).nonzero().squeeze(1)
    return tuple((int(s), int(e - s)) for s, e in zip(starts, ends))


def spaced(ranges: Ranges, size: int) -> int | None:
    """How large the parts are, of several equal ones that make up `size`, of which these are the same range of each.

    >>> spaced([(1, 2), (5, 2), (9, 2)], 12), spaced([(1, 2), (5, 3)], 8)
    (4, None)
    """
    count = len(ranges)
    if count < 2 or size % count:
        return None
    (first, length), part = ranges[0], size // count
    alike = all((start, n) == (first + i * part, length) for i, (start, n) in enumerate(ranges))
    return part if alike and first + length <= part else None


def take(x: Tensor, dim: int, ranges: Ranges) -> Tensor:
    """The ranges of x along `dim`, one after another; a view where there is one."""
    dim %= x.ndim
    if spaced(ranges, x.shape[dim]):
        return _each(x, dim, ranges).flatten(dim, dim + 1)
    parts = [x.narrow(dim, start, length) for start, length in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def put(x: Tensor, dim: int, ranges: Ranges, values: Tensor) -> None:
    """Copies into x what `take` would return of it."""
    dim %= x.ndim
    if spaced(ranges, x.shape[dim]):
        _each(x, dim, ranges).copy_(values.unflatten(dim, (len(ranges), ranges[0][1])))
        return
    offset = 0
    for start, length in ranges:
        x.narrow(dim, start, length).copy_(values.narrow(dim, offset, length))
        offset += length


def _each(x: Tensor, dim: int, ranges: Ranges) -> Tensor:
    """A view of x with the parts in place of `dim`, and the range of each behind it."""
    return x.unflatten(dim, (len(ranges), x.shape[dim] // len(ranges))).narrow(dim + 1, *ranges[0])
