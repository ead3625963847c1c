"""Stage 3, select: the order in which the units of a structure are chosen.

A score for every unit, high ones first, and which of the best train under a budget.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from math import fsum, inf

import torch
from torch import Tensor

from s2ft_compile.config import SELECTIONS, S2FTConfig, qualified_name, units_for
from s2ft_compile.errors import ConfigError

from .selections import SCORES

WHOLE = "whole"  # the role of a parameter all of which trains, whatever its axes are
Taken = Mapping[str, Sequence[tuple[int, Tensor]]]  # parameter -> (dim, indices) that excluded adapters change


@dataclass(frozen=True)
class Band:
    """positions: int64 (units, width), where each unit lies along `dim`. group: bands that share a ranking."""

    parameter_name: str
    dim: int
    role: str
    group: tuple
    positions: Tensor


@dataclass(frozen=True)
class Ranking:
    """What units are chosen by. targeted: target -> the bands it may train a part of. scores, free: of each group of
    bands, for every unit."""

    config: S2FTConfig
    targeted: Mapping[str, list[Band]]
    scores: Mapping[tuple, Sequence[float]]
    free: Mapping[tuple, Sequence[bool]]

    @classmethod
    def of(
        cls,
        targeted: Mapping[str, list[Band]],
        config: S2FTConfig,
        parameters: Mapping[str, Tensor],
        measured: Mapping[tuple[str, int], Tensor],
        taken: Taken,
    ) -> "Ranking":
        """Scores every unit of the bands."""
        by_group: dict[tuple, list[Band]] = {}
        for bands in targeted.values():
            for band in bands:
                by_group.setdefault(band.group, []).append(band)
        scores = {group: _scores(bands, config, parameters, measured) for group, bands in by_group.items()}
        return cls(config, targeted, scores, {group: _free(bands, taken) for group, bands in by_group.items()})

    def choose(self, target: str) -> dict[tuple, list[int]]:
        """Group -> the units that train, ascending: the free ones with the highest scores (lowest where not
        `largest`)."""
        config, groups = self.config, list(dict.fromkeys(band.group for band in self.targeted[target]))
        best, scores = {group: self.best_first(group) for group in groups}, self.scores
        shares = _shares({group: list(compress(scores[group], self.free[group])) for group in groups}, self._highest)
        chosen: dict[tuple, list[int]] = {group: [] for group in groups}
        for pool in [[group] for group in groups] if config.budget == "layer" else [groups]:
            total = sum(len(scores[group]) for group in pool)
            wanted = units_for(config.targets[target], total, f"target {target!r}")
            _check_free(target, wanted, sum(sum(self.free[group]) for group in pool), total)
            units = [(group, unit, rank) for group in pool for rank, unit in enumerate(best[group], 1)]
            if config.budget == "score":  # the next unit to the layer with the most share per unit so far (D'Hondt)
                units.sort(key=lambda gur: -shares[gur[0]] / gur[2])
            else:  # stable: ties go to the first
                units.sort(key=lambda gur: scores[gur[0]][gur[1]], reverse=self._highest)
            for group, unit, _ in units[:wanted]:
                chosen[group].append(unit)
        return {group: sorted(units) for group, units in chosen.items()}

    def best_first(self, group: tuple) -> list[int]:
        """A group's free units, the first of equal ones first; what has the score -inf is not among them."""
        scores, free = self.scores[group], self.free[group]
        units = (unit for unit, score in enumerate(scores) if score > -inf and free[unit])
        return sorted(units, key=scores.__getitem__, reverse=self._highest)

    @property
    def _highest(self) -> bool:
        return self.config.largest or not self.config.scored


def _free(group: Sequence[Band], taken: Taken) -> list[bool]:
    """Whether each unit shares no entry with what is taken. A slice along another dimension crosses all of them."""
    free = torch.ones(len(group[0].positions), dtype=torch.bool)
    for band in group:
        for dim, indices in taken.get(band.parameter_name, ()):
            free &= ~torch.isin(band.positions, indices).any(1) if dim == band.dim else False
    return free.tolist()


