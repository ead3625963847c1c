"""Saved activations: the storages that a forward pass keeps for its backward, without parameters and buffers."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch
from methods import METHODS, Setting, batch
from torch import Tensor


def saved_bytes(model: torch.nn.Module, inputs: dict[str, Tensor]) -> int:
    """Bytes of the distinct storages that one forward saves. Storages, because a saved view keeps its whole base."""
    fixed = {t.untyped_storage().data_ptr() for t in chain(model.parameters(), model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    return sum(storage.nbytes() for storage in kept.values())


def units_per_layer(method: str, setting: Setting, layers: Sequence[int]) -> float:
    """Saved activations per token and layer, in units of the hidden size: the slope between two depths."""
    few, many = (_saved_with(method, replace(setting, layers=n)) for n in layers)
    width = getattr(torch, setting.dtype).itemsize
    return (many - few) / (layers[1] - layers[0]) / (setting.tokens * setting.hidden * width)


def _saved_with(method: str, setting: Setting) -> int:
    torch._dynamo.reset()
    trial, inputs = METHODS[method](setting), batch(setting)
    trial.step(inputs)  # compiles
    return saved_bytes(trial.model, inputs)
