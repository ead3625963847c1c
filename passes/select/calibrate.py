"""What units are worth on data (paper section 3.2: A, S and G), in one pass over a few batches.

Per entry W_ij of a weight that meets the input X and makes Y, for tokens t:

    activation         Σ_t X_tj²  for a unit of columns (what it reads),  Σ_t Y_ti²  for one of rows (what it makes,
                       before a bias): once for each position of the unit
    weight_activation  W_ij² Σ_t X_tj², the square of Wanda's score (arXiv 2306.11695), summed over the unit's entries
    gradient           (∂ loss / ∂ W_ij)² of each batch, summed over the unit's entries

All are squares that add, like those of `scores.py`: over a unit, the bands of a structure, the uses of a weight
(for the gradient, a weight's uses add up before the square), and batches. They are reduced to one number for each
position of a weight's dimension as soon as they exist; neither an activation nor a gradient of a frozen weight outlives
the operator that made it. The model runs in eval mode and is left as it was.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from s2ft_compile.capture.examples import arguments
from s2ft_compile.capture.models import inference_mode_of
from s2ft_compile.config import SELECTIONS, looks_at_data
from s2ft_compile.errors import ConfigError
from s2ft_compile.passes.backward.beside import trained_values, with_slices
from s2ft_compile.quantized import Quantized, quantized_in

from .lean_saving import lean_saving
from .products import Uses
from .selections import SCORES

log = logging.getLogger(__name__)
Place = tuple[str, int]  # a parameter's name and one of its dimensions
Loss = Callable[[Any, Any], Tensor]


def calibrate(
    model: nn.Module, places: Iterable[Place], selection: str, batches: Iterable[Any], loss: Loss | None = None
) -> dict[Place, Tensor]:
    """Place -> float64 (size of the dimension,) on the CPU: the scores of `selection`, which looks at data.

    batches: each a tuple or a dict of the forward's arguments. loss: (output, batch) -> scalar, for "gradient"; by
    default the output itself or its `.loss`. A bias or norm weight has no activations and is left out of the result.
    Raises `ConfigError` for unusable batches, an output without a loss, and a weight that is used in no known product.
    """
    check(selection, batches)
    places = list(places)
    quantized = quantized_in(model)
    weights = {name: quantized.get(name) or model.get_parameter(name) for name, _ in places}
    gradients, score = SELECTIONS[selection] == "gradients", SCORES[selection]
    if not gradients:
        weights = {name: w for name, w in weights.items() if len(w.shape) > 1}
    sums = {
        (name, dim): torch.zeros(weights[name].shape[dim], dtype=torch.float64, device=_device(weights[name]))
        for name, dim in dict.fromkeys(places)
        if name in weights
    }
    count = 0
    with inference_mode_of(model), torch.compiler.set_stance("force_eager"):
        for batch in batches:
            count += 1
            if gradients:
                _add_gradients(model, weights, sums, score, batch, loss)
            else:
                plain = {name: w for name, w in weights.items() if name not in quantized}
                with torch.no_grad(), Uses(plain, sums, score) as uses, _seen(model, weights, uses):
                    _call(model, batch)
    if not count:
        raise ConfigError("calibration has no batches; pass a list of tuples or dicts of the forward's arguments")
    broken = [name for (name, _), total in sums.items() if not total.isfinite().all()]
    if broken:
        raise ConfigError(
            f"selection {selection!r} found values that are not finite at {broken[0]} "
            f"({len(broken)} of {len(sums)}); a calibration batch or the weights overflow"
        )
    log.info("calibrated %d weights on %d batches", len(weights), count)
    return {place: total.cpu() for place, total in sums.items()}


def check(selection: Any, batches: Any) -> None:
    """Raises `ConfigError` if a selection that looks at data is not given batches. Looks into none of them."""
    if not looks_at_data(selection):
        return
    if batches is None:
        raise ConfigError(
            f"selection {selection!r} looks at data: pass calibration=, a few batches, each a tuple or a "
            f"dict of the forward's arguments; without data use 'random', 'weight' or 'lowrank'"
        )
    if isinstance(batches, (str, Mapping, Tensor)) or not isinstance(batches, Iterable):
        raise ConfigError(
            f"calibration is a list of batches, each a tuple or a dict of the forward's arguments, got "
            f"one {type(batches).__name__}; for one batch pass [batch]"
        )


def _call(model: nn.Module, batch: Any) -> Any:
    args, kwargs = arguments(batch)
    return model(*args, **kwargs)


def _add_gradients(
    model: nn.Module,
    weights: Mapping[str, Tensor | Quantized],
    sums: Mapping[Place, Tensor],
    score: Callable[[Tensor, int], Tensor],
    batch: Any,
    loss: Loss | None,
) -> None:
    """Every weight that is asked for becomes a leaf of its own, whose gradient is reduced and dropped as soon as it is
    complete; all others are constants, so that nothing is computed below the first leaf."""
    quantized = {name: w for name, w in weights.items() if isinstance(w, Quantized)}
    leaves = {name: (w.hollow() if name in quantized else w.detach()).requires_grad_() for name, w in weights.items()}
    totals: dict[str, list[tuple[int, Tensor]]] = {}
    for (name, dim), total in sums.items():
        totals.setdefault(name, []).append((dim, total))

    def reduce(name: str, leaf: Tensor) -> None:
        for dim, total in totals[name]:
            total += score(leaf.grad, dim)
        leaf.grad = None

    for name, leaf in leaves.items():
        leaf.register_post_accumulate_grad_hook(partial(reduce, name))
    kept = quantized_in(model)
    frozen = {name: p.detach() for name, p in model.named_parameters() if name not in kept}
    given = {name: leaf for name, leaf in leaves.items() if name not in quantized}
    args, kwargs = arguments(batch)
    with torch.enable_grad():
        with lean_saving([*frozen.values(), *model.buffers()]), _tapped(model, leaves):
            output = torch.func.functional_call(model, {**frozen, **given}, args, kwargs)
            value = _loss_of(model, output, batch, loss)
        del output
        if value.requires_grad:  # else it does not depend on any of them
            torch.autograd.backward(value, inputs=list(leaves.values()))


# --- quantized weights: their layers' products ------------------------------------------------------------------------


def _device(weight: Tensor | Quantized) -> torch.device:
    return weight.held.device if isinstance(weight, Quantized) else weight.device


@contextmanager
def _multiplied(model: nn.Module, product: Callable[[Quantized, Tensor, Tensor | None], Tensor]) -> Iterator[None]:
    """Context: a layer of a quantized weight gives product(weight, x, bias), where the libraries would make copies of
    the weight in float32, and keep its values, those of all layers, for the backward."""
    by_id = {id(w.held): w for w in quantized_in(model).values() if w.is_linear}
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    layers = [(m, by_id[id(w)]) for m in linear if id(w := m._parameters.get("weight")) in by_id]
    forwards = [(layer, layer.__dict__.get("forward")) for layer, _ in layers]

    def forward(weight: Quantized, layer: nn.Linear, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = (*args, *kwargs.values())
        return product(weight, x, None if layer.bias is None else layer.bias.to(x.dtype))

    try:
        for layer, weight in layers:
            layer.forward = partial(forward, weight, layer)
        yield
    finally:
        for layer, forward in forwards:
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _seen(model: nn.Module, weights: Mapping[str, Tensor | Quantized], uses: Uses) -> AbstractContextManager[None]:
    """Context: a quantized weight's products count as those of its values, which exist for one product at a time."""

    def product(weight: Quantized, x: Tensor, bias: Tensor | None) -> Tensor:
        values = trained_values(weight.values().to(x.dtype), weight.layer)
        y = F.linear(x, values, bias)
        if weight.name in weights:
            with _disable_current_modes():
                uses.add_linear(weight.name, values, x, y, bias)
        return y

    return _multiplied(model, product)


