"""Adapters as inputs of an ONNX graph: one base graph, and a small file for each adapter. See `onnx_places`."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from s2ft_compile.adapters.apply import check_fits, summed
from s2ft_compile.adapters.format import Adapter, read_adapter
from s2ft_compile.adapters.layers import linear_layers, matrices, vectors
from s2ft_compile.capture.models import unwrap
from s2ft_compile.config import S2FTConfig
from s2ft_compile.errors import ConfigError, ExportError
from s2ft_compile.exporters.adapter import untrained
from s2ft_compile.exporters.files import new_files
from s2ft_compile.exporters.lora import adapter_source
from s2ft_compile.exporters.merged import dtype_of_others
from s2ft_compile.plan import Plan, Slice, delta_of
from s2ft_compile.quantized import Values
from s2ft_compile.slices.state import is_prepared, state_of

from .places import GENAI, NAMES, check_names, lora_names, slice_names, vector_name

log = logging.getLogger(__name__)
SUFFIX = ".onnx_adapter"
PROBED = 16  # indices of each weight that a graph is checked with


def save_onnx_adapter(
    model: nn.Module,
    file: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    names: str = NAMES[0],
) -> Path:
    """Writes an adapter for graphs of `export_onnx(..., adapters="separate")`, and returns the file's path.

    model: prepared; or, with `adapter`, the plain base model of that adapter folder. file: a new `.onnx_adapter`.
    names: those of the graph; "genai" gives Olive's LoRA adapters. ONNX Runtime loads the file with `LoraAdapter` and
    adds it to a run with `RunOptions.add_active_adapter`. Raises `ConfigError` for unknown names, `ExportError` for a
    file name with another ending, a file that exists, or slices that no matrix product takes.
    """
    target, module = Path(file), unwrap(model)
    if target.suffix != SUFFIX:
        raise ExportError(
            f"{target} is not the name of an adapter for ONNX Runtime; {target.with_suffix(SUFFIX)} would be"
        )
    check_names(names)
    source = adapter_source(model, adapter)
    arrays = _arrays(module, source, names)
    with new_files(target) as folder:
        _write(arrays, folder / target.name)
    log.info("adapter for ONNX Runtime written to %s: %d slices", target, len(source.slices))
    return target


def _write(parameters: Mapping[str, np.ndarray], file: Path) -> None:
    """Raises `ExportError` where the file cannot be written or, read again, does not hold these bits."""
    import onnxruntime

    arrays = {name: np.ascontiguousarray(values) for name, values in parameters.items()}
    written = onnxruntime.AdapterFormat()
    written.set_adapter_version(1)
    written.set_model_version(1)
    # an OrtValue on a CPU points into its array, which has to live until the file is written
    written.set_parameters({n: onnxruntime.OrtValue.ortvalue_from_numpy(values) for n, values in arrays.items()})
    try:
        written.export_adapter(str(file))
    except RuntimeError as error:  # ONNX Runtime's, of a full disk too
        what = str(error).rpartition(")> ")[2].strip()  # behind the name of its own function
        raise ExportError(f"could not write {file.name}: {what}") from error
    _read_back(arrays, file)


def _read_back(arrays: Mapping[str, np.ndarray], file: Path) -> None:
    import onnxruntime

    read = onnxruntime.AdapterFormat.read_adapter(str(file))  # its values point into it
    held = {name: value.numpy() for name, value in read.get_parameters().items()}
    if odd := sorted(held.keys() ^ arrays.keys()) or [n for n, a in arrays.items() if not _same(a, held[n])]:
        raise ExportError(f"{file.name} was not written correctly: read again, it differs in {', '.join(odd[:3])}")


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit."""
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a.view(np.uint8), b.view(np.uint8))


class Part(NamedTuple):
    """A slice as a product x W sees it. delta: (n, out) of columns, which x W contracts, or (in, n) of rows.
    size: of the axis that the indices are of."""

    weight: str
    columns: bool
    indices: np.ndarray
    delta: np.ndarray
    size: int


def _arrays(module: nn.Module, source: Adapter, names: str) -> dict[str, np.ndarray]:
    """What an adapter gives to the inputs of a graph."""
    values, others = Values(module), dtype_of_others(module)
    layers = linear_layers(module, matrices(source.slices), "an adapter beside an ONNX graph")

    def in_type(s: Slice) -> torch.Tensor:
        """The delta in the type that the graph has."""
        dtype = values.dtype(s.parameter_name)
        if s.parameter_name in values.quantized:
            dtype = others or dtype
        delta = delta_of(s).to(torch.float32 if dtype == torch.bfloat16 else dtype)
        if not delta.isfinite().all():
            raise ExportError(
                f"the delta of {s.parameter_name} exceeds the largest {delta.dtype}, in which the graph adds it; "
                f"`save_merged` takes it, since the sum does not"
            )
        return delta

    parts = []
    for s in matrices(source.slices):
        transposed, delta = layers[s.parameter_name][1], in_type(s)
        columns, indices = (s.dim == 1) != transposed, s.indices.numpy()
        parts.append(
            Part(s.parameter_name, columns, indices, (delta if transposed else delta.T).numpy(), s.shape[s.dim])
        )
    whole = {s.parameter_name: (s, in_type(s)) for s in vectors(source.slices)}
    return (_loras(parts) if names == GENAI else _slices(parts)) | {
        vector_name(name): delta.new_zeros(s.shape).index_copy_(0, s.indices, delta).numpy()
        for name, (s, delta) in whole.items()
    }


