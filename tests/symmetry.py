"""What the tests of couplings share: random orders, applied by hand; outputs compared; float32 casts promoted.

The tolerance. Reordering a sum of n terms in arithmetic of unit roundoff u changes it by at most 2 n u Σ|terms|. Along
a path from input to output every parameter takes part in one contraction per dimension, so the lengths of all sums
together are at most N = Σ max(shape). Between two norms a block passes an error on with a gain of its weights' norms,
which `AMPLIFIED` bounds generously for these models. So |y - y'| ≤ 2 N u · AMPLIFIED · max|y|: about 1e-11 in
float64 here, while a wrong permutation changes outputs by 1e-3 and more.
"""

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from s2ft_compile.layout import gather_index, leaves
from s2ft_compile.structure import Analysis, Coupling

AMPLIFIED = 200.0


def tolerance(model: nn.Module, y: Tensor) -> float:
    """The largest difference that reordering every sum of the model may make (see above)."""
    u = torch.finfo(y.dtype).eps / 2
    n = sum(max(p.shape, default=1) for p in model.parameters())
    return 2 * n * u * AMPLIFIED * max(1.0, y.abs().max().item())


def random_orders(couplings, seed: int = 0) -> dict[int, Tensor]:
    """A random order that is not the identity for each coupling, by axis."""
    random = torch.Generator().manual_seed(seed)
    orders = {}
    for c in couplings:
        order = torch.randperm(c.units, generator=random)
        orders[c.axis] = order.roll(1) if torch.equal(order, torch.arange(c.units)) else order
    return orders


@torch.no_grad()
def reorder(model: nn.Module, analysis: Analysis, orders: dict[int, Tensor], skip: tuple = ()) -> None:
    """Reorders axes wherever a layout mentions them; `skip` leaves some (name, dim) out, which is wrong."""
    parameters = dict(model.named_parameters())
    for (name, dim), layout in analysis.layouts.items():
        if (name, dim) not in skip and any(leaf.axis in orders for leaf in leaves(layout)):
            parameters[name].copy_(parameters[name].index_select(dim, gather_index(layout, orders)))


def outputs_of(made) -> list[Tensor]:
    """The floating-point tensors in what a model returned."""
    if isinstance(made, Tensor):
        return [made] if made.is_floating_point() else []
    items = made.values() if hasattr(made, "values") else made if isinstance(made, (list, tuple)) else []
    return [t for item in items for t in outputs_of(item)]


def assert_same(model: nn.Module, before, after) -> None:
    for a, b in zip(outputs_of(before), outputs_of(after), strict=True):
        difference = (a - b).abs().max().item() if a.numel() else 0.0
        assert difference <= tolerance(model, a), (
            f"outputs changed by {difference:.3g}, allowed {tolerance(model, a):.3g}"
        )


def changed(model: nn.Module, before, after) -> bool:
    """Whether outputs differ by far more than rounding explains."""
    return any(
        (a - b).abs().max().item() > 100 * tolerance(model, a)
        for a, b in zip(outputs_of(before), outputs_of(after), strict=True)
    )


def pairs(analysis: Analysis) -> set:
    """The couplings as comparable (role, units, {(name, dim)}), listed so that equal ones stay apart."""
    return {signature(c) for c in analysis.couplings}


def signature(coupling: Coupling) -> tuple:
    return coupling.role, coupling.units, frozenset((m.parameter_name, m.dim) for m in coupling.members)


class Promoted(TorchFunctionMode):
    """float64 wherever a model asks for float32 (norms, RoPE, softmax): then a float64 oracle stays one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*args, **kwargs)
