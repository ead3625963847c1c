"""The trained model as an ordinary one: in the base model's order, the trained blocks in place."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_model
from torch import Tensor, nn

from s2ft_compile.capture import unwrap
from s2ft_compile.errors import ExportError
from s2ft_compile.state import is_prepared, merged, state_of
from s2ft_compile.stored import check_stored, names_in

from . import sharded
from .conversion import as_stored
from .files import new_directory

log = logging.getLogger(__name__)
WEIGHTS = "model.safetensors"


@contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """Context in which `model` is a plain model with its trained weights: `merged`, if it is prepared. Raises
    `ExportError` for trained weights that are not finite."""
    if not is_prepared(model):
        yield
        return
    slices = state_of(model).plan.slices
    with merged(model):
        weights = dict(unwrap(model).named_parameters())
        for s in slices:
            W = weights[s.parameter_name].detach()
            if not W.index_select(s.dim, s.indices.to(W.device)).isfinite().all():
                raise ExportError(
                    f"the trained {s.parameter_name} is not finite: its delta is not, or their sum exceeds {W.dtype}"
                )
        yield


def save_merged(model: nn.Module, directory: str | os.PathLike) -> Path:
    """Writes the model into a new folder, and returns its path.

    A Hugging Face model (one with `save_pretrained`) becomes a folder for `from_pretrained`; any other
    becomes `model.safetensors`, in which tied weights are stored once (`safetensors.torch.load_model` ties
    them again). The weights keep their type, and the model is afterwards as it was. Of a model sharded by FSDP2, every
    process calls this, and process 0 writes. Raises `ExportError` if the folder exists.
    """
    if sharded.is_sharded(model):
        sharded.save_merged(model, directory)
    else:
        with new_directory(directory) as folder:
            write_merged(model, folder)
    log.info("merged model written to %s", directory)
    return Path(directory)


def write_merged(model: nn.Module, folder: Path) -> None:
    """Writes the model's files into a folder that exists. Raises `ExportError`."""
    module = unwrap(model)
    with plain(model):
        if hasattr(module, "save_pretrained"):
            module.save_pretrained(folder)
        else:
            _save(module, folder / WEIGHTS)
        _read_back(module, sorted(folder.glob("*.safetensors")))


def _save(module: nn.Module, path: Path) -> None:
    try:
        save_model(module, str(path))
    except (RuntimeError, ValueError, TypeError) as error:  # tensors that overlap in part, or that are no tensors
        raise ExportError(f"{type(module).__name__} cannot be stored as safetensors: {error}") from error


def _read_back(module: nn.Module, files: list[Path]) -> None:
    """Raises `ExportError` where the files do not hold what the module does: all of it, a tied tensor once."""
    held = module.state_dict()
    if getattr(module, "hf_quantizer", None) or any(t.is_meta or hasattr(t, "placements") for t in held.values()):
        log.info("%s is quantized, offloaded or sharded: its files were not compared with it", type(module).__name__)
        return
    if not names_in(files) <= held.keys():
        held = as_stored(module, held)
    found = check_stored(files, held)
    places = {_place(held[name]) for name in found}
    left_out = getattr(module, "_keys_to_ignore_on_save", None) or ()
    lost = [
        n for n, t in held.items() if n not in found and n not in left_out and t.numel() and _place(t) not in places
    ]
    if lost:
        raise ExportError(f"{type(module).__name__} was not written whole: {', '.join(lost[:3])} is in no file")


def _place(tensor: Tensor) -> tuple:
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()
