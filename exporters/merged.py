"""The trained model as an ordinary one: in the base model's order, the trained blocks in place."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from s2ft_compile.adapters.stored import check_stored, digest, digests_in, names_in
from s2ft_compile.capture.models import unwrap
from s2ft_compile.errors import ConfigError, ExportError
from s2ft_compile.quantized import Quantized, Values, not_quantized, parts_of, quantized_in, stand_ins
from s2ft_compile.slices.blocks import Beside, base_parameters, blocks_in
from s2ft_compile.slices.state import is_prepared, merged, state_of

from . import sharded
from .adapter import adapter_of, untrained, write_all
from .conversion import as_stored, reversible
from .files import new_directory

log = logging.getLogger(__name__)
WEIGHTS = "model.safetensors"
ADAPTER = "adapter"  # the folder inside a quantized checkpoint
REQUANTIZED = "requantized.json"


@contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """Context in which `model` is a plain model with its trained weights: `merged`, if it is prepared. Raises
    `ExportError` for trained weights that are not finite."""
    if not is_prepared(model):
        yield
        return
    slices = state_of(model).all_trained.slices
    with merged(model):
        weights, quantized = dict(unwrap(model).named_parameters()), quantized_in(unwrap(model))
        for s in slices:
            if s.parameter_name in quantized:  # checked where it is added
                continue
            W = weights[s.parameter_name].detach()
            if not W.index_select(s.dim, s.indices.to(W.device)).isfinite().all():
                raise ExportError(
                    f"the trained {s.parameter_name} is not finite: its delta is not, or their sum exceeds {W.dtype}"
                )
        yield


def save_merged(
    model: nn.Module, directory: str | os.PathLike[str], dequantize: bool = False, requantize: bool = False
) -> Path:
    """Writes the model into a new folder, and returns its path.

    A Hugging Face model (one with `save_pretrained`) becomes a folder for `from_pretrained`; any other
    becomes `model.safetensors`, in which tied weights are stored once (`safetensors.torch.load_model` ties
    them again). The weights keep their type, and the model is afterwards as it was. Of a model sharded by FSDP2, every
    process calls this, and process 0 writes.

    A model with quantized weights is written as the quantized checkpoint, with the adapter in the folder `adapter`
    inside: `load_adapter(from_pretrained(directory), f"{directory}/adapter")` is what was trained, bit for bit.
    dequantize: write an ordinary model instead, each sum of a dequantized weight and its slice rounded once to the type
    of the model's other weights; all of it has to fit into memory. requantize: that model, quantized once more as the
    base was. This loses something: a warning, and `requantized.json` in the folder, say how far trained entries are
    from what they were.

    Raises `ExportError` if the folder exists, for a quantized model that transformers cannot save as it is, and for
    `requantize` of one that it did not load.
    """
    if dequantize and requantize:
        raise ConfigError("a merged model is dequantized or quantized again; pass one of dequantize and requantize")
    if sharded.is_sharded(model):
        sharded.save_merged(model, directory)
    else:
        with new_directory(directory) as folder:
            if requantize:
                write_requantized(model, folder)
            else:
                write_merged(model, folder, dequantize)
    log.info("merged model written to %s", directory)
    return Path(directory)


def write_merged(model: nn.Module, folder: Path, dequantize: bool = False) -> None:
    """Writes the model's files into a folder that exists. Raises `ExportError`."""
    module = unwrap(model)
    if quantized_in(module) and not dequantize:
        _write_quantized(model, folder)
        return
    with plain(model), reversible(module), dense(module, stored=True):
        if save := getattr(module, "save_pretrained", None):
            save(folder)
        else:
            _save(module, folder / WEIGHTS)
        _read_back(module, sorted(folder.glob("*.safetensors")))


