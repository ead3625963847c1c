"""The two files of an adapter: written, read, checked.

`adapter_model.safetensors` holds, for each slice, `<parameter>.delta` (float32, or float64 where the
configuration says so; the parameter's shape with n along the slice's dim) and `<parameter>.indices` (int32
(n,), ascending, in the base model's order): entry i of the delta belongs to indices[i].
`adapter_config.json` holds what they mean: the plan, the base model's fingerprint and the samples it is made
of, hashes of the base's blocks, its name and revision where they are known, checksums, versions. What decides whether a
model is the base are the samples and the hashes; the name is for people, and for programs that fetch it.

Reading trusts neither file. What a header claims is checked against the file's size before anything is
allocated, and everything else before a model is touched.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from s2ft_compile.errors import AdapterError, ConfigError
from s2ft_compile.plan import Plan, Slice

from .fingerprint import combined
from .stored import save_tensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FORMAT, FORMAT_VERSION = "s2ft", 1
CONFIG_BYTES = (
    32 << 20
)  # samples of a hundred thousand tensors; an index takes less than 4 times its bytes in the weights
WIDE = "float64"  # the type of a delta that no float32 number can be


@dataclass(frozen=True, eq=False)
class Adapter:
    """plan: its slices ascending, with deltas. base: what the files say about the base model. source: where from."""

    plan: Plan
    base: Mapping[str, Any]
    source: str = "this adapter"

    @property
    def slices(self) -> tuple[Slice, ...]:
        return self.plan.slices


def ascending(plan: Plan) -> Plan:
    """The plan with each slice's indices in ascending order on the CPU, and a copy of its delta in theirs."""

    def sort(s: Slice) -> Slice:
        indices, order = s.indices.cpu().sort()
        return replace(s, indices=indices, delta=s.delta.detach().cpu().index_select(s.dim, order))

    return replace(plan, slices=tuple(map(sort, plan.slices)))


# --- writing -----------------------------------------------------------------------------------------------


def describe_base(
    kind: str,
    dtype: str,
    samples: Mapping[str, str],
    blocks: Mapping[str, str],
    named: Mapping[str, str] = {},
    quantized: Mapping[str, bool] = {},
) -> dict[str, Any]:
    """The samples tell base models apart; blocks that were trained are hashed whole, so that no sum is made twice.

    named: what `named_base` says. quantized: the names of weights that are, and whose blocks are their samples, each
    with whether it is turned.
    """
    return {
        **named,
        **({"quantized": list(quantized)} if quantized else {}),
        **({"turned": turned} if (turned := [name for name, is_turned in quantized.items() if is_turned]) else {}),
        "class": kind,
        "dtype": dtype,
        "fingerprint": combined(samples),
        "samples": dict(samples),
        "blocks": dict(blocks),
    }


def named_base(source: str | os.PathLike | None, commit: str | None = None) -> dict[str, str]:
    """`name` and, where it is known, `revision` of a base model. source: a hub id, or a folder; of a folder, in which
    the hub's cache keeps a model, the id and the commit, and of any other its last part only: an adapter is handed on,
    and the paths of a machine are not."""
    if not source:
        return {}
    path = Path(source)
    if len(path.parts) > 2 and path.parts[-2] == "snapshots" and path.parts[-3].startswith("models--"):
        name, commit = path.parts[-3].removeprefix("models--").replace("--", "/"), commit or path.name
    elif path.is_absolute() or len(path.parts) != 2 or path.exists():
        name = path.resolve().name
    else:
        name = str(source)
    return {"name": name, **({"revision": commit} if commit else {})}


def base_of(adapter: Adapter) -> str:
    """The base model, for a person: `org/name at 1a2b3c, a LlamaForCausalLM in bfloat16`."""
    name, revision = (_cut(adapter.base.get(key) or "") for key in ("name", "revision"))
    known = f"{name}{f' at {revision}' if revision else ''}, " if name else ""
    return f"{known}a {adapter.base.get('class')} in {adapter.base.get('dtype')}"


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Raises `ExportError` for files that cannot be written."""
    tensors = {}
    for s in adapter.slices:
        tensors[f"{s.parameter_name}.delta"] = s.delta.contiguous()
        tensors[f"{s.parameter_name}.indices"] = s.indices.to(torch.int32)
    save_tensors(tensors, folder / WEIGHTS)
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "base": adapter.base,
        "plan": adapter.plan.to_dict(),
        "delta_dtypes": {s.parameter_name: WIDE for s in adapter.slices if s.delta.dtype == torch.float64},
        "weights_sha256": hash_of_file(folder / WEIGHTS),
        "versions": {p: _version(p) for p in ("s2ft-compile", "torch", "transformers", "safetensors")},
    }
    config["config_sha256"] = hash_of_config(config)
    (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")


# --- reading -----------------------------------------------------------------------------------------------


def read_adapter(directory: str | os.PathLike) -> Adapter:
    """An adapter folder's content, checked as far as it can be without the base model. Raises `AdapterError`."""
    try:
        return _read(Path(directory))
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError, OSError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{_cut(directory)} is not an adapter: {type(error).__name__}: {_cut(error)}") from error


