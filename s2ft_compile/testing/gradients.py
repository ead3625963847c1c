"""Gradients of slices against those of whole weights."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from s2ft_compile.capture.examples import arguments
from s2ft_compile.capture.models import tensors_of, unwrap
from s2ft_compile.capture.recording import exporting
from s2ft_compile.config import NORM, ROLES, CompileOptions, S2FTConfig
from s2ft_compile.errors import ConfigError, StateError
from s2ft_compile.passes.backward.attach import runs
from s2ft_compile.passes.backward.trainable import Taken, sliced_gradients, trained_bands
from s2ft_compile.passes.select.ranking import Band
from s2ft_compile.passes.select.select import select, targeted_bands
from s2ft_compile.passes.tracing import recorded
from s2ft_compile.plan import Plan, Slice
from s2ft_compile.preparation import analyze, prepare_analyzed
from s2ft_compile.slices.state import find_state, release, state_of
from s2ft_compile.structure import Analysis
from s2ft_compile.verification import default_dtype

from .equivalence import AMPLIFIED, Promoted, noisy, outputs_of, wide

U32 = 2.0**-24  # unit roundoff of float32, in which deltas and their gradients live
WITHIN = 16 * U32  # of a weight's largest gradient; in float64, too, torch has constants of float32 (hardsigmoid's 1/6)


def assert_gradients(
    model: nn.Module,
    plan: Plan,
    inputs: Any,
    loss: Callable[[Any], Tensor] | None = None,
    options: CompileOptions | None = None,
) -> None:
    """That the gradient of every slice, through the backend, is that slice of the whole weight's, worked out in float64
    in eager mode. The model stays as it is; both sides run on copies, in eval mode.

    model, plan: prepared, and what `prepare` returned. inputs: a tuple or a dict of the forward's arguments. loss:
    output -> scalar; by default the output's own, or an uneven one of all that it holds. options: by default
    `inner="aot_eager"`, which compiles fastest. Drops the graphs that torch.compile holds.
    Raises `AssertionError` that names the slice and its worst unit; or, as the negative control, a slice that no
    gradient reaches, and a model of which nothing was compiled. Raises `StateError` for a model without this plan.
    """
    model, loss, options = unwrap(model), loss or uneven_loss, options or CompileOptions(inner="aot_eager")
    state = find_state(model)
    if state is None or state.plan is not plan:
        raise StateError("assert_gradients takes a prepared model and the plan that prepare returned for it")
    args, kwargs = arguments(inputs)
    base = copy.deepcopy(model)
    release(base)
    base = base.double().eval().requires_grad_(True)

    def whole(wide_model: nn.Module) -> Tensor:
        with Promoted():
            return loss(wide_model(*wide(args), **wide(kwargs)))

    full = full_gradients(base, whole)
    copied = copy.deepcopy(model).eval()
    copied.zero_grad()
    torch._dynamo.reset()
    with recorded() as steps:
        how = {name: value for name, value in vars(options).items() if value is not None}
        loss(torch.compile(copied, backend="s2ft", options=how)(*args, **kwargs)).backward()
    torch._dynamo.reset()
    if options.inner != "eager" and not any(step.level == "joint" for step in steps):
        raise AssertionError("no graph with a slice was compiled, so nothing was tested")
    weights, n = dict(model.named_parameters()), sum(max(p.shape, default=1) for p in base.parameters())
    for s, block in zip(plan.slices, state_of(copied).blocks, strict=True):
        u = torch.finfo(weights[s.parameter_name].dtype).eps / 2
        _assert_slice(s, block.delta.grad, full[s.parameter_name], 2 * n * u * AMPLIFIED)


def assert_slices(plan: Plan, full: Mapping[str, Tensor], tolerance: float) -> None:
    """That each delta's gradient is the slice of the full one: to `tolerance` of its largest entry, and float32's
    rounding. full: parameter name -> gradient, as `full_gradients` gives them."""
    for s in plan.slices:
        _assert_slice(s, s.delta.grad, full[s.parameter_name], tolerance, reached=False)


def full_gradients(base: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Eager gradients of every parameter of a plain model; a parameter the loss does not reach has zeros."""
    return dict(zip(dict(base.named_parameters()), _gradients(loss(base), list(base.parameters()))))


