"""refresh: W[block] = cast(W0 + D) for many weights in one launch.

    W: a weight of any shape, contiguous; bf16, fp16 or float32       D: float32, the block's shape, contiguous
    W0: the block before training, W's type, contiguous               block: (start, length) ranges along one dimension

Each range is a matrix of rows and columns: with `outer` and `inner` elements before and behind the dimension,
W is (outer, size · inner) and the range `length · inner` columns of it; a range of whole rows (outer == 1) is
(length, inner). The launch reads where these matrices lie from a table on the device, and which matrix and tile each
program writes. The sum is made in float32 and rounded once, to the nearest even, as torch does.

The table depends on addresses and layouts, so it is looked up by these, every time: weights that moved (`model.to`,
`.data = ...`) have other ones, and get another table. A launch takes the weights of one device and type.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from math import prod

import torch
from torch import Tensor

from .support import capability, jit, placed, tl

ROWS, COLUMNS = 8, 512
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Ranges = tuple[tuple[int, int], ...]
Part = tuple[Tensor, Tensor, Tensor, int, Ranges]  # W, W0, D, dim, ranges


@torch.no_grad()
def refresh_reference(W: Tensor, W0: Tensor, D: Tensor, dim: int, ranges: Ranges) -> None:
    offset = 0
    for start, length in ranges:
        value = W0.narrow(dim, offset, length).float() + D.narrow(dim, offset, length)
        W.narrow(dim, start, length).copy_(value.to(W.dtype))
        offset += length


@jit()
def _kernel(table, owners, like, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    entry = table + tl.load(owners + 2 * tl.program_id(0)).to(tl.int64) * 7
    tile = tl.load(owners + 2 * tl.program_id(0) + 1)
    W = tl.load(entry).to(like.dtype)
    W0 = tl.load(entry + 1).to(like.dtype)
    D = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    rows, columns = tl.load(entry + 3), tl.load(entry + 4)
    across = (columns + COLUMNS - 1) // COLUMNS
    row = (tile // across) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    here = row * tl.load(entry + 6) + column
    value = tl.load(W0 + here, mask=inside).to(tl.float32) + tl.load(D + here, mask=inside)
    tl.store(W + row * tl.load(entry + 5) + column, value.to(like.dtype.element_ty), mask=inside)


def fits(W: Tensor, W0: Tensor, D: Tensor) -> bool:
    """Whether a launch can write this weight; not so on the CPU, for subclasses such as DTensor, and for float64."""
    return (
        W.is_cuda
        and W.dtype in DTYPES
        and W0.dtype == W.dtype
        and D.dtype == torch.float32
        and all(type(t) in (Tensor, torch.nn.Parameter) and t.is_contiguous() for t in (W, W0, D))
        and W0.device == W.device == D.device
        and capability(W.device) is not None
    )


def refresh(parts: Sequence[Part]) -> None:
    """Writes all of them, one launch for each device and type. Every part has to fit."""

    def kind(part):
        return str(part[0].device), str(part[0].dtype)

    for _, alike in groupby(sorted(parts, key=kind), kind):
        alike = list(alike)
        with placed(alike[0][0]):
            launch(_kernel, alike)


def launch(kernel, parts: Sequence[Part]) -> None:
    """parts: of one device and one type."""
    W = parts[0][0]
    where = tuple((W.data_ptr(), W0.data_ptr(), D.data_ptr(), W.shape, dim, ranges) for W, W0, D, dim, ranges in parts)
    entries, owners = _table(where, W.element_size(), W.device)
    if len(owners):
        kernel[(len(owners),)](entries, owners, W, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8)
    torch.autograd.graph.increment_version([part[0] for part in parts])


@lru_cache(maxsize=16)
def _table(where: tuple, itemsize: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Every range: the addresses of W, W0 and D, rows, columns, and from row to row of W and of D, in elements; and for
    every program its range and its tile."""
    entries, owners = [], []
    for W, W0, D, shape, dim, ranges in where:
        outer, size, inner = prod(shape[:dim]), shape[dim], prod(shape[dim + 1 :])
        total, offset = sum(n for _, n in ranges), 0
        for start, n in ranges:
            rows, columns, w_row, d_row = (
                (n, inner, inner, inner) if outer == 1 else (outer, n * inner, size * inner, total * inner)
            )
            count = -(-rows // ROWS) * -(-columns // COLUMNS)
            owners += [(len(entries), tile) for tile in range(count)]
            at = offset * inner
            entries.append((W + start * inner * itemsize, W0 + at * itemsize, D + 4 * at, rows, columns, w_row, d_row))
            offset += n
    return (
        torch.tensor(entries, dtype=torch.int64).to(device),
        torch.tensor(owners, dtype=torch.int32).view(-1, 2).to(device),
    )
