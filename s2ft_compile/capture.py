"""Stage 1, capture: a model and example inputs -> an aten graph whose parameters carry their names."""

import logging
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from .errors import CaptureError
from .examples import Inputs, arguments, resized, several
from .quantized import StandIn, check_known, stand_ins
from .quantized import __file__ as STAND_INS
from .recording import Recorded, record

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captured:
    """graph_module: aten. parameters: placeholder name -> the parameter's (first) name. tied: other name -> first.

    overlapping: a parameter -> another tensor of the model that it shares memory with, in words; itself where its own
    elements share memory. constants: name of a node -> the value of a small tensor of integers that the forward made
    from Python numbers. uniform: placeholder name -> the dimensions along which a constant does not vary, a constant
    being what no `state_dict` holds and no forward writes. buffers: placeholder name -> name, of those that a
    `state_dict` holds; written: output name -> the buffer that it is the next value of. refused:
    parameter -> why it has no coupling, whatever the graph says. border: what the graph is of, where that is not the
    whole model; start: how deep in the model that begins. trace: what sets this one apart
    from the first, in words. resized: it is the one before it, at other sizes of the inputs. training: it is
    of train mode. elsewhere: the quantized weights that something else than their own layers reads.
    """

    graph_module: torch.fx.GraphModule
    parameters: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    overlapping: Mapping[str, str]
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    uniform: Mapping[str, frozenset[int]] = field(default_factory=dict)
    trace: str = ""
    resized: bool = False
    training: bool = False
    buffers: Mapping[str, str] = field(default_factory=dict)
    written: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    border: str = "the model"
    start: int = 0
    elsewhere: frozenset[str] = frozenset()


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, DistributedDataParallel):
            model = model.module
        else:
            return model


