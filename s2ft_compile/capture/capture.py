"""Stage 1, capture: a model and example inputs -> an aten graph whose parameters carry their names."""

import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from s2ft_compile.errors import CaptureError
from s2ft_compile.quantized import StandIn, check_known, stand_ins
from s2ft_compile.quantized import __file__ as STAND_INS

from .examples import arguments
from .models import held_tensors, memory_span, mode_of, one_draw, overlapping_names, tied_names
from .recording import Recorded, record, unlogged

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
    of train mode. elsewhere: the quantized weights that something else than their own layers reads. copies: weight ->
    that of the layer which its own is a copy of.
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
    copies: Mapping[str, str] = field(default_factory=dict)


def capture(
    model: nn.Module, example_inputs: Any, training: bool = False, trace: str = "", resized: bool = False
) -> Captured:
    """Traces `model` in one mode, without a KV cache (both are put back). Raises `CaptureError`."""
    args, kwargs = arguments(example_inputs)
    if any(p.is_meta for p in model.parameters()):  # structure without weights takes inputs without values
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
    check_known(model)
    with stand_ins(model) as quantized, mode_of(model, training), one_draw(), unlogged(), warnings.catch_warnings():
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
        copies=recorded.copies,
    )


def _recorded(model: nn.Module, args: tuple, kwargs: Mapping[str, Any], trace: str) -> Recorded:
    try:
        return record(model, args, kwargs, {id(t): name for name, t in held_tensors(model)})
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


def _own_buffers(model: nn.Module) -> set[str]:
    """The buffers that a `state_dict` holds and nothing else shares memory with."""
    held = [*model.parameters(), *(t for _, t in held_tensors(model))]
    spans = [span for t in held if (span := memory_span(t)) is not None]
    count = Counter(storage for storage, *_ in spans)
    own = {n for n, t in model.named_buffers() if (span := memory_span(t)) is not None and count[span[0]] == 1}
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
    "cast notimplemented to tensor": "A kind of tensor takes part that cannot be traced, such as a nested one; padded "
    "ones with a mask trace.",
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
