"""What room for adapters costs an ONNX graph: speed of the base beside that of a plain export, and with one active.

`measure()` exports a Llama-style model with a KV cache three times: plain, with adapters as slices, and as LoRAs
(names="genai"), and runs prefill and one step of decoding of all of them in turn, on one thread. Speeds are ratios to
the plain export, medians over the rounds of the process's CPU time, so that what else the machine does weighs little,
and on all alike.

`--quantized`: the same graph with room for slices in float, int8 and int4, with an adapter active and without: speed,
bytes, and how far the logits are from those of the float graph, as a share of their norm.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from turns import cpu_ms, in_turn, medians

import s2ft_compile as s2ft
from s2ft_compile.exporters import export_onnx, save_onnx_adapter
from s2ft_compile.slices.state import state_of

WARM_UP = 2
BATCH, PROMPT = 4, 128
TARGETS = {"attention.out": 1, "ffn.out": 0.03, "ffn.in": 0.03}


def prepared(layers: int, width: int) -> torch.nn.Module:
    """A model with an adapter, as if it had been trained."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=width,
            intermediate_size=7 * width // 2,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 256,
            max_position_embeddings=2 * PROMPT,
        )
    ).eval()
    s2ft.prepare(model, {"input_ids": torch.arange(16)[None]}, s2ft.S2FTConfig(targets=TARGETS))
    with torch.no_grad():
        for delta in s2ft.parameters(model):
            delta.normal_(std=0.02)
    state_of(model).refresh()
    return model


def runner(path: Path, adapter: Path | None = None) -> Callable[[dict], list]:
    """(inputs) -> outputs, with the adapter active."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    run, loaded = onnxruntime.RunOptions(), onnxruntime.LoraAdapter()
    if adapter:
        loaded.Load(str(adapter))
        run.add_active_adapter(loaded)

    def call(feeds: dict) -> list:
        return session.run(None, feeds, run)

    call.adapter = loaded  # ONNX Runtime keeps a pointer to it only
    return call


def inputs(model: torch.nn.Module, past: int, new: int) -> dict[str, np.ndarray]:
    config, random = model.config, np.random.default_rng(0)
    shape = (BATCH, config.num_key_value_heads, past, config.hidden_size // config.num_attention_heads)
    cache = {
        f"past_key_values.{i}.{kind}": random.standard_normal(shape, np.float32)
        for i in range(config.num_hidden_layers)
        for kind in ("key", "value")
    }
    return {
        "input_ids": random.integers(0, config.vocab_size, (BATCH, new)),
        "attention_mask": np.ones((BATCH, past + new), np.int64),
        "position_ids": np.arange(past, past + new)[None].repeat(BATCH, 0),
        **cache,
    }


def measure(layers: int = 4, width: int = 512, rounds: int = 60) -> dict[str, Any]:
    """Speeds relative to the plain export; the goal is at least 0.95 for `slices` with no adapter active."""
    model, example = prepared(layers, width), {"input_ids": torch.arange(16)[None]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_onnx(model, folder / "plain.onnx", example, cache=True)
        runs = {"plain": runner(folder / "plain.onnx")}
        for form, names in (("slices", "model"), ("lora", "genai")):
            path = export_onnx(model, folder / form / "base.onnx", example, "separate", cache=True, names=names)
            file = save_onnx_adapter(model, folder / form / "one.onnx_adapter", names=names)
            runs |= {form: runner(path), f"{form}, active": runner(path, file)}
        figures = {}
        for stage, past, new, repeats in (("prefill", 0, PROMPT, rounds), ("decode", PROMPT, 1, 4 * rounds)):
            feeds = inputs(model, past, new)
            ms = medians(in_turn({name: partial(run, feeds) for name, run in runs.items()}, repeats, WARM_UP, cpu_ms))
            figures[stage] = {
                "plain_ms": ms["plain"],
                "speed": {name: ms["plain"] / its for name, its in ms.items() if name != "plain"},
            }
    size = sum(p.numel() for p in model.parameters())
    return {
        "parameters": size,
        "slices": len(state_of(model).plan.slices),
        "batch": BATCH,
        "prompt": PROMPT,
        "rounds": rounds,
        "onnxruntime": onnxruntime.__version__,
        **figures,
    }


def measure_quantized(layers: int = 4, width: int = 512, rounds: int = 30) -> dict[str, Any]:
    """Ratios to the float graph in the same state; the goals are at least 2 for `smaller`, and 1 for `speed`."""
    model, example, kinds = prepared(layers, width), {"input_ids": torch.arange(16)[None]}, ("float", "int8", "int4")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = save_onnx_adapter(model, folder / "one.onnx_adapter")
        runs, size = {}, {}
        for kind in kinds:
            how = {} if kind == "float" else {"quantize": kind}
            path = export_onnx(model, folder / kind / "base.onnx", example, "separate", cache=True, **how)
            runs |= {kind: runner(path), f"{kind}, active": runner(path, file)}
            size[kind] = sum(part.stat().st_size for part in path.parent.iterdir())
        figures: dict[str, Any] = {"smaller": {kind: size["float"] / size[kind] for kind in kinds[1:]}}
        for stage, past, new, repeats in (("prefill", 0, PROMPT, rounds), ("decode", PROMPT, 1, 4 * rounds)):
            feeds = inputs(model, past, new)
            ms = medians(in_turn({name: partial(run, feeds) for name, run in runs.items()}, repeats, WARM_UP, cpu_ms))
            logits = {name: run(feeds)[0] for name, run in runs.items()}
            figures[stage] = {"float_ms": ms["float"], "speed": {}, "error": {}}
            for name in (name for name in runs if not name.startswith("float")):
                whole = "float" + name.removeprefix("int8").removeprefix("int4")
                figures[stage]["speed"][name] = ms[whole] / ms[name]
                gap = np.linalg.norm(logits[name] - logits[whole]) / np.linalg.norm(logits[whole])
                figures[stage]["error"][name] = float(gap)
    return {"layers": layers, "width": width, "batch": BATCH, "prompt": PROMPT, "rounds": rounds, **figures}


if __name__ == "__main__":
    run = measure_quantized if "--quantized" in sys.argv else measure
    print(json.dumps(run(**({"layers": 2, "rounds": 5} if "--quick" in sys.argv else {})), indent=2))