def capture(
    model: nn.Module, example_inputs: Any, training: bool = False, trace: str = "", resized: bool = False
) -> Captured:
    """Traces `model` in one mode, without a KV cache (both are put back). Raises `CaptureError`."""
    args, kwargs = arguments(example_inputs)
    if any(p.is_meta for p in model.parameters()):  # structure without weights takes inputs without values
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
    check_known(model)
    with stand_ins(model) as quantized, mode_of(model, training), one_draw(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recorded = _recorded(model, args, kwargs, trace)
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    tied = tied_names(model)
    names = {place: tied.get(name, name) for place, name in recorded.parameters.items()}
    nodes = len(recorded.graph_module.graph.nodes)
    log.info("captured %s: %d nodes, %d parameters", type(model).__name__, nodes, len(names))
    saved = _own_buffers(model)
    return Captured(
        recorded.graph_module,
        names,
        shapes,
        tied,
        overlapping_names(model, recorded.constants),
        {name: t for name, t in recorded.constants.items() if is_small_index(t)},
        _uniform(model, recorded),
        trace,
        resized,
        training,
        {place: name for place, name in recorded.buffers.items() if name in saved},
        recorded.written,
        elsewhere=_read_elsewhere(
            recorded.graph_module.graph, {place: name for place, name in names.items() if name in quantized}
        ),
    )


def _recorded(model: nn.Module, args: tuple, kwargs: Mapping[str, Any], trace: str) -> Recorded:
    try:
        return record(model, args, kwargs, {id(t): name for name, t in _held(model)})
    except Exception as error:  # higher-order operators, sizes that depend on data, or no model that traces at all
        log.debug("%s was not recorded (%s: %s)", type(model).__name__, type(error).__name__, error)
    try:
        with _frozen(model):  # attention's operators have no derivative on every device
            program = torch.export.export(model, args, dict(kwargs), strict=False).run_decompositions({})
    except Exception as error:  # export raises many unrelated types
        raise CaptureError(_explain(model, error, trace)) from error
    signature, constants = program.graph_signature, program.constants
    lifted = signature.inputs_to_lifted_tensor_constants.items()
    return Recorded(
        program.graph_module,
        signature.inputs_to_parameters,
        signature.inputs_to_buffers,
        {place: constants[key] for place, key in lifted if isinstance(constants.get(key), torch.Tensor)},
        {**signature.buffers_to_mutate, **signature.parameters_to_mutate},
    )


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        yield
    finally:
        for p, trained in before:
            p.requires_grad_(trained)


def _read_elsewhere(graph: torch.fx.Graph, quantized: Mapping[str, str]) -> frozenset[str]:
    """Of quantized weights (placeholder -> name), those that something else than their own layers reads."""
    places = [place for place in graph.find_nodes(op="placeholder") if place.name in quantized]
    return frozenset(quantized[p.name] for p in places if not all(map(_is_of_a_stand_in, p.users)))


def _is_of_a_stand_in(node: torch.fx.Node) -> bool:
    if "traceback" in node.meta:  # of a recording
        return any(frame.filename == STAND_INS for frame in node.meta["traceback"].summary())
    modules = list(node.meta.get("nn_module_stack", {}).values())
    return bool(modules) and str(modules[-1][1]).endswith(StandIn.__name__)


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
        from .pieces import pieces  # which capture their own traces

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


def _own_buffers(model: nn.Module) -> set[str]:
    """The buffers that a `state_dict` holds and nothing else shares memory with."""
    held = [*model.parameters(), *(t for _, t in _held(model))]
    spans = [span for t in held if (span := _span(t)) is not None]
    count = Counter(storage for storage, *_ in spans)
    own = {n for n, t in model.named_buffers() if (span := _span(t)) is not None and count[span[0]] == 1}
    return own - _not_saved(model)


def _not_saved(model: nn.Module) -> set[str]:
    """The buffers that no `state_dict` holds."""
    return {f"{path}.{key}".lstrip(".") for path, m in model.named_modules() for key in m._non_persistent_buffers_set}


def is_small_index(t: torch.Tensor) -> bool:
    """Whether a constant may be a list of positions that the model's code spells out, and has values to read."""
    return t.dtype == torch.int64 and t.numel() <= 64 and not t.is_meta and type(t) is torch.Tensor


def _uniform(model: nn.Module, recorded: Recorded) -> dict[str, frozenset[int]]:
    """Dimensions along which the values of constants do not vary, by placeholder. Buffers of the state_dict are state
    (running statistics start out alike and differ later); a tensor without values is taken to vary."""
    fixed, values = _not_saved(model) - set(recorded.written.values()), dict(model.named_buffers())
    buffers = {place: values[name] for place, name in recorded.buffers.items() if name in fixed and name in values}
    return {place: uniform_dims(t) for place, t in {**buffers, **recorded.constants}.items()}


def uniform_dims(t: torch.Tensor) -> frozenset[int]:
    """The dimensions along which a constant's values do not vary; none of a tensor without values to read."""
    if type(t) is not torch.Tensor or not t.numel() or t.is_meta:
        return frozenset()
    return frozenset(d for d in range(t.dim()) if torch.equal(t, t.narrow(d, 0, 1).expand_as(t)))


def tied_names(model: nn.Module) -> dict[str, str]:
    """Further name -> first name, for parameters that a model holds under several."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied


def overlapping_names(model: nn.Module, constants: Mapping[str, Any] | None = None) -> dict[str, str]:
    """A parameter -> another tensor that lies partly or wholly in its memory, for each that has such another; itself
    where its own elements share memory.

    The other may be a parameter, a buffer, an attribute of a module (or held by a list, tuple or dict that is one), or
    one of `constants`, tensors that a trace met anywhere else. An attribute that is the parameter itself is another
    name for it (nn.LSTM has such a list); where a forward reads that, it is among the constants.
    """
    parameters = dict(model.named_parameters())
    spans: dict[int, list[tuple[int, int, str]]] = {}
    itself = {id(p) for p in parameters.values()}
    held = [(name, t) for name, t in _held(model) if id(t) not in itself]
    for name, t in [*parameters.items(), *held, *(constants or {}).items()]:
        if isinstance(t, torch.Tensor) and (span := _span(t)) is not None:
            spans.setdefault(span[0], []).append((*span[1:], name))
    overlaps = {n: n for n, p in parameters.items() if any(s > 1 and not d for s, d in zip(p.shape, p.stride()))}
    for spanned in spans.values():
        last_end, last_name = 0, ""
        for start, end, name in sorted(set(spanned)):
            if start < last_end:
                overlaps[name] = last_name
                overlaps.setdefault(last_name, name)
            if end > last_end:
                last_end, last_name = end, name
    return {name: other for name, other in overlaps.items() if name in parameters}


def _span(t: torch.Tensor) -> tuple[int, int, int] | None:
    """(storage, first element, end) of what a tensor reads; None of what has no memory of its own."""
    try:
        storage = t.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # a subclass that wraps others
        return None
    if not t.numel() or t.layout != torch.strided:
        return None
    end = t.storage_offset() + 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return storage, t.storage_offset() * t.itemsize, end * t.itemsize


def _held(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Buffers, and tensors among a module's attributes, or one level below: what a weight may be known by besides."""
    for path, module in model.named_modules():
        for key, value in {**module._buffers, **vars(module)}.items():
            if key in ("_parameters", "_buffers", "_modules"):
                continue
            below = (
                value.items() if isinstance(value, dict) else enumerate(value) if type(value) in (list, tuple) else ()
            )
            for name, t in [(key, value), *((f"{key}[{k!r}]", v) for k, v in below)]:
                if isinstance(t, torch.Tensor):
                    yield f"{path}.{name}" if path else name, t


def held_again(model: nn.Module) -> dict[str, str]:
    """A parameter -> the attribute that it is, too, of those that are one."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(t)]: name for name, t in _held(model) if id(t) in names}


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def inference_mode_of(model: nn.Module):
    """Eval mode, no KV cache and no fused encoder layers; afterwards whatever it was before, module by module."""
    return mode_of(model, training=False)


@contextmanager
def in_mode(model: nn.Module, training: bool):
    """Train or eval mode; afterwards each module's own again."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was in before:
            module.training = was


@contextmanager
def mode_of(model: nn.Module, training: bool):
    """Train or eval mode, no KV cache and no fused encoder layers; afterwards whatever it was before."""
    configs = [c for c in configs_of(model) if getattr(c, "use_cache", None)]
    with ExitStack() as stack:
        stack.enter_context(in_mode(model, training))
        for config in configs:
            stack.callback(setattr, config, "use_cache", config.use_cache)
            config.use_cache = False
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)  # one opaque operator for a whole encoder layer
        yield


