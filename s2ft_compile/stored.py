"""Tensors in safetensors files: written, and read again before anyone relies on them."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import ExportError


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
    found: set[str] = set()
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    if name not in expected or not same_bits(file.get_tensor(name), expected[name]):
                        raise ExportError(f"{path.name} was not written correctly: read again, it differs in {name}")
                    found.add(name)
        except SafetensorError as error:
            raise ExportError(f"{path.name} was not written correctly: {error}") from error
    return found


def names_in(paths: Iterable[Path]) -> set[str]:
    """The names of all tensors in these files."""
    found: set[str] = set()
    for path in paths:
        with safe_open(path, framework="pt") as file:
            found.update(file.keys())
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal in type, shape and every bit, wherever they are."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
