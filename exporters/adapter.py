"""The adapter: what was trained, and nothing else.

A folder of two files. `adapter_model.safetensors` holds, for each slice, `<parameter>.delta` (float32, the
parameter's shape with n along the slice's dim) and `<parameter>.indices` (int32 (n,), ascending, in the
base model's order): entry i of the delta belongs to indices[i]. `adapter_config.json` holds what they mean:
the plan, the base model's fingerprint, checksums, versions. Inverse of each other, bit for bit:

    load(base, save(prepared)) == merged(prepared)        W[indices] = cast(W0 + delta)

Reading trusts neither file: everything is checked before the model is touched.
"""

import hashlib
import json
import logging
import os
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..capture import unwrap
from ..errors import AdapterError, ConfigError, ExportError
from ..fingerprint import fingerprint
from ..plan import Plan, Slice
from ..state import State, disabled, is_prepared, state_of
from .files import new_directory

log = logging.getLogger(__name__)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FORMAT, FORMAT_VERSION = "s2ft", 1


def save_adapter(model: nn.Module, directory: str | os.PathLike) -> Path:
    """Writes what a prepared model has trained into a new folder, and returns its path.

    Raises `StateError` for a model that is not prepared, `ExportError` if the folder exists or a delta is
    not finite.
    """
    plan = _ascending(state_of(model).plan)
    tensors = {}
    for s in plan.slices:
        if not s.delta.isfinite().all():
            raise ExportError(
                f"the delta of {s.parameter_name} has NaN or infinite entries: training diverged; "
                f"a lower learning rate may help"
            )
        tensors[f"{s.parameter_name}.delta"] = s.delta.float().cpu().contiguous()
        tensors[f"{s.parameter_name}.indices"] = s.indices.to("cpu", torch.int32)
    with new_directory(directory) as folder:
        with disabled(model):
            base = _base(unwrap(model), plan)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "base": base,
            "plan": plan.to_dict(),
            "weights_sha256": _hash_of_file(folder / WEIGHTS),
            "versions": {p: _version(p) for p in ("s2ft-compile", "torch", "transformers", "safetensors")},
        }
        config["config_sha256"] = _hash_of_config(config)
        (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    log.info("adapter written to %s: %d slices", directory, len(plan.slices))
    return Path(directory)


def load_adapter(model: nn.Module, directory: str | os.PathLike) -> Plan:
    """Puts an adapter on the model it was trained from, and returns its plan.

    A plain model's weights become the trained ones, bit for bit those of `save_merged`. On a model prepared
    with the same slices the deltas (and the weights) become the adapter's. Raises `AdapterError` for files
    that are missing, damaged or made for another base, and for a model prepared with other slices; the
    model is then unchanged.
    """
    folder, module = Path(directory), unwrap(model)
    config = _read_config(folder)
    plan = _read_plan(folder, config)
    deltas = _read_deltas(folder, config, plan)
    with disabled(model) if is_prepared(model) else nullcontext():
        _check_fingerprint(module, plan, config["base"])
        for s in plan.slices:
            _check_slice(module, s, deltas[s.parameter_name], config["base"]["blocks"])
    if is_prepared(model):
        _into_deltas(state_of(model), plan, deltas)
    else:
        _into_weights(module, plan, deltas)
    log.info("adapter %s loaded: %d slices", directory, len(plan.slices))
    return plan


@torch.no_grad()
def _ascending(plan: Plan) -> Plan:
    """The plan with each slice's indices in ascending order, and a copy of its delta in theirs."""

    def sort(s: Slice) -> Slice:
        indices, order = s.indices.sort()
        return replace(s, indices=indices, delta=s.delta.index_select(s.dim, order.to(s.delta.device)))

    return replace(plan, slices=tuple(map(sort, plan.slices)))


# --- into the model: computed first, then written ----------------------------------------------------------


@torch.no_grad()
def _into_weights(module: nn.Module, plan: Plan, deltas: Mapping[str, Tensor]) -> None:
    """W[indices] = cast(W0 + delta): the sum in the wider of the two types, rounded once."""
    weights, blocks = dict(module.named_parameters()), []
    for s in plan.slices:
        W, delta = weights[s.parameter_name], deltas[s.parameter_name]
        indices, wide = s.indices.to(W.device), torch.promote_types(W.dtype, delta.dtype)
        block = W.index_select(s.dim, indices).to(wide) + delta.to(W.device, wide)
        blocks.append((W, s.dim, indices, block.to(W.dtype)))
    for W, dim, indices, block in blocks:
        W.index_copy_(dim, indices, block)


@torch.no_grad()
def _into_deltas(state: State, plan: Plan, deltas: Mapping[str, Tensor]) -> None:
    mine = {s.parameter_name: s for s in state.plan.slices}
    theirs = {s.parameter_name: s for s in plan.slices}
    differ = [
        name
        for name in sorted(mine.keys() | theirs.keys())
        if not (name in mine and name in theirs and _same(mine[name], theirs[name]))
    ]
    if differ:
        raise AdapterError(
            f"the model is prepared with other slices than the adapter's: {', '.join(differ[:3])}"
            f"{', ...' if len(differ) > 3 else ''}. Prepare it with the adapter's configuration "
            f"({plan.config}), or load the adapter into a model that is not prepared"
        )
    for name, s in mine.items():
        s.delta.index_copy_(s.dim, s.indices.argsort().to(s.delta.device), deltas[name].to(s.delta.device))
    state.refresh()


def _same(mine: Slice, ascending: Slice) -> bool:
    return mine.dim == ascending.dim and torch.equal(mine.indices.cpu().sort().values, ascending.indices)


# --- checks ------------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> dict[str, Any]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterError(
                f"{folder} is not an adapter: it has no file {name}; save_adapter writes {CONFIG} "
                f"and {WEIGHTS}"
            )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            f"{folder / CONFIG} is not valid JSON ({error}); it was cut off or edited"
        ) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = (
            config.get("format", config.get("peft_type"))
            if isinstance(config, dict)
            else type(config).__name__
        )
        raise AdapterError(f"{folder / CONFIG} describes an adapter of format {found!r}; valid: {FORMAT!r}")
    if config.get("format_version") != FORMAT_VERSION:
        raise AdapterError(
            f"{folder} has format version {config.get('format_version')!r}; this release reads "
            f"version {FORMAT_VERSION}"
        )
    if config.get("config_sha256") != _hash_of_config(config):
        raise AdapterError(
            f"{folder / CONFIG} does not match its own checksum: it was edited after it was saved"
        )
    return config