@contextmanager
def one_draw():
    """One fixed draw for Python's random numbers, and for single ones of torch: what layers are dropped by."""
    state = random.getstate()
    random.seed(0)
    try:
        with _SingleDraws():
            yield
    finally:
        random.setstate(state)


class _SingleDraws(TorchFunctionMode):
    """`torch.rand` of one number as a constant, which a trace can branch on."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        drawn = func(*args, **(kwargs or {}))
        if func is not torch.rand or drawn.shape not in ((), (1,)):
            return drawn
        return torch.tensor([0.5] if drawn.dim() else 0.5, dtype=drawn.dtype, device=drawn.device)


def configs_of(model: nn.Module) -> list[Any]:
    """Every configuration of Hugging Face in a model, once: a decoder may have its own."""
    return list({id(c): c for m in model.modules() for c in _configs(getattr(m, "config", None))}.values())


def _configs(config: Any):
    if hasattr(config, "to_dict"):
        yield config
        for value in vars(config).values():
            yield from _configs(value)


def _explain(model: nn.Module, error: Exception, trace: str) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    where = [line.strip() for line in lines if line.strip().startswith('File "') and "/torch/" not in line]
    place = f" ({where[-1]})" if where else ""
    return (
        f"{type(model).__name__} could not be traced by torch.export{f' {trace}' if trace else ''}: "
        f"{type(error).__name__}: {lines[0] if lines else 'no message'}{place}. {_advice(str(error))}"
        f"{TRAIN_MODE if 'train mode' in trace else ''}"
    )


# what an error of torch.export says -> what would make the model trace
ADVICE = {
    "data-dependent": "A branch or a size there depends on the values of a tensor; it traces once that is computed "
    "without Python control flow (torch.where, masks), or with example inputs and settings that avoid it.",
    "not on the expected device": "Tensors of two devices meet: make the example inputs on the model's device.",
    "same device": "Tensors of two devices meet: make the example inputs on the model's device.",
    "unexpected keyword argument": "The example inputs are the forward's arguments by name; one of them is not.",
    "missing": "The example inputs have to hold every argument that the forward needs.",
}


TRAIN_MODE = (
    " It does trace in eval mode: where it is only ever trained so, or its train mode differs by dropout alone, "
    "`train=False` leaves train mode out of the proof."
)


def _advice(message: str) -> str:
    advice = next((advice for sign, advice in ADVICE.items() if sign in message.lower()), "")
    return advice or (
        "The forward has to run on the example inputs without branching on tensor values; example inputs that "
        "avoid the branch, or a forward without it, trace."
    )
