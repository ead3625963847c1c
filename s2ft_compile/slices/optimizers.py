"""`optimizer`: Muon or AdamW for the deltas of a prepared model, as one object that a loop or Trainer takes.

The delta of a slice is a dense matrix, which Muon can orthogonalize: all directions of it move equally far, whatever
their gradients' sizes (https://arxiv.org/abs/2502.16982). What is no matrix (biases, batched experts) trains by AdamW,
at the same rate: with `match_rms_adamw` both change an entry by about as much. Heads train by AdamW at a rate of their
own: of a few examples Muon learns every direction's noise with them, and their best rate varies less (docs/targets.md).
"""

import logging
from collections.abc import Iterable
from math import prod, sqrt
from statistics import median
from typing import Any

from torch import nn, optim

from s2ft_compile.config import OPTIMIZERS, check_choice
from s2ft_compile.errors import ConfigError
from s2ft_compile.plan import Slice

from .state import parameters, state_of

log = logging.getLogger(__name__)
SPAN = 16.0  # docs/targets.md says from what
MOVED = 0.2  # how far a step of Muon moves an entry, in rates (`match_rms_adamw`); AdamW's moves it by about one
STEPS = 1000  # of a run that nobody says the length of


def optimizer(
    model: nn.Module,
    name: str = "muon",
    lr: float | None = None,
    weight_decay: float = 0.0,
    steps: int = STEPS,
    heads: float | None = None,
) -> optim.Optimizer:
    """An optimizer of `s2ft.parameters(model)`.

    name: "muon" (of channels; heads, and what is no matrix, train by AdamW) or "adamw". lr: the peak of the caller's
    schedule, which scales the rate of every group by the same factor; None: `learning_rate(model, steps)`.
    weight_decay: pulls towards the base model. steps: optimizer steps of the run. heads: the rate of heads and of their
    channels beside Muon; None: 0.2 √(lr · `learning_rate(model, steps)`), with which they move as far as channels do at
    that rate, and follow another one by its root. Raises `ConfigError` for another name or a rate that is not positive,
    `StateError` for a model that is not prepared.
    """
    check_choice("optimizer", name, OPTIMIZERS)
    deltas = parameters(model)
    by_rule = learning_rate(model, steps)
    lr = by_rule if lr is None else lr
    for what, value in (("lr", lr), ("heads", 1.0 if heads is None else heads)):
        if not value > 0:
            raise ConfigError(f"{what} is a positive number such as 0.003, got {value}")
    matrices, of_heads, others = _apart(zip(deltas, state_of(model).plan.slices), name)
    optimizers: list[optim.Optimizer] = []
    if matrices:
        optimizers.append(optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    of_heads_lr = MOVED * sqrt(lr * by_rule) if heads is None else heads
    for group, rate in ((of_heads, of_heads_lr), (others, lr)):
        if group:
            optimizers.append(optim.AdamW(group, lr=rate, weight_decay=weight_decay, fused=True))
    return optimizers[0] if len(optimizers) == 1 else Together(optimizers)


def state_bytes(model: nn.Module, name: str) -> int:
    """What an optimizer of this name keeps of the deltas: Muon one number for each of theirs, AdamW two."""
    matrices, *rest = _apart(zip(parameters(model), state_of(model).plan.slices), name)
    numbers: int = sum(p.numel() for p in matrices) + 2 * sum(p.numel() for group in rest for p in group)
    return 4 * numbers


def _apart(
    deltas: Iterable[tuple[nn.Parameter, Slice]], name: str
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Those of Muon, the heads beside them, and all others."""
    matrices: list[nn.Parameter] = []
    heads: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for delta, s in deltas:
        of_heads = any(role.startswith("attention.") for role in s.roles)
        (others if name != "muon" or delta.ndim != 2 else heads if of_heads else matrices).append(delta)
    return matrices, heads, others


def learning_rate(model: nn.Module, steps: int = STEPS) -> float:
    """A rate to start from, the peak of a schedule: `SPAN` / (width · √steps).

    width: how many numbers a unit has in a weight, its row or column; the median over the weights, in a transformer the
    hidden size. steps: of the run. Raises `ConfigError` for less than one step.
    """
    if steps < 1:
        raise ConfigError(f"steps is a positive number, got {steps}")
    slices = state_of(model).plan.slices
    width = median([_width(s) for s in slices if len(s.shape) > 1] or [1])
    rate = SPAN / (width * sqrt(steps))
    log.info("learning rate %.2g, for units of %g numbers and %d steps", rate, width, steps)
    return rate


def _width(s: Slice) -> int:
    batched = len(s.shape) == 3 and any(role.startswith("moe.") for role in s.roles)
    return prod(s.shape) // s.shape[s.dim] // (s.shape[0] if batched else 1)


class Together(optim.Optimizer):
    """Several optimizers as one: their groups and their state are its own, so schedules and checkpoints reach both."""

    def __init__(self, parts: list[optim.Optimizer]):
        self.parts: list[optim.Optimizer] = []
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:  # load_state_dict ends here
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        for part, group in zip(self.parts, self.param_groups):
            part.param_groups, part.state = [group], self.state

    def step(self, closure: Any = None) -> Any:
        loss = None
        for number, part in enumerate(self.parts):
            loss = part.step(closure) if number == 0 else (part.step(), loss)[1]
        return loss
