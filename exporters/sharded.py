"""Exports of a sharded model (FSDP2): process 0 writes what one process would, from one gathered tensor after another.

Every process has to call these, since weights are gathered; the others keep none of them.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from s2ft_compile.adapters.fingerprint import combined, sample
from s2ft_compile.adapters.format import Adapter, ascending, describe_base, hash_of_block
from s2ft_compile.adapters.stored import check_stored, names_in
from s2ft_compile.capture.models import unwrap
from s2ft_compile.errors import ExportError
from s2ft_compile.slices.blocks import base_parameters, whole
from s2ft_compile.slices.processes import first_does
from s2ft_compile.slices.state import find_state, state_of

from .conversion import as_stored
from .files import new_directory


def is_sharded(model: nn.Module) -> bool:
    """Whether this is a prepared model whose weights are shards."""
    state = find_state(model)
    return state is not None and any([block.follow_shards() for block in state.blocks])


@torch.no_grad()
def gathered(model: nn.Module, trained: bool) -> Iterator[tuple[str, Tensor]]:
    """Each parameter, whole, on the CPU, in the base model's order, with the trained blocks or the base's.

    A tied one comes once, under its first name. Every process has to go through all of it.
    """
    state = state_of(model)
    if state.left_behind:
        raise ExportError(
            "units of this model were chosen anew before it was sharded, and what trained before is lost here"
        )
    blocks = {block.name: block for block in state.blocks}
    for name, parameter in base_parameters(unwrap(model)).items():
        tensor = whole(parameter.detach()).cpu().clone()
        if name in blocks:
            block = blocks[name]
            block.write_to(tensor, block.trained() if trained else block.backup)
        for moved, dim, index in reversed(state.moves):
            if moved == name:
                tensor = tensor.index_select(dim, torch.argsort(index.cpu()))
        yield name, tensor


def adapter_of(model: nn.Module, check, named: Mapping[str, str]) -> Adapter:
    """The adapter of a sharded model, on every process. check: (weight, slice), raises for what is not finite. named:
    the base, as `named_base` says."""
    state = state_of(model)
    plan = replace(state.plan, slices=tuple(replace(s, delta=whole(s.delta.detach())) for s in state.plan.slices))
    plan = ascending(plan)
    slices = {s.parameter_name: s for s in plan.slices}
    samples, blocks, types = {}, {}, set()
    for name, tensor in gathered(model, trained=False):
        samples[name] = sample(tensor)
        types.add(str(tensor.dtype).removeprefix("torch."))
        if name in slices:
            check(tensor, slices[name])
            blocks[name] = hash_of_block(tensor, slices[name])
    blocks = {name: blocks[name] for name in slices}  # in the order of any other adapter's file
    base = describe_base(_class_name(model), " and ".join(sorted(types)), samples, blocks, named)
    return Adapter(replace(plan, fingerprint=combined(samples)), base)


def save_merged(model: nn.Module, directory: str | os.PathLike) -> None:
    """`exporters.save_merged` of a sharded model."""
    module, first = unwrap(model), dist.get_rank() == 0
    tensors = {name: tensor for name, tensor in gathered(model, trained=True) if first}
    persistent = module.state_dict().keys()
    tensors |= {n: whole(b.detach()).cpu() for n, b in module.named_buffers() if n in persistent}

    def write() -> None:
        with new_directory(directory) as folder:
            _write(module, tensors, folder)

    first_does(write)


def _write(module: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    expected = dict(tensors)
    if hasattr(module, "save_pretrained"):
        with state_of(module).names_as_stored(module):
            module.save_pretrained(folder, state_dict=dict(tensors))
            if not names_in(sorted(folder.glob("*.safetensors"))) <= expected.keys():
                expected = as_stored(module, expected)
    else:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    lost = expected.keys() - check_stored(sorted(folder.glob("*.safetensors")), expected)
    if lost:
        raise ExportError(f"{_class_name(module)} was not written whole: {sorted(lost)[0]} is in no file")


def _class_name(model: nn.Module) -> str:
    return type(unwrap(model)).__name__.removeprefix("FSDP")
