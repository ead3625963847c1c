"""What a pass does to a graph, as text: for logs, for the option `trace`, for `s2ft explain`."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True)
class Step:
    """One pass over one graph. graph: its number among those compiled. before, after: `text` of it."""

    graph: int
    level: str
    name: str
    before: str
    after: str
    changed: dict[str, int]

    def __str__(self) -> str:
        return f"graph {self.graph}, {self.level}, {self.name}: {summary(self.changed)}"


_lists: list[list[Step]] = []


@contextmanager
def recorded() -> Iterator[list[Step]]:
    """Context: the steps of all graphs that are compiled inside, in their order."""
    steps: list[Step] = []
    _lists.append(steps)
    try:
        yield steps
    finally:
        _lists[:] = [other for other in _lists if other is not steps]


def is_recording() -> bool:
    return bool(_lists)


def record(step: Step, folder: str | os.PathLike[str] | None) -> None:
    """Adds a step to the lists of `recorded`, and where there is a folder to its files, one for each graph's state."""
    for steps in _lists:
        steps.append(step)
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        stem = f"{step.graph:03}-{step.level.lower()}-{step.name}"
        for when, text in (("before", step.before), ("after", step.after)):
            (Path(folder) / f"{stem}.{when}.txt").write_text(f"# {step}\n{text}\n", encoding="utf-8")


def operators(graph: fx.Graph) -> Counter[str]:
    """How often each operator is called."""
    return Counter(_operator(n.target) for n in graph.nodes if n.op in ("call_function", "call_method"))


def changes(before: Counter[str], after: Counter[str]) -> dict[str, int]:
    """Operator -> how many calls were added (positive) or removed."""
    return {name: n for name in sorted(before | after) if (n := after[name] - before[name])}


def summary(changed: dict[str, int]) -> str:
    total = sum(map(abs, changed.values()))
    listed = ", ".join(f"{n:+} {name}" for name, n in sorted(changed.items(), key=lambda item: item[1]))
    return f"{total} operators changed ({listed})" if total else "nothing changed"


def text(graph: fx.Graph) -> str:
    """A line for each node: its name, its value's type and shape, and the call."""
    return "\n".join(map(_line, graph.nodes))


def _line(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {node.args[0]}"
    value = node.meta.get("val", node.meta.get("example_value"))
    given = [*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())]
    call = "input" if node.op == "placeholder" else f"{_operator(node.target)}({', '.join(given)})"
    return f"{node.name}{_type(value)} = {call}"


def _type(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ": (" + ", ".join(_type(v).removeprefix(": ") or "None" for v in value) + ")"
    if isinstance(value, torch.Tensor):
        return f": {str(value.dtype).removeprefix('torch.')}{[*value.shape]}"
    return ""


def _operator(target: Any) -> str:
    named = isinstance(target, (str, torch._ops.OpOverload, torch._ops.OpOverloadPacket))
    return str(target) if named else torch.typename(target) if isinstance(target, type) else _qualified(target)


def _qualified(target: Any) -> str:
    module = getattr(target, "__module__", None) or ""
    return f"{module}.{getattr(target, '__name__', target)}".removeprefix("_").removeprefix(".")
