"""Equivalence of a model after its couplings are permuted.

The tolerance. Reordering a sum of n terms in arithmetic of unit roundoff u changes it by at most 2 n u Σ|terms|. Along
a path from input to output every parameter takes part in one contraction per dimension, so the lengths of all sums
together are at most N = Σ max(shape). Between two norms a block passes an error on with a gain of its weights' norms,
which `AMPLIFIED` bounds generously for small models. So |y - y'| ≤ 2 N u · AMPLIFIED · max|y|: about 1e-11 in
float64 there, while a wrong permutation changes outputs by 1e-3 and more.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from s2ft_compile.capture.examples import arguments
from s2ft_compile.capture.models import tensors_of, unwrap
from s2ft_compile.layout import gather_index, leaves
from s2ft_compile.preparation import analyze
from s2ft_compile.structure import Analysis, Coupling

AMPLIFIED = 200.0


def tolerance(model: nn.Module, y: Tensor) -> float:
    """The largest difference that reordering every sum of the model may make (see above)."""
    u = torch.finfo(y.dtype).eps / 2
    n = sum(max(p.shape, default=1) for p in model.parameters())
    return 2 * n * u * AMPLIFIED * max(1.0, y.abs().max().item())


def random_orders(couplings: Iterable[Coupling], seed: int = 0) -> dict[int, Tensor]:
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
    tensors = tensors_of(model)
    for (name, dim), layout in analysis.layouts.items():
        if (name, dim) not in skip and any(leaf.axis in orders for leaf in leaves(layout)):
            tensors[name].copy_(tensors[name].index_select(dim, gather_index(layout, orders)))


def outputs_of(output) -> list[Tensor]:
    """The floating-point tensors in what a model returned."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    items = output.values() if hasattr(output, "values") else output if isinstance(output, (list, tuple)) else []
    return [t for item in items for t in outputs_of(item)]


def assert_same(model: nn.Module, before, after) -> None:
    """The outputs of a forward are equal up to the rounding of the model's type (`tolerance`)."""
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
    """A coupling as a comparable (role, units, {(name, dim)})."""
    return coupling.role, coupling.units, frozenset((m.parameter_name, m.dim) for m in coupling.members)


class Promoted(TorchFunctionMode):
    """float64 wherever a model asks for float32 (norms, RoPE, softmax): then a float64 oracle stays one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*args, **kwargs)


# --- a model -----------------------------------------------------------------------------------------------------


def assert_equivalent(model: nn.Module, inputs: Any, analysis: Analysis | None = None, seed: int = 0) -> Analysis:
    """That every coupling of a model may be permuted at random without changing its outputs; returns the couplings.

    inputs: a tuple or a dict of the forward's arguments. analysis: by default what `analyze` finds. Compared in float64
    and eval mode on a copy whose every parameter has noise (constants would hide a wrong order), for these inputs and
    others: other values, another batch size, and another length where the model takes one.
    Raises `AssertionError` that names the smallest coupling that is wrong, and two units of it whose swap shows it; or,
    as the negative control, a coupling of which a member may be left out unseen, so that nothing was tested.
    """
    analysis = analyze(model, inputs) if analysis is None else analysis
    calls = list(_other_inputs(noisy(model, seed), inputs, seed))

    def difference(orders: Mapping[int, Tensor], skip: tuple = ()) -> tuple[float, float]:
        """(the largest part of its tolerance that any output moved by, the largest difference)."""
        permuted = noisy(model, seed)
        reorder(permuted, analysis, orders, skip)
        worst, largest = 0.0, 0.0
        for call, before in calls:
            for a, b in zip(before, _outputs(permuted, call), strict=True):
                moved = (a - b).abs().max().item() if a.numel() else 0.0
                worst, largest = max(worst, moved / tolerance(permuted, a)), max(largest, moved)
        return worst, largest

    if not difference(random_orders(analysis.couplings, seed))[0] <= 1:
        raise AssertionError(_smallest_wrong(analysis.couplings, difference))
    for c in analysis.couplings:
        orders = random_orders([c], seed)
        places = {(m.parameter_name, m.dim) for m in c.members}  # one, where a projection is fused: left out, it rests
        if len(places) > 1 and not any(difference(orders, (place,))[0] > 100 for place in places):
            raise AssertionError(f"no output depends on the order of {c}: give inputs that reach it")
    return analysis


def _smallest_wrong(couplings: Sequence[Coupling], difference: Callable) -> str:
    for c in sorted(couplings, key=lambda c: (c.units, len(c.members))):
        if difference(random_orders([c]))[0] > 1:
            for i, j in combinations(range(c.units), 2):
                order = torch.arange(c.units)
                order[i], order[j] = j, i
                worst, moved = difference({c.axis: order})
                if not worst <= 1:
                    return f"swapping units {i} and {j} changes the outputs by {moved:.3g}, in {c}"
            return f"a permutation changes the outputs, in {c}"
    return "permuting all couplings together changes the outputs, though each alone does not"


@torch.no_grad()
def noisy(model: nn.Module, seed: int) -> nn.Module:
    """A float64 copy in eval mode, the same for the same seed, none of whose parameters is constant."""
    copied, random = copy.deepcopy(unwrap(model)).double().eval(), torch.Generator().manual_seed(seed)
    for p in copied.parameters():
        scale = p.std().item() if p.numel() > 1 and p.std() > 0 else 1.0
        p += 0.3 * scale * torch.randn(p.shape, generator=random, dtype=p.dtype).to(p.device)
    for module in copied.modules():
        if isinstance(module, _BatchNorm) and module.running_var is not None:
            for statistic in (module.running_mean, module.running_var):
                statistic += 0.3 * torch.rand(statistic.shape, generator=random, dtype=statistic.dtype).to(
                    statistic.device
                )
    return copied


def wide(tree: Any) -> Any:
    """Its floating-point tensors in float64."""
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, tree)


@torch.no_grad()
def _outputs(model: nn.Module, call: tuple) -> list[Tensor]:
    args, kwargs = call
    with Promoted():
        return outputs_of(model(*args, **kwargs))


def _other_inputs(model: nn.Module, inputs: Any, seed: int) -> Iterator[tuple[tuple, list[Tensor]]]:
    """(arguments, outputs): the inputs, and others that the model takes."""
    random = torch.Generator().manual_seed(seed)

    def values(t: Tensor) -> Tensor:
        return t.flatten()[torch.randperm(t.numel(), generator=random)].view(t.shape) if t.numel() else t

    def batch(t: Tensor) -> Tensor:
        return torch.cat([t, values(t)[:1]]) if t.ndim else t

    def length(t: Tensor) -> Tensor:
        return t[:, :-1] if t.ndim > 1 and t.shape[1] > 1 else t

    args = wide(tuple(arguments(inputs)))
    yield args, _outputs(model, args)
    for change in (values, batch, length):
        other = pytree.tree_map_only(Tensor, change, args)
        try:
            outputs = _outputs(model, other)
        except (RuntimeError, ValueError, IndexError, TypeError):
            continue  # a model of one size
        yield other, outputs