def _read_plan(folder: Path, config: Mapping[str, Any]) -> Plan:
    base = config.get("base")
    if not isinstance(base, dict) or not isinstance(base.get("blocks"), dict):
        raise AdapterError(f"{folder / CONFIG} does not say which base model the adapter was trained from")
    try:
        plan = Plan.from_dict(config.get("plan"))
    except ConfigError as error:
        raise AdapterError(f"{folder / CONFIG}: {error}") from error
    names = [s.parameter_name for s in plan.slices]
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise AdapterError(
            f"{folder / CONFIG}: each slice has a parameter's name, and each parameter one slice"
        )
    return plan


def _read_deltas(folder: Path, config: Mapping[str, Any], plan: Plan) -> dict[str, Tensor]:
    """Parameter name -> delta. `safe_open` checks its header against the file's size before it maps it."""
    path, deltas = folder / WEIGHTS, {}
    if config.get("weights_sha256") != _hash_of_file(path):
        raise AdapterError(f"{path} does not match its checksum in {CONFIG}: it was cut off or edited")
    expected = {f"{s.parameter_name}.{part}" for s in plan.slices for part in ("delta", "indices")}
    try:
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != expected:
                odd = sorted(set(file.keys()) ^ expected)
                raise AdapterError(
                    f"{path} and the plan in {CONFIG} do not have the same tensors: {', '.join(odd[:4])}"
                )
            for s in plan.slices:
                indices = file.get_tensor(f"{s.parameter_name}.indices")
                if indices.dtype != torch.int32 or not torch.equal(indices.to(torch.int64), s.indices):
                    raise AdapterError(
                        f"{path}: the indices of {s.parameter_name} are not those of the plan, as int32"
                    )
                deltas[s.parameter_name] = file.get_tensor(f"{s.parameter_name}.delta")
    except SafetensorError as error:
        raise AdapterError(f"{path} is not a valid safetensors file: {error}") from error
    return deltas


