"""The table of docs/quantized.md: memory of a training step by `s2ft estimate`, for models of five sizes.

    python benchmarks/quantized.py [SIZE ...] [--batch 1] [--budget 1.0]

Layers are alike, so each model is estimated with two layers and with three, and the rest follows.
"""

import argparse
import tempfile
from dataclasses import fields
from functools import cache

import torch
import transformers

from s2ft_compile.cli.estimate import estimate_folder
from s2ft_compile.config import CompileOptions, S2FTConfig
from s2ft_compile.estimation import Estimate
from s2ft_compile.planned import BYTES

COMMON = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 16384, "dtype": "bfloat16"}
SIZES = {  # Llama 3.2 and 3.1, and Qwen 3's 32B
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "layers": 16, "num_attention_heads": 32, "tied": True},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "layers": 28, "num_attention_heads": 24, "tied": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "layers": 32, "num_attention_heads": 32},
    "32B": {"hidden_size": 5120, "intermediate_size": 25600, "layers": 64, "num_attention_heads": 64, "head_dim": 128}
    | {"vocab_size": 151936},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "layers": 80, "num_attention_heads": 64},
}
WAYS = {"bf16": "none", "int8": "int8", "NF4": "nf4"}
LENGTHS = (2048, 8192)


@cache
def total(size: str, way: str, length: int, batch: int, budget: float) -> float:
    """Bytes of a step, with 2% of the FFN's channels training. All that int8 changes against NF4 is the weights."""
    if way == "int8":
        numbers = numbers_quantized(size)
        more = BYTES["int8"](numbers, SIZES[size]["hidden_size"]) - BYTES["nf4"](numbers, 1)
        return total(size, "NF4", length, batch, budget) + more
    shape = {**COMMON, **SIZES[size]}
    layers, tied = shape.pop("layers"), shape.pop("tied", False)
    two, three = (
        _estimate({**shape, "tie_word_embeddings": tied, "num_hidden_layers": n}, way, length, batch, budget)
        for n in (2, 3)
    )
    parts = [f.name for f in fields(Estimate) if f.name not in ("trainable", "batch", "tokens")]
    return sum(getattr(two, p) + (layers - 2) * (getattr(three, p) - getattr(two, p)) for p in parts)


def numbers_quantized(size: str) -> int:
    """How many weights the linear layers but the head have."""
    s = SIZES[size]
    heads, kv = s["num_attention_heads"], COMMON["num_key_value_heads"]
    width = s.get("head_dim", s["hidden_size"] // heads)
    return s["layers"] * s["hidden_size"] * (width * 2 * (heads + kv) + 3 * s["intermediate_size"])


def _estimate(shape: dict, way: str, length: int, batch: int, budget: float) -> Estimate:
    torch._dynamo.reset()  # each is a first compilation
    with tempfile.TemporaryDirectory() as folder:
        config = transformers.LlamaConfig(**shape)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        options = CompileOptions(activation_budget=budget, logits=False)
        config = S2FTConfig({"ffn.in": 0.02, "ffn.out": 0.02})
        return estimate_folder(folder, batch, length, "bfloat16", config, options, WAYS[way])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", default=list(SIZES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--budget", type=float, default=1.0)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    given = parser.parse_args()
    columns = [(way, length) for length in given.lengths for way in given.ways]
    print("| GiB | " + " | ".join(f"{way}, {length:,} tokens" for way, length in columns) + " |")
    print("|---|" + "---|" * len(columns))
    for size in given.sizes:
        cells = [total(size, way, length, given.batch, given.budget) / 2**30 for way, length in columns]
        print(f"| {size} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
