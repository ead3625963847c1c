"""An adapter and the model it is for: whether they fit, and what its weights become."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from s2ft_compile.fingerprint import OWN, samples_of
from s2ft_compile.plan import Slice

from .format import Adapter, check_base, check_slice


def check_fits(module: nn.Module, adapter: Adapter) -> None:
    """That a plain model is the adapter's base, its blocks untouched. Raises `AdapterError`."""
    check_base(adapter, samples_of(module), f"a {type(module).__name__} in {dtypes_of(module)}")
    weights = dict(module.named_parameters())
    for s in adapter.slices:
        check_slice(adapter, s, weights[s.parameter_name])


def dtypes_of(module: nn.Module) -> str:
    """The types of a model's own parameters, for a person: `bfloat16 and float32`."""
    own = {str(p.dtype) for name, p in module.named_parameters() if not name.startswith(OWN)}
    return " and ".join(sorted(own)).replace("torch.", "")


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
