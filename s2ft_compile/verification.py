"""Verify: permute every coupling of a model at once, at random, and compare its outputs with those of before.

The model is never written to: the permuted weights are copies, which `torch.func.functional_call` puts in the place of
the model's for one forward. They are float64, and so is everything the forward casts to float32 (norms, softmax, RoPE).

The tolerance. A reordered sum of n terms in arithmetic of unit roundoff u is the exact sum of terms each off by
a factor of at most 1 ± 2 n u (backward error of summation), so a permuted model is the model with its weights
multiplied by such factors. What factors of 1 ± ε at random do to the outputs is measured, Δ(ε), and scaled:
tolerance = SAFETY · 2 n u · (Δ(ε) / ε + max|y|), n the longest sum (the largest dimension of a parameter or an input).
A control shows that the comparison could have failed: the same permutations with half of the parameters left behind.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from s2ft_compile.passes.permute import moves_for

from .capture.examples import Inputs, resized, several
from .capture.models import inference_mode_of, unwrap
from .capture.recording import as_before
from .errors import ConfigError, StateError, VerificationError
from .quantized import Quantized, stand_ins
from .slices.state import find_state
from .structure import Analysis, Coupling

log = logging.getLogger(__name__)

SAFETY = 8.0  # worst signs of the factors against random ones
EPSILON = {torch.float64: 2.0**-30, torch.float32: 2.0**-16}  # far above roundoff, far below what changes a decision
FAILURES = (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, AssertionError)
NARROW = {torch.float32, torch.bfloat16, torch.float16}


@dataclass(frozen=True)
class Verification:
    """What permuting all couplings at once did to a model's outputs.

    difference: the largest change of an output. tolerance: what reordered sums explain. control: the change when half
    of the parameters stay behind; not above the tolerance, the weights cannot tell a right permutation from a wrong
    one. parameters: how many were permuted. alike: those whose values their permutation did not change (constants).
    wrong: the couplings that change the outputs by themselves. calls: how many examples and sizes were compared;
    the figures are of the first, or of the first that differs, which `where` then names.
    """

    couplings: int
    parameters: int
    alike: tuple[str, ...]
    dtype: str
    difference: float
    tolerance: float
    control: float
    wrong: tuple[Coupling, ...] = ()
    calls: int = 1
    where: str = ""

    @property
    def ok(self) -> bool:
        """Whether the outputs stay what they were, up to rounding."""
        return self.difference <= self.tolerance

    @property
    def sharp(self) -> bool:
        """Whether a wrong permutation would have shown."""
        return not self.couplings or self.control > self.tolerance

    def __str__(self) -> str:
        outcome = "unchanged" if self.ok else "CHANGED"
        lines = [
            f"{self.couplings} couplings permuted at once in {self.parameters} parameters ({self.dtype}): "
            f"outputs {outcome}, difference {self.difference:.2g}, allowed {self.tolerance:.2g}; "
            f"control {self.control:.2g}"
        ]
        if self.calls > 1:
            lines.append(f"{self.calls} calls compared, at other batch sizes and lengths too")
        if self.where and not self.ok:
            lines.append(f"the outputs differ {self.where}")
        if self.alike:
            lines.append(f"says nothing about {len(self.alike)} parameters that are constant, such as {self.alike[0]}")
        if not self.sharp:
            lines.append("the control changed nothing either: these weights cannot show a mistake (zeros? constants?)")
        return "\n".join([*lines, *(f"wrong: {c}" for c in self.wrong)])


def verify(model: nn.Module, example_inputs: Any, analysis: Analysis, seed: int = 0) -> Verification:
    """Permutes random copies of all couplings' weights at once and compares outputs; the model stays as it is.

    example_inputs: as for `analyze`. seed: of the permutations. Raises `ConfigError` for a model without weights
    (`meta`), `StateError` for a prepared one, `VerificationError` if the model runs in neither float64 nor float32.
    """
    model = unwrap(model)
    if find_state(model) is not None:
        raise StateError("this model is prepared; verify it before, or after s2ft.release(model)")
    if any(p.is_meta for p in model.parameters()):
        raise ConfigError(
            "a model on the meta device has no weights to verify; load them, or call analyze without verify"
        )
    with stand_ins(model, _dequantized), inference_mode_of(model), torch.no_grad():
        verifications = [
            replace(verification, where=where)
            for i, inputs in enumerate(several(example_inputs))
            for verification, where in _verified(model, inputs, f"with example {i + 1}" if i else "", analysis, seed)
        ]
    return replace(next((v for v in verifications if not v.ok), verifications[0]), calls=len(verifications))


def _dequantized(weight: Quantized) -> nn.Parameter:
    return nn.Parameter(weight.values(), requires_grad=False)


def _verified(
    model: nn.Module, inputs: Inputs, which: str, analysis: Analysis, seed: int
) -> Iterator[tuple[Verification, str]]:
    """The comparison on an example, and on the same at the other sizes that the model runs at; with words for each."""
    yield _compared(model, inputs, analysis, seed), which
    for choice in resized(model, inputs):
        try:
            yield _compared(model, choice.inputs, analysis, seed), f"{choice.label} {which}".strip()
        except VerificationError as error:
            log.debug("a size is fixed: %s", error)
            continue
        if choice.whole:
            return


def _compared(model: nn.Module, inputs: Inputs, analysis: Analysis, seed: int) -> Verification:
    try:
        return _Trial(model, inputs, torch.float64, seed).verification(analysis)
    except FAILURES as error:
        log.info("%s does not run in float64 (%s); float32 instead", type(model).__name__, error)
    try:
        return _Trial(model, inputs, torch.float32, seed).verification(analysis)
    except FAILURES as error:
        raise VerificationError(
            f"{type(model).__name__} runs neither in float64 nor in float32, so nothing can be compared: {error}"
        ) from error


class _Trial:
    """Forwards of a model with other weights in its place, all in one type and from one random state."""

    def __init__(self, model: nn.Module, inputs: Inputs, dtype: torch.dtype, seed: int):
        self.model, self.dtype, self.seed = model, dtype, seed
        self.args, self.kwargs = tree_map(self._cast, tuple(inputs))
        self.weights = {name: self._cast(p.detach()) for name, p in model.named_parameters()}
        self.buffers = {name: self._cast(b) for name, b in model.named_buffers()}
        self.before = self.outputs(self.weights)
        self.tolerance = self._tolerance()

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def outputs(self, weights: Mapping[str, Tensor]) -> list[Tensor]:
        buffers = {name: b.clone() for name, b in self.buffers.items()}
        apart = as_before(self.model)  # what a module keeps of a forward is of its weights: nothing for the next
        with apart, torch.random.fork_rng(devices=[]), default_dtype(self.dtype), Promoted(self.dtype):
            torch.manual_seed(self.seed)
            output = functional_call(self.model, {**buffers, **weights}, self.args, self.kwargs)
        return [
            t for t in tree_leaves(dict(output) if isinstance(output, Mapping) else output) if isinstance(t, Tensor)
        ]

    def difference(self, weights: Mapping[str, Tensor]) -> float:
        after = self.outputs(weights)
        if [t.shape for t in after] != [t.shape for t in self.before]:
            return float("inf")
        return max((_distance(a, b) for a, b in zip(self.before, after)), default=0.0)

    def permuted(
        self, analysis: Analysis, orders: Mapping[int, Tensor], leave: Sequence[str] = ()
    ) -> dict[str, Tensor]:
        """The weights, with those that a reordered axis occurs in reordered, save for `leave`."""
        weights = {**self.weights, **{name: self.buffers[name] for name in analysis.statistics}}
        for (name, dim), index in moves_for(orders, analysis.layouts).items():
            if name not in leave:
                weights[name] = weights[name].index_select(dim, index.to(weights[name].device))
        return weights

    def verification(self, analysis: Analysis) -> Verification:
        orders = random_orders(analysis.couplings, self.seed)
        weights = self.permuted(analysis, orders)
        names = sorted({name for name, _ in moves_for(orders, analysis.layouts)})
        difference = self.difference(weights)
        before = {**self.buffers, **self.weights}
        alike = tuple(n for n in names if torch.equal(weights[n], before[n]))
        wrong = [] if difference <= self.tolerance else self.culprits(analysis, list(analysis.couplings), orders)
        varied = [n for n in names if n not in alike]  # of constants it would not show that they stay behind
        control = self.difference(self.permuted(analysis, orders, varied[::2]))
        return Verification(
            len(analysis.couplings),
            len(names),
            alike,
            str(self.dtype).removeprefix("torch."),
            difference,
            self.tolerance,
            control,
            tuple(wrong),
        )

    def culprits(
        self, analysis: Analysis, couplings: list[Coupling], orders: Mapping[int, Tensor]
    ) -> Iterator[Coupling]:
        """Those of `couplings` that change the outputs by themselves, by halving."""
        chosen = {c.axis: orders[c.axis] for c in couplings}
        if not couplings or self.difference(self.permuted(analysis, chosen)) <= self.tolerance:
            return
        if len(couplings) == 1:
            yield couplings[0]
            return
        half = len(couplings) // 2
        yield from self.culprits(analysis, couplings[:half], orders)
        yield from self.culprits(analysis, couplings[half:], orders)

    def _tolerance(self) -> float:
        """See the module's docstring."""
        epsilon, random = EPSILON[self.dtype], torch.Generator().manual_seed(self.seed)
        nudged = {
            name: w * (1 + epsilon * _signs(w, random)) if w.is_floating_point() else w
            for name, w in self.weights.items()
        }
        sizes = [
            n
            for t in [*self.weights.values(), *tree_leaves((self.args, self.kwargs))]
            if isinstance(t, Tensor)
            for n in t.shape
        ]
        largest = max((t.abs().max().item() for t in self.before if t.is_floating_point() and t.numel()), default=1.0)
        u = torch.finfo(self.dtype).eps / 2
        tolerance = SAFETY * 2 * max(sizes, default=1) * u * (self.difference(nudged) / epsilon + largest)
        return tolerance if tolerance == tolerance and tolerance != float("inf") else 0.0


