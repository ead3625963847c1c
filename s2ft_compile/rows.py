"""The deltas of a batch on a CPU, without copies of them.

What a batch costs besides the base model is the traffic of its adapters' deltas. Gathering a delta for each row reads
them, writes them, and reads them again; here the rows are brought to the deltas instead. Rows with neighbouring adapters
of a stack, as many for each, are one batched product with a part of the stack, which is a view:

    ids = [3, 0, 1, 2]   ->   adapters 1 to 3 of the stack with rows [[2], [3], [0]]; row 1 has none

`added` is the formula, differentiable and for any device; `by_adapter` applies it to each such run, as an operator that
dynamo does not look into, since the runs depend on the ids' values.
"""

from typing import Iterator, Sequence

import torch
from torch import Tensor


def added(x: Tensor, y: Tensor, index: Tensor, delta: Tensor, contracts: bool) -> Tensor:
    """y (N, tokens, out) with row i's delta added. x: (N, tokens, in), index: (N, n), delta: (N, n, out) for columns
    (`contracts`), (N, in, n) for rows."""
    index = index[:, None, :].expand(-1, x.shape[1], -1)
    if contracts:
        return y + torch.bmm(x.gather(2, index), delta.to(x.dtype)).to(y.dtype)
    return y.scatter_add(2, index, torch.bmm(x, delta.to(x.dtype)).to(y.dtype))


def runs(ids: Sequence[int]) -> Iterator[tuple[int, list[list[int]]]]:
    """(first, rows): the adapters first, first + 1, ... have the rows rows[0], rows[1], ..., as many each. Not 0."""
    held: dict[int, list[int]] = {}
    for row, k in enumerate(ids):
        held.setdefault(k, []).append(row)
    held.pop(0, None)
    run: list[list[int]] = []
    for k in sorted(held):
        run.append(held[k])
        if len(held.get(k + 1, ())) != len(held[k]):
            yield k + 1 - len(run), run
            run = []


@torch.library.custom_op("s2ft::add_by_adapter", mutates_args=())
def by_adapter(x: Tensor, y: Tensor, ids: Tensor, index: Tensor, delta: Tensor, contracts: bool) -> Tensor:
    """`added(x, y, index[ids], delta[ids], contracts)`, where row 0 of delta is zeros; not differentiable."""
    out = y.clone()
    for first, rows in runs(ids.tolist()):
        some, part = torch.tensor(rows), slice(first, first + len(rows))
        made = added(x[some].flatten(1, 2), y[some].flatten(1, 2), index[part], delta[part], contracts)
        out[some] = made.view(*some.shape, *y.shape[1:])
    return out


@by_adapter.register_fake
def _(x, y, ids, index, delta, contracts):
    return torch.empty_like(y)
