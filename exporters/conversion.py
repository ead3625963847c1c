"""A checkpoint's tensors as its model has them: transformers may store them under other names, split, fused or turned.

`save_pretrained` turns a model's tensors into those on disk, and moves numbers in doing so but computes none. So it can
be asked of positions instead: what it makes of arange(numel) says which entry of the model's tensor each entry on disk
is, and that is the way there and the way back.
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2ft_compile.adapters.stored import Stored, mapped
from s2ft_compile.errors import ExportError

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Assembled:
    """A parameter of a model that is stored as other tensors. pieces: these. model: on the meta device."""

    name: str
    model: nn.Module
    shape: tuple[int, ...]
    pieces: Mapping[str, Stored]

    def at(self, folder: Path) -> "Assembled":
        """The same in a copy of the checkpoint."""
        return Assembled(self.name, self.model, self.shape, {n: piece.at(folder) for n, piece in self.pieces.items()})

    @contextmanager
    def opened(self, write: bool = False) -> Iterator[Tensor]:
        """A copy as the model has it; with `write`, what is in it afterwards is written to the files."""
        size = math.prod(self.shape)
        entries = torch.arange(size, dtype=torch.int32 if size < 1 << 31 else torch.int64).view(self.shape)
        positions = as_stored(self.model, {self.name: entries})
        W = torch.empty(size, dtype=next(iter(self.pieces.values())).dtype)
        for name, piece in self.pieces.items():
            with mapped(piece) as D:
                W[positions[name]] = D
        yield W.view(self.shape)
        for name, piece in self.pieces.items() if write else ():
            with mapped(piece, write=True) as D:
                D.copy_(W[positions[name]])


@dataclass(frozen=True)
class Converted:
    """tensors: a checkpoint's, by the model's names where these are known. refused: name on disk, and the model's, of
    what is stored in a way that is not understood -> why. why: nothing is known of the model."""

    tensors: Mapping[str, Stored | Assembled]
    refused: Mapping[str, str]
    why: str = ""


def as_stored(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `save_pretrained` of this model writes for these tensors of it. Raises `ExportError`."""
    try:
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(model, dict(tensors))
    except Exception as error:  # whatever a conversion raises that lacks a part
        raise ExportError(f"transformers does not say how {type(model).__name__} is stored: {error}") from error


@contextmanager
def reversible(model: nn.Module) -> Iterator[None]:
    """Context in which a model that was loaded quantized can be saved: what put its weights together from a quantized
    checkpoint has no way back in transformers, and needs none, since `state_dict` takes them apart."""
    conversions = vars(model).get("_weight_conversions")
    if conversions is None or getattr(model, "hf_quantizer", None) is None:
        yield
        return
    vars(model)["_weight_conversions"] = [c for c in conversions if _has_way_back(c)]
    try:
        yield
    finally:
        vars(model)["_weight_conversions"] = conversions


def _has_way_back(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def check_dense(folder: str | os.PathLike[str]) -> None:
    """Raises `ExportError` for a checkpoint that is stored quantized: its tensors are not its weights."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(config, dict) and config.get("quantization_config"):
        raise ExportError(
            f"{folder} is stored quantized, and what its files hold cannot be changed by a sum. `s2ft export merged "
            f"--model {folder} --adapter ADAPTER` writes an ordinary model, and load_adapter puts an adapter beside "
            f"the quantized one"
        )


def by_model_names(stored: Mapping[str, Stored], folder: Path, kind: str | None = None) -> Converted:
    """The tensors of a checkpoint as the model named `kind` has them; none: as that of its configuration has."""
    if not (folder / "config.json").is_file():
        return Converted(stored, {})
    try:
        model = _skeleton(folder, kind)
        held = model.state_dict()
        written = as_stored(model, held)
    except Exception as error:  # of a configuration that is not transformers', or of code that is not here
        log.info("%s: its tensors are taken as they are stored: %s", folder, error)
        return Converted(stored, {}, f"{type(error).__name__}: {error}".splitlines()[0])
    names = {id(tensor): name for name, tensor in held.items()}
    renamed = {name: names[id(tensor)] for name, tensor in written.items() if id(tensor) in names}
    tensors: dict[str, Stored | Assembled] = {}
    for name, tensor in stored.items():
        known = renamed.get(name, name)
        tensors[name if known in stored else known] = tensor
    refused: dict[str, str] = {}
    for name in held.keys() - tensors.keys() - set(renamed.values()):
        pieces, why = _pieces(model, name, held[name], stored)
        if why:
            refused |= dict.fromkeys((name, *pieces), why)
            continue
        for piece in pieces:
            del tensors[piece]
        tensors[name] = Assembled(name, model, tuple(held[name].shape), {n: stored[n] for n in pieces})
    return Converted(tensors, refused)


def _skeleton(folder: Path, kind: str | None) -> nn.Module:
    """The model on the meta device, in eval mode."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, kind or config.architectures[0])
    if not issubclass(cls, transformers.PreTrainedModel):
        raise ExportError(f"{kind} is no model of transformers")
    with torch.device("meta"):
        return cls._from_config(config).eval()


def _pieces(model: nn.Module, name: str, tensor: Tensor, stored: Mapping[str, Stored]) -> tuple[list[str], str]:
    """The tensors on disk that a parameter is stored as, and why not, if it is not these and nothing else."""
    try:
        stored_parts = as_stored(model, {name: tensor})
    except ExportError as error:
        return [], str(error)
    absent = [n for n in stored_parts if n not in stored]
    if absent:
        return list(stored_parts), f"{absent[0]}, as which {name} is stored, is missing"
    types = {stored[n].dtype for n in stored_parts}
    differ = [n for n, part in stored_parts.items() if stored[n].shape != tuple(part.shape)]
    if (
        differ
        or len(types) > 1
        or None in types
        or sum(part.numel() for part in stored_parts.values()) != tensor.numel()
    ):
        return list(stored_parts), f"{name} is stored together with others, or in several types"
    return list(stored_parts), ""