def _tapped(model: nn.Module, leaves: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    """Context: each leaf gets the gradient that its quantized weight's values would have."""

    def product(weight: Quantized, x: Tensor, bias: Tensor | None) -> Tensor:
        return with_slices(_Tap.apply(x, leaves.get(weight.name), bias, weight), x, weight.layer)

    return _multiplied(model, product)


class _Tap(torch.autograd.Function):
    """y = x Wᵀ + b of a quantized W, whose gradient goes to a leaf of its shape, if there is one."""

    @staticmethod
    def forward(ctx, x, leaf, bias, weight):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        ctx.weight = weight
        return F.linear(x, weight.values().to(x.dtype), bias)

    @staticmethod
    def backward(ctx, dY):
        (x,), dX, dW, db = ctx.saved_tensors, None, None, None
        if ctx.needs_input_grad[0]:
            dX = dY @ ctx.weight.values().to(dY.dtype)
        if ctx.needs_input_grad[1]:
            dW = dY.flatten(0, -2).mT @ x.flatten(0, -2)
        if ctx.needs_input_grad[2]:
            db = dY.flatten(0, -2).sum(0)
        return dX, dW, db, None


def _loss_of(model: nn.Module, output: Any, batch: Any, loss: Loss | None) -> Tensor:
    if loss is not None:
        value = loss(output, batch)
    else:
        value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ConfigError(
            f"selection 'gradient' needs a scalar loss, and {'loss=' if loss else type(model).__name__} "
            f"returned {_kind(value)}; give the batches labels if the model takes them, or pass loss=, a "
            f"function of (output, batch)"
        )
    return value.reshape(())


def _kind(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