def uneven_loss(output: Any) -> Tensor:
    """The loss that an output holds, or else a scalar that every number in it has an uneven part in."""
    held = getattr(output, "loss", None)
    if isinstance(held, Tensor):
        return held
    total = [((o - 0.1 * torch.linspace(-1, 1, o.shape[-1]).to(o)) ** 2).mean() for o in outputs_of(output) if o.ndim]
    return torch.stack(total).sum()


def _assert_slice(s: Slice, grad: Tensor | None, full: Tensor, tolerance: float, reached: bool = True) -> None:
    expected = full.index_select(s.dim, s.indices.to(full.device))
    where = f"{s.parameter_name}[{s.dim}] ({', '.join(s.roles)})"
    assert grad is not None, f"{where} has no gradient"
    assert grad.shape == expected.shape, f"{where} has a gradient of {list(grad.shape)}, not of {list(expected.shape)}"
    assert grad.dtype == torch.float32, f"{where} has a gradient of {grad.dtype}"
    assert not reached or expected.any(), f"no gradient reaches {where}: give inputs that reach it"
    error = (grad.to(expected.dtype) - expected).abs()
    allowed = tolerance * full.abs().max() + 2 * U32 * expected.abs()
    if not (error <= allowed).all():
        worst = int((error - allowed).movedim(s.dim, 0).reshape(len(s.indices), -1).amax(1).argmax())
        raise AssertionError(
            f"the gradient of {where} is off by {error.max():.3g} at index {int(s.indices[worst])}, "
            f"where {allowed.max():.3g} is allowed and the largest entry is {full.abs().max():.3g}"
        )


def _gradients(of: Tensor, to: Sequence[Tensor]) -> list[Tensor]:
    """Zeros where nothing reaches."""
    gradients = torch.autograd.grad(of, list(to), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, to)]


def assert_trains(
    model: nn.Module, inputs: Any, inner: str | None = "aot_eager", ratio: float = 0.3, analysis: Analysis | None = None
) -> dict[str, int]:
    """That every role that a model offers trains: one step's gradients of the slices are slices of all gradients.

    Compared in float64 and eval mode on copies; the deltas are float32, so to 2^-20 of a weight's largest gradient.
    inner: what compiles (`CompileOptions.inner`), None for eager. analysis: the couplings, by default what `analyze`
    finds. Returns role -> number of weights that train.
    Raises `AssertionError` that names the role and the weight, or what the step raised; `ValueError` where the model's
    own gradients are not finite.
    """
    inputs = wide(inputs)
    base, trained = noisy(model, 0).requires_grad_(True), {}
    full = _finite(full_gradients(base, lambda base: _summed(base, inputs)))
    rounding = _rounding(full)
    analysis = analysis or analyze(copy.deepcopy(base), inputs)
    for role in ROLES:
        config = S2FTConfig(_targets(role, ratio), selection="random")
        try:
            targeted_bands(analysis, config)
        except ConfigError:  # it has no such role
            continue
        prepared = noisy(model, 0)
        plan = prepare_analyzed(prepared, inputs, analysis, config)
        torch._dynamo.reset()
        net = torch.compile(prepared, backend="s2ft", options={"inner": inner}) if inner else prepared
        try:
            gradients = _gradients(_summed(net, inputs), [s.delta for s in plan.slices])
        except Exception as error:  # of any pass, dynamo or torch
            raise AssertionError(f"{role} is offered and does not train: {type(error).__name__}: {error}") from error
        for s, gradient in zip(plan.slices, gradients, strict=True):
            expected = full[s.parameter_name].index_select(s.dim, s.indices)
            error = (gradient.to(expected.dtype) - expected).abs().max().item()
            allowed = WITHIN * full[s.parameter_name].abs().max().item() + rounding
            assert error <= allowed, f"{role}: the gradient of {s.parameter_name} is off by {error:.3g} > {allowed:.3g}"
        trained[role] = len(plan.slices)
    return trained


