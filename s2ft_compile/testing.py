"""Property-based tests of equivalence after permutation, for models and operators of one's own. Needs hypothesis.

    assert_equivalent(model, inputs)        every coupling found in the model may be permuted, and the test would notice
    permutations(analysis)                  a hypothesis strategy of random orders of a model's couplings
    assert_trains(model, inputs)            every role that a model offers trains, with exact gradients
    rulecheck("ns::op", samples)            an operator's axis rule against the operator, as `torch.library.opcheck`

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
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from s2ft_compile.passes.couple.axes import PRODUCT, SUM, Axis, atoms, find
from s2ft_compile.passes.couple.rules import rule_for
from s2ft_compile.passes.couple.rules.context import Context, Value
from s2ft_compile.passes.select.select import targeted_bands

from .capture import arguments, unwrap
from .config import ROLES, S2FTConfig
from .errors import ConfigError
from .layout import Layout, Leaf, Product, Sum, gather_index, leaves
from .preparation import analyze, prepare
from .structure import Analysis, Coupling

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
    parameters = {**dict(model.named_parameters()), **dict(model.named_buffers())}
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


# --- a model -----------------------------------------------------------------------------------------------------


def permutations(analysis: Analysis) -> st.SearchStrategy[dict[int, Tensor]]:
    """Axis -> an order of its units, for any couplings of a model; it shrinks to the identity and to fewer."""
    orders = {c.axis: st.permutations(range(c.units)).map(torch.tensor) for c in analysis.couplings}
    return st.fixed_dictionaries({}, optional=orders)


def assert_equivalent(model: nn.Module, inputs: Any, analysis: Analysis | None = None, seed: int = 0) -> Analysis:
    """That every coupling of a model may be permuted at random without changing its outputs; returns the couplings.

    inputs: a tuple or a dict of the forward's arguments. analysis: by default what `analyze` finds. Compared in float64
    and eval mode on a copy whose every parameter has noise (constants would hide a wrong order), for these inputs and
    others: other values, another batch size, and another length where the model takes one.
    Raises `AssertionError` that names the smallest coupling that is wrong, and two units of it whose swap shows it; or,
    as the negative control, a coupling of which a member may be left out unseen, so that nothing was tested.
    """
    analysis = analyze(model, inputs) if analysis is None else analysis
    calls = list(_other_inputs(_noisy(model, seed), inputs, seed))

    def difference(orders: Mapping[int, Tensor], skip: tuple = ()) -> tuple[float, float]:
        """(the largest part of its tolerance that any output moved by, the largest difference)."""
        permuted = _noisy(model, seed)
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


def assert_trains(model: nn.Module, inputs: Any, inner: str | None = "aot_eager", ratio: float = 0.3) -> dict[str, int]:
    """That every role that a model offers trains: one step's gradients of the slices are slices of all gradients.

    Compared in float64 and eval mode on copies; the deltas are float32, so to 2^-20 of a weight's largest gradient.
    inner: what compiles (`CompileOptions.inner`), None for eager. Returns role -> number of weights that train.
    Raises `AssertionError` that names the role and the weight, or what the step raised.
    """
    base, trained = _noisy(model, 0), {}
    inputs = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    full = dict(zip(dict(base.named_parameters()), _gradients(base, inputs, list(base.parameters()))))
    analysis = analyze(copy.deepcopy(base), inputs)
    for role in ROLES:
        try:
            targeted_bands(analysis, S2FTConfig({role: ratio}))
        except ConfigError:  # it has no such role
            continue
        made = _noisy(model, 0)
        plan = prepare(made, inputs, S2FTConfig({role: ratio}))
        torch._dynamo.reset()
        net = torch.compile(made, backend="s2ft", options={"inner": inner}) if inner else made
        try:
            found = _gradients(net, inputs, [s.delta for s in plan.slices])
        except Exception as error:  # of any pass, dynamo or torch
            raise AssertionError(f"{role} is offered and does not train: {type(error).__name__}: {error}") from error
        for s, gradient in zip(plan.slices, found, strict=True):
            expected = full[s.parameter_name].index_select(s.dim, s.indices)
            error = (gradient.to(expected.dtype) - expected).abs().max().item()
            allowed = 2.0**-20 * full[s.parameter_name].abs().max().item()
            assert error <= allowed, f"{role}: the gradient of {s.parameter_name} is off by {error:.3g} > {allowed:.3g}"
        trained[role] = len(plan.slices)
    return trained


def _gradients(model: nn.Module, inputs: Any, of: Sequence[Tensor]) -> list[Tensor]:
    """Of a sum of all outputs with different weights, from one random state."""
    args, kwargs = arguments(inputs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = [y.double() for y in outputs_of(model(*args, **kwargs)) if y.requires_grad]
    total = sum((y * torch.arange(y.numel(), device=y.device).view(y.shape).sin()).sum() for y in outputs)
    made = torch.autograd.grad(total, list(of), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(made, of)]


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
def _noisy(model: nn.Module, seed: int) -> nn.Module:
    """A float64 copy in eval mode, the same for the same seed, none of whose parameters is constant."""
    made, random = copy.deepcopy(unwrap(model)).double().eval(), torch.Generator().manual_seed(seed)
    for p in made.parameters():
        scale = p.std().item() if p.numel() > 1 and p.std() > 0 else 1.0
        p += 0.3 * scale * torch.randn(p.shape, generator=random, dtype=p.dtype).to(p.device)
    for module in made.modules():
        if isinstance(module, _BatchNorm) and module.running_var is not None:
            for statistic in (module.running_mean, module.running_var):
                statistic += 0.3 * torch.rand(statistic.shape, generator=random, dtype=statistic.dtype).to(
                    statistic.device
                )
    return made


@torch.no_grad()
def _outputs(model: nn.Module, call: tuple) -> list[Tensor]:
    args, kwargs = call
    with Promoted():
        return outputs_of(model(*args, **kwargs))


def _other_inputs(model: nn.Module, inputs: Any, seed: int) -> Iterator[tuple[tuple, list[Tensor]]]:
    """(arguments, outputs): the inputs, and others that the model takes."""
    random = torch.Generator().manual_seed(seed)

    def wide(t: Tensor) -> Tensor:
        return t.double() if t.is_floating_point() else t

    def values(t: Tensor) -> Tensor:
        return t.flatten()[torch.randperm(t.numel(), generator=random)].view(t.shape) if t.numel() else t

    def batch(t: Tensor) -> Tensor:
        return torch.cat([t, values(t)[:1]]) if t.ndim else t

    def length(t: Tensor) -> Tensor:
        return t[:, :-1] if t.ndim > 1 and t.shape[1] > 1 else t

    args = pytree.tree_map_only(Tensor, wide, tuple(arguments(inputs)))
    yield args, _outputs(model, args)
    for change in (values, batch, length):
        other = pytree.tree_map_only(Tensor, change, args)
        try:
            outputs = _outputs(model, other)
        except (RuntimeError, ValueError, IndexError, TypeError):
            continue  # a model of one size
        yield other, outputs


# --- an operator -------------------------------------------------------------------------------------------------


class Solution:
    """A random order for every free atom of some axes, and what it does to the positions along any of them."""

    def __init__(self, axes: Iterable[Axis], seed: int = 0):
        self.ids: dict[Axis, int] = {}
        random = torch.Generator().manual_seed(seed)
        free = {atom: None for axis in axes for atom in atoms(axis) if atom.pin is None}
        self.orders = {}
        for atom in free:
            self.orders[self.ids.setdefault(atom, len(self.ids))] = torch.randperm(atom.size, generator=random)

    def index(self, axis: Axis) -> Tensor:
        return gather_index(frozen(axis, self.ids), self.orders)

    def flat(self, dims: Iterable[Axis]) -> Tensor:
        """Where each element of a row-major tensor of these dimensions comes from."""
        index = torch.zeros(1, dtype=torch.int64)
        for axis in dims:
            index = (index[:, None] * axis.size + self.index(axis)[None, :]).reshape(-1)
        return index

    def move(self, x: Tensor, dims: Iterable[Axis]) -> Tensor:
        for d, axis in enumerate(dims):
            assert axis.size == x.shape[d], f"the rule says size {axis.size} for dim {d} of {list(x.shape)}"
            x = x.index_select(d, self.index(axis))
        return x


def frozen(axis: Axis, ids: dict[Axis, int]) -> Layout:
    root = find(axis)
    if root.kind == PRODUCT:
        return Product(tuple(frozen(p, ids) for p in root.parts))
    if root.kind == SUM:
        return Sum(tuple(frozen(p, ids) for p in root.parts))
    return Leaf(ids.setdefault(root, len(ids)), root.size)


def infer(op: Callable, args: Sequence, kwargs: Mapping[str, Any]) -> tuple[list, list, list, Context]:
    """The verdict of an operator's rule on one call: (inputs, their axes, the outputs' axes, the context)."""
    graph, inputs, axes = fx.Graph(), [], []

    def placeholder(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        node = graph.placeholder(f"x{len(inputs)}")
        node.meta["val"] = t
        inputs.append(t)
        axes.append([Axis(n) for n in t.shape])
        return node

    node_args = fx.node.map_aggregate(tuple(args), placeholder)
    node_kwargs = fx.node.map_aggregate(dict(kwargs), placeholder)
    node = graph.call_function(op, node_args, node_kwargs)
    node.meta["val"] = op(*args, **kwargs)
    values = {p: Value(a, weight=False) for p, a in zip(graph.find_nodes(op="placeholder"), axes)}
    rule_args, rule_kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    context = Context()
    made = rule_for(op)(context, node, *rule_args, **rule_kwargs)
    several = isinstance(node.meta["val"], (list, tuple))
    made = [made.dims if isinstance(made, Value) else made] if not several else made
    return inputs, axes, [list(m.dims) if isinstance(m, Value) else list(m) for m in made], context


def check_rule(op: Callable, args: Sequence, kwargs: Mapping[str, Any], seed: int = 0) -> int:
    """Checks a rule on one call; returns how many atoms of size > 1 it left free.

    Every atom gets a random order: op(permuted inputs) has to be permuted op(inputs).
    """
    inputs, axes, made, _ = infer(op, args, kwargs)
    solution = Solution([a for dims in [*axes, *made] for a in dims], seed)
    moved = iter([solution.move(x, dims) for x, dims in zip(inputs, axes)])
    moved_args, moved_kwargs = fx.node.map_aggregate(
        (tuple(args), dict(kwargs)), lambda a: next(moved) if isinstance(a, Tensor) else a
    )
    after, before = op(*moved_args, **moved_kwargs), op(*args, **kwargs)
    after, before = (list(v) if isinstance(v, (list, tuple)) else [v] for v in (after, before))
    for a, b, dims in zip(after, before, made, strict=True):
        torch.testing.assert_close(a, solution.move(b, dims), rtol=1e-9, atol=1e-9, equal_nan=True)
    return sum(1 for dims in axes for axis in dims for atom in set(atoms(axis)) if atom.pin is None and atom.size > 1)


def rulecheck(operator: str, samples: Iterable[Sequence], seeds: int = 5) -> int:
    """An operator's axis rule against the operator itself; returns how many atoms it left free, over all samples.

    operator: "ns::op" (its default overload) or with an overload, "ns::op.out". samples: tuples of its arguments, best
    in float64 and with sizes that differ. 0 means that the rule pins everything, as where there is none.
    Raises `AssertionError` where the outputs do not move as the rule says.
    """
    namespace, _, name = operator.partition("::")
    op: Any = getattr(getattr(torch.ops, namespace, None), name.partition(".")[0], None)
    op = getattr(op, name.partition(".")[2] or "default", None)
    if not isinstance(op, torch._ops.OpOverload):
        raise ConfigError(f"no operator {operator!r}; it is named 'namespace::operator', once its library is imported")
    samples = [tuple(sample) for sample in samples]
    if not samples:
        raise ConfigError(f"rulecheck of {operator} needs samples: tuples of its arguments")
    free = 0
    for sample in samples:
        free += [check_rule(op, sample, {}, seed) for seed in range(seeds)][0]
    return free
