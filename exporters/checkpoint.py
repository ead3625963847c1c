"""An adapter applied to a checkpoint on disk, without building the model.

A merged checkpoint is the base's files with the blocks of the adapter patched: the headers, the order of the tensors
and every other byte stay. So the files are copied by the kernel, and then one tensor at a time is mapped, the values
at its indices are computed and written, and it is unmapped: the peak of memory is about one tensor, however large the
checkpoint and its shards are.
"""

import json
import logging
import math
import mmap
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from s2ft_compile.adapters.apply import summed
from s2ft_compile.adapters.format import Adapter, check_base, check_slice, read_adapter
from s2ft_compile.errors import AdapterError, ExportError
from s2ft_compile.fingerprint import sample
from s2ft_compile.plan import Slice

from .files import new_directory

log = logging.getLogger(__name__)
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx.data")
Part = tuple[Adapter, Slice, float]  # a slice, of which adapter, and with which weight


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file. start: its first byte in the file. dtype: None for one that torch lacks."""

    file: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int
    length: int

    def at(self, folder: Path) -> "Stored":
        """The tensor of the same place in a copy of its file."""
        return Stored(folder / self.file.name, self.dtype, self.shape, self.start, self.length)


def merge_checkpoint(
    base: str | os.PathLike,
    adapters: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    weights: Sequence[float] | None = None,
) -> Path:
    """Writes a copy of a checkpoint with adapters added to its weights into a new folder, and returns its path.

    base: a folder with `model.safetensors`, or with shards and `model.safetensors.index.json`. weights: a factor for
    each adapter, 1 by default. One adapter gives the bits of `save_merged`; several are summed in float32 and rounded
    once, cast(W0 + sum of weight * delta), also where they overlap. Other files are copied, weights in other formats
    are not. Raises `AdapterError` for an adapter of another base, `ExportError` for a checkpoint that cannot be read
    or a folder that exists.
    """
    stored = stored_tensors(base)
    factors = [1.0] * len(adapters) if weights is None else list(weights)
    if len(factors) != len(adapters) or not adapters or not all(map(math.isfinite, factors)):
        raise ExportError(f"{len(adapters)} adapters and {len(factors)} weights; each adapter has one finite weight")
    read = [read_adapter(folder) for folder in adapters]
    found = {name: sampled(tensor) for name, tensor in stored.items()}
    for adapter in read:
        check_base(adapter, found, f"the checkpoint {base}")
    files = _other_files(Path(base)) + sorted({tensor.file for tensor in stored.values()})
    with new_directory(out) as folder:
        for path in files:
            shutil.copyfile(path, folder / path.name)  # by the kernel, through the links of a hub cache
        for name, parts in _by_parameter(read, factors).items():
            _patch(stored[name].at(folder), parts)
    log.info("%s with %d adapters written to %s", base, len(adapters), out)
    return Path(out)


def _by_parameter(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, list[Part]]:
    parts: dict[str, list[Part]] = {}
    for adapter, weight in zip(adapters, weights):
        for s in adapter.slices:
            parts.setdefault(s.parameter_name, []).append((adapter, s, weight))
    return parts


def _patch(stored: Stored, parts: Sequence[Part]) -> None:
    with mapped(stored, write=True) as W:
        for adapter, s, _ in parts:
            check_slice(adapter, s, W)
        W.index_copy_(*summed(W, [(s, weight) for _, s, weight in parts]))


# --- safetensors files on disk -----------------------------------------------------------------------------


def stored_tensors(directory: str | os.PathLike) -> dict[str, Stored]:
    """Name -> tensor of every tensor in a checkpoint. Raises `ExportError` for one that is missing or damaged."""
    folder = Path(directory)
    names = _shards(folder)
    found: dict[str, Stored] = {}
    for name in names:
        found.update(_header(folder / name))
    return found


def _shards(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
            inside = all(name == os.path.basename(name) for name in names)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ExportError(f"{folder / INDEX} is not the index of a checkpoint: {error!r}") from error
        if not inside or not names:
            raise ExportError(f"{folder / INDEX} names files outside of its folder, or none")
        return names
    if (folder / SINGLE).is_file():
        return [SINGLE]
    raise ExportError(
        f"{folder} is not a checkpoint: it has neither {SINGLE} nor {INDEX}; weights in other formats "
        f"are converted by save_pretrained of transformers"
    )


def _header(path: Path) -> dict[str, Stored]:
    """The tensors of one file. `safe_open` checks the header, and its claims against the file's size."""
    try:
        with safe_open(path, framework="pt"):
            pass
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(size))
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{path} is not a complete safetensors file: {error}") from error
    return {
        name: Stored(
            path,
            DTYPES.get(entry["dtype"]),
            tuple(entry["shape"]),
            8 + size + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in entries.items()
        if name != "__metadata__"
    }


@contextmanager
def mapped(stored: Stored, write: bool = False) -> Iterator[Tensor]:
    """The tensor in its file's memory; with `write`, what is written to it is written to the file.

    It must not be used afterwards. Raises `AdapterError` for a type that torch does not have.
    """
    if stored.dtype is None:
        raise AdapterError(f"{stored.file}: a tensor of shape {stored.shape} has a type that torch does not have")
    if not stored.length:
        yield torch.empty(stored.shape, dtype=stored.dtype)
        return
    before = stored.start % mmap.ALLOCATIONGRANULARITY
    with open(stored.file, "r+b" if write else "rb") as file:
        access = mmap.ACCESS_WRITE if write else mmap.ACCESS_COPY
        memory = mmap.mmap(file.fileno(), before + stored.length, access=access, offset=stored.start - before)
    yield torch.frombuffer(memory, dtype=stored.dtype, count=math.prod(stored.shape), offset=before).view(stored.shape)
    # the mapping ends with the last tensor that holds it


def sampled(stored: Stored) -> str:
    """`fingerprint.sample` of a stored tensor, or nothing that equals one."""
    if stored.dtype is None:
        return ""
    with mapped(stored) as tensor:
        return sample(tensor)


# --- other files -------------------------------------------------------------------------------------------


def _other_files(folder: Path) -> list[Path]:
    """What belongs to a checkpoint besides its weights; another format's weights would be those of the base."""
    found, left = [], []
    for path in sorted(folder.iterdir()):
        foreign = not path.is_file() or path.name.endswith(OTHER_WEIGHTS)
        (left if foreign else found).append(path)
    names = [path.name for path in left if not path.name.endswith(".safetensors") and not path.name.startswith(".")]
    if names:
        log.warning("not copied from %s: %s", folder, ", ".join(names))
    return found
