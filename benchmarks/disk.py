"""What an adapter is on disk: its size, and `s2ft merge` on a checkpoint made on the spot."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from math import ceil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import s2ft_compile as s2ft
from s2ft_compile.adapters.fingerprint import combined
from s2ft_compile.adapters.format import Adapter, describe_base, hash_of_block, write_adapter
from s2ft_compile.adapters.stored import INDEX, mapped, sampled, stored_tensors
from s2ft_compile.exporters.card import CARD, card

# The child's own peak: what the parent reads of a child's usage includes the parent's memory at the fork.
MERGE = """
from s2ft_compile.cli.app import app
try:
    app()
finally:
    print(*[line for line in open("/proc/self/status") if line.startswith("VmHWM")])
"""
Chosen = tuple[str, int, tuple[str, ...], Tensor]  # parameter, dim, roles, indices


def adapter_of(
    config: s2ft.S2FTConfig,
    chosen: Sequence[Chosen],
    weights: Mapping[str, Tensor],
    samples: Mapping[str, str],
    dtype: str,
) -> Adapter:
    """As if these slices of a base model had been trained; random deltas."""
    slices = []
    for name, dim, roles, indices in chosen:
        shape = list(weights[name].shape)
        shape[dim] = len(indices)
        slices.append(s2ft.Slice(name, dim, indices, tuple(weights[name].shape), roles, 1e-3 * torch.randn(shape)))
    blocks = {s.parameter_name: hash_of_block(weights[s.parameter_name], s) for s in slices}
    return Adapter(
        s2ft.Plan(config, combined(samples), tuple(slices)), describe_base("LlamaForCausalLM", dtype, samples, blocks)
    )


def file_size(adapter: Adapter) -> dict[str, int]:
    """Bytes of an adapter's folder, and of the numbers in it."""
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder), adapter)
        (Path(folder) / CARD).write_text(card(adapter), encoding="utf-8")
        files = sum(path.stat().st_size for path in Path(folder).iterdir())
    return {"files": files, "numbers": sum(s.delta.numel() * s.delta.element_size() for s in adapter.slices)}


def merge(folder: Path, gigabytes: float) -> dict[str, float]:
    """`s2ft merge` in a process of its own, on a sharded bfloat16 checkpoint made on the spot."""
    size = checkpoint(folder / "base", gigabytes)
    stored = stored_tensors(folder / "base")
    samples = {name: sampled(tensor) for name, tensor in stored.items()}
    with ExitStack() as stack:
        weights = {name: stack.enter_context(mapped(stored[name])) for name in stored if "down_proj" in name}
        chosen = [(name, 1, ("ffn.out",), torch.arange(0, W.shape[1], 20)) for name, W in weights.items()]
        adapter = adapter_of(s2ft.S2FTConfig({"ffn.out": 0.05}), chosen, weights, samples, "bfloat16")
    (folder / "adapter").mkdir()
    write_adapter(folder / "adapter", adapter)
    began = time.perf_counter()
    command = [sys.executable, "-c", MERGE, "merge", folder / "base", folder / "adapter", folder / "out"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - began
    assert stored_tensors(folder / "out").keys() == stored.keys()
    return {"seconds": seconds, "peak_bytes": 1024 * int(done.stdout.split()[-2]), "checkpoint_bytes": size}


def checkpoint(folder: Path, gigabytes: float) -> int:
    """A Llama of 8B's widths in four shards, as many layers as fit; its bytes."""
    d = 4096 if gigabytes > 1 else 128
    shapes = {
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (d // 4, d),
        "self_attn.v_proj": (d // 4, d),
        "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (7 * d // 2, d),
        "mlp.up_proj": (7 * d // 2, d),
        "mlp.down_proj": (d, 7 * d // 2),
    }
    layer_bytes = 2 * sum(rows * columns for rows, columns in shapes.values())
    layers, shards, where = max(4, ceil(gigabytes * 1e9 / layer_bytes)), 4, {}
    folder.mkdir()
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        tensors = {
            f"model.layers.{i}.{name}.weight": torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.02, 0.02)
            for i in range(shard, layers, shards)
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, file))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return sum(path.stat().st_size for path in folder.iterdir())
