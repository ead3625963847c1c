"""A base that is quantized: while it is loaded, as `--quantize` asks for, or as it is stored."""

import math
import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from s2ft_compile.config import check_choice
from s2ft_compile.errors import ConfigError
from s2ft_compile.quantized import Values

QUANTIZE = ("none", "nf4", "int8", "fp8")
LIBRARIES = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}


def stored_as(config: Any) -> str | None:
    """How bitsandbytes or torchao quantized the weights of a checkpoint with this configuration: a way of `QUANTIZE`,
    or what another one is called; None where neither did."""
    held = getattr(config, "quantization_config", None)
    if held is None:
        return None
    held = held if isinstance(held, dict) else held.to_dict()
    method = held.get("quant_method")
    if method == "bitsandbytes" and held.get("load_in_4bit"):
        kind = held.get("bnb_4bit_quant_type", "fp4")
        twice = bool(held.get("bnb_4bit_use_double_quant"))
        return "nf4" if kind == "nf4" and twice else f"{kind}, {'with' if twice else 'without'} double quantization"
    if method == "torchao":
        quant_type = held.get("quant_type")
        default = quant_type.get("default", quant_type) if isinstance(quant_type, dict) else quant_type
        name = str(default.get("_type") if isinstance(default, dict) else default)
        return {"Int8WeightOnlyConfig": "int8", "Float8WeightOnlyConfig": "fp8"}.get(name, f"torchao's {name}")
    return "bitsandbytes' 8 bits" if method == "bitsandbytes" else None


def check_not_stored(model: Any, config: Any, quantize: str) -> None:
    """Raises `ConfigError` for a checkpoint that is stored quantized, and is to be quantized otherwise."""
    check_choice("quantize", quantize, QUANTIZE)
    stored = stored_as(config)
    if stored and quantize not in ("none", stored):
        raise ConfigError(
            f"{model} is quantized already ({stored}), and trains as it is: leave out --quantize {quantize}"
        )


def check_some(model: nn.Module, quantize: str) -> None:
    """Raises `ConfigError` where nothing of a model was quantized, or could be; warns where most of it is not."""
    if quantize == "none":
        return
    values = Values(model)
    ends = {id(e.weight) for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e is not None}
    sizes = {n: math.prod(values.shape(n)) for n, p in values.own.items() if id(p) not in ends}
    dense = {n: size for n, size in sizes.items() if n not in values.quantized}
    if not values.quantized:
        raise ConfigError(
            f"--quantize {quantize} changes nothing of a {type(model).__name__}: {LIBRARIES[quantize]} quantizes "
            f"linear layers, and its weights, such as {max(dense, key=dense.__getitem__)}, are of none"
            f"{'; nf4 takes those of Conv1D too' if quantize != 'nf4' else ''}"
        )
    share = sum(dense.values()) / sum(sizes.values())
    if share > 0.5:
        largest = max(dense, key=dense.__getitem__)
        warnings.warn(
            f"--quantize {quantize} leaves {share:.0%} of this {type(model).__name__} as it is (without embeddings): "
            f"{LIBRARIES[quantize]} quantizes linear layers, and {largest} is in none",
            stacklevel=2,
        )


def quantization(quantize: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """What `from_pretrained` is given to quantize. dtype: in which products are computed. Raises `ConfigError` for an
    unknown way, or a library that is not here."""
    check_choice("quantize", quantize, QUANTIZE)
    if quantize == "none":
        return {}
    library = "bitsandbytes" if quantize == "nf4" else "torchao"
    if find_spec(library) is None:
        raise ConfigError(f"--quantize {quantize} needs {library}: pip install 's2ft-compile[quantized]'")
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if quantize == "nf4":
        config: Any = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype or torch.float32,
        )
    else:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

        config = TorchAoConfig({"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[quantize]())
    return {"quantization_config": config, **on_one_device()}


def on_one_device() -> dict[str, Any]:
    """What `from_pretrained` is given to put all of a quantized model on the device that trains."""
    return {"device_map": {"": "cuda" if torch.cuda.is_available() else "cpu"}}


def check_fp8(fp8: bool, quantize: str) -> None:
    """Raises `ConfigError` for products in fp8 with weights that are not."""
    if fp8 and quantize != "fp8":
        raise ConfigError(
            f"--fp8 multiplies by weights that are stored in fp8: it needs --quantize fp8, got {quantize}"
        )
