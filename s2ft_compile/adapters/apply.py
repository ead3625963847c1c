"""An adapter and the model it is for: whether they fit, and what its weights become."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from s2ft_compile.errors import AdapterError
from s2ft_compile.plan import Slice
from s2ft_compile.quantized import Values, quantized_in
from s2ft_compile.slices.blocks import base_parameters

from .fingerprint import samples_of
from .format import Adapter, check_base, check_slice


def check_fits(module: nn.Module, adapter: Adapter) -> None:
    """That a plain model is the adapter's base, its blocks untouched, and can hold the sums. Raises `AdapterError`."""
    values, samples = Values(module), samples_of(module)
    turned, dtype = {name: weight.turned for name, weight in values.quantized.items()}, dtypes_of(module)
    otherwise = check_base(adapter, samples, f"a {type(module).__name__} in {dtype}", turned, dtype)
    for s in adapter.slices:
        W, name = values[s.parameter_name], s.parameter_name
        check_slice(adapter, s, W, samples[name] if name in values.quantized else None, name not in otherwise)
        check_finite(name, summed(W, [(s, 1.0)])[2])


def check_finite(name: str, block: Tensor) -> None:
    """That a sum of a weight and deltas is in the range of its type. Raises `AdapterError`."""
    if not block.isfinite().all():
        raise AdapterError(f"{name}: {overflow_of(block)}")


def overflow_of(block: Tensor) -> str:
    """What is wrong with a sum that is not finite, for a person."""
    kind = str(block.dtype).removeprefix("torch.")
    return (
        f"the sum of the weight and the delta is not finite in {kind}, whose largest number is "
        f"{torch.finfo(block.dtype).max:.4g}; a base model in {'bfloat16 or ' if kind == 'float16' else ''}float32 "
        f"holds more"
    )


def dtypes_of(module: nn.Module) -> str:
    """The types of a model's own parameters, for a person: `bfloat16 and float32`, `Int8Tensor and bfloat16`."""
    quantized = quantized_in(module)
    own = {str(p.dtype).removeprefix("torch.") for n, p in base_parameters(module).items() if n not in quantized}
    classes = {type(weight.held).__name__ for weight in quantized.values()} - {"Parameter"}
    return " and ".join(sorted(own | classes))


@torch.no_grad()
def summed(W: Tensor, parts: Sequence[tuple[Slice, float]]) -> tuple[int, Tensor, Tensor]:
    """(dim, indices, block): what W[indices] along dim becomes with every slice's weight * delta added to it.

    The sum is made in the widest of the types and rounded once, in the order of `parts`, so one slice with
    weight 1 gives cast(W0 + delta). The indices are the union; slices of different dims give all of dim 0.
    """
    dims = {s.dim for s, _ in parts}
    dim = dims.pop() if len(dims) == 1 else 0
    if dims:
        indices = torch.arange(W.shape[0])
    else:
        indices = torch.cat([s.indices for s, _ in parts]).unique()
    wide = W.dtype
    for s, _ in parts:
        wide = torch.promote_types(wide, s.delta.dtype)
    block = W.index_select(dim, indices.to(W.device)).to(wide)
    for s, weight in parts:
        delta = s.delta.to(W.device, wide)
        place = torch.searchsorted(indices, s.indices) if s.dim == dim else s.indices
        block.index_add_(s.dim, place.to(W.device), delta if weight == 1 else delta * weight)
    return dim, indices.to(W.device), block.to(W.dtype)