def _cut(text: object) -> str:
    """Printable, and short enough for a line."""
    printable = str(text).encode("utf-8", "backslashreplace").decode()
    return printable if len(printable) <= 300 else f"{printable[:300]}..."


def _read(folder: Path) -> Adapter:
    config = _read_config(folder)
    plan = _read_plan(folder, config)
    deltas = _read_deltas(folder, config, plan)
    slices = tuple(replace(s, delta=deltas[s.parameter_name]) for s in plan.slices)
    for s in slices:
        _check_delta(s, config.get("delta_dtypes") or {})
    return Adapter(replace(plan, slices=slices), config["base"], str(folder))


def _read_config(folder: Path) -> dict[str, Any]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterError(
                f"{folder} is not an adapter: it has no file {name}; save_adapter writes {CONFIG} and {WEIGHTS}"
            )
    size, most = (folder / CONFIG).stat().st_size, CONFIG_BYTES + 4 * (folder / WEIGHTS).stat().st_size
    if size > most:
        raise AdapterError(
            f"{folder / CONFIG} has {size:,} bytes; that of an adapter with such weights has {most:,} at most"
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{folder / CONFIG} is not valid JSON ({error}); it was cut off or edited") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        named = config.get("format", config.get("peft_type")) if isinstance(config, dict) else type(config).__name__
        raise AdapterError(f"{folder / CONFIG} describes an adapter of format {named!r}; valid: {FORMAT!r}")
    if config.get("format_version") != FORMAT_VERSION:
        raise AdapterError(
            f"{folder} has format version {config.get('format_version')!r}; this release reads version {FORMAT_VERSION}"
        )
    if config.get("config_sha256") != hash_of_config(config):
        raise AdapterError(f"{folder / CONFIG} does not match its own checksum: it was edited after it was saved")
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
        raise AdapterError(f"{folder / CONFIG}: each slice has a parameter's name, and each parameter one slice")
    if base.get("fingerprint") != plan.fingerprint:
        raise AdapterError(f"the adapter names two base models: {base.get('fingerprint')} and {plan.fingerprint}")
    samples = base.get("samples")
    if (
        not isinstance(samples, dict)
        or not all(isinstance(v, str) for v in samples.values())
        or combined(samples) != plan.fingerprint
    ):
        raise AdapterError(f"{folder / CONFIG}: the samples of the base model do not make its fingerprint")
    for kind in ("quantized", "turned"):
        given = base.get(kind, [])
        if not isinstance(given, list) or not all(isinstance(name, str) and name in samples for name in given):
            raise AdapterError(f"{folder / CONFIG}: the {kind} weights are not a list of the base model's names")
    return plan


def _read_deltas(folder: Path, config: Mapping[str, Any], plan: Plan) -> dict[str, Tensor]:
    """Parameter name -> delta. `safe_open` checks its header against the file's size before it maps it."""
    path, deltas = folder / WEIGHTS, {}
    if config.get("weights_sha256") != hash_of_file(path):
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
                    raise AdapterError(f"{path}: the indices of {s.parameter_name} are not those of the plan, as int32")
                deltas[s.parameter_name] = file.get_tensor(f"{s.parameter_name}.delta")
    except SafetensorError as error:
        raise AdapterError(f"{path} is not a valid safetensors file: {error}") from error
    return deltas


def _check_delta(s: Slice, dtypes: Mapping[str, str]) -> None:
    """That the slice lies inside the shape that it states, and its delta is finite and of that block's shape."""
    where = f"adapter slice {s.parameter_name!r}"
    if not all(isinstance(size, int) and 0 < size < 1 << 63 for size in s.shape):
        raise AdapterError(f"{where}: a parameter of shape {s.shape}, which is none")
    if not 0 <= s.dim < len(s.shape):
        raise AdapterError(f"{where}: dim {s.dim} of a parameter with {len(s.shape)} dimensions")
    size, sorted_once = s.shape[s.dim], s.indices.dim() == 1 and bool((s.indices.diff() > 0).all())
    if not sorted_once or not len(s.indices) or s.indices[0] < 0 or s.indices[-1] >= size:
        raise AdapterError(f"{where}: its indices must be one or more, ascending, each once, from 0 to {size - 1}")
    shape = (*s.shape[: s.dim], len(s.indices), *s.shape[s.dim + 1 :])
    dtype = torch.float64 if dtypes.get(s.parameter_name) == WIDE else torch.float32
    if s.delta.dtype != dtype or tuple(s.delta.shape) != shape:
        raise AdapterError(f"{where}: a delta of {s.delta.dtype} {tuple(s.delta.shape)}; valid: {dtype} {shape}")
    if not s.delta.isfinite().all():
        raise AdapterError(f"{where}: the delta has NaN or infinite entries")


# --- against a base model ----------------------------------------------------------------------------------


def check_base(
    adapter: Adapter,
    fingerprints: Mapping[str, str],
    what: str,
    quantized: Mapping[str, bool] = {},
    dtype: str | None = None,
) -> frozenset[str]:
    """That what has these samples is the adapter's base: what both have is the same, and every slice is there.

    A checkpoint may hold buffers besides parameters, and a tied weight once or twice. quantized: names of weights that
    are, each with whether it is turned. dtype: of all of them, as `dtypes_of` says. Weights that the adapter's base had
    otherwise, in full precision or quantized in another way, are not compared: a warning says so. Returns their names.
    """
    theirs, turned = set(adapter.base.get("quantized", ())), set(adapter.base.get("turned", ()))
    alike = theirs & quantized.keys() if dtype == adapter.base.get("dtype") else set()
    otherwise = frozenset(n for n in theirs | quantized.keys() if n in fingerprints and n not in alike)
    absent = [s.parameter_name for s in adapter.slices if s.parameter_name not in fingerprints]
    differ = absent + [
        name
        for name, sample in adapter.base["samples"].items()
        if name in fingerprints and name not in otherwise and fingerprints[name] != sample
    ]
    if differ:
        raise AdapterError(
            f"{adapter.source} was trained from another base model: {base_of(adapter)} with fingerprint "
            f"{adapter.plan.fingerprint}; this is {what} with fingerprint "
            f"{combined(fingerprints)}, which {'has no' if absent else 'differs in'} {', '.join(differ[:3])}"
            f"{', ...' if len(differ) > 3 else ''}{_alike(differ[0], fingerprints, adapter) if absent else ''}"
        )
    trained = otherwise.intersection(s.parameter_name for s in adapter.slices)
    if other_way := [name for name in trained if (name in turned) != quantized.get(name, False)]:
        here, there = ("(in, out)", "(out, in)") if other_way[0] in turned else ("(out, in)", "(in, out)")
        raise AdapterError(
            f"{adapter.source} was trained with weights that are {there}, and {what} has {min(other_way)} as {here}: "
            f"it fits the model that it was trained from, and save_merged(model, directory, dequantize=True) of that "
            f"writes an ordinary one"
        )
    if otherwise:
        warnings.warn(
            f"{adapter.source} was trained with {base_of(adapter)}, and this is {what}: {len(otherwise)} weights, "
            f"which are quantized otherwise or in one of the two alone, were not compared. They differ by their "
            f"quantization error, and so do the outputs; the same model gives what was trained",
            stacklevel=3,
        )
    return otherwise


def _alike(name: str, fingerprints: Mapping[str, str], adapter: Adapter) -> str:
    """What is named like a missing weight but for a prefix: the same weights of another class have such names."""
    alike = [other for other in fingerprints if f".{other}".endswith(f".{name}") or f".{name}".endswith(f".{other}")]
    return f"; it has {alike[0]}: save it as a {adapter.base.get('class')}, whose names these are" if alike else ""


def check_slice(adapter: Adapter, s: Slice, W: Tensor, sample: str | None = None, compared: bool = True) -> None:
    """That the slice is one of `W`, in base order, and that its block there is what was trained. sample: of a quantized
    weight, whose values are W. compared: whether the base had it as it is here (`check_base`)."""
    where = f"adapter slice {s.parameter_name!r}"
    if tuple(W.shape) != s.shape:
        raise AdapterError(f"{where}: a parameter of shape {s.shape}; the model has {tuple(W.shape)}")
    if not W.dtype.is_floating_point or W.dtype.itemsize < 2:
        raise AdapterError(
            f"{where}: {str(W.dtype).removeprefix('torch.')} weights cannot take a delta; valid: "
            f"float64, float32, bfloat16, float16"
        )
    if compared and (sample or hash_of_block(W, s)) != adapter.base["blocks"].get(s.parameter_name):
        raise AdapterError(
            f"{where}: the model has other values there than the base model; was an adapter loaded "
            f"into it before, or was it trained?"
        )


# --- checksums ---------------------------------------------------------------------------------------------


@torch.no_grad()
def hash_of_block(W: Tensor, s: Slice) -> str:
    block = W.index_select(s.dim, s.indices.to(W.device)).cpu().contiguous()
    return hashlib.sha256(block.view(torch.uint8).numpy()).hexdigest()


def hash_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of_config(config: Mapping[str, Any]) -> str:
    """Of all other fields, however they are laid out in the file."""
    rest = {key: value for key, value in config.items() if key != "config_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"  # run from a checkout that is not installed
