"""The adapter as a SHiRA (sparse high rank adapter, arXiv 2406.13175) of PEFT's format.

A SHiRA adds single numbers to a weight (out, in): r (in + out) of them in each layer, one r for all layers, and its
files hold their positions. A slice is n * out (columns) or n * in (rows) numbers: r is what the layer with the most
of them needs, and the others get zeros at positions that nothing changes. Norms, and layers whose bias trains, are
stored whole (`modules_to_save`). PEFT's `merge_and_unload` gives the bits of `save_merged` (but for the sign of a
weight that is -0.0), in bfloat16 and float16 too.
"""

import json
import logging
import os
from collections.abc import Mapping
from math import ceil
from pathlib import Path

import torch
from torch import Tensor, nn

from s2ft_compile.adapters.format import CONFIG, WEIGHTS
from s2ft_compile.adapters.layers import linear_layers
from s2ft_compile.adapters.stored import save_tensors
from s2ft_compile.capture.models import unwrap
from s2ft_compile.errors import ExportError
from s2ft_compile.plan import Slice, delta_of

from .card import CARD, SHIRA, card
from .files import new_directory
from .lora import adapter_source, peft_config
from .whole import layer_of, partition, whole_modules, whole_tensors

log = logging.getLogger(__name__)


def save_shira(
    model: nn.Module, directory: str | os.PathLike[str], *, adapter: str | os.PathLike[str] | None = None
) -> Path:
    """Writes an adapter into a new folder as a SHiRA of PEFT, and returns its path.

    model: prepared; or, with `adapter`, the plain base model of that adapter folder. What is no weight of a linear
    layer (norms, embeddings), and linear layers whose bias trains, are stored whole. Raises `ExportError` for weights
    that are tied or stored (in, out), an adapter that changes no `nn.Linear` by its weight alone, a layer that has no
    room for as many numbers as the largest slice asks of all layers, or a folder that exists.
    """
    module, source = unwrap(model), adapter_source(model, adapter)
    linear, biases, others = partition(module, source.slices)
    apart = {layer_of(s) for s in biases}
    others += [*biases, *(s for s in linear if layer_of(s) in apart)]
    held = linear_layers(module, [s for s in linear if layer_of(s) not in apart], "a SHiRA")
    layers = {held[s.parameter_name][0]: s for s in linear if layer_of(s) not in apart}
    if not layers:
        raise ExportError(
            "a SHiRA changes the weight of a linear layer, and this adapter none alone; `save_lora` takes it"
        )
    whole = whole_modules(module, others, layers.keys(), "a SHiRA")
    _check_layers(module, layers)
    r = common_r(layers)
    with new_directory(directory) as folder:
        tensors = {}
        for layer, s in layers.items():
            values, indices = numbers(s, r * sum(s.shape))
            tensors[f"base_model.model.{layer}.shira_weight"] = values
            tensors[f"base_model.model.{layer}.shira_indices"] = indices
        tensors |= whole_tensors(model, source, whole)
        save_tensors(tensors, folder / WEIGHTS)
        config = {**peft_config(module, list(layers)), "peft_type": "SHIRA", "r": r, "mask_type": "random"}
        config |= {"modules_to_save": whole} if whole else {}
        (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
        (folder / CARD).write_text(card(source, SHIRA, whole=whole), encoding="utf-8")
    log.info("SHiRA written to %s: %d modules, r = %d", directory, len(layers), r)
    return Path(directory)


def _check_layers(module: nn.Module, layers: Mapping[str, Slice]) -> None:
    for layer, s in layers.items():
        if not isinstance(module.get_submodule(layer), nn.Linear):
            kind = type(module.get_submodule(layer)).__name__
            raise ExportError(f"{layer} is a {kind}; PEFT's SHiRA takes nn.Linear only. `save_lora` takes it")
        if delta_of(s).dtype != torch.float32:
            raise ExportError(
                f"the delta of {s.parameter_name} is {delta_of(s).dtype}; PEFT keeps a SHiRA in float32, "
                f"which would not be exact"
            )


def common_r(layers: Mapping[str, Slice]) -> int:
    """The r with which every layer holds its slice. Raises `ExportError` where a layer has no room for it."""
    needs = {layer: ceil(delta_of(s).numel() / sum(s.shape)) for layer, s in layers.items()}
    widest = max(needs, key=needs.__getitem__)
    for layer, s in layers.items():
        (rows, columns), most = s.shape, s.shape[0] * s.shape[1] // sum(s.shape)
        if needs[widest] > most:
            trained = delta_of(layers[widest]).numel()
            raise ExportError(
                f"a SHiRA changes r * (in + out) numbers of every layer, with one r for all. {widest} changes "
                f"{trained:,} and needs r = {needs[widest]}, but {layer} ({rows} x {columns}) has "
                f"room for r = {most} at most, which is {most * (rows + columns):,} numbers. Train fewer units of "
                f"{widest}, or use `save_lora`"
            )
    return needs[widest]


def numbers(s: Slice, count: int) -> tuple[Tensor, Tensor]:
    """The slice as `count` float32 numbers and their int32 (2, count) rows and columns, ascending as in PEFT's files.

    Those beyond the slice are zeros, in the rows or columns that it leaves alone.
    """
    others = torch.ones(s.shape[s.dim], dtype=torch.bool).index_fill_(0, s.indices, False).nonzero().flatten()
    across = s.shape[1 - s.dim]
    k = torch.arange(count)
    along = torch.cat([s.indices, others])[k // across]
    values, delta = torch.zeros(count), delta_of(s)
    values[: delta.numel()] = delta.movedim(s.dim, 0).flatten()
    rows, columns = (along, k % across) if s.dim == 0 else (k % across, along)
    order = (rows * s.shape[1] + columns).argsort()
    return values[order], torch.stack([rows, columns])[:, order].to(torch.int32)
