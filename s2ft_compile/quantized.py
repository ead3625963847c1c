"""What a quantized weight is: how its shape, type and values are had. A row of `KINDS` for each way to quantize one.

A quantized weight is never written, and only its own layer can read it. So everything here that wants a weight's values
asks for them one at a time (`Values`), and what only wants its shape, such as a trace, sees an ordinary linear layer
with an ordinary weight of no size (`stand_ins`).
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import isfunction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ConfigError

__all__ = ["Kind", "not_quantized", "register"]

ROWS = 128  # of a weight that are dequantized at a time: on the way libraries make copies in float32


@dataclass(frozen=True)
class Kind:
    """A way to quantize the weight of a layer.

    holds: (layer, name of one of its parameters) -> whether that is a weight of this kind. dtype: of a layer's values.
    values: a layer's, dequantized: a new tensor (out, in). settle: makes the library keep the weight as it is, where it
    would rearrange it between two forwards, and the layer one that can be pickled.
    """

    name: str
    holds: Callable[[nn.Module, str], bool]
    dtype: Callable[[nn.Module, str], torch.dtype]
    values: Callable[[nn.Module, str], Tensor]
    settle: Callable[[nn.Module], Any] = lambda layer: None


def is_conv1d(layer: nn.Module) -> bool:
    """Whether it is transformers' linear layer whose weight is stored (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def _made_by(layer: nn.Module, library: str, name: str) -> bool:
    return any(c.__name__ == name and c.__module__.split(".")[0] == library for c in type(layer).__mro__)


def _weight(layer: nn.Module, key: str) -> Any:
    """A layer's weight, which may be of a library's own type."""
    return layer._parameters[key]


def _dequantizes_itself(layer: nn.Module, key: str) -> bool:
    """Whether it is a tensor of a class that is made of others and knows its values, such as those of torchao."""
    classes = type(_weight(layer, key)).__mro__
    own = [vars(c) for c in classes[: classes.index(Tensor)]]
    return any(isfunction(c.get("dequantize")) for c in own) and any("__tensor_flatten__" in c for c in own)


def _in_rows(weight: Tensor) -> list[Tensor]:
    """A tensor that is made of others in pieces of `ROWS` rows that are tensors of the same make; itself alone, where
    its library has no such pieces."""
    try:
        pieces = [weight.detach()[start : start + ROWS] for start in range(0, weight.shape[0], ROWS)]
    except (NotImplementedError, RuntimeError, ValueError, TypeError, AssertionError, AttributeError):
        return [weight]
    return pieces if all(_make(piece) == _make(weight) for piece in pieces) else [weight]


def _make(tensor: Any) -> tuple[type, str]:
    made = getattr(tensor, "__tensor_flatten__", None)
    return type(tensor), repr(made()[1]) if made else ""


def _dequantized(weight: Any) -> Tensor:
    pieces = _in_rows(weight)
    if len(pieces) > 1:
        return _in_one(weight, weight.dtype, (piece.dequantize() for piece in pieces))
    values: Tensor = weight.dequantize()
    return values


def _in_one(weight: Tensor, dtype: torch.dtype, pieces: Iterable[Tensor]) -> Tensor:
    """What is made `ROWS` rows at a time, never twice in memory."""
    values = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for i, piece in enumerate(pieces):
        values[i * ROWS : (i + 1) * ROWS] = piece
    return values


def _values_4bit(layer: nn.Module, key: str) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    _settle_4bit(layer)
    weight = _weight(layer, key)
    values: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return values


def _settle_4bit(layer: Any) -> None:
    """On some CPUs a forward in eval mode rounds the scales, and the layer does not train afterwards."""
    if getattr(layer._parameters["weight"].quant_state, "packing_format_for_cpu", False):
        layer.state_dict()  # which turns it back
    layer.support_avx512bf16_for_cpu = False


def _values_8bit(layer: Any, key: str) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    weight = _weight(layer, key)
    scales = layer.state.SCB if weight.SCB is None else weight.SCB
    parts = [slice(start, start + ROWS) for start in range(0, len(scales), ROWS)]
    return _in_one(weight.data, scales.dtype, (int8_vectorwise_dequant(weight.data[p], scales[p]) for p in parts))


