"""`S2FTConfig`: what to train. `CompileOptions`: how its graphs are compiled. Plain values, checked when made."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any

from .errors import ConfigError

# of which a unit is a whole head
HEADS = ("attention.out", "attention.value", "attention.query", "attention.key", "attention.in")
CHANNELS = ".channels"  # behind one of these: a unit is a channel of a head, the same one of every head
ROLES = (
    *HEADS,
    *(f"{role}{CHANNELS}" for role in HEADS),
    "ffn.out",
    "ffn.in",
    "moe.out",
    "moe.in",
    "ssm.out",
    "ssm.in",
    "conv.out",
    "conv.in",
    "norm",
)
NORM = "norm"  # which trains whole
# What ranks units -> what it needs: nothing, the weight alone, or of batches of data activations or gradients. Its
# function is in `passes/select/selections.py`. `s2ft_compile.selections` adds others, "namespace::name".
SELECTIONS: dict[str, str] = {
    "random": "nothing",
    "weight": "weight",
    "lowrank": "weight",
    "activation": "activations",
    "weight_activation": "activations",
    "gradient": "gradients",
}
CALIBRATED = tuple(name for name, needs in SELECTIONS.items() if needs in ("activations", "gradients"))


def looks_at_data(selection: object) -> bool:
    """Whether a selection needs batches: one of `CALIBRATED`, or a registered one."""
    return isinstance(selection, str) and SELECTIONS.get(selection) in ("activations", "gradients")


DEFAULT, SHARE = "default", 0.0125  # the target that stands for every role of a model, and its ratio if none is given
WIDER = {"heads": 5, "channels": 4}  # times that ratio, of heads and of their channels (docs/targets.md says why)
BUDGETS = ("layer", "model", "score")
OPTIMIZERS = ("muon", "adamw")
INNER = ("inductor", "aot_eager", "eager")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def units_for(amount: int | float, available: int, what: str) -> int:
    """How many of `available` units an amount from `targets` stands for: a ratio is rounded down, to 1 at least.

    Raises `ConfigError` for a number of units that there are not.

    >>> units_for(0.03, 3584, "target 'ffn.out'"), units_for(8, 3584, "target 'ffn.out'")
    (107, 8)
    """
    if isinstance(amount, Integral):
        if amount > available:
            raise ConfigError(f"{what} asks for {amount} units, but there are {available}; use 1 to {available}")
        return int(amount)
    return max(1, int(amount * available + 1e-9))  # 0.29 * 100 is 28.999999999999996


@dataclass(frozen=True)
class S2FTConfig:
    """Which slices of a model train.

    targets: role (see `ROLES`) or glob on parameter names -> ratio in (0, 1] (a float; at least one unit) or number
        of units (an int). A unit is a query head for `attention.out` and `attention.query`, a kv head for
        `attention.key` and `attention.value`, a head for `attention.in`, for `attention.*.channels` a channel of a
        head, the same one of every head; a channel for `ffn.*`, a channel of every expert for `moe.*`. "norm" is 1.0:
        gains and biases of norms train whole. A glob with 1.0 trains all of what it matches, whatever its axes are: a
        new head, biases. "default" stands for every role that the model has and `targets` does not name: of heads for
        their channels where it has those, both at `WIDER` times the ratio. Beside it, 0 leaves a role out. None:
    selection: how units are ranked. None: "gradient" where `prepare` is given batches of data, else "random".
        One of `SELECTIONS`: "random", "weight", "activation", "weight_activation" and "gradient" are the paper's R, W,
        A, S and G (section 3.2), "lowrank" is the weight after rank reduction; see `passes/select/scores.py` and
        `calibrate.py` for what each one is. Those in `CALIBRATED` need batches of data.
        Or the name of one that `s2ft_compile.selections` registered. Or a function (bands, scores) -> units: for the
        `Band`s of one structure and the float64 (units,) scores of "weight", the units that may train, best first, of
        which the first `targets`' amount do.
    largest: take the units with the highest scores (False: the lowest). Without effect on `random` and on a function.
    budget: "layer": every layer trains the same number of units. The others make one pool of all layers, and a number
        of units then counts over the whole model. "model": the units with the best scores, wherever they lie (with
        `random`: one draw). "score": a layer's share of the pool is its share of the sum of all scores.
    seed: of the random selection; the same on every machine.
    top_layers: only the last N layers of each target train, in the order in which the model uses them; the backward
        stops at the first of them. None: all.
    exclude: folders of adapters of the same base model, of which no entry may train again (the paper's non-overlapped
        fusion). Their units are not free; ratios still count of all. An adapter that trains the other dimension of a
        weight crosses every unit of it, so none of that weight is free. Kept as text; read by `prepare` only.

    >>> S2FTConfig({"ffn.out": 0.03, "attention.out": 1, "*.up_proj.weight": 8}, selection="weight").scored
    True
    >>> S2FTConfig({"ffn.out": 3.0})
    Traceback (most recent call last):
    s2ft_compile.errors.ConfigError: target 'ffn.out': a ratio lies in (0, 1], got 3.0; a number of units is ...
    """

    targets: Mapping[str, int | float] | None = None
    selection: str | Callable[..., Any] | None = None
    largest: bool = True
    budget: str = "layer"
    seed: int = 0
    top_layers: int | None = None
    exclude: Sequence[str | os.PathLike[str]] = ()

    def __post_init__(self) -> None:
        if self.targets is not None:
            object.__setattr__(self, "targets", _checked(self.targets))
        if self.selection is not None:
            _check_selection(self.selection)
        check_choice("budget", self.budget, BUDGETS)
        if self.budget == "score" and not self.scored:
            raise ConfigError(
                f"budget 'score' shares units out by their scores, and selection {self.selection!r} has "
                f"none; use budget 'layer' or 'model', or a selection among "
                f"{', '.join(s for s, needs in SELECTIONS.items() if needs != 'nothing')}"
            )
        if not isinstance(self.largest, bool):
            raise ConfigError(f"largest must be True or False, got {self.largest!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral) or not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be an integer from 0 to 2**63 - 1, got {self.seed!r}")
        _check_top_layers(self.top_layers)
        object.__setattr__(self, "exclude", _folders(self.exclude))

    @property
    def scored(self) -> bool:
        """Whether units have scores that mean the same in every layer."""
        return isinstance(self.selection, str) and SELECTIONS.get(self.selection, "nothing") != "nothing"

    def is_that_of(self, settled: "S2FTConfig") -> bool:
        """Whether a plan's configuration is this one, in which `prepare` filled in what was left open."""
        roles = [target for target in settled.targets or () if not is_glob(target)]
        mine = replace(self, targets=self.targets_of(roles), selection=self.selection or settled.selection)
        return mine.to_dict() == settled.to_dict()

    def targets_of(self, roles: Sequence[str]) -> dict[str, int | float]:
        """The targets of a model that has these roles: with each of them in place of "default", the channels of heads
        rather than whole heads."""
        targets = {DEFAULT: SHARE} if self.targets is None else dict(self.targets)
        if DEFAULT not in targets:
            return targets
        amount = targets.pop(DEFAULT)
        named = {target.removesuffix(CHANNELS) for target in targets}
        finest = [role for role in roles if role + CHANNELS not in roles and role.removesuffix(CHANNELS) not in named]
        return {**{role: _of_default(role, amount) for role in finest}, **{t: a for t, a in targets.items() if a}}

    def to_dict(self) -> dict[str, Any]:
        """Plain values. A function is recorded by its name, "module:function"."""
        selection = self.selection and qualified_name(self.selection)
        return {**asdict(self), "selection": selection, "exclude": list(self.exclude)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "S2FTConfig":
        """The inverse of `to_dict`. An unknown field is refused by name.

        A function's name stays a name, which nothing can be selected with: a plan that someone else wrote must not
        import code.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"a configuration is a map of options, got {values!r}")
        known = [f.name for f in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ConfigError(f"unknown option {', '.join(map(repr, unknown))}; valid options: {', '.join(known)}")
        return cls(**values)


@dataclass(frozen=True)
class CompileOptions:
    """How `backend="s2ft"` compiles a model's graphs.

    inner: what compiles the rewritten graphs, one of `INNER`.
    activation_budget: from 0 to 1, the share of the activations kept for the backward that a step without
        recomputation keeps; what is not kept is computed again (0: as much as possible). Without effect on "eager".
    logits: whether a training step returns its logits beside its loss. False: it returns None in their place where the
        loss is the cross-entropy of a head that does not train, and computes both a few tokens at a time, so that no
        full logits exist. Forwards without gradients return them all the same.
    mode: of Inductor, one of `MODES`. The same as torch.compile's, which allows no options beside it.
    kernels: whether the gradients of slices are Triton kernels on a GPU that has them. False: products of aten.
    fp8: whether a frozen weight that is stored in fp8 is multiplied in fp8 too, forward and for dX, the other operand
        rounded to it row by row. Takes a base in fp8 and a GPU of capability 8.9 or more (or a CPU, slowly).
    off: the names of passes (`s2ft_compile.pipeline.PASSES`) to leave out, to find out which one is to blame. Without
        "slice_pushdown" gradients are made at full size, and without "recheck" a graph that is not proved runs.
    trace: a folder for what each pass does to each graph, as text before and after.
    """

    inner: str = "inductor"
    activation_budget: float = 1.0
    logits: bool = True
    mode: str | None = None
    kernels: bool = True
    fp8: bool = False
    off: Sequence[str] = ()
    trace: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.inner not in INNER:
            raise ConfigError(f"unknown inner backend {self.inner!r}; valid: {', '.join(INNER)}")
        budget = self.activation_budget
        if isinstance(budget, bool) or not isinstance(budget, Real) or not 0 <= float(budget) <= 1:
            raise ConfigError(f"activation_budget is a number from 0 (recompute all that can be) to 1, got {budget!r}")
        for name in ("logits", "kernels", "fp8"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.fp8 and self.inner == "eager":
            raise ConfigError("fp8 products are made in a graph, so inner is 'inductor' or 'aot_eager', not 'eager'")
        if self.mode is not None:
            check_choice("mode", self.mode, MODES)
        if isinstance(self.off, str) or not all(isinstance(name, str) for name in self.off):
            raise ConfigError(f"off is a list of names of passes, got {self.off!r}")
        object.__setattr__(self, "off", tuple(self.off))
        if self.trace is not None:
            if not isinstance(self.trace, (str, os.PathLike)) or os.path.isfile(self.trace):
                raise ConfigError(f"trace is a folder to write to, got {self.trace!r}")
            object.__setattr__(self, "trace", os.fspath(self.trace))


def qualified_name(selection: str | Callable[..., Any]) -> str:
    """What stands for a selection in a file: its name, or "module:function"."""
    if isinstance(selection, str):
        return selection
    named = selection if hasattr(selection, "__qualname__") else type(selection)
    return f"{named.__module__}:{named.__qualname__}"


def is_glob(target: str) -> bool:
    """Whether a target names parameters (with or without wildcards) rather than a role."""
    return target not in (*ROLES, DEFAULT)


def _of_default(role: str, amount: int | float) -> int | float:
    if role == NORM:
        return 1.0
    if isinstance(amount, Integral) or role.removesuffix(CHANNELS) not in HEADS:
        return amount
    return min(1.0, WIDER["channels" if role.endswith(CHANNELS) else "heads"] * amount)


def matches(target: str, parameter_name: str) -> bool:
    """Whether a glob names a parameter."""
    return fnmatchcase(parameter_name, target)


def _checked(targets: Any) -> dict[str, int | float]:
    if not isinstance(targets, Mapping) or not targets:
        raise ConfigError(
            f"targets must map roles or globs to amounts, got {targets!r}; for example "
            f"{{'ffn.in': 0.02, 'ffn.out': 0.02}}"
        )
    for target, amount in targets.items():
        _check_target(target)
        _check_amount(target, amount, may_be_none=target != DEFAULT and DEFAULT in targets)
    return {target: 1.0 if target == NORM and amount else amount for target, amount in targets.items()}


def _check_target(target: object) -> None:
    if not isinstance(target, str) or not target:
        raise ConfigError(f"a target is a role ({', '.join(ROLES)}) or a glob on parameter names, got {target!r}")


def _check_amount(target: str, amount: object, may_be_none: bool) -> None:
    if isinstance(amount, bool) or not isinstance(amount, Real):
        raise ConfigError(f"target {target!r}: expected a ratio in (0, 1] or a number of units, got {amount!r}")
    if amount == 0 and may_be_none:
        return
    if target == NORM and float(amount) != 1.0:
        raise ConfigError(f"target {target!r}: norms train whole, so the ratio is 1.0, got {amount}")
    if isinstance(amount, Integral):
        if amount < 1:
            raise ConfigError(f"target {target!r}: a number of units is at least 1, got {amount}")
    elif not 0 < float(amount) <= 1:
        raise ConfigError(
            f"target {target!r}: a ratio lies in (0, 1], got {amount}; a number of units is written as an integer"
        )


def _check_selection(selection: object) -> None:
    if not callable(selection) and not (isinstance(selection, str) and ":" in selection):
        check_choice("selection", selection, (*SELECTIONS, "a function of (bands, scores)"))


def _check_top_layers(value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
        raise ConfigError(f"top_layers is a number of layers from 1, or None for all of them, got {value!r}")


def _folders(values: Any) -> tuple[str, ...]:
    listed = isinstance(values, Sequence) and not isinstance(values, str)
    if not listed or not all(isinstance(v, (str, os.PathLike)) and os.fspath(v) for v in values):
        raise ConfigError(f"exclude is a list of adapter folders, got {values!r}; for example ['adapters/law']")
    return tuple(os.fspath(v) for v in values)


def check_choice(name: str, value: object, valid: Sequence[str]) -> None:
    """Raises `ConfigError` for a value that is not valid. name: what it is of, in words."""
    if value not in valid:
        raise ConfigError(f"unknown {name} {value!r}; valid: {', '.join(valid)}")
