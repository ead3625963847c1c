"""An adapter applied to a checkpoint on disk, without building the model.

A merged checkpoint is the base's files with the blocks of the adapter patched: the headers, the order of the tensors
and every other byte stay. So the files are copied by the kernel, and then one tensor at a time is mapped, the values
at its indices are computed and written, and it is unmapped: the peak of memory is about one tensor, however large the
checkpoint and its shards are.
"""

import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import torch

from s2ft_compile.adapters.apply import check_finite, summed
from s2ft_compile.adapters.format import Adapter, check_base, check_slice, read_adapter
from s2ft_compile.adapters.stored import Stored, same_bits, sampled, stored_tensors
from s2ft_compile.errors import AdapterError, ExportError
from s2ft_compile.plan import Slice, delta_of

from .conversion import Assembled, by_model_names, check_dense
from .files import new_directory

log = logging.getLogger(__name__)
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx.data")
Part = tuple[Adapter, Slice, float]  # a slice, of which adapter, and with which weight


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
) -> Path:
    """Writes a copy of a checkpoint with adapters added to its weights into a new folder, and returns its path.

    base: a folder with `model.safetensors`, or with shards and `model.safetensors.index.json`. weights: a factor for
    each adapter, 1 by default. One adapter gives the bits of `save_merged`; several are summed in float32 and rounded
    once, cast(W0 + sum of weight * delta), also where they overlap. Other files are copied, weights in other formats
    are not. Raises `AdapterError` for an adapter of another base, `ExportError` for a checkpoint that cannot be read
    or a folder that exists.
    """
    check_dense(base)
    stored = stored_tensors(base)
    factors = [1.0] * len(adapters) if weights is None else list(weights)
    if len(factors) != len(adapters) or not adapters or not all(map(math.isfinite, factors)):
        raise ExportError(f"{len(adapters)} adapters and {len(factors)} weights; each adapter has one finite weight")
    read = [read_adapter(folder) for folder in adapters]
    _refuse_equal(read)
    tensors = _under_their_names(read, stored, Path(base))
    parts = _by_parameter(read, factors)
    samples = {n: sampled(t) for n, t in tensors.items() if isinstance(t, Stored) or n in parts}
    for adapter in read:
        check_base(adapter, samples, f"the checkpoint {base}")
    files = _other_files(Path(base)) + sorted({tensor.file for tensor in stored.values()})
    with new_directory(out) as folder:
        for path in files:
            shutil.copyfile(path, folder / path.name)  # by the kernel, through the links of a hub cache
        for name, part in parts.items():
            _patch(tensors[name].at(folder), part)
    log.info("%s with %d adapters written to %s", base, len(adapters), out)
    return Path(out)


def _by_parameter(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, list[Part]]:
    parts: dict[str, list[Part]] = {}
    for adapter, weight in zip(adapters, weights):
        for s in adapter.slices:
            parts.setdefault(s.parameter_name, []).append((adapter, s, weight))
    return parts


def _refuse_equal(adapters: Sequence[Adapter]) -> None:
    for a, b in combinations(adapters, 2):
        theirs = {s.parameter_name: s for s in b.slices}
        if theirs.keys() == {s.parameter_name for s in a.slices} and all(
            s.dim == theirs[s.parameter_name].dim
            and torch.equal(s.indices, theirs[s.parameter_name].indices)
            and torch.equal(delta_of(s), delta_of(theirs[s.parameter_name]))
            for s in a.slices
        ):
            raise ExportError(
                f"{a.source} and {b.source} are the same adapter, which would be added twice; "
                f"name it once, with a weight of 2 if that is what you want"
            )


def _under_their_names(
    adapters: Sequence[Adapter], stored: Mapping[str, Stored], base: Path
) -> Mapping[str, Stored | Assembled]:
    """The checkpoint's tensors, by the names that the adapters have for them. Raises `AdapterError`."""
    if all(s.parameter_name in stored for adapter in adapters for s in adapter.slices):
        return stored
    converted = by_model_names(stored, base, adapters[0].base.get("class"))
    for name in (s.parameter_name for adapter in adapters for s in adapter.slices):
        if why := converted.refused.get(name) or (name not in converted.tensors and converted.why):
            raise AdapterError(
                f"{base} does not hold {name} under this name or in this form, and it could not be converted: {why}. "
                f"Through the model it can: `s2ft export merged --model {base} --adapter {adapters[0].source} ...`"
            )
    return converted.tensors


def _patch(stored: Stored | Assembled, parts: Sequence[Part]) -> None:
    name = parts[0][1].parameter_name
    with stored.opened(write=True) as W:
        for adapter, s, _ in parts:
            check_slice(adapter, s, W, compared=name not in adapter.base.get("quantized", ()))
        dim, indices, block = summed(W, [(s, weight) for _, s, weight in parts])
        check_finite(name, block)
        W.index_copy_(dim, indices, block)
    with stored.opened() as W:
        if not same_bits(W.index_select(dim, indices), block):
            raise ExportError(f"{name} was not written correctly: read again, it differs")


# --- other files -------------------------------------------------------------------------------------------


def _other_files(folder: Path) -> list[Path]:
    """What belongs to a checkpoint besides its weights; another format's weights would be those of the base."""
    copied: list[Path] = []
    left: list[Path] = []
    for path in sorted(folder.iterdir()):
        foreign = not path.is_file() or path.name.endswith(OTHER_WEIGHTS)
        (left if foreign else copied).append(path)
    names = [path.name for path in left if not path.name.endswith(".safetensors") and not path.name.startswith(".")]
    if names:
        log.warning("not copied from %s: %s", folder, ", ".join(names))
    return copied