KINDS: list[Kind] = [
    Kind(
        "a tensor that dequantizes itself",
        _dequantizes_itself,
        lambda layer, key: _weight(layer, key).dtype,
        lambda layer, key: _dequantized(_weight(layer, key)),
        lambda layer: layer.__dict__.pop("extra_repr", None),  # torchao's, a method of a `partial`, cannot be pickled
    ),
    Kind(
        "bitsandbytes 4-bit",
        lambda layer, key: (
            key == "weight"
            and _made_by(layer, "bitsandbytes", "Linear4bit")
            and getattr(_weight(layer, key), "quant_state", None) is not None
        ),
        lambda layer, key: _weight(layer, key).quant_state.dtype,
        _values_4bit,
        _settle_4bit,
    ),
    Kind(
        "bitsandbytes 8-bit",
        lambda layer, key: (
            key == "weight"
            and _made_by(layer, "bitsandbytes", "Linear8bitLt")
            and _weight(layer, key).dtype == torch.int8
        ),
        lambda layer, key: torch.float32,
        _values_8bit,
    ),
]


def register(kind: Kind) -> None:
    """Adds a way to quantize weights. It is asked before those that are known."""
    KINDS.insert(0, kind)


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized weight. layer, key: the (first) module that holds it, and its name there."""

    name: str
    layer: nn.Module
    key: str
    kind: Kind

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        layer = self.layer
        return (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else tuple(self.held.shape)

    @property
    def held(self) -> nn.Parameter:
        held: nn.Parameter = _weight(self.layer, self.key)
        return held

    @property
    def dtype(self) -> torch.dtype:
        return self.kind.dtype(self.layer, self.key)

    @property
    def is_linear(self) -> bool:
        return isinstance(self.layer, nn.Linear) and self.key == "weight"

    @property
    def turned(self) -> bool:
        """Whether it is (in, out) where it was loaded from, as transformers' Conv1D has it."""
        return getattr(getattr(self.layer, "source_cls", None), "__name__", None) == "Conv1D"

    @torch.no_grad()
    def values(self) -> Tensor:
        """Dequantized: a new tensor."""
        return self.kind.values(self.layer, self.key).detach()

    def hollow(self) -> nn.Parameter:
        """A tensor of the values' shape, type and device that has one element in memory."""
        one = torch.zeros((), dtype=self.dtype, device=self.held.device)
        return nn.Parameter(one.expand(self.shape), requires_grad=False)

    def saved(self) -> dict[str, Tensor]:
        """What the layer's `state_dict` holds of it, by the names it has there."""
        saved: dict[str, Tensor] = {}
        self.layer.state_dict(destination=saved)
        return {n: t for n, t in saved.items() if n == self.key or n not in self.layer._parameters}


