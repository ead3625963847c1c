"""Stage 1, capture: a model and example inputs -> an aten graph whose parameters carry their names."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from .errors import CaptureError, ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captured:
    """graph_module: aten. parameters: placeholder name -> the parameter's (first) name. tied: other name -> first.

    overlapping: a parameter -> another parameter that it shares memory with. constants: placeholder name -> the value
    of a small tensor of integers that the forward made from Python numbers. uniform: placeholder name -> the dimensions
    along which a constant does not vary, a constant being what no `state_dict` holds and no forward writes.
    """

    graph_module: torch.fx.GraphModule
    parameters: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    overlapping: Mapping[str, str]
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    uniform: Mapping[str, frozenset[int]] = field(default_factory=dict)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, DistributedDataParallel):
            model = model.module
        else:
            return model


class Inputs(NamedTuple):
    """A call's arguments."""

    args: tuple
    kwargs: dict


def arguments(example_inputs: Any) -> Inputs:
    """`example_inputs`, a tuple or a dict of the forward's arguments, as (args, kwargs)."""
    if isinstance(example_inputs, Inputs):
        return example_inputs
    if isinstance(example_inputs, torch.Tensor):
        return Inputs((example_inputs,), {})
    if isinstance(example_inputs, Mapping):
        return Inputs((), dict(example_inputs))
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return Inputs(tuple(example_inputs), {})
    raise ConfigError(
        f"example_inputs is a tuple or a dict of the forward's arguments, got {type(example_inputs).__name__}"
    )


def capture(model: nn.Module, example_inputs: Any) -> Captured:
    """Traces `model` (in eval mode, without a KV cache; both are put back). Raises `CaptureError`."""
    args, kwargs = arguments(example_inputs)
    if any(p.is_meta for p in model.parameters()):  # structure without weights takes inputs without values
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
    with inference_mode_of(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(model, args, kwargs, strict=False).run_decompositions({})
        except Exception as error:  # export raises many unrelated types
            raise CaptureError(_explain(model, error)) from error
    tied = tied_names(model)
    names = {p: tied.get(n, n) for p, n in program.graph_signature.inputs_to_parameters.items()}
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    log.info("captured %s: %d nodes, %d parameters", type(model).__name__, len(program.graph.nodes), len(names))
    return Captured(
        program.graph_module,
        names,
        shapes,
        tied,
        overlapping_names(model),
        _small_constants(program),
        _uniform(program),
    )


def _small_constants(program) -> dict[str, torch.Tensor]:
    lifted = program.graph_signature.inputs_to_lifted_tensor_constants.items()
    values = {name: program.constants.get(key) for name, key in lifted}
    return {
        name: t
        for name, t in values.items()
        if isinstance(t, torch.Tensor) and t.dtype == torch.int64 and t.numel() <= 64 and not t.is_meta
    }


def _uniform(program) -> dict[str, frozenset[int]]:
    """Dimensions along which the values of constants do not vary, by placeholder. Buffers of the state_dict are state
    (running statistics start out alike and differ later); a tensor without values is taken to vary."""
    signature = program.graph_signature
    lifted = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    written = set(signature.buffers_to_mutate.values())
    values = {n: program.constants.get(key) for n, key in lifted.items() if key not in written}
    return {n: _constant_dims(t) for n, t in values.items() if type(t) is torch.Tensor and t.numel() and not t.is_meta}


def _constant_dims(t: torch.Tensor) -> frozenset[int]:
    return frozenset(d for d in range(t.dim()) if torch.equal(t, t.narrow(d, 0, 1).expand_as(t)))


def tied_names(model: nn.Module) -> dict[str, str]:
    """Further name -> first name, for parameters that a model holds under several."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied


def overlapping_names(model: nn.Module) -> dict[str, str]:
    """A parameter -> another one that lies partly or wholly in the same memory, for each that has such another; itself
    where its own elements share memory."""
    spans: dict[int, list[tuple[int, int, str]]] = {}
    found = {}
    for name, p in model.named_parameters():
        if p.numel():
            end = p.storage_offset() + 1 + sum((size - 1) * stride for size, stride in zip(p.shape, p.stride()))
            if any(size > 1 and stride == 0 for size, stride in zip(p.shape, p.stride())):
                found[name] = name  # expanded: what is written to one place changes several
            spans.setdefault(p.untyped_storage()._cdata, []).append((p.storage_offset(), end, name))
    for held in spans.values():
        last_end, last_name = 0, ""
        for start, end, name in sorted(held):
            if start < last_end:
                found[name] = last_name
                found.setdefault(last_name, name)
            if end > last_end:
                last_end, last_name = end, name
    return found


@contextmanager
def inference_mode_of(model: nn.Module):
    """Eval mode, no KV cache and no fused encoder layers; afterwards whatever it was before, module by module."""
    training = {m: m.training for m in model.modules()}
    configs = [c for c in configs_of(model) if getattr(c, "use_cache", None)]
    with ExitStack() as stack:
        for module, was in training.items():
            stack.callback(setattr, module, "training", was)
        for config in configs:
            stack.callback(setattr, config, "use_cache", config.use_cache)
            config.use_cache = False
        model.eval()
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)  # one opaque operator for a whole encoder layer
        yield


def configs_of(model: nn.Module) -> list[Any]:
    """Every configuration of Hugging Face in a model, once: a decoder may have its own."""
    return list({id(c): c for m in model.modules() for c in _configs(getattr(m, "config", None))}.values())


def _configs(config: Any):
    if hasattr(config, "to_dict"):
        yield config
        for value in vars(config).values():
            yield from _configs(value)


def _explain(model: nn.Module, error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    where = [line.strip() for line in lines if line.strip().startswith('File "') and "/torch/" not in line]
    place = f" ({where[-1]})" if where else ""
    return (
        f"{type(model).__name__} could not be traced by torch.export: {type(error).__name__}: "
        f"{lines[0] if lines else 'no message'}{place}. {_advice(str(error))}"
    )


# what an error of torch.export says -> what would make the model trace
ADVICE = {
    "data-dependent": "A branch or a size there depends on the values of a tensor; it traces once that is computed without "
    "Python control flow (torch.where, masks), or with example inputs and settings that avoid it.",
    "not on the expected device": "Tensors of two devices meet: make the example inputs on the model's device.",
    "same device": "Tensors of two devices meet: make the example inputs on the model's device.",
    "unexpected keyword argument": "The example inputs are the forward's arguments by name; one of them is not.",
    "missing": "The example inputs have to hold every argument that the forward needs.",
}


def _advice(message: str) -> str:
    found = next((advice for sign, advice in ADVICE.items() if sign in message.lower()), "")
    return found or (
        "The forward has to run on the example inputs without branching on tensor values; example inputs that "
        "avoid the branch, or a forward without it, trace."
    )
