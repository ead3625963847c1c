"""The table of docs/quantized.md: memory of a training step by `s2ft estimate`, for models of five sizes.

    python benchmarks/quantized.py [SIZE ...] [--lengths 2048 8192] [--ways bf16 int8 NF4] [--keep]

One sequence a step, Muon, gradient checkpointing (--keep: without), 2% of the FFN's channels. Layers are alike, so each
model is estimated with three layers and with four, and the rest follows; some 20 seconds a model on one core. Writes
benchmarks/results/quantized.json, a size at a time.
"""

import tempfile
from dataclasses import asdict

import torch
import transformers
from turns import facts, parser, save

from s2ft_compile.cli.estimate import estimate_folder
from s2ft_compile.config import CompileOptions, S2FTConfig

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


PARTS = ("weights", "slices", "optimizer", "activations", "working")
FEW, MORE = 3, 4  # layers: with two, the first one's backward, which ends early, is half of all


def parts(size: str, way: str, length: int, checkpointing: bool) -> dict[str, float]:
    """Bytes of a step, by part."""
    shape = {**COMMON, **SIZES[size]}
    layers, tied = shape.pop("layers"), shape.pop("tied", False)
    few, more = (
        _estimate({**shape, "tie_word_embeddings": tied, "num_hidden_layers": n}, way, length, checkpointing)
        for n in (FEW, MORE)
    )
    return {p: few[p] + (layers - FEW) * (more[p] - few[p]) / (MORE - FEW) for p in PARTS}


def _estimate(shape: dict, way: str, length: int, checkpointing: bool) -> dict[str, int]:
    torch._dynamo.reset()  # each is a first compilation
    with tempfile.TemporaryDirectory() as folder:
        config = transformers.LlamaConfig(**shape)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        options = CompileOptions(logits=False)
        config = S2FTConfig({"ffn.in": 0.02, "ffn.out": 0.02})
        return asdict(
            estimate_folder(folder, 1, length, "bfloat16", config, options, WAYS[way], checkpointing=checkpointing)
        )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("sizes", nargs="*", default=list(SIZES))
    options.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    options.add_argument("--ways", nargs="+", default=list(WAYS))
    options.add_argument("--keep", action="store_true", help="keep all activations: no gradient checkpointing")
    given = options.parse_args()
    sizes, lengths = (["1B"], [128]) if given.quick else (given.sizes, given.lengths)
    columns = [(way, length) for length in lengths for way in given.ways]
    print("| GiB | " + " | ".join(f"{way}, {length:,} tokens" for way, length in columns) + " |")
    print("|---|" + "---|" * len(columns))
    result = {**facts("cpu", given.quick), "checkpointing": not given.keep, "bytes": {}}
    for size in sizes:
        steps = {f"{way} {length}": parts(size, way, length, not given.keep) for way, length in columns}
        steps = {name: {**step, "total": sum(step.values())} for name, step in steps.items()}
        result["bytes"][size] = steps
        print(f"| {size} | " + " | ".join(f"{step['total'] / 2**30:.1f}" for step in steps.values()) + " |", flush=True)
        save(result, "quantized", given.output)


if __name__ == "__main__":
    main()
