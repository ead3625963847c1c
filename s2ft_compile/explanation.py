"""`explain`: what the compiler does to a model, pass by pass, and what it leaves as it is, and why."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from s2ft_compile.passes.backward.trainable import Taken, refused_gradients
from s2ft_compile.passes.editor import Mismatch
from s2ft_compile.passes.select.select import bands
from s2ft_compile.passes.tracing import Step, recorded

from .capture.examples import Inputs, arguments
from .capture.models import unwrap
from .config import CompileOptions, S2FTConfig
from .errors import ConfigError, S2FTError, StateError
from .estimation import graphs_of_step
from .pipeline import Pipeline
from .preparation import analyze, prepare
from .slices.state import find_state
from .structure import Refusal


@dataclass(frozen=True)
class Explanation:
    """What the compiler does to one training step of a model.

    steps: of each pass over each graph. gradients: (parameter, dim) that may be permuted, and whose gradient has no
    slice rule -> why. axes: those that may not be permuted. refused: why nothing was compiled, if so.
    """

    steps: tuple[Step, ...] = field(repr=False)
    gradients: Mapping[tuple[str, int], Mismatch]
    axes: tuple[Refusal, ...]
    refused: str = ""

    def __str__(self) -> str:
        steps = [str(step) for step in self.steps]
        gradients = _grouped((f"{name}[{dim}]", f"would be {why}") for (name, dim), why in self.gradients.items())
        axes = _grouped(
            (f"{m.parameter_name}[{m.dim}] × {r.units}", f"{r.reason}{f' at {r.source}' if r.source else ''}")
            for r in self.axes
            for m in r.members
        )
        parts = {
            "passes": steps or [self.refused or "no graph with a slice was compiled"],
            "gradients that cannot be sliced": gradients or ["none"],
            "axes that cannot be permuted": axes or ["none"],
        }
        return "\n".join(line for title, lines in parts.items() for line in (title, *(f"  {one}" for one in lines)))


def explain(
    model: nn.Module, example_inputs: Any, config: S2FTConfig | None = None, options: CompileOptions | None = None
) -> Explanation:
    """Prepares and compiles a copy of a model without storage, in which nothing runs; the model stays as it is.

    example_inputs: a tuple or a dict of the forward's arguments of one step, with labels if the model computes its loss
    (else the loss is the sum of its outputs). Raises `StateError` for a model that is prepared, `ConfigError` for an
    unknown pass to be off, and `CaptureError`.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> made = explain(model, (torch.ones(2, 4),), S2FTConfig({"ffn.out": 2}))
    >>> [step.name for step in made.steps]
    ['recheck', 'slice_pushdown', 'keep_saved', 'lower', 'see_through', 'int8']
    >>> made.gradients, made.axes[0].reason
    ({}, 'it is an input of the model')
    """
    model, config, options = unwrap(model), config or S2FTConfig(), options or CompileOptions()
    if find_state(model) is not None:
        raise StateError("explain takes a model before prepare; call s2ft.release(model) first")
    Pipeline(options)  # refuses the name of a pass that there is not, before anything is traced
    args, kwargs = arguments(example_inputs)
    inputs = Inputs(args, {name: value for name, value in kwargs.items() if "label" not in name})
    analysis = analyze(model, inputs)
    places = list(dict.fromkeys((b.parameter_name, b.dim) for b in bands(analysis)))
    slices = [Taken(*place) for place in places]
    untrained = refused_gradients(model, inputs, slices, analysis.copies)
    gradients = {(taken.parameter_name, taken.dim): why for taken, why in untrained.items()}
    bare, refused = _without_storage(model), ""
    with recorded() as steps:
        try:
            prepare(bare, inputs, config)
            graphs_of_step(bare, args, kwargs, options)
        except (ConfigError, BackendCompilerFailed) as error:
            if not isinstance(reason := getattr(error, "inner_exception", error), S2FTError):
                raise
            refused = str(reason)
    return Explanation(tuple(steps), gradients, analysis.refusals, refused)


def _without_storage(model: nn.Module) -> nn.Module:
    def bare(t: Tensor) -> Tensor:
        hollow = t.detach().to("meta")
        return nn.Parameter(hollow, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else hollow

    return copy.deepcopy(model, {id(t): bare(t) for t in (*model.parameters(), *model.buffers())})


def _grouped(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each reason, with the first of what it holds for."""
    held: dict[str, list[str]] = {}
    for what, why in pairs:
        held.setdefault(why, []).append(what)
    return [
        f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}: {why}"
        for why, names in held.items()
    ]
