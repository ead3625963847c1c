"""The adapter as an exact LoRA, for PEFT, vLLM and llama.cpp.

A LoRA adds B A to a weight (out, in). A slice of it is one exactly, with rank r = selected indices and no
decomposition: B A sums one product with 1 and zeros.

    columns (what the layer contracts)      A[k, indices[k]] = 1   (r, in)      B = delta       (out, r)
    rows (what it produces)                 A = delta              (r, in)      B[indices[k], k] = 1   (out, r)

A program scales B A by alpha / rank, which is 1 here by each of their rules:

    PEFT            alpha_pattern or lora_alpha, over rank_pattern or r
    vLLM, Olive     lora_alpha / r
    llama.cpp       lora_alpha / the rank of the tensor

In the layout "padded" every module has the rank r = `lora_alpha`; in "pattern", which is smaller where ranks differ,
llama.cpp scales what is below the widest rank by too much.

A parameter of three dimensions (experts, each a matrix) is one such pair for each expert, all of one rank. PEFT wraps
parameters by name (`target_parameters`), and stores the pairs of E experts as one: A (E r, in), B (out, r E), where
column k E + e of B is column k of expert e's.

A bias of a linear layer is its `lora_B.bias` (`lora_bias`), where every layer of the LoRA has one. Everything else,
such as a norm, is stored whole, with its module (`modules_to_save`). Both are for PEFT only: vLLM refuses them;
llama.cpp's converter takes norms, and its runtime leaves them out without a word.

PEFT's `merge_and_unload` gives the bits of `save_merged` (but for the sign of a weight that is -0.0), in bfloat16 and
float16 too: it keeps A and B in float32 and rounds the sum once. With `safe_merge=True`, or loaded with
`autocast_adapter_dtype=False`, it rounds the delta before it adds, and entries differ by up to about one unit in the
last place.
"""

import json
import logging
import os
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2ft_compile.adapters.apply import check_fits
from s2ft_compile.adapters.format import CONFIG, WEIGHTS, Adapter, read_adapter
from s2ft_compile.adapters.layers import held_as, is_linear, linear_layers
from s2ft_compile.adapters.stored import save_tensors
from s2ft_compile.capture.models import unwrap
from s2ft_compile.errors import ConfigError, ExportError
from s2ft_compile.plan import Slice, delta_of
from s2ft_compile.quantized import is_conv1d
from s2ft_compile.slices.state import is_prepared

from .adapter import adapter_of, named_in, untrained
from .card import CARD, LORA, card
from .files import new_directory
from .whole import layer_of, moved, partition, whole_modules, whole_tensors

log = logging.getLogger(__name__)
LAYOUTS = ("padded", "pattern")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as max_lora_rank


@dataclass(frozen=True, eq=False)
class Factors:
    """A (r, in) and B (out, r), float32, of a module; (E, r, in) and (E, out, r) of a parameter.

    target: the module's or parameter's name. stored: what PEFT's files call it. error: relative, in the Frobenius norm;
    0 where exact. bias: (out,), what is added to the module's bias; None: the LoRA has no biases.
    """

    target: str
    stored: str
    A: Tensor
    B: Tensor
    error: float = 0.0
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    @property
    def is_parameter(self) -> bool:
        return self.A.dim() == 3

    def tensors(self) -> dict[str, Tensor]:
        A, B = (self.A.flatten(0, 1), self.B.permute(1, 2, 0).flatten(1)) if self.is_parameter else (self.A, self.B)
        name = f"base_model.model.{self.stored}"
        tensors = {f"{name}.lora_A.weight": A.contiguous(), f"{name}.lora_B.weight": B.contiguous()}
        return tensors if self.bias is None else {**tensors, f"{name}.lora_B.bias": self.bias}


