"""Selections of one's own: what ranks the units of a structure, by name, as the built-in ones.

    @selection("mine::peak", needs="weight")
    def peak(weight, dim):
        return weight.double().abs().amax(1 - dim)

    S2FTConfig(targets, selection="mine::peak")

A name holds in this process from then on; one that is given again takes the first one's place. A plan that was made
with it is read anywhere: it records which units were chosen.
"""

from collections.abc import Callable
from typing import Any

from s2ft_compile.passes.select.selections import SCORES

from .config import SELECTIONS
from .errors import ConfigError

__all__ = ["selection"]
NEEDS = ("weight", "gradients", "activations", "nothing")


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
    if needs not in NEEDS:
        raise ConfigError(f"unknown needs {needs!r} of selection {name!r}; valid: {', '.join(NEEDS)}")

    def register(score: Callable[..., Any]) -> Callable[..., Any]:
        if not callable(score):
            raise ConfigError(f"selection {name!r} is a function of scores, got {score!r}")
        SELECTIONS[name], SCORES[name] = needs, score
        return score

    return register