def parts_of(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that named ones are made of, each with its path."""
    for name, t in tensors:
        if hasattr(t, "__tensor_flatten__"):
            yield from parts_of((f"{name}.{part}", getattr(t, part)) for part in t.__tensor_flatten__()[0])
        else:
            yield name, t


def same_parts(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors, plain or made of others, hold the same."""
    ours, theirs = dict(parts_of([("", a)])), dict(parts_of([("", b)]))
    return ours.keys() == theirs.keys() and all(
        t.shape == theirs[n].shape and t.dtype == theirs[n].dtype and torch.equal(t, theirs[n].to(t.device))
        for n, t in ours.items()
    )


def sampled(weight: Quantized, sample: Callable[[Tensor], str]) -> str:
    """128 bits (hex) of a quantized weight's kind, shape, type, and samples of its parts."""
    parts = sorted(parts_of(weight.saved().items()))
    text = f"{weight.shape} {weight.dtype}" + "".join(f"\n{name} {sample(t)}" for name, t in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def settle(layer: nn.Module, key: str) -> None:
    """Makes the library keep a quantized weight as it is from now on."""
    if kind := kind_of(layer, key):
        kind.settle(layer)


def kind_of(layer: nn.Module, key: str) -> Kind | None:
    return next((kind for kind in KINDS if kind.holds(layer, key)), None)


def quantized_in(model: nn.Module) -> dict[str, Quantized]:
    """The quantized weights of a model, by (first) name."""
    weights: dict[int, Quantized] = {}
    for path, layer in model.named_modules():
        for key, parameter in layer._parameters.items():
            if parameter is not None and id(parameter) not in weights and (kind := kind_of(layer, key)):
                weights[id(parameter)] = Quantized(f"{path}.{key}" if path else key, layer, key, kind)
    return {weight.name: weight for weight in weights.values()}


def check_known(model: nn.Module) -> None:
    """Raises `ConfigError` for a weight that is packed in a way whose values nobody here knows."""
    for path, layer in model.named_modules():
        for key, p in layer._parameters.items():
            packed = p is not None and hasattr(p, "__tensor_flatten__") and not hasattr(p, "placements")
            if packed and kind_of(layer, key) is None:
                raise ConfigError(
                    f"{path}.{key} is of type {type(p).__name__}, which has no `dequantize()`, so its values, and a "
                    f"gradient through it, are not known; valid: "
                    f"{', '.join(kind.name for kind in KINDS)}, or a way of your own, s2ft_compile.quantized.register"
                )


def check_gradients(weights: Iterable[Quantized]) -> None:
    """Raises `ConfigError` for a weight whose product rounds its input too: no gradient gets through that. Of weights
    that are made alike one is asked, for the gradient at two places: a linear function has the same."""
    asked: set[tuple[type, str]] = set()
    for weight in weights:
        held = weight.held
        made = getattr(held, "__tensor_flatten__", None)
        if made is None or held.is_meta or not weight.is_linear:
            continue
        alike = type(held), repr(made()[1])
        if alike in asked:
            continue
        asked.add(alike)
        x = torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype, device=held.device)[None]
        rows = _in_rows(held)[0]
        gradients = [_gradient(at, rows) for at in (x, x.square())]
        if not torch.equal(*gradients) or not gradients[0].any():
            raise ConfigError(
                f"{weight.name} is of type {type(held).__name__}, and its product rounds the input as well as the "
                f"weight, so that no gradient gets through it; valid are bases whose weights alone are quantized, such "
                f"as by torchao's Int8WeightOnlyConfig and Float8WeightOnlyConfig"
            )


def _gradient(x: Tensor, weight: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = F.linear(x, weight)
        return torch.autograd.grad(y.sum(), x)[0] if y.requires_grad else torch.zeros_like(x)


class Values(Mapping[str, Tensor]):
    """A model's parameters by name, a quantized one as its values, made anew whenever it is asked for. own: as they
    are. quantized: what is known of those that are."""

    def __init__(self, model: nn.Module):
        self.own, self.quantized = dict(model.named_parameters()), quantized_in(model)

    def __getitem__(self, name: str) -> Tensor:
        return self.quantized[name].values() if name in self.quantized else self.own[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)

    def dtype(self, name: str) -> torch.dtype:
        return self.quantized[name].dtype if name in self.quantized else self.own[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self.quantized[name].shape if name in self.quantized else tuple(self.own[name].shape)


# what transformers and accelerate know a quantized model by
MARKS = ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method")


@contextmanager
def not_quantized(model: nn.Module) -> Iterator[None]:
    """Context in which transformers takes a model for one that is not quantized: one that its Trainer trains, and that
    is saved as an ordinary one."""
    marked = [*((model, name) for name in MARKS), (getattr(model, "config", None), "quantization_config")]
    kept = [(owner, name, vars(owner).pop(name)) for owner, name in marked if owner is not None and name in vars(owner)]
    try:
        yield
    finally:
        for owner, name, value in kept:
            vars(owner)[name] = value


class StandIn(nn.Linear):
    """A linear layer that takes its input in any type, as quantized ones do."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        bias: Tensor | None = self.bias
        if weight.dtype != x.dtype:
            weight = weight.to(x.dtype)
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return F.linear(x, weight, bias)


@contextmanager
def stand_ins(
    model: nn.Module, value: Callable[[Quantized], nn.Parameter] = Quantized.hollow
) -> Iterator[dict[str, Quantized]]:
    """Context in which quantized layers are ordinary ones, and `value(weight)` their weights: by default of no size.

    Gives the weights that are replaced, by name.
    """
    weights, undo = quantized_in(model), []
    values: dict[str, nn.Parameter] = {}
    named = {id(weight.held): weight for weight in weights.values()}
    try:
        for layer in model.modules():
            for key, parameter in list(layer._parameters.items()):
                if (weight := named.get(id(parameter))) is None:
                    continue
                if weight.name not in values:
                    values[weight.name] = value(weight)
                undo.append((layer, type(layer), key, parameter, layer.__dict__.get("forward")))
                layer._parameters[key] = values[weight.name]
                if isinstance(layer, nn.Linear):
                    layer.__dict__.pop("forward", None)
                    layer.__class__ = StandIn
        yield weights
    finally:
        for layer, cls, key, parameter, forward in undo:
            layer.__class__ = cls
            layer._parameters[key] = parameter
            if forward is not None:
                layer.__dict__["forward"] = forward