def random_orders(couplings: Sequence[Coupling], seed: int) -> dict[int, Tensor]:
    """A random order, never the identity, of each coupling's units: axis -> int64 (units,)."""
    random, orders = torch.Generator().manual_seed(seed), {}
    for c in couplings:
        order = torch.randperm(c.units, generator=random)
        orders[c.axis] = order.roll(1) if torch.equal(order, torch.arange(c.units)) else order
    return orders


def _signs(like: Tensor, random: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, like.shape, generator=random) * 2 - 1).to(like)


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest |a - b|; infinite where one is not a number and the other is, or where integers differ."""
    if not a.is_floating_point() and not a.is_complex():
        return 0.0 if torch.equal(a, b) else float("inf")
    same = (a == b) | (a.isnan() & b.isnan())
    distance = torch.where(same, torch.zeros((), dtype=a.dtype), a - b).abs()
    return distance.nan_to_num(float("inf")).max().item() if a.numel() else 0.0


class Promoted(TorchFunctionMode):
    """The given type wherever a forward asks for a narrower one, so that one cast does not undo the precision."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def _wider(self, value: Any) -> Any:
        return self.dtype if isinstance(value, torch.dtype) and value in NARROW else value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            return args[0].to(self.dtype)
        return func(*map(self._wider, args), **{k: self._wider(v) for k, v in (kwargs or {}).items()})


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The type of tensors made without one; afterwards what it was."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