def _slices(parts: Sequence[Part]) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for part in parts:
        indices, delta = slice_names(part.weight, part.columns)
        arrays |= {indices: part.indices, delta: part.delta}
    return arrays


def _loras(parts: Sequence[Part]) -> dict[str, np.ndarray]:
    """A (in, r) and B (r, out): a slice is a LoRA with a one-hot factor; those of one weight lie side by side."""
    arrays: dict[str, np.ndarray] = {}
    for part in parts:
        one_hot = np.zeros((part.size, len(part.indices)), part.delta.dtype)
        one_hot[part.indices, np.arange(len(part.indices))] = 1
        for name, factor, axis in zip(
            lora_names(part.weight), (one_hot, part.delta) if part.columns else (part.delta, one_hot.T), (1, 0)
        ):
            arrays[name] = np.concatenate([arrays[name], factor], axis) if name in arrays else factor
    return arrays


# --- a graph's check ---------------------------------------------------------------------------------------


@contextmanager
def probe(module: nn.Module, places: Sequence[tuple[str, int]], names: str, folder: Path) -> Iterator[Any]:
    """Context in which a plain module has an adapter of random numbers at all of these (weight, dim), and yields the
    `RunOptions` of ONNX Runtime with that adapter, written into `folder`, active."""
    import onnxruntime

    adapter = _random_adapter(module, places)
    file = folder / f"probe{SUFFIX}"
    _write(_arrays(module, adapter, names), file)
    loaded, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    loaded.Load(str(file))
    options.add_active_adapter(loaded)
    try:
        with added(module, adapter):
            yield options
    finally:
        file.unlink()


def _random_adapter(module: nn.Module, places: Sequence[tuple[str, int]]) -> Adapter:
    """Up to `PROBED` indices each, with numbers that change a layer's outputs by much of what they are."""
    random, slices = torch.Generator().manual_seed(0), []
    for name, dim in places:
        W = module.get_parameter(name).detach()
        indices = torch.randperm(W.shape[dim], generator=random)[:PROBED].sort().values
        shape = [len(indices) if d == dim else size for d, size in enumerate(W.shape)]
        scale = min(4.0, (W.shape[dim] / len(indices)) ** 0.5) * (float(W.float().square().mean().sqrt()) or 1.0)
        delta = (scale * torch.randn(shape, generator=random)).to(torch.promote_types(W.dtype, torch.float32))
        slices.append(Slice(name, dim, indices, tuple(W.shape), (), delta))
    return Adapter(Plan(S2FTConfig(), "", tuple(slices)), {})


@contextmanager
def added(module: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Context in which the weights of a plain module have the slices of an adapter added."""
    undo: list[tuple[nn.Parameter, int, torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        try:
            for s in adapter.slices:
                W = module.get_parameter(s.parameter_name)
                dim, indices, block = summed(W, [(s, 1.0)])
                undo.append((W, dim, indices, W.index_select(dim, indices)))
                W.index_copy_(dim, indices, block)
            yield
        finally:
            for W, dim, indices, block in reversed(undo):
                W.index_copy_(dim, indices, block)


# --- the graph ---------------------------------------------------------------------------------------------


def places_of(model: nn.Module, adapters: str | Sequence[str | os.PathLike[str]]) -> list[tuple[str, int]]:
    """(weight, dim) of everything that the adapters change: those of a prepared model, or of adapter folders.

    Raises `ConfigError` where there are none, `AdapterError` for an adapter of another base model.
    """
    if isinstance(adapters, (str, os.PathLike)):
        if adapters != "separate":
            raise ConfigError(f"adapters must be 'separate' or a list of adapter folders, got {os.fspath(adapters)!r}")
        if not is_prepared(model):
            raise ConfigError(
                "adapters='separate' makes room for what a prepared model trains, and this one is not "
                "prepared; give a list of adapter folders instead"
            )
        slices = list(state_of(model).plan.slices)
    else:
        read = [read_adapter(folder) for folder in adapters]
        with untrained(model):
            for adapter in read:
                check_fits(unwrap(model), adapter)
        slices = [s for adapter in read for s in adapter.slices]
    if not slices:
        raise ConfigError("no adapter was given, so there is nothing that the graph could make room for")
    return list(dict.fromkeys((s.parameter_name, s.dim) for s in slices))
