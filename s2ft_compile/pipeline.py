"""The compiler on one screen: its passes, in their order.

dynamo      the model's forward, before autograd
joint       forward and backward in one graph of aten
Inductor    the same, for what only Inductor compiles
"""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import resolve_name
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from s2ft_compile.passes import tracing
from s2ft_compile.passes.backward import chunk_loss, fp8, int8, lower, pushdown
from s2ft_compile.passes.couple import recheck

from .config import CompileOptions
from .errors import CompileError, ConfigError, S2FTError, of_memory, of_the_system
from .rules import rules_key
from .slices.blocks import trains_slices
from .slices.state import live_states

log = logging.getLogger(__name__)
DYNAMO, JOINT, INDUCTOR = "dynamo", "joint", "Inductor"


@dataclass(frozen=True)
class Pass:
    """One step of the compiler, at one level.

    run: changes a graph in place; inputs: the tensors of a dynamo graph. ensures: what is wrong with the graph that a
    run leaves, None where nothing is; asked after every run. modules: what the pass is made of, besides what they
    import; the key of compile caches is their source. everywhere: whether a joint graph without deltas, or a forward
    alone, is its matter too.
    """

    name: str
    level: str
    run: Callable[[fx.Graph, Sequence[Any]], Any]
    ensures: Callable[[fx.Graph], str | None]
    modules: tuple[ModuleType, ...]
    everywhere: bool = False


def _prove(graph: fx.Graph, inputs: Sequence[Any]) -> None:
    """The analysis held for the traces that it saw; here is the graph that runs, perhaps another. Raises `CompileError`
    where the order of a permuted axis matters in it."""
    given = dict(zip(map(id, inputs), graph.find_nodes(op="placeholder")))
    for state in live_states():
        if state.active and state.permuted.axes:
            assert graph.owning_module is not None
            weights = {given[id(t)]: (name, state.permuted) for name, t in state.tensors().items() if id(t) in given}
            if weights:
                try:
                    state.left |= recheck.recheck(graph.owning_module, weights, frozenset(state.left))
                except CompileError:
                    raise
                except Exception as error:  # a higher-order operator that no rule traces: what `prepare` proved stands
                    log.warning("a graph could not be proved again (%s: %s)", type(error).__name__, error)


def _chunk(graph: fx.Graph, inputs: Sequence[Any]) -> None:
    chunk_loss.chunk_loss(graph, trains_slices(inputs))


PASSES = (
    Pass("recheck", DYNAMO, _prove, lambda graph: None, (recheck,)),
    Pass("chunk_loss", DYNAMO, _chunk, chunk_loss.whole_logits, (chunk_loss,)),
    Pass("slice_pushdown", JOINT, lambda graph, _: pushdown.slice_pushdown(graph), pushdown.attached, (pushdown,)),
    Pass("keep_saved", JOINT, lambda graph, _: chunk_loss.keep_saved(graph), chunk_loss.unsaved, (chunk_loss,)),
    Pass("fp8", JOINT, lambda graph, _: fp8.fp8_products(graph), fp8.left_over, (fp8,), everywhere=True),
    Pass("lower", JOINT, lambda graph, _: lower.lower_where_possible(graph), lower.rounded, (lower,)),
    Pass("see_through", INDUCTOR, lambda graph, _: lower.see_through(graph), lower.opaque, (lower,)),
    Pass("int8", INDUCTOR, lambda graph, _: int8.by_int16(graph), int8.left_over, (int8,), everywhere=True),
)