def _check_fingerprint(module: nn.Module, plan: Plan, base: Mapping[str, Any]) -> None:
    found = fingerprint(module)
    if base.get("fingerprint") != plan.fingerprint:
        raise AdapterError(
            f"the adapter names two base models: {base.get('fingerprint')} and {plan.fingerprint}"
        )
    if found != plan.fingerprint:
        raise AdapterError(
            f"the adapter was trained from another base model: a {base.get('class')} in {base.get('dtype')} "
            f"with fingerprint {plan.fingerprint}; this is a {type(module).__name__} in {_dtypes(module)} "
            f"with fingerprint {found}"
        )


def _check_slice(module: nn.Module, s: Slice, delta: Tensor, blocks: Mapping[str, str]) -> None:
    """That the slice is one of `module`, in base order, and that its block there is what was trained."""
    W, where = dict(module.named_parameters()).get(s.parameter_name), f"adapter slice {s.parameter_name!r}"
    if W is None or tuple(W.shape) != s.shape:
        raise AdapterError(
            f"{where}: a parameter of shape {s.shape}; the model has "
            f"{'none of this name' if W is None else tuple(W.shape)}"
        )
    if not 0 <= s.dim < W.dim():
        raise AdapterError(f"{where}: dim {s.dim} of a parameter with {W.dim()} dimensions")
    size, ascending = W.shape[s.dim], s.indices.dim() == 1 and bool((s.indices.diff() > 0).all())
    if not ascending or not len(s.indices) or s.indices[0] < 0 or s.indices[-1] >= size:
        raise AdapterError(
            f"{where}: its indices must be one or more, ascending, each once, from 0 to {size - 1}"
        )
    shape = (*W.shape[: s.dim], len(s.indices), *W.shape[s.dim + 1 :])
    if delta.dtype != torch.float32 or tuple(delta.shape) != shape:
        raise AdapterError(
            f"{where}: a delta of {delta.dtype} {tuple(delta.shape)}; valid: torch.float32 {shape}"
        )
    if not delta.isfinite().all():
        raise AdapterError(f"{where}: the delta has NaN or infinite entries")
    if _hash_of_block(W, s) != blocks.get(s.parameter_name):
        raise AdapterError(
            f"{where}: the model has other values there than the base model; was an adapter loaded into "
            f"it before, or was it trained?"
        )


# --- what is recorded of the base model, and checksums -----------------------------------------------------


def _base(module: nn.Module, plan: Plan) -> dict[str, Any]:
    """The fingerprint samples; blocks that were trained are hashed whole, so that no sum is made twice."""
    weights = dict(module.named_parameters())
    return {
        "class": type(module).__name__,
        "dtype": _dtypes(module),
        "fingerprint": plan.fingerprint,
        "blocks": {s.parameter_name: _hash_of_block(weights[s.parameter_name], s) for s in plan.slices},
    }


def _dtypes(module: nn.Module) -> str:
    own = {str(p.dtype) for name, p in module.named_parameters() if not name.startswith("s2ft.")}
    return " and ".join(sorted(own)).replace("torch.", "")


@torch.no_grad()
def _hash_of_block(W: Tensor, s: Slice) -> str:
    block = W.index_select(s.dim, s.indices.to(W.device)).cpu().contiguous()
    return hashlib.sha256(block.view(torch.uint8).numpy()).hexdigest()


def _hash_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_of_config(config: Mapping[str, Any]) -> str:
    """Of all other fields, however they are laid out in the file."""
    rest = {key: value for key, value in config.items() if key != "config_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"  # run from a checkout that is not installed