def save_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    layout: str = LAYOUTS[0],
    ranks: int | str = "exact",
    *,
    adapter: str | os.PathLike[str] | None = None,
    truncate: bool = False,
    linear_only: bool = False,
) -> Path:
    """Writes an adapter into a new folder in the format of PEFT, and returns its path.

    model: prepared; or, with `adapter`, the plain base model of that adapter folder. layout: "padded", all modules
    with one rank (zeros added), right in every program and for `hotswap_adapter`; or "pattern", each with the rank it
    needs (`rank_pattern`), smaller, for PEFT and vLLM and not for llama.cpp. ranks: "exact"; "vllm", rounded up to the
    next of `VLLM_RANKS`; or an int, a limit that "padded" pads to. A module that needs more is refused, or with
    `truncate` cut to the limit by SVD, and the error is logged.

    Batched experts (parameters of three dimensions) are for PEFT alone, by its `target_parameters`, and so is what no
    LoRA has: norms, embeddings and other modules are stored whole, by `modules_to_save` (which `hotswap_adapter` does
    not take), biases by `lora_bias`.
    linear_only: leave that out, for vLLM and llama.cpp, which is not what was trained; how far each of it had moved is
    logged, and in the folder's card.

    Raises `ExportError` for tied weights, parameters of the model itself, norms and biases with ranks="vllm", a rank
    above the limit, or a folder that exists; `ConfigError` for an option that is unknown.
    """
    _check_options(layout, ranks)
    module, source = unwrap(model), adapter_source(model, adapter)
    source, left_out = _linear_alone(model, source) if linear_only else (source, {})
    with new_directory(directory) as folder:
        exact, whole = _all_factors(module, source)
        _check_consumer(ranks, exact, whole)
        factors = [_fitted(f, ranks, truncate) for f in exact]
        widest = max(f.rank for f in factors)
        padded_to = ranks if isinstance(ranks, int) else _rounded(widest, ranks)
        factors = [_padded(f, padded_to if layout == "padded" else _rounded(f.rank, ranks)) for f in factors]
        tensors = {name: tensor for f in factors for name, tensor in f.tensors().items()}
        tensors |= whole_tensors(model, source, whole)
        save_tensors(tensors, folder / WEIGHTS)
        config, size = _config(module, factors, whole), _size(source, tensors)
        (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
        errors = {f.target: f.error for f in factors if f.error}
        how = LORA.format(vllm=_for_vllm(config), llama_cpp=_for_llama_cpp(config), size=size)
        (folder / CARD).write_text(card(source, how, errors, whole, left_out), encoding="utf-8")
    log.info("LoRA written to %s: %d modules, ranks up to %d, %s", directory, len(factors), config["r"], size)
    return Path(directory)


def _check_options(layout: str, ranks: int | str) -> None:
    if layout not in LAYOUTS:
        raise ConfigError(f"unknown layout {layout!r}; valid: {', '.join(LAYOUTS)}")
    if ranks not in ("exact", "vllm") and (isinstance(ranks, (bool, str)) or not isinstance(ranks, int) or ranks < 1):
        raise ConfigError(f"ranks must be 'exact', 'vllm' or a positive number, got {ranks!r}")


def adapter_source(model: nn.Module, adapter: str | os.PathLike[str] | None) -> Adapter:
    """What a prepared model has trained, or an adapter folder of this plain model."""
    if adapter is None:
        return adapter_of(model)
    if is_prepared(model):
        raise ConfigError(
            "the model is prepared and has deltas of its own; give the plain base model of the adapter, or no adapter"
        )
    read = read_adapter(adapter)
    check_fits(unwrap(model), read)
    return read


# --- factors -----------------------------------------------------------------------------------------------


def _linear_alone(model: nn.Module, source: Adapter) -> tuple[Adapter, dict[str, float]]:
    """What of an adapter programs take that know linear layers only, and how far the rest had moved. Raises
    `ExportError` where nothing is left."""
    kept = partition(unwrap(model), source.slices)[0]
    if not kept:
        raise ExportError("the adapter changes no weight of a linear layer, so nothing would be left of it")
    with untrained(model):
        left_out = moved(unwrap(model), [s for s in source.slices if s not in kept])
    for name, share in left_out.items():
        log.warning("left out: %s, which had moved by %.3g of its norm", name, share)
    return replace(source, plan=replace(source.plan, slices=tuple(kept))), left_out


def _check_consumer(ranks: int | str, factors: Sequence[Factors], whole: Sequence[str]) -> None:
    """That vLLM takes it, if it is for vLLM. Raises `ExportError`; warns where only PEFT does."""
    others = [*whole, *(f"the bias of {f.target}" for f in factors if f.bias is not None and f.bias.any())]
    if not others:
        return
    named = f"{others[0]}{f' and {len(others) - 1} more' if len(others) > 1 else ''}"
    if ranks == "vllm":
        raise ExportError(
            f"vLLM takes no LoRA that changes {named}: merge the adapter instead (save_merged), or pass "
            f"linear_only=True to leave them out, which is not what was trained"
        )
    log.warning(
        "for PEFT only, since it changes %s: vLLM refuses that, and llama.cpp leaves norms out without a word; "
        "save_merged is for both",
        named,
    )


def _all_factors(module: nn.Module, source: Adapter) -> tuple[list[Factors], list[str]]:
    """Of the linear layers that hold slices, and of the parameters of experts; and the modules that are stored whole.
    Raises `ExportError`."""
    experts = [s for s in source.slices if len(s.shape) == 3 and _is_expert(module, s)]
    linear, biases, others = partition(module, [s for s in source.slices if s not in experts])
    layers = {layer_of(s) for s in (*linear, *biases)}
    if biases and (experts or any(getattr(module.get_submodule(name), "bias", None) is None for name in layers)):
        apart = {layer_of(s) for s in biases}  # `lora_bias` is for all layers of a LoRA or for none
        others += biases + [s for s in linear if layer_of(s) in apart]
        linear, biases = [s for s in linear if layer_of(s) not in apart], []
    holders = linear_layers(module, linear)
    factors = [_factors(s, layer := holders[s.parameter_name][0], layer, holders[s.parameter_name][1]) for s in linear]
    targets = {*layers - {layer_of(s) for s in others}, *(layer_of(s) for s in experts)}
    whole = whole_modules(module, others, targets, "a LoRA")
    if not factors and not experts:
        factors = [_nothing(module, layer_of(biases[0]) if biases else None, whole)]
    if biases:
        factors = _with_biases(module, factors, biases)
    if experts and any(flip for _, flip in holders.values()):
        raise ExportError("PEFT's LoRA has no experts beside layers whose weights are stored (in, out)")
    named = held_as(module)
    for s in experts:
        layer, _, key = s.parameter_name.rpartition(".")
        if s.dim == 0 or not layer or len(named[s.parameter_name]) > 1:
            why = (
                "its slices are whole experts" if s.dim == 0 else "it is tied" if layer else "the model itself holds it"
            )
            raise ExportError(f"{s.parameter_name} cannot be a LoRA: {why}. `save_adapter` and `save_merged` take it")
        holder = module.get_submodule(layer)
        beside = [
            k
            for k, _ in holder.named_parameters(recurse=False)
            if any(e.parameter_name == f"{layer}.{k}" for e in experts)
        ]
        # PEFT wraps a module once for each of its parameters, the first of them innermost
        stored = layer + ".base_layer" * (len(beside) - 1 - beside.index(key))
        factors.append(_factors(s, s.parameter_name, stored, bool(getattr(holder, "is_transposed", False))))
    return factors, whole


def _is_expert(module: nn.Module, s: Slice) -> bool:
    """Whether PEFT takes it for the matrices of experts: any parameter of three dimensions but a convolution's."""
    return not isinstance(module.get_submodule(layer_of(s)), nn.modules.conv._ConvNd)


def _nothing(module: nn.Module, layer: str | None, whole: Sequence[str]) -> Factors:
    """Zeros of rank 1: PEFT's LoRA has to have a linear layer. layer: which. Raises `ExportError`."""
    free = (
        n for n, m in module.named_modules() if is_linear(m) and not any(f"{n}.".startswith(f"{w}.") for w in whole)
    )
    if (name := layer or next(free, None)) is None:
        raise ExportError(
            "PEFT's LoRA changes a linear layer at least, and this model has none; `save_merged` takes it"
        )
    rows, columns = module.get_parameter(f"{name}.weight").shape
    size_out, size_in = (columns, rows) if is_conv1d(module.get_submodule(name)) else (rows, columns)
    return Factors(name, name, torch.zeros(1, size_in), torch.zeros(size_out, 1))


def _with_biases(module: nn.Module, factors: Sequence[Factors], biases: Sequence[Slice]) -> list[Factors]:
    """Each with what is added to its bias, and factors of zeros for layers of which only the bias changes."""
    deltas: dict[str, Tensor] = {}
    for s in biases:
        if delta_of(s).dtype != torch.float32:
            raise ExportError(f"the delta of {s.parameter_name} is {delta_of(s).dtype}; a LoRA is in float32")
        deltas[layer_of(s)] = torch.zeros(s.shape).index_copy_(0, s.indices, delta_of(s))
    missing = [name for name in deltas if name not in {f.target for f in factors}]
    every = [*factors, *(_nothing(module, name, ()) for name in missing)]
    return [replace(f, bias=deltas.get(f.target, torch.zeros(f.B.shape[0]))) for f in every]


def _factors(s: Slice, target: str, stored: str, transposed: bool) -> Factors:
    """transposed: the matrices are stored (in, out)."""
    delta = delta_of(s)
    if delta.dtype != torch.float32:
        raise ExportError(f"the delta of {s.parameter_name} is {delta.dtype}; a LoRA in float32 would not be exact")
    delta = delta.transpose(-1, -2) if transposed else delta
    one_hot = torch.zeros(*delta.shape[:-2], len(s.indices), s.shape[s.dim])
    one_hot[..., torch.arange(len(s.indices)), s.indices] = 1
    columns = (s.dim == len(s.shape) - 1) != transposed
    return Factors(target, stored, *((one_hot, delta) if columns else (delta, one_hot.transpose(-1, -2))))


def _rounded(rank: int, ranks: int | str) -> int:
    return VLLM_RANKS[bisect_left(VLLM_RANKS, rank)] if ranks == "vllm" else rank


def _for_vllm(config: Mapping[str, Any]) -> str:
    """How vLLM serves a LoRA of this configuration: its limit of the rank is one of its list."""
    rank = config["r"]
    if others := _not_linear(config):
        return f"refuses it, since it changes {others}; `save_merged` is for it, or `linear_only=True` without them"
    if "target_parameters" in config:
        return "not for it, since experts have other names there; `save_merged` is"
    if rank > VLLM_RANKS[-1]:
        return f"does not take it, since its rank {rank} is above {VLLM_RANKS[-1]}"
    return f"`--enable-lora --max-lora-rank {_rounded(rank, 'vllm')} --lora-modules name=this-folder`"


def _for_llama_cpp(config: Mapping[str, Any]) -> str:
    """How llama.cpp runs a LoRA of this configuration: it knows one alpha, and divides it by each tensor's rank."""
    if others := _not_linear(config):
        return (
            f"not for it, since it changes {others}, of which it leaves norms out without a word; `save_merged` is, or "
            f"`linear_only=True` without them"
        )
    if "target_parameters" in config:
        return "not for it, since its converter has no experts; `save_merged` is"
    if config["rank_pattern"]:
        return 'does not take it right, since its modules have several ranks; `save_lora(..., layout="padded")` does'
    return "`convert_lora_to_gguf.py this-folder --base BASE --outtype f32`, then `--lora` with the file"


def _not_linear(config: Mapping[str, Any]) -> str:
    """What a LoRA of this configuration has besides factors, for a person; none: the empty text."""
    names = config.get("modules_to_save", [])
    whole = f"{names[0]} and {len(names) - 1} more modules, whole" if len(names) > 1 else "".join(names)
    return " and ".join(filter(None, (whole, "biases" * bool(config.get("lora_bias")))))


def _fitted(f: Factors, ranks: int | str, truncate: bool) -> Factors:
    """The factors with a rank within the limit. Raises `ExportError` where that needs a truncation not asked for."""
    limit = ranks if isinstance(ranks, int) else f.rank if ranks == "exact" else VLLM_RANKS[-1]
    if f.rank <= limit:
        return f
    if not truncate:
        whose = "which is vLLM's limit" if ranks == "vllm" else "the rank that was asked for"
        raise ExportError(
            f"{f.target} needs rank {f.rank}, above {limit}, {whose}. Train fewer units, merge the "
            f"adapter instead, or pass truncate=True for the nearest LoRA of that rank"
        )
    U, S, V = torch.linalg.svd(f.B.double() @ f.A.double(), full_matrices=False)
    error = float(S[..., limit:].norm() / S.norm()) if S.any() else 0.0
    log.warning("%s: rank %d cut to %d, relative error %.3g", f.target, f.rank, limit, error)
    root = S[..., :limit].sqrt()
    A, B = root[..., None] * V[..., :limit, :], U[..., :limit] * root[..., None, :]
    return replace(f, A=A.float(), B=B.float(), error=error)


def _padded(f: Factors, rank: int) -> Factors:
    more = rank - f.rank
    return replace(f, A=nn.functional.pad(f.A, (0, 0, 0, more)), B=nn.functional.pad(f.B, (0, more)))


def _size(source: Adapter, tensors: Mapping[str, Tensor]) -> str:
    """What it costs to write slices as a LoRA, for a person."""
    trained = sum(delta_of(s).numel() for s in source.slices)
    stored = sum(tensor.numel() for tensor in tensors.values())
    return (
        f"{4 * stored / 1e6:,.1f} MB for {4 * trained / 1e6:,.1f} MB of trained numbers ({stored / trained:.1f} times)"
    )


# --- the configuration -------------------------------------------------------------------------------------


def _config(module: nn.Module, factors: Sequence[Factors], whole: Sequence[str]) -> dict[str, Any]:
    """Every module has a pattern, longer names first: PEFT takes the first one that a module's name ends with."""
    ranks = {f.target: f.rank for f in sorted(factors, key=lambda f: -len(f.target))}
    widest = max(ranks.values())
    pattern = ranks if len(set(ranks.values())) > 1 else {}
    layers, parameters = ([f.target for f in factors if f.is_parameter == kind] for kind in (False, True))
    return {
        **peft_config(module, layers),
        **({"target_parameters": parameters} if parameters else {}),
        **({"modules_to_save": list(whole)} if whole else {}),
        **({"lora_bias": True} if any(f.bias is not None for f in factors) else {}),
        "peft_type": "LORA",
        "r": widest,
        "lora_alpha": widest,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "fan_in_fan_out": any(is_conv1d(module.get_submodule(layer)) for layer in layers),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }


def peft_config(module: nn.Module, layers: Sequence[str]) -> dict[str, Any]:
    """The fields that all of PEFT's methods have."""
    name, commit = named_in(module)
    return {
        "task_type": "CAUSAL_LM" if type(module).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": name,
        **({"revision": commit} if commit else {}),
        "target_modules": _targets(module, layers),
        "inference_mode": True,
    }


def _targets(module: nn.Module, names: Sequence[str]) -> list[str] | str:
    """The names, or where another module's name ends like one of them a pattern that matches these only."""
    others = {name for name, _ in module.named_modules()} - set(names)
    alike = any(other.endswith(f".{name}") for other in others for name in names)
    return "|".join(map(re.escape, names)) if alike else list(names)
