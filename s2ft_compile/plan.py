"""`Plan`: what was selected, as values that can be written down."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .config import S2FTConfig
from .errors import ConfigError

PLAN_VERSION = 1


@dataclass(frozen=True, eq=False)
class Slice:
    """The part of one parameter that trains.

    dim: along which it was selected. indices: int64 (n,), in the base model's order. delta: float32, of the
    parameter's shape with n along `dim`, entry i belongs to indices[i], and along the other dimensions in the base
    model's order; the weight there is W0 + delta in the wider of the two types, cast to the parameter's. None in a
    plan that was read from JSON. shape: the whole parameter's.
    """

    parameter_name: str
    dim: int
    indices: Tensor
    shape: tuple[int, ...]
    roles: tuple[str, ...]
    delta: Tensor | None = field(default=None, repr=False)


def delta_of(s: Slice) -> Tensor:
    """A slice's delta, where there is one: everywhere but in a plan that was read from JSON."""
    assert s.delta is not None
    return s.delta


@dataclass(frozen=True, eq=False)
class Plan:
    """config: what was asked for. fingerprint: of the base weights. slices: one for each parameter that trains.
    notes: where something else trains than what was asked for, in words."""

    config: S2FTConfig
    fingerprint: str
    slices: tuple[Slice, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without deltas, that `from_dict` reads."""
        return {
            "version": PLAN_VERSION,
            "config": self.config.to_dict(),
            "fingerprint": self.fingerprint,
            "notes": list(self.notes),
            "slices": [
                {
                    "parameter_name": s.parameter_name,
                    "dim": s.dim,
                    "shape": list(s.shape),
                    "roles": list(s.roles),
                    "indices": s.indices.tolist(),
                }
                for s in self.slices
            ],
        }

    def to_json(self) -> str:
        """Everything but the deltas."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Plan":
        """The inverse of `to_dict`. Raises `ConfigError` on anything else."""
        try:
            if values["version"] != PLAN_VERSION:
                raise ConfigError(f"plan version {values['version']!r}; this release reads version {PLAN_VERSION}")
            slices = tuple(map(_slice, values["slices"]))
            notes = tuple(map(str, values.get("notes", ())))
            return cls(S2FTConfig.from_dict(values["config"]), str(values["fingerprint"]), slices, notes)
        except (LookupError, TypeError, RuntimeError, ValueError, ArithmeticError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"not a plan: {type(error).__name__}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """What `to_json` wrote. Raises `ConfigError`."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"not a plan: {error}") from error
        return cls.from_dict(values)

    def __str__(self) -> str:
        trained = sum(s.delta.numel() for s in self.slices if s.delta is not None)
        lines = [f"{len(self.slices)} slices, {trained:,} parameters train"]
        for s in self.slices:
            lines.append(f"  {s.parameter_name}[{s.dim}]: {len(s.indices)} of {s.shape[s.dim]} ({', '.join(s.roles)})")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def _slice(values: Mapping[str, Any]) -> Slice:
    """Raises `TypeError` for what is only like what `to_dict` writes: 1.7 or "1" for a dim."""
    dim, indices, shape, roles = (values[key] for key in ("dim", "indices", "shape", "roles"))
    if not isinstance(roles, list) or not all(isinstance(role, str) for role in roles):
        raise TypeError(f"roles are a list of texts, got {roles!r}")
    for what, numbers in (("a dim", [dim]), ("a shape", shape)):
        if not isinstance(numbers, list) or not all(type(n) is int for n in numbers):
            raise TypeError(f"{what} is of integers, got {numbers!r}")
    if not isinstance(indices, list):
        raise TypeError(f"indices are a list, got {indices!r}")
    given = torch.tensor(indices)
    if given.dtype != torch.int64 and indices:
        raise TypeError(f"indices are integers, got {given.dtype}")
    return Slice(values["parameter_name"], dim, given.to(torch.int64), tuple(shape), tuple(roles))