def assert_sliced(
    model: nn.Module, inputs: Any, ratio: float = 0.3, analysis: Analysis | None = None
) -> dict[str, tuple[int, int]]:
    """The same without a compiler: all slices of all roles at once, by the slice rules of one joint graph of eval mode
    that is run as it is, in float64. What is offered is what `s2ft inspect` shows and `prepare` takes.

    analysis: the couplings, by default what `analyze` finds. Returns role -> (number of weights that train, number of
    those that have no slice rule, which are left out). Raises `AssertionError` where a gradient is no slice of the full
    one or has no slice rule after all, and what tracing raises where there is no joint graph.
    """
    analysis = analysis or analyze(model, inputs)
    _, refused = trained_bands(model, inputs, analysis)
    inputs, model = wide(inputs), noisy(model, 0).requires_grad_(False)
    parameters = dict(model.named_parameters())
    of_roles: dict[str, list[Taken]] = {}
    counts: dict[str, tuple[int, int]] = {}
    for role in ROLES:
        try:
            chosen = select(analysis, S2FTConfig(_targets(role, ratio), selection=_first_units), parameters)
        except ConfigError:  # it has no such role
            continue
        kept = [s for s in chosen if role not in refused.get((s.parameter_name, s.dim), ())]
        ranges = [runs(s.indices.tolist()) for s in kept]
        of_roles[role] = [Taken(s.parameter_name, s.dim, *map(tuple, r)) for s, r in zip(kept, ranges)]
        counts[role] = len(kept), len(chosen) - len(kept)
    slices = list(dict.fromkeys(taken for listed in of_roles.values() for taken in listed))
    if not slices:
        return counts
    with Promoted(), default_dtype(torch.float64):
        joint = sliced_gradients(model, inputs, slices, _weighted)
    for role, listed in of_roles.items():
        for one in (one for one in listed if one in joint.refused):
            raise AssertionError(f"{role} is offered, and {one} does not train: it would be {joint.refused[one]}")
    args, kwargs = arguments(inputs)
    given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    deltas = [_taken(parameters[s.parameter_name], s) for s in slices]
    with torch.no_grad(), default_dtype(torch.float64):  # what an operator makes of integers is of this type, too
        gradients = joint.graph_module(*tensors_of(model).values(), *given, *deltas)[-len(deltas) :]
    with exporting(), Promoted(), default_dtype(torch.float64):  # code that asks takes the same way as in the graph
        full = _finite(full_gradients(model.requires_grad_(True), lambda base: _summed(base, inputs)))
    rounding = _rounding(full)
    for s, gradient in zip(slices, gradients, strict=True):
        expected = _taken(full[s.parameter_name], s)
        gradient = torch.zeros_like(expected) if gradient is None else gradient
        error = (gradient.to(expected.dtype) - expected).abs().max().item()
        allowed = WITHIN * full[s.parameter_name].abs().max().item() + rounding
        assert error <= allowed, f"the gradient of {s} is off by {error:.3g} > {allowed:.3g}"
    return counts


def _targets(role: str, ratio: float) -> dict[str, float]:
    return {role: 1.0 if role == NORM else ratio}


def _finite(full: dict[str, Tensor]) -> dict[str, Tensor]:
    """Raises `ValueError` that names a gradient with which nothing can be compared."""
    for name, gradient in full.items():
        if not gradient.isfinite().all():
            raise ValueError(f"the gradient of {name} is not finite on these inputs; give inputs on which it is")
    return full


def _rounding(full: Mapping[str, Tensor]) -> float:
    """What float64 leaves of a gradient that is zero in exact arithmetic (a query's, where there is one key)."""
    return 2.0**-53 * AMPLIFIED * max((g.abs().max().item() for g in full.values() if g.numel()), default=0.0)


def _first_units(bands: Sequence[Band], scores: Tensor) -> Tensor:
    return torch.arange(len(scores))


def _taken(t: Tensor, s: Taken) -> Tensor:
    return torch.cat([t.detach().narrow(s.dim, start, n) for start, n in zip(s.starts, s.lengths)], s.dim)


def _summed(model: nn.Module, inputs: Any) -> Tensor:
    """All outputs with different weights, from one random state."""
    args, kwargs = arguments(inputs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _weighted(model(*args, **kwargs))


def _weighted(output: Any) -> Tensor:
    outputs = [y.double() for y in outputs_of(output) if y.requires_grad]
    return sum((y * torch.arange(y.numel(), device=y.device).view(y.shape).sin()).sum() for y in outputs)
