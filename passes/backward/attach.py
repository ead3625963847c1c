"""`attach`: a frozen weight whose gradient goes to a delta.

attach(W, D) has W's value, which already holds cast(W0 + D), and passes the slice of its gradient on to D. It is one
opaque operator so that the joint graph shows exactly where a delta is used; `slice_pushdown` removes it.
`take` is the slice of a gradient, opaque for the same reason until `slice_pushdown` has moved it to where it is cheap.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, fx


@torch.library.custom_op("s2ft::take", mutates_args=())
def _take(x: Tensor, dim: int, starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    return torch.cat([x.narrow(dim, s, n) for s, n in zip(starts, lengths)], dim)


@_take.register_fake
def _(x, dim, starts, lengths):
    shape = list(x.shape)
    shape[dim] = sum(lengths)
    return x.new_empty(shape)


@torch.library.custom_op("s2ft::attach", mutates_args=())
def _attach(weight: Tensor, delta: Tensor, dim: int, starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    return weight.clone()


@_attach.register_fake
def _(weight, delta, dim, starts, lengths):
    return torch.empty_like(weight)


def _setup(ctx, inputs, output):
    _, delta, ctx.dim, ctx.starts, ctx.lengths = inputs
    ctx.dtype = delta.dtype


def _backward(ctx, grad):
    taken = torch.ops.s2ft.take(grad, ctx.dim, ctx.starts, ctx.lengths).to(ctx.dtype)
    return grad if ctx.needs_input_grad[0] else None, taken, None, None, None


_attach.register_autograd(_backward, setup_context=_setup)

ATTACH = torch.ops.s2ft.attach.default
TAKE = torch.ops.s2ft.take.default


def positions(taken: fx.Node) -> list[int]:
    """What a take takes along its dimension, ascending."""
    return [start + k for start, length in zip(*taken.args[2:]) for k in range(length)]


def runs(positions: Sequence[int]) -> tuple[list[int], list[int]]:
    """(starts, lengths) of the runs of ascending positions."""
    starts = [p for i, p in enumerate(positions) if i == 0 or p != positions[i - 1] + 1]
    ends = [p + 1 for i, p in enumerate(positions) if i + 1 == len(positions) or p + 1 != positions[i + 1]]
    return starts, [e - s for s, e in zip(starts, ends)]


def attach(weight: Tensor, delta: Tensor, dim: int, starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """weight, with the gradient of its ranges along `dim` going to `delta` (the ranges one after another)."""
    return torch.ops.s2ft.attach(weight, delta, dim, starts, lengths)
