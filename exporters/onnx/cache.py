"""A causal language model with its KV cache as inputs and outputs: one graph for prefill and decoding.

    input_ids (batch, sequence), attention_mask (batch, past + sequence), position_ids (batch, sequence),
    past_key_values.N.key, .value (batch, heads, past, channels)
        -> logits (batch, sequence, vocabulary), present.N.key, .value (batch, heads, past + sequence, channels)

The past may be empty, so the same graph reads a prompt and continues it. That is the form that optimum and
onnxruntime-genai run, and the weights are there once; `transformers.exporters` writes a graph for each.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from s2ft_compile.capture.examples import Inputs
from s2ft_compile.errors import ConfigError

from .check import close, first_line, named_tensors
from .values import Call

ROWS, PAST, NEW = 2, 4, 3  # the sizes that are traced: all different, and none 1, which the tracer takes for a constant
TOKENS, TOTAL = {0: "batch", 1: "sequence"}, {0: "batch", 1: "total_sequence"}
CACHE = {0: "batch", 2: "past_sequence"}
SUMS = {f"{a} + {b}": "total_sequence" for a, b in (("past_sequence", "sequence"), ("sequence", "past_sequence"))}
IGNORED = {"attention_mask", "position_ids", "labels", "use_cache"}  # made here, or no part of generation


@contextmanager
def stepping(module: nn.Module, inputs: Inputs) -> Iterator[Call]:
    """Context in which `module(**inputs)` takes a past and returns logits and a present; yields how it is called.

    inputs: the example inputs, from which tokens are taken. Raises `ConfigError` for a model that has no such cache.
    """
    ids, accepted = _token_ids(module, inputs), _accepted(module)
    given, own = module.forward, module.__dict__.get("forward")
    prompt = {name: t for name, t in _prompt(ids).items() if name in accepted}
    names = [*prompt, "past_key_values"]
    module.forward = _step(given, names)
    try:
        yield _call(module, prompt)
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _step(forward: Callable, names: list[str]) -> Callable:
    """The forward, from tensors to tensors."""

    def step(**given: Any) -> dict[str, Any]:
        cache = _cache(given.pop("past_key_values"))
        logits = getattr(forward(**given, past_key_values=cache, use_cache=True), "logits", None)
        if logits is None:
            raise ConfigError("it returns no logits")
        return {"logits": logits, "present": [{"key": layer.keys, "value": layer.values} for layer in cache.layers]}

    step.__signature__ = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    )
    return step


def _cache(past: list[Mapping[str, Tensor]]) -> Any:
    """A cache that only grows. That of a sliding window counts and cuts in Python, which a graph cannot hold; the
    model's mask applies the window either way."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for pair in past:
        layer = DynamicLayer()
        layer.lazy_initialization(pair["key"], pair["value"])
        layer.keys, layer.values = pair["key"], pair["value"]
        cache.layers.append(layer)
    return cache


# --- what it is traced and checked with --------------------------------------------------------------------


def _call(module: nn.Module, prompt: Mapping[str, Tensor]) -> Call:
    """Traced on three tokens after four; checked on a prompt without a past, and on one token of one row."""
    try:
        with torch.no_grad():
            whole = module(**prompt, past_key_values=[])
            before = module(**_part(prompt, 0, PAST), past_key_values=[])
            _check_layers(before["present"])
            past = [{k: t.clone() for k, t in pair.items()} for pair in before["present"]]
            traced = {**_part(prompt, PAST, PAST + NEW), "past_key_values": past}
            again = module(**traced)
    except Exception as error:  # whatever a model raises on a cache that is not of its kind
        raise _no_cache(module, first_line(error) if not isinstance(error, ConfigError) else str(error)) from error
    if not close(whole["logits"][1:], torch.cat([before["logits"], again["logits"]], 1)[1:]):
        raise _no_cache(module, "its tokens see those that follow, so a prompt cannot be continued")
    empty = [{k: t[:, :, :0] for k, t in pair.items()} for pair in past]
    last = [{k: t[1:, :, :-1] for k, t in pair.items()} for pair in again["present"]]
    one = {name: t[1:] for name, t in _part(prompt, PAST + NEW - 1, PAST + NEW).items()}
    kinds = {"attention_mask": TOTAL, "input_ids": TOKENS, "position_ids": TOKENS}
    names = [name for name, _ in named_tensors(traced, separator=".")]
    return Call(
        Inputs((), traced),
        axes=tuple(kinds.get(name, CACHE) for name in names),
        names=tuple(names),
        separator=".",
        checks=(Inputs((), {**prompt, "past_key_values": empty}), Inputs((), {**one, "past_key_values": last})),
        sums=SUMS,
    )


def _prompt(ids: Tensor) -> dict[str, Tensor]:
    """Two rows of seven of these tokens, the first row padded on the left."""
    rows = ids.repeat(ROWS, -(-(PAST + NEW) // ids.shape[1]))[:ROWS, : PAST + NEW]
    mask = torch.ones_like(rows)
    mask[0, 0] = 0
    return {"input_ids": rows, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def _part(prompt: Mapping[str, Tensor], start: int, end: int) -> dict[str, Tensor]:
    """The tokens from `start` on; the mask is that of the past too. No views: torch.export does not trace those."""
    return {name: t[:, 0 if name == "attention_mask" else start : end].clone() for name, t in prompt.items()}


# --- refusals ----------------------------------------------------------------------------------------------


def _token_ids(module: nn.Module, inputs: Inputs) -> Tensor:
    args, kwargs = inputs
    named = {**dict(zip(inspect.signature(module.forward).parameters, args)), **kwargs}
    ids, more = named.pop("input_ids", None), sorted(set(named) - IGNORED)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.numel() == 0 or more:
        candidates = [f"input_ids of shape {tuple(getattr(ids, 'shape', ()))}"] if ids is not None else []
        raise ConfigError(
            f"cache=True takes example inputs with integer input_ids of shape (batch, sequence), and no "
            f"more than {', '.join(sorted(IGNORED))} beside them; found "
            f"{', '.join([*candidates, *more]) or 'no input_ids'}"
        )
    return ids


def _accepted(module: nn.Module) -> set[str]:
    parameters = set(inspect.signature(module.forward).parameters)
    missing = sorted({"input_ids", "attention_mask", "past_key_values"} - parameters)
    if missing or getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        raise _no_cache(
            module, f"its forward does not take {', '.join(missing)}" if missing else "it is an encoder with a decoder"
        )
    return parameters


def _check_layers(present: list[Mapping[str, Tensor]]) -> None:
    shapes = [[tuple(t.shape) for t in pair.values() if isinstance(t, Tensor)] for pair in present]
    if not shapes:
        raise ConfigError("it puts no keys and values into the cache that it is given")
    for i, pair in enumerate(shapes):
        if len(pair) != 2 or any(len(shape) != 4 or shape[0] != ROWS or shape[2] != PAST for shape in pair):
            raise ConfigError(
                f"layer {i} of its cache has no keys and values of shape (batch, heads, past, channels), "
                f"but {' and '.join(map(str, pair)) or 'none'} for a batch of {ROWS} and {PAST} tokens"
            )


def _no_cache(module: nn.Module, why: str) -> ConfigError:
    return ConfigError(
        f"{type(module).__name__} has no KV cache that a graph could carry: {why}. cache=True is for "
        f"causal language models whose layers cache keys and values; cache=False exports the others"
    )
