"""What a model is made of, and the modes that it is traced in: wrappers, tensors, names that share memory."""

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, DistributedDataParallel):
            model = model.module
        else:
            return model


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
    held = [(name, t) for name, t in held_tensors(model) if id(t) not in itself]
    for name, t in [*parameters.items(), *held, *(constants or {}).items()]:
        if isinstance(t, torch.Tensor) and (span := memory_span(t)) is not None:
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


def memory_span(t: torch.Tensor) -> tuple[int, int, int] | None:
    """(storage, first byte, end) of what a tensor reads; None of what has no memory of its own."""
    try:
        storage = t.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # a subclass that wraps others
        return None
    if not t.numel() or t.layout != torch.strided:
        return None
    end = t.storage_offset() + 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return storage, t.storage_offset() * t.itemsize, end * t.itemsize


def held_tensors(model: nn.Module) -> Iterator[tuple[str, Any]]:
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
    return {names[id(t)]: name for name, t in held_tensors(model) if id(t) in names}


def holdings(model: nn.Module) -> list[tuple[Any, Any]]:
    """The attributes of every module, and each list or dict among them, with a copy of what it holds now."""
    held = [h for m in model.modules() for h in (vars(m), *(v for v in vars(m).values() if type(v) in (list, dict)))]
    return [(h, h.copy()) for h in held]


def holds_still(held: Any, was: Any) -> bool:
    """Whether a list or dict holds the very things of before, in their order."""
    if isinstance(held, dict):
        return list(held) == list(was) and all(held[key] is was[key] for key in held)
    return len(held) == len(was) and all(x is y for x, y in zip(held, was))


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
