"""An adapter recovered from two checkpoints: the inverse of merging.

For every tensor (but vectors, which train whole) the entries whose bits differ have to lie in a few indices along one
dimension. The delta there is T - W0, in float32, or in float64 where no float32 number d has cast(W0 + d) == T: a
float32 weight that shrank to a small part of what it was, for instance. Each delta is added again and compared with T,
bit for bit.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from s2ft_compile.adapters.apply import summed
from s2ft_compile.adapters.fingerprint import combined, sample
from s2ft_compile.adapters.format import Adapter, describe_base, hash_of_block, named_base, write_adapter
from s2ft_compile.adapters.stored import stored_tensors
from s2ft_compile.capture.models import unwrap
from s2ft_compile.config import S2FTConfig
from s2ft_compile.errors import ExportError, StateError
from s2ft_compile.plan import Plan, Slice
from s2ft_compile.slices.state import is_prepared

from .adapter import named_in
from .card import CARD, card
from .conversion import Converted, by_model_names, check_dense
from .files import new_directory

log = logging.getLogger(__name__)
Tensors = Mapping[str, Callable[[], AbstractContextManager[Tensor]]]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def extract(
    base: nn.Module | str | os.PathLike[str],
    tuned: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    limit: float = 0.5,
) -> Path:
    """Writes the adapter that turns `base` into `tuned`, bit for bit, into a new folder, and returns its path.

    Each is a plain model or the folder of a safetensors checkpoint, read one tensor at a time, under the names that its
    model has. limit: the largest share of a matrix's rows (or columns) that may have changed; all of a vector may,
    since norms train whole. Raises `ExportError`, naming the tensor, where they have other tensors, shapes or types,
    where the changes are no slice, and where nothing changed.
    """
    folders = [Path(source) for source in (base, tuned) if not isinstance(source, nn.Module)]
    for folder in folders:
        check_dense(folder)
    described = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    refused: dict[str, str] = {}
    before, after = (_tensors(source, described, refused) for source in (base, tuned))
    odd = sorted(before.keys() ^ after.keys())
    if odd:
        raise ExportError(
            f"only one of the two has {', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''}; an adapter "
            f"changes weights, and adds or removes none"
        )
    samples: dict[str, str] = {}
    blocks: dict[str, str] = {}
    slices: list[Slice] = []
    dtypes: set[str] = set()
    with new_directory(out) as folder:
        for name in before:
            with before[name]() as W, after[name]() as T:
                s = _slice(name, W.detach(), T.detach(), limit)
                samples[name] = sample(W)
                dtypes.add(str(W.dtype).removeprefix("torch."))
                if s is not None and name in refused:
                    raise ExportError(
                        f"{name} changed, and the model has it in another form: {refused[name]}. Load both models, "
                        f"and extract from these"
                    )
                if s is not None:
                    slices.append(s)
                    blocks[name] = hash_of_block(W, s)
        if not slices:
            raise ExportError("the two have the same weights: there is nothing to extract")
        config = S2FTConfig(targets={s.parameter_name: len(s.indices) for s in slices})
        plan = Plan(config, combined(samples), tuple(slices))
        named = named_base(*(named_in(unwrap(base)) if isinstance(base, nn.Module) else (base,)))
        kind = describe_base(_class_of(base), " and ".join(sorted(dtypes)), samples, blocks, named)
        adapter = Adapter(plan, kind)
        write_adapter(folder, adapter)
        (folder / CARD).write_text(card(adapter), encoding="utf-8")
    log.info("adapter of %d slices written to %s", len(slices), out)
    return Path(out)


def _tensors(source: nn.Module | str | os.PathLike[str], described: Path | None, refused: dict[str, str]) -> Tensors:
    """Name -> what opens the tensor of this name. Tied parameters count once, under their first name.

    described: a folder whose configuration says how the model has what a checkpoint holds. refused: gets the names of
    what it does not say that of, and why.
    """
    if not isinstance(source, nn.Module):
        stored = stored_tensors(source)
        converted = by_model_names(stored, described) if described else Converted(stored, {})
        refused |= converted.refused
        return {name: tensor.opened for name, tensor in converted.tensors.items()}
    module = unwrap(source)
    if is_prepared(module):
        raise StateError(
            "the model is prepared, and save_adapter writes what it has trained; extract takes plain models"
        )
    parameters = dict(module.named_parameters())
    tied = {name for name, _ in module.named_parameters(remove_duplicate=False)} - parameters.keys()
    kept = {name: tensor for name, tensor in module.state_dict().items() if name not in tied}
    return {name: partial(_opened, tensor) for name, tensor in kept.items()}


def _opened(tensor: Tensor) -> AbstractContextManager[Tensor]:
    return nullcontext(tensor)


def _class_of(source: nn.Module | str | os.PathLike[str]) -> str:
    if isinstance(source, nn.Module):
        return type(unwrap(source)).__name__
    try:
        return str(json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))["architectures"][0])
    except (OSError, ValueError, LookupError, TypeError):
        return "checkpoint"


# --- one tensor --------------------------------------------------------------------------------------------


@torch.no_grad()
def _slice(name: str, W: Tensor, T: Tensor, limit: float) -> Slice | None:
    """The slice that turns W into T, None where they are equal. Raises `ExportError`."""
    if W.shape != T.shape or W.dtype != T.dtype:
        raise ExportError(
            f"{name} is {W.dtype} {tuple(W.shape)} in the base and {T.dtype} {tuple(T.shape)} in the other"
        )
    T = T.to(W.device)
    changed = _bits(W) != _bits(T)
    if not changed.any():
        return None
    if not W.is_floating_point() or not W.dim() or not (W.isfinite().all() and T.isfinite().all()):
        raise ExportError(
            f"{name} changed, and is no tensor of finite floating-point numbers: {W.dtype} {tuple(W.shape)}"
        )
    dim, indices = _few(changed)
    if W.dim() > 1 and len(indices) > limit * W.shape[dim]:
        raise ExportError(
            f"{name} is not a slice: {int(changed.sum())} of its {changed.numel()} entries changed, in "
            f"{_spread(changed)}; at most {limit:g} of them may (`limit`)"
        )
    for dtype in (torch.float32, torch.float64):
        delta = (T.index_select(dim, indices).double() - W.index_select(dim, indices).double()).to(dtype)
        s = Slice(name, dim, indices.cpu(), tuple(W.shape), ("extracted",), delta.cpu())
        wrong = _bits(summed(W, [(s, 1.0)])[2]) != _bits(T.index_select(dim, indices))
        if not wrong.any():
            return s
    raise ExportError(
        f"{name}: {int(wrong.sum())} of its entries are the sum of the base's and no float64 number, "
        f"such as -0.0, or a number far below the precision of the base's"
    )


def _few(changed: Tensor) -> tuple[int, Tensor]:
    """(dim, indices along it that have a change), of the dimension where they are the smallest share."""
    by_dim = [(dim, _along(changed, dim).nonzero().squeeze(1)) for dim in range(changed.dim())]
    return min(by_dim, key=lambda f: len(f[1]) / changed.shape[f[0]])


def _along(changed: Tensor, dim: int) -> Tensor:
    return changed.movedim(dim, 0).flatten(1).any(1) if changed.dim() > 1 else changed


def _spread(changed: Tensor) -> str:
    return " and ".join(
        f"{int(_along(changed, dim).sum())} of {size} indices of dim {dim}" for dim, size in enumerate(changed.shape)
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(BITS[tensor.element_size()])
