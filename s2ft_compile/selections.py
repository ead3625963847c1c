"""Selections of one's own: what ranks the units of a structure, by name, as the built-in ones.

    @selection("mine::peak", needs="weight")
    def peak(weight, dim):
        return weight.double().abs().amax(1 - dim)

    S2FTConfig(targets, selection="mine::peak")

A name holds in this process from then on; one that is given again takes the first one's place. A plan that was made
with it is read anywhere: it records which units were chosen.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

from s2ft_compile.passes.select.selections import SCORES

from .config import SELECTIONS
from .errors import ConfigError

__all__ = ["selection"]
# what a selection may look at -> how many scores it gives of its arguments
SIZES: dict[str, Callable[..., int | None]] = {
    "weight": lambda weight, dim: weight.shape[dim],
    "gradients": lambda gradient, dim: gradient.shape[dim],
    "activations": lambda use, unit: None,
    "nothing": lambda seed, key, units: units,
}


def selection(name: str, *, needs: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function of scores, high ones first, as `S2FTConfig.selection`. name: "namespace::name".

    needs: what it looks at. "weight": (weight, dim) -> float64 (size of dim,), a score for each position along dim; a
    unit's is their sum over all weights of its structure. "gradients": the same of the gradient of each calibration
    batch. "activations": (use, unit), see `passes/select/products.py`. "nothing": (seed, key, units) -> (units,).
    Raises `ConfigError` for a name without a namespace, or another need.

    >>> @selection("mine::smooth", needs="weight")
    ... def smooth(weight, dim):
    ...     return -weight.double().diff(dim=1 - dim).square().sum(1 - dim)
    """
    namespace, separator, own = name.partition("::") if isinstance(name, str) else ("", "", "")
    if not (separator and namespace and own) or ":" in own:
        raise ConfigError(f"a selection is named 'namespace::name', got {name!r}")
    if needs not in SIZES:
        raise ConfigError(f"unknown needs {needs!r} of selection {name!r}; valid: {', '.join(SIZES)}")

    def register(score: Callable[..., Any]) -> Callable[..., Any]:
        if not callable(score):
            raise ConfigError(f"selection {name!r} is a function of scores, got {score!r}")

        @wraps(score)
        def checked(*args: Any) -> Any:
            return _checked(name, score(*args), SIZES[needs](*args))

        SELECTIONS[name], SCORES[name] = needs, checked
        return score

    return register


def _checked(name: str, scores: Any, size: int | None) -> Any:
    """Raises `ConfigError` for what are no scores. size: how many there have to be, None where that is not known."""
    given = list(scores.shape) if isinstance(scores, Tensor) else [len(scores)] if isinstance(scores, list) else None
    if given is None or size is not None and given != [size]:
        found = type(scores).__name__ if given is None else f"sizes {given}"
        raise ConfigError(f"selection {name!r} gave {found}; it has to return {size or 'a tensor of'} scores")
    return scores
