"""Pieces: the modules of a model that can be traced where the whole cannot, as when it branches on data.

The model runs once in each mode and at each size. A module that traces for every kind of call that it got is a piece;
of one that does not, its children are looked at. What enters or leaves a piece is in the base order, so a coupling
holds where pieces alone read its weights. A weight that anything else reads is refused, with the reason.
"""

import dis
import inspect
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from s2ft_compile.errors import CaptureError

from .capture import Captured, capture
from .examples import Inputs, resized
from .models import mode_of, one_draw, overlapping_names, tied_names
from .recording import as_before

log = logging.getLogger(__name__)
WHOLE = set("parameters named_parameters _parameters get_parameter state_dict".split())  # ways to read any weight
WHOLE |= set("children named_children modules named_modules _modules get_submodule".split())
MAX_KINDS, MAX_SIZES = 8, 16  # of calls of one module; one that gets more kinds is no piece


@dataclass
class Run:
    """What a model did. calls: module -> kind of call (mode, arguments that are no tensors, types and dimensions of
    those that are) -> sizes -> the arguments. reads: (parameter, the modules that ran when it was read)."""

    calls: dict[str, dict[Any, dict[Any, Inputs]]] = field(default_factory=dict)
    reads: set[tuple[str, tuple[str, ...]]] = field(default_factory=set)


def pieces(model: nn.Module, inputs: Inputs, train: bool, error: CaptureError) -> list[Captured]:
    """The traces of all pieces, with the weights that are refused. Raises `error`, which says why the whole does not
    trace, where nothing in it does, or where it has no weights to run with."""
    if any(p.is_meta for p in model.parameters()):
        raise error
    run = _run(model, inputs, train, error)
    traced = dict(_traced(model, "", run.calls))
    if not traced:
        raise error
    parameters, tied = dict(model.named_parameters()), tied_names(model)
    names = {id(t): name for name, t in (*parameters.items(), *model.named_buffers())}
    held = {path: {names[id(p)] for p in model.get_submodule(path).parameters()} for path in traced}
    read = {(name, path) for name, running in run.reads for path in running if name in held.get(path, ())}
    outside = {name for name, running in run.reads if not any((name, path) in read for path in running)}
    outside |= set(parameters) - {name for name, _ in read}
    mentioned = _attributes(model, traced)  # a branch that was not taken may read it
    any_is_read = not WHOLE.isdisjoint(attribute for _, attribute in mentioned)
    for name in {*parameters, *tied}:
        path = next((p for p in traced if name.startswith(f"{p}.")), None)
        first = name.removeprefix(f"{path}.").partition(".")[0]
        ways = {("", first), (str(path).rpartition(".")[-1], first)}
        if path is None or any_is_read or mentioned & ways:
            outside.add(tied.get(name, name))
    refused = dict.fromkeys(sorted(outside), "code that could not be traced reads it")
    log.warning("%s; %d modules that do trace were looked at by themselves", str(error).rstrip("."), len(traced))
    shapes, overlapping = {name: tuple(p.shape) for name, p in parameters.items()}, overlapping_names(model)
    captures, start = [], 0
    for path in (p for p in run.calls if p in traced):
        module = model.get_submodule(path)
        local = {n: names[id(t)] for n, t in (*module.named_parameters(), *module.named_buffers())}
        for captured in traced[path]:
            captures.append(
                replace(
                    captured,
                    parameters={place: local[n] for place, n in captured.parameters.items()},
                    buffers={place: local[n] for place, n in captured.buffers.items()},
                    written={place: local[n] for place, n in captured.written.items()},
                    shapes=shapes,
                    overlapping=overlapping | {local[n]: other for n, other in captured.overlapping.items()},
                    tied=tied,
                    refused=refused,
                    border=f"{path}, which is traced by itself",
                    start=start,
                )
            )
        start += len(held[path])
    return captures


def _attributes(model: nn.Module, traced: Collection[str]) -> set[tuple[str, str]]:
    """Every attribute that code outside of the pieces mentions, after the attribute that it is one of ("" for what may
    be anything): the code of the modules that hold pieces and of what that calls."""
    attributes: set[tuple[str, str]] = set()
    seen: set[Any] = set()
    for path, module in model.named_modules():
        inside = any(piece == path or path.startswith(f"{piece}.") for piece in traced)
        spaces = [vars(module), *map(vars, type(module).__mro__)]
        stack = [] if inside or not any(module.children()) else [space.get("forward") for space in spaces]
        while stack:
            function = _plain(stack.pop())
            if function is None or function in seen or function.__module__.startswith("torch."):
                continue
            seen.add(function)
            mentioned = _mentioned(function.__code__)
            attributes |= mentioned
            known = {name for _, name in mentioned}.union(function.__code__.co_names)
            held = [function.__globals__[n] for n in known if n in function.__globals__]
            modules = [vars(m) for m in held if inspect.ismodule(m)]
            stack += [*held, *(c.cell_contents for c in function.__closure__ or ())]
            stack += [
                space[n] for n in known for space in spaces if n in space and not _says_where(module, n, space[n])
            ]
            stack += [space[n] for n in known for space in modules if n in space]
    return attributes


