"""Tensors in safetensors files: written, and read again before anyone relies on them; and mapped where they are."""

import hashlib
import json
import math
import mmap
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from s2ft_compile.errors import AdapterError, ExportError

from .fingerprint import sample

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
INDEX_BYTES = 256 << 20  # names of two million tensors
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


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes a file of these tensors. Raises `ExportError` where it cannot be written, or holds other bits then."""
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise ExportError(f"could not write {path.name}: {error}") from error
    if missing := tensors.keys() - check_stored([path], tensors):
        raise ExportError(f"{path.name} was not written correctly: {', '.join(sorted(missing)[:3])} is missing")


def check_stored(paths: Iterable[Path], expected: Mapping[str, Tensor]) -> set[str]:
    """The names of what these files hold, all of it in `expected`, bit for bit. Raises `ExportError`.

    The files are mapped, so this takes no memory, and the time to read what the system still has in its cache.
    """
    names: set[str] = set()
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    if name not in expected or not same_bits(file.get_tensor(name), expected[name]):
                        raise ExportError(f"{path.name} was not written correctly: read again, it differs in {name}")
                    names.add(name)
        except SafetensorError as error:
            raise ExportError(f"{path.name} was not written correctly: {error}") from error
    return names


def names_in(paths: Iterable[Path]) -> set[str]:
    """The names of all tensors in these files."""
    names: set[str] = set()
    for path in paths:
        with safe_open(path, framework="pt") as file:
            names.update(file.keys())
    return names


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal in type, shape and every bit, wherever they are."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def digest(tensor: Tensor) -> str:
    """128 bits (hex) of a tensor's type, shape and every bit."""
    held = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    held.update(_bytes(tensor).numpy())
    return held.hexdigest()


def digests_in(paths: Iterable[Path]) -> Counter[str]:
    """The digests of all tensors in these files, each as often as it is there."""
    digests: Counter[str] = Counter()
    for path in paths:
        with safe_open(path, framework="pt") as file:
            digests.update(digest(file.get_tensor(name)) for name in file.keys())
    return digests


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


# --- checkpoints --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file. start: its first byte in the file. dtype: None for one that torch lacks."""

    file: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int
    length: int

    def opened(self, write: bool = False) -> AbstractContextManager[Tensor]:
        """The tensor in its file's memory, as `mapped` gives it."""
        return mapped(self, write)

    def at(self, folder: Path) -> "Stored":
        """The tensor of the same place in a copy of its file."""
        return Stored(folder / self.file.name, self.dtype, self.shape, self.start, self.length)


def stored_tensors(directory: str | os.PathLike) -> dict[str, Stored]:
    """Name -> tensor of every tensor in a checkpoint. Raises `ExportError` for one that is missing or damaged."""
    folder = Path(directory)
    names = _shards(folder)
    tensors: dict[str, Stored] = {}
    for name in names:
        tensors.update(_header(folder / name))
    return tensors


def _shards(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        if (size := (folder / INDEX).stat().st_size) > INDEX_BYTES:
            raise ExportError(f"{folder / INDEX} has {size:,} bytes; an index has {INDEX_BYTES:,} at most")
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
            inside = all(name == os.path.basename(name) and os.fsencode(name) for name in names)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
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


def sampled(stored: Any) -> str:
    """`fingerprint.sample` of a `Stored` tensor, or of what opens like one; nothing that equals one where torch lacks
    its type."""
    if isinstance(stored, Stored) and stored.dtype is None:
        return ""
    with stored.opened() as tensor:
        return sample(tensor)
