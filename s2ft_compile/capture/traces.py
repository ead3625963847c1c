"""Which traces of a model are looked at: each example, in both modes, at other sizes, and piece by piece if need be."""

import logging
import re
from dataclasses import replace
from typing import Any

from torch import nn

from s2ft_compile.errors import CaptureError

from .capture import Captured, capture
from .examples import Inputs, resized, several
from .pieces import pieces

log = logging.getLogger(__name__)


def captures(model: nn.Module, example_inputs: Any, train: bool = True) -> list[Captured]:
    """Traces `model` on each example in eval mode and in train mode, at the example's sizes and at others.

    Two traces see both where train mode runs the same operators: eval mode at the example's sizes, train mode at
    others. Otherwise all four are made. A size that the model's code fixes stays as it is. Raises `CaptureError` where
    an example does not trace in a mode.
    """
    examples = several(example_inputs)
    return [
        captured
        for i, inputs in enumerate(examples)
        for captured in _traces(model, inputs, train, f"with example {i + 1}" if i else "")
    ]


def _traces(model: nn.Module, inputs: Inputs, train: bool, which: str) -> list[Captured]:
    try:
        first = capture(model, inputs, trace=which)
    except CaptureError as error:
        return pieces(model, inputs, train, error)
    in_train_mode = _words("in train mode", which)
    other = _resized(model, inputs, train, which)
    if not train:
        return [first, *other]
    if other and all(_steps(c) == _steps(first) for c in other):
        return [first, *other]
    trained = capture(model, inputs, True, in_train_mode)
    if not other:
        return [first, trained]
    other = [replace(c, trace=_words("in train mode", c.trace)) for c in other]
    return [first, *_resized(model, inputs, False, which), trained, *other]


def _resized(model: nn.Module, inputs: Inputs, training: bool, which: str) -> list[Captured]:
    """The traces at other sizes that the model runs at: at all of them at once, or at each alone."""
    traces = []
    for choice in resized(model, inputs):
        try:
            traces.append(capture(model, choice.inputs, training, _words(choice.label, which), True))
        except CaptureError as error:
            log.debug("a size is fixed: %s", error)
            continue
        if choice.whole:
            break
    return traces


def _words(*parts: str) -> str:
    return " ".join(part for part in parts if part)


# operators that train and eval mode spell differently, or that one of them lacks
ALIKE = re.compile(r"native_dropout|dropout|clone|getitem|detach|alias")


def _steps(captured: Captured) -> list[str]:
    """The operators in order, without those that are the same function of axes whatever the mode."""
    called = [str(n.target) for n in captured.graph_module.graph.nodes if n.op == "call_function"]
    return [name for name in called if not ALIKE.search(name)]