def _says_where(module: nn.Module, name: str, attribute: Any) -> bool:
    """Whether it is a property that says of which type, or on which device, weights are: not what they hold."""
    if not isinstance(attribute, property):
        return False
    try:
        return isinstance(getattr(module, name), (torch.dtype, torch.device))
    except Exception:  # of a model, anything
        return False


def _plain(attribute: Any) -> Any:
    """The function in a method, a property or a decorator; None where there is none."""
    attribute = getattr(attribute, "__func__", getattr(attribute, "fget", attribute))
    attribute = inspect.unwrap(attribute) if callable(attribute) else attribute
    return attribute if inspect.isfunction(attribute) else None


def _mentioned(code: CodeType) -> set[tuple[str, str]]:
    mentioned, before = set(), ""
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            mentioned.add((before, step.argval))
            before = step.argval
        elif step.opname not in ("CACHE", "EXTENDED_ARG"):
            before = "self" if step.opname == "LOAD_FAST" and step.argval == "self" else ""
    return mentioned.union(*(_mentioned(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _traced(module: nn.Module, path: str, calls: Mapping[str, Any]) -> Iterator[tuple[str, list[Captured]]]:
    """The outermost modules that trace, with their traces. One with a single matrix has none but its borders."""
    for name, child in module.named_children():
        at = f"{path}.{name}".lstrip(".")
        if sum(p.dim() > 1 for p in child.parameters()) > 1:
            traces = _traces(child, calls.get(at, {}), at)
            yield from [(at, traces)] if traces else _traced(child, at, calls)


def _traces(module: nn.Module, kinds: Mapping[Any, Mapping[Any, Inputs]], path: str) -> list[Captured]:
    """Of each kind of call the two at the largest sizes; [] where one does not trace."""
    traces = []
    for (training, *_), sizes in kinds.items():
        largest = sorted(sizes, key=lambda shapes: -sum(shape.numel() for shape in shapes))[:2]
        for i, size in enumerate(largest):
            where = f"of {path}{' in train mode' if training else ''}"
            try:
                traces.append(capture(module, sizes[size], training, where, i > 0))
            except CaptureError as error:
                log.debug("no piece: %s", error)
                return []
    return traces if len(kinds) <= MAX_KINDS else []


def _run(model: nn.Module, inputs: Inputs, train: bool, error: CaptureError) -> Run:
    run = Run()
    for training in (False, True) if train else (False,):
        for given, whole in ((inputs, False), *((choice.inputs, choice.whole) for choice in resized(model, inputs))):
            try:
                with mode_of(model, training), one_draw(), torch.no_grad(), _kept(model), _watched(model, run):
                    model(*pytree.tree_map_only(torch.Tensor, torch.clone, given.args), **given.kwargs)
            except Exception as fault:  # of a model, anything
                if given is inputs:
                    raise error from fault
                log.debug("a size is fixed: %s", fault)
                continue
            if whole:
                break
    return run


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Buffers, attributes and the state of random numbers are as before afterwards."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    with as_before(model), torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            with torch.no_grad():
                for now, was in buffers:
                    now.copy_(was)


@contextmanager
def _watched(model: nn.Module, run: Run) -> Iterator[None]:
    names = {id(m): name for name, m in model.named_modules()}
    running: list[str] = []

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        running.append(names[id(module)])
        flat, spec = pytree.tree_flatten((args, kwargs))
        tensors = [t for t in flat if isinstance(t, torch.Tensor)]
        kind = (module.training, spec, *((t.dim(), t.dtype) if isinstance(t, torch.Tensor) else repr(t) for t in flat))
        sizes = run.calls.setdefault(running[-1], {}).setdefault(kind, {})
        shapes = tuple(t.shape for t in tensors)
        if shapes not in sizes and len(sizes) < MAX_SIZES and all(map(torch.Size.numel, shapes)):
            sizes[shapes] = Inputs(*pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs)))

    def leave(*_) -> None:
        running.pop()

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        with _Reads(model, running, run):
            yield


class _Reads(TorchDispatchMode):
    """Notes which modules run whenever a parameter is read."""

    def __init__(self, model: nn.Module, running: list[str], run: Run):
        super().__init__()
        self.running, self.run = running, run
        self.names: dict[int, list[str]] = {}
        for name, p in model.named_parameters():
            self.names.setdefault(p.untyped_storage()._cdata, []).append(name)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for t in pytree.tree_leaves((args, kwargs)):
            if isinstance(t, torch.Tensor) and t.layout == torch.strided:
                for name in self.names.get(t.untyped_storage()._cdata, ()):
                    self.run.reads.add((name, tuple(self.running)))
        return func(*args, **(kwargs or {}))