def _write_quantized(model: nn.Module, folder: Path) -> None:
    """The base as it is, and the adapter in a folder inside."""
    module: Any = unwrap(model)
    other = "save_merged(model, directory, dequantize=True) writes an ordinary model, save_adapter the slices alone"
    if getattr(module, "hf_quantizer", None) is None:
        raise ExportError(
            f"{type(module).__name__} has quantized weights, and was not loaded with a quantization_config, so that no "
            f"checkpoint of it could be loaded as it is: {other}"
        )
    if not is_prepared(model) and blocks_in(module):
        raise ExportError(
            f"an adapter's slices lie beside the quantized weights of this {type(module).__name__}, and its checkpoint "
            f"would not hold them: unload_adapter(model) leaves the base, whose folder goes with the adapter's; {other}"
        )
    if is_prepared(model):
        with new_directory(folder / ADAPTER) as inside:
            write_all(inside, adapter_of(model))
    with untrained(model), reversible(module):
        try:
            module.save_pretrained(folder)
        except (ValueError, RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
            raise ExportError(
                f"transformers cannot save this quantized model ({type(error).__name__}: {error}): {other}"
            ) from error
        _find_again(module, folder)


def _find_again(module: nn.Module, folder: Path) -> None:
    """Raises `ExportError` where a piece of a quantized weight is in no file. What a library calls the pieces is its
    own matter, so they are looked for by what they hold."""
    stored = digests_in(folder.glob("*.safetensors"))
    for name, weight in quantized_in(module).items():
        for piece, t in parts_of((n, t) for n, t in weight.saved().items() if not t.is_meta):
            held = digest(t)
            stored[held] -= 1
            if stored[held] < 0:
                raise ExportError(f"{name} was not written correctly: read again, its {piece} is in no file")


def write_requantized(model: nn.Module, folder: Path) -> None:
    """Writes the merged model, quantized once more, and `requantized.json`: for each weight that trained beside it, how
    far the trained entries are from the sums (`largest_change`), and the largest delta. Raises `ExportError`."""
    module: Any = unwrap(model)
    config = getattr(getattr(module, "config", None), "quantization_config", None)
    if getattr(module, "hf_quantizer", None) is None or config is None:
        raise ExportError(
            f"{type(module).__name__} was not loaded with a quantization_config, so it is not known how to quantize it "
            f"again; save_merged(model, directory, dequantize=True) writes an ordinary model, which can be"
        )
    with TemporaryDirectory(dir=folder) as ordinary:
        write_merged(model, Path(ordinary), dequantize=True)
        how = {"quantization_config": config, "device_map": {"": module.device}, "dtype": "auto"}
        again = type(module).from_pretrained(ordinary, **how)
    changes = _changes(module, again)
    again.save_pretrained(folder)
    _find_again(again, folder)
    (folder / REQUANTIZED).write_text(json.dumps(changes, indent=1), encoding="utf-8")
    if changes:
        name, worst = max(changes.items(), key=lambda item: item[1]["largest_change"])
        log.warning(
            "quantized again, trained entries are up to %.2g from what was trained (%s, whose largest delta is %.2g)",
            worst["largest_change"],
            name,
            worst["largest_delta"],
        )


@torch.no_grad()
def _changes(module: nn.Module, again: nn.Module) -> dict[str, dict[str, float]]:
    ours, theirs = Values(module), Values(again)
    changes: dict[str, dict[str, float]] = {}
    for block in blocks_in(module):
        if isinstance(block, Beside):
            values, others, largest = ours[block.name], theirs[block.name], {"change": 0.0, "delta": 0.0}
            for index, delta in block.all_of_it():
                part = (block.dim, index.to(values.device))
                wanted = values.index_select(*part).double() + delta.to(values.device)
                change = (others.index_select(*part).double() - wanted).abs().max()
                largest["change"] = max(largest["change"], float(change))
                largest["delta"] = max(largest["delta"], float(delta.abs().max()))
            changes[block.name] = {f"largest_{what}": value for what, value in largest.items()}
    return changes


@contextmanager
def dense(module: nn.Module, stored: bool = False) -> Iterator[None]:
    """Context in which a plain model has no quantized weights: each is the sum of its values and the slice beside it,
    rounded once to the type of the other weights. stored: each as its class has it in files, and not to be run. Raises
    `ExportError` for sums that are not finite."""
    values = Values(module)
    if not values.quantized:
        yield
        return
    blocks = {id(b.weight): b for b in blocks_in(module) if isinstance(b, Beside)}
    others = dtype_of_others(module)

    def value(weight: Quantized) -> nn.Parameter:
        values, block = weight.values(), blocks.get(id(weight.held))
        dtype = others or values.dtype
        dense = values.to(dtype) if block is None else block.with_all(values, dtype)
        if not dense.isfinite().all():
            raise ExportError(
                f"the trained {weight.name} is not finite: its delta is not, or their sum exceeds {dtype}"
            )
        return nn.Parameter(dense.T.contiguous() if stored and weight.turned else dense, requires_grad=False)

    with ExitStack() as undo:
        for block in blocks.values():
            undo.callback(block.install)
            block.uninstall()
        undo.enter_context(stand_ins(module, value))
        undo.enter_context(not_quantized(module))
        yield


def dtype_of_others(module: nn.Module) -> torch.dtype | None:
    """The type of a model's weights that are not quantized, None without any: that of the quantized ones in an ordinary
    model."""
    quantized = quantized_in(module)
    others = (p.dtype for n, p in base_parameters(module).items() if n not in quantized and p.is_floating_point())
    return next(others, None)


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
    stored = check_stored(files, held)
    places = {_place(held[name]) for name in stored}
    left_out = getattr(module, "_keys_to_ignore_on_save", None) or ()
    lost = [
        n for n, t in held.items() if n not in stored and n not in left_out and t.numel() and _place(t) not in places
    ]
    if lost:
        raise ExportError(f"{type(module).__name__} was not written whole: {', '.join(lost[:3])} is in no file")


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()
