"""A slice beside its weight: what it adds to the result of a layer y = x Wᵀ whose weight is never written.

    columns of W (what the layer contracts)     y += x[..., index] Dᵀ      D: (out, n)
    rows (what it makes)                        y[..., index] += x Dᵀ      D: (n, in)

Autograd makes the slice of dW and no more: dYᵀ x[..., index], or dY[..., index]ᵀ x. Entries are taken and placed by
gathering both ways, which a compiler fuses into what reads them, and which adds in no order of its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HELD = "_s2ft"  # a module's attribute: name of a weight -> its block


def with_slices(y: Tensor, x: Tensor, module: nn.Module) -> Tensor:
    """What a layer gives for x with the slices beside its weights, of what it gives without."""
    for block in getattr(module, HELD, {}).values():
        if block.beside and block.active:
            y = block.add_to(y, x, module)
    return y


def trained_values(values: Tensor, module: nn.Module) -> Tensor:
    """A layer's weight with the slice beside it, of its values without."""
    for block in getattr(module, HELD, {}).values():
        if block.beside and block.active:
            values = block.with_all(values)
    return values


def inverse_of(index: Tensor, size: int) -> Tensor:
    """int64 (size,): where in `index` each position is, len(index) where it is not."""
    inverse = torch.full((size,), len(index), dtype=torch.int64, device=index.device)
    inverse[index] = torch.arange(len(index), device=index.device)
    return inverse


class _Gathered(torch.autograd.Function):
    """A function of (x, index, inverse) whose gradient is gathered by the same two."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, index, inverse = inputs
        ctx.save_for_backward(index, inverse)


class Take(_Gathered):
    """x[..., index]."""

    @staticmethod
    def forward(x, index, inverse):
        return x.index_select(-1, index)

    @staticmethod
    def backward(ctx, grad):
        return Place.apply(grad, *ctx.saved_tensors), None, None


class Place(_Gathered):
    """Zeros but for y[..., index] = x."""

    @staticmethod
    def forward(x, index, inverse):
        return F.pad(x, (0, 1)).index_select(-1, inverse)

    @staticmethod
    def backward(ctx, grad):
        return Take.apply(grad, *ctx.saved_tensors), None, None


def added(x: Tensor, y: Tensor, delta: Tensor, dim: int, index: Tensor, inverse: Tensor) -> Tensor:
    """y with what a slice along `dim` of the layer's weight adds to it. x (..., in), y (..., out)."""
    if dim == 1:
        x = Take.apply(x, index, inverse)
    added = F.linear(x, delta.to(x.dtype)).to(y.dtype)
    return y + (added if dim == 1 else Place.apply(added, index, inverse))
