"""`S2FTConfig`: what to train. A plain frozen dataclass, checked when it is made."""

from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from math import ceil
from numbers import Integral, Real
from typing import Any, Mapping

from .errors import ConfigError

ROLES = ("attention.out", "attention.value", "attention.query", "attention.key", "ffn.out", "ffn.in")
SELECTIONS = ("random", "weight")
BUDGETS = ("layer", "model")


def units_for(amount: int | float, available: int, what: str) -> int:
    """How many of `available` units an amount from `targets` stands for: a ratio is rounded down.

    Raises `ConfigError` when that is not between 1 and `available`, naming the smallest amount that works.
    """
    if isinstance(amount, Integral):
        if amount > available:
            raise ConfigError(f"{what} asks for {amount} units, but there are {available}; use 1 to {available}")
        return int(amount)
    units = int(amount * available + 1e-9)  # 0.29 * 100 is 28.999999999999996
    if units == 0:
        raise ConfigError(
            f"{what} = {amount} is less than one of {available} units; the smallest ratio that works is "
            f"{ceil(1e6 / available) / 1e6:g}, or ask for 1 unit"
        )
    return units


@dataclass(frozen=True)
class S2FTConfig:
    """Which slices of a model train.

    targets: role (see `ROLES`) or glob on parameter names -> ratio in (0, 1] (a float) or number of units (an int).
        A unit is a query head for `attention.out` and `attention.query`, a kv head for `attention.key` and
        `attention.value`, a channel for `ffn.*`.
    selection: how units are ranked, one of `SELECTIONS` (paper section 3.2: R, W).
    largest: take the highest-ranked units (False: the lowest). Without effect on `random`.
    budget: "layer": every layer trains the same number of units; "model": one draw over all layers, and a
        number of units then counts over the whole model.
    seed: of the random selection; the same on every machine.
    """

    targets: Mapping[str, int | float] = field(default_factory=lambda: {"ffn.out": 0.03})
    selection: str = "random"
    largest: bool = True
    budget: str = "layer"
    seed: int = 0

    def __post_init__(self):
        if not isinstance(self.targets, Mapping) or not self.targets:
            raise ConfigError(f"targets must map roles or globs to amounts, got {self.targets!r}; "
                              f"for example {{'ffn.out': 0.03}}")
        object.__setattr__(self, "targets", dict(self.targets))
        for target, amount in self.targets.items():
            _check_target(target)
            _check_amount(target, amount)
        _check_choice("selection", self.selection, SELECTIONS)
        _check_choice("budget", self.budget, BUDGETS)
        if not isinstance(self.largest, bool):
            raise ConfigError(f"largest must be True or False, got {self.largest!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral) or not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be an integer from 0 to 2**63 - 1, got {self.seed!r}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "S2FTConfig":
        """The inverse of `to_dict`. An unknown field is refused by name."""
        known = [f.name for f in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ConfigError(f"unknown option {', '.join(map(repr, unknown))}; valid options: {', '.join(known)}")
        return cls(**values)


def is_glob(target: str) -> bool:
    """Whether a target names parameters (with or without wildcards) rather than a role."""
    return target not in ROLES


def matches(target: str, parameter_name: str) -> bool:
    return fnmatchcase(parameter_name, target)


def _check_target(target):
    if not isinstance(target, str) or not target:
        raise ConfigError(f"a target is a role ({', '.join(ROLES)}) or a glob on parameter names, got {target!r}")


def _check_amount(target, amount):
    if isinstance(amount, bool) or not isinstance(amount, Real):
        raise ConfigError(f"target {target!r}: expected a ratio in (0, 1] or a number of units, got {amount!r}")
    if isinstance(amount, Integral):
        if amount < 1:
            raise ConfigError(f"target {target!r}: a number of units is at least 1, got {amount}")
    elif not 0 < amount <= 1:
        raise ConfigError(f"target {target!r}: a ratio lies in (0, 1], got {amount}; "
                          f"a number of units is written as an integer")


def _check_choice(name, value, valid):
    if value not in valid:
        raise ConfigError(f"unknown {name} {value!r}; valid: {', '.join(valid)}")