def _check_free(target: str, wanted: int, free: int, units: int) -> None:
    if wanted > free:
        raise ConfigError(
            f"target {target!r} asks for {wanted} of {units} units, but {free} are free: the others "
            f"share entries with adapters in exclude (one that trains the other dimension of a weight "
            f"crosses all of its units); {f'use 1 to {free} units, or ' if free else ''}exclude fewer"
        )


def _shares(scores: Mapping[tuple, Sequence[float]], highest: bool) -> dict[tuple, float]:
    """What each group's share is proportional to: its part of all scores, or where the lowest are wanted, the rest."""
    sums = {group: fsum(values) for group, values in scores.items()}
    return sums if highest or len(sums) == 1 else {group: fsum(sums.values()) - s for group, s in sums.items()}


# --- a score for every unit of a structure, high ones first ------------------------------------------------------


def _scores(
    group: Sequence[Band],
    config: S2FTConfig,
    parameters: Mapping[str, Tensor],
    measured: Mapping[tuple[str, int], Tensor],
) -> Sequence[float]:
    """The scores of the bands that share a ranking: those of all their positions, each counted once, added up."""
    needs = SELECTIONS.get(config.selection) if isinstance(config.selection, str) else None
    if group[0].role == WHOLE:
        return [0.0] * len(group[0].positions)
    if needs == "nothing":
        return SCORES[config.selection](config.seed, group[0].group, len(group[0].positions))
    if needs in ("activations", "gradients"):
        _check_measured(group, config.selection, measured)
        return _rounded(_added(group, lambda name, dim: measured.get((name, dim))))
    score = SCORES[config.selection if needs else "weight"]
    scores = _added(group, lambda name, dim: score(parameters[name].detach(), dim))
    return _rounded(scores) if needs else _asked(config.selection, group, scores)


def _added(group: Sequence[Band], measure: Callable[[str, int], Tensor | None]) -> Tensor:
    """float64 (units,). A band that `measure` has nothing for counts nothing."""
    total = torch.zeros(len(group[0].positions), dtype=torch.float64)
    for band in {(b.parameter_name, b.dim, b.role): b for b in group}.values():
        values = measure(band.parameter_name, band.dim)
        if values is not None:
            total += values.cpu()[band.positions].sum(1)
    if not total.isfinite().all():
        raise ConfigError(
            f"scores of {group[0].parameter_name} are not finite: its weights, or those coupled to it, are not"
        )
    return total


def _rounded(scores: Tensor) -> list[float]:
    """To 12 digits: units that are alike have the same score on every machine, in whatever order it adds."""
    return [float(f"{score:.11e}") for score in scores.tolist()]


def _check_measured(group: Sequence[Band], selection: str, measured: Mapping[tuple[str, int], Tensor]) -> None:
    if not any((b.parameter_name, b.dim) in measured for b in group):
        raise ConfigError(
            f"selection {selection!r} has no scores for {group[0].parameter_name}: a bias or a norm has "
            f"no activations; target a weight of its structure too, or use 'weight' or 'gradient'"
        )


def _asked(function: str | Callable, group: Sequence[Band], scores: Tensor) -> list[float]:
    """What the user's function puts first, as scores; -inf for what it leaves out."""
    if isinstance(function, str):
        raise ConfigError(
            f"selection {function!r} is the name of a function, recorded where it chose the units; pass the function "
            f"itself, or register it (s2ft_compile.selections)"
        )
    units = function(tuple(group), scores.clone())
    units = units.tolist() if hasattr(units, "tolist") else units
    units = list(units) if isinstance(units, Iterable) else [units]
    if len(set(units)) < len(units) or not all(type(u) is int and 0 <= u < len(scores) for u in units):
        raise ConfigError(
            f"{qualified_name(function)} chose {units[:8]}{'...' * (len(units) > 8)} of a structure with "
            f"{len(scores)} units; it has to return distinct integers from 0 to {len(scores) - 1}"
        )
    ranks = dict(zip(units, range(len(units))))
    return [-ranks[u] if u in ranks else -inf for u in range(len(scores))]