@dataclass(frozen=True)
class Pipeline(CustomGraphPass):
    """The passes that options leave on, for the graphs of one dynamo graph. It is Inductor's hook for joint graphs.

    number: of the dynamo graph, in logs and traces. trains: whether it trains slices, which may all lie beside their
    weights, where no joint graph shows them.
    """

    how: CompileOptions
    number: int = 0
    trains: bool = False

    def __post_init__(self) -> None:
        if unknown := set(self.how.off) - {p.name for p in PASSES}:
            valid = ", ".join(p.name for p in PASSES)
            raise ConfigError(f"there is no pass {', '.join(map(repr, sorted(unknown)))} to be off; valid: {valid}")

    @property
    def passes(self) -> tuple[Pass, ...]:
        how = self.how
        off = {*how.off, *["chunk_loss"] * how.logits, *["lower", "see_through"] * (not how.kernels)}
        off |= set() if how.fp8 else {"fp8"}
        return tuple(p for p in PASSES if p.name not in off)

    def run(self, level: str, graph: fx.Graph, inputs: Sequence[Any] = (), everywhere: bool = False) -> None:
        """All passes of a level, or those for any graph alone. An error of one names it, and those before it."""
        for i, one in enumerate(self.passes):
            if one.level == level and (one.everywhere or not everywhere):
                where = f"pass {one.name} of graph {self.number}"
                where += f", after {', '.join(p.name for p in self.passes[:i])}" if i else ""
                self._run(one, graph, inputs, where)

    def _run(self, one: Pass, graph: fx.Graph, inputs: Sequence[Any], where: str) -> None:
        written = self.how.trace is not None or tracing.is_recording() or log.isEnabledFor(logging.DEBUG)
        interface, operators = _interface(graph), tracing.operators(graph)
        before = tracing.text(graph) if written else ""
        try:
            one.run(graph, inputs)
            graph.lint()
            wrong = one.ensures(graph) or _changed(interface, _interface(graph))
        except S2FTError as error:
            raise type(error)(f"{error} ({where})") from error
        except Exception as error:
            if of_memory(error) or of_the_system(error):
                raise
            named = CompileError(f"{type(error).__name__}: {error} ({where})")
            raise named.with_traceback(error.__traceback__) from error
        if wrong:
            raise CompileError(f"{wrong} ({where})")
        after, changed = tracing.text(graph) if written else "", tracing.changes(operators, tracing.operators(graph))
        step = tracing.Step(self.number, one.level, one.name, before, after, changed)
        log.info("%s", step)
        log.debug("%s before\n%s\nafter\n%s", one.name, before, after)
        if written:
            tracing.record(step, self.how.trace)

    def rewrite(self, joint: fx.Graph, *levels: str) -> None:
        """The passes of joint graphs. One without deltas and without a loss in chunks only has those for any graph."""
        attached = pushdown.attached(joint) or joint.find_nodes(op="call_function", target=chunk_loss.KEEP)
        for level in levels:
            self.run(level, joint, everywhere=not (self.trains or attached))

    def __call__(self, graph: fx.Graph) -> None:
        self.rewrite(graph, JOINT, INDUCTOR)

    def uuid(self) -> bytes | None:
        """What a compiled graph depends on besides itself; None where it must not come from a cache."""
        if self.how.trace is not None or tracing.is_recording():
            return None
        files = sources((__name__, *(module.__name__ for p in PASSES for module in p.modules)))
        return get_hash_for_files(files, " ".join([*(p.name for p in self.passes), rules_key(), str(self.trains)]))


def _interface(graph: fx.Graph) -> tuple[list[str], list[str]]:
    """The names of a graph's inputs, and types and shapes of its outputs."""
    outputs = graph.output_node().args[0]
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    values = [n.meta.get("val") if isinstance(n, fx.Node) else None for n in outputs]
    shown = [f"{v.dtype} {tuple(v.shape)}" if isinstance(v, torch.Tensor) else "" for v in values]
    return [n.name for n in graph.find_nodes(op="placeholder")], shown


def _changed(before: tuple[list[str], list[str]], after: tuple[list[str], list[str]]) -> str | None:
    same = before[0] == after[0] and len(before[1]) == len(after[1])
    if same and all(b in (a, "") or a == "" for b, a in zip(before[1], after[1])):
        return None
    return f"a pass keeps what a graph takes and gives, but {before} became {after}"


ROOT = Path(__file__).parent
IMPORT = re.compile(r"^\s*from\s+([.\w]+)\s+import\s+(\([^)]*\)|[^\n#]*)", re.MULTILINE)


@cache
def sources(modules: tuple[str, ...]) -> tuple[str, ...]:
    """The files of modules, and of all modules of this package that they import, directly or not."""
    files: dict[str, str] = {}
    pending = list(modules)
    while pending:
        name = pending.pop()
        stem = ROOT.joinpath(*name.split(".")[1:])
        file = next((f for f in (stem.with_suffix(".py"), stem / "__init__.py") if f.is_file()), None)
        if name in files or file is None:
            continue
        files[name] = str(file)
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        for source, names in IMPORT.findall(file.read_text(encoding="utf-8")):
            base = resolve_name(source, package)
            imported = [base, *(f"{base}.{each}" for each in re.findall(r"\w+", names))]
            pending += [each for each in imported if each.startswith("s2ft_compile.")]
    return tuple(sorted(files.values()))
