"""Adapters in use: switched, side by side in one batch, on disk, and merged into a checkpoint, against LoRA with PEFT.

    python benchmarks/adapters.py [--quick] [--output benchmarks/results/adapters.json] [--rounds 21] [--dtype bfloat16]

The model has the shape of Llama-3.2-1B and random weights. Our adapters train as many numbers (4.2% of the FFN channels
of each layer) as LoRA's, of rank 16 on the linear layers: 0.9% of its parameters. Both serve the same weights in one
process and take turns; a figure is the median over the rounds. `--quick` is a rehearsal on a tiny model: its figures
mean nothing, and are written only where `--output` says.
"""

import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx_adapters
import torch
from disk import adapter_of, file_size, merge
from methods import LORA_RANK, Setting, build
from rich.table import Table
from torch import Tensor, nn
from turns import DEVICE, console, facts, goal_table, in_turn, medians, parser, save

import s2ft_compile as s2ft
from s2ft_compile.adapters.fingerprint import samples_of
from s2ft_compile.adapters.format import Adapter
from s2ft_compile.passes.select.select import select

WARM_UP = 2
ADAPTERS = 16  # behind one model, and rows of a batch: each row its own
TARGETS = {"ffn.out": 0.042}
FULL_SIZE = Setting(
    hidden=2048, layers=16, ffn=8192, heads=32, kv_heads=8, vocabulary=128256, batch=ADAPTERS, length=1, tied=True
)
QUICK_SIZE = Setting(
    hidden=64, layers=2, ffn=256, heads=4, kv_heads=2, vocabulary=64, batch=ADAPTERS, length=1, tied=True
)
GIB = 2**30
GOALS = {
    "switch_lora_over_ours": (">=", 16),
    "batch_ours_over_lora": ("<=", 0.78),
    "batch_ours_over_base": ("<=", 1.3),
    "file_over_numbers": ("<=", 1.05),
    "merge_peak_gib": ("<=", 3),
    "onnx_base_speed": (">=", 0.95),
}


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    setting = replace(QUICK_SIZE if arguments.quick else FULL_SIZE, dtype=arguments.dtype, device=DEVICE)
    rounds = 2 if arguments.quick else arguments.rounds
    result = {
        **facts(DEVICE, arguments.quick),
        "model": {**asdict(setting), "targets": TARGETS},
        "lora_rank": LORA_RANK,
        "adapters": ADAPTERS,
    }
    with tempfile.TemporaryDirectory() as folder, console.status("s2ft merge"):
        result["merge"] = merge(Path(folder), 0.01 if arguments.quick else 8.0)
    with torch.no_grad(), console.status("a model, and its adapters"):
        model = model_of(setting)
        adapters = our_adapters(model, setting)
    result["file"] = file_size(adapters[0])
    with torch.no_grad():
        result["batch"] = batch_times(model, adapters, setting, rounds)
        result["switch"] = switch_times(model, adapters[0], rounds)
    with console.status("ONNX"):
        result["onnx"] = onnx_adapters.measure(**({"layers": 2, "rounds": 2} if arguments.quick else {}))
    result["ratios"] = ratios(result)
    console.print(table(result))
    save(result, "adapters", arguments.output)


def _arguments() -> Namespace:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=21, help="rounds that count (default 21)")
    options.add_argument("--dtype", default="bfloat16", help="of the weights (default bfloat16, as that model's are)")
    options.add_argument("--threads", type=int, default=2)
    return options.parse_args()


# --- a model and adapters -----------------------------------------------------------------------------------------


def model_of(setting: Setting) -> nn.Module:
    return build(setting).eval().requires_grad_(False)


def our_adapters(model: nn.Module, setting: Setting) -> list[Adapter]:
    """As if each had been trained from a random selection of its own; random deltas."""
    shape = model_of(replace(setting, device="meta"))
    analysis = s2ft.analyze(shape, {"input_ids": torch.zeros(2, 8, dtype=torch.int64, device="meta")})
    weights, base = dict(model.named_parameters()), samples_of(model)
    slices = []
    for seed in range(ADAPTERS):
        config = s2ft.S2FTConfig(TARGETS, seed=seed)
        chosen = [(s.parameter_name, s.dim, s.roles, s.indices) for s in select(analysis, config, {})]
        slices.append(adapter_of(config, chosen, weights, base, setting.dtype))
    return slices


class BatchedLoRA:
    """Every linear layer of a model with a LoRA for each row: A and B gathered by row, and two batched products."""

    def __init__(self, model: nn.Module):
        self.ids: Tensor | None = None
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and name != "lm_head":
                A = 1e-2 * torch.randn(ADAPTERS, layer.in_features, LORA_RANK).to(layer.weight)
                B = 1e-2 * torch.randn(ADAPTERS, LORA_RANK, layer.out_features).to(layer.weight)
                layer.register_forward_hook(self._hook(A, B))

    def _hook(self, A: Tensor, B: Tensor) -> Callable:
        def add(layer, args, y):
            if self.ids is None:
                return None
            low_rank = torch.einsum("nti,nir->ntr", args[0], A[self.ids])
            return y + torch.einsum("ntr,nro->nto", low_rank, B[self.ids])

        return add

    @contextmanager
    def batch(self, ids: Tensor) -> Iterator[None]:
        self.ids = ids
        try:
            yield
        finally:
            self.ids = None


# --- measurements -------------------------------------------------------------------------------------------------


def batch_times(model: nn.Module, adapters: list[Adapter], setting: Setting, rounds: int) -> dict[str, dict]:
    """One forward of `ADAPTERS` rows of one token, each with an adapter of its own; eager, and compiled."""
    bank, lora = s2ft.AdapterBank(model), BatchedLoRA(model)
    for k, adapter in enumerate(adapters):
        bank.add(str(k), adapter)
    inputs = torch.randint(setting.vocabulary, (ADAPTERS, 1), device=setting.device)
    rows = torch.arange(ADAPTERS, device=setting.device)

    def run(forward, context) -> None:
        with context:
            forward(input_ids=inputs)

    return {
        how: medians(
            in_turn(
                {
                    "base": lambda: run(forward, nullcontext()),
                    "ours": lambda: run(forward, bank.batch(bank.names)),
                    "lora": lambda: run(forward, lora.batch(rows)),
                },
                rounds,
                WARM_UP,
            )
        )
        for how, forward in (("eager", model), ("compiled", torch.compile(model)))
    }


def switch_times(model: nn.Module, adapter: Adapter, rounds: int) -> dict[str, float]:
    """An adapter on and off again, in place: what switching from one to another costs."""
    from peft import LoraConfig, get_peft_model

    bank = s2ft.AdapterBank(model)
    bank.add("ours", adapter)
    config = LoraConfig(r=LORA_RANK, target_modules="all-linear", init_lora_weights=False)
    lora = get_peft_model(model, config, autocast_adapter_dtype=False)

    def ours() -> None:
        bank.activate("ours")
        bank.activate(None)

    def theirs() -> None:
        lora.merge_adapter()
        lora.unmerge_adapter()

    return medians(in_turn({"ours": ours, "lora": theirs}, rounds, WARM_UP))


# --- what is made of them -----------------------------------------------------------------------------------------


def ratios(result: Mapping[str, Any]) -> dict[str, float]:
    switch, batch, file = result["switch"], result["batch"]["eager"], result["file"]
    onnx = (result["onnx"][stage]["speed"]["slices"] for stage in ("prefill", "decode"))
    return {
        "switch_lora_over_ours": switch["lora"] / switch["ours"],
        "batch_ours_over_lora": batch["ours"] / batch["lora"],
        "batch_ours_over_base": batch["ours"] / batch["base"],
        "file_over_numbers": file["files"] / file["numbers"],
        "merge_peak_gib": result["merge"]["peak_bytes"] / GIB,
        "onnx_base_speed": min(onnx),  # the slower of the two, with no adapter active
    }


def table(result: Mapping[str, Any]) -> Table:
    switch, file, done = (result[key] for key in ("switch", "file", "merge"))
    batch, compiled = result["batch"]["eager"], result["batch"]["compiled"]
    notes = {
        "switch_lora_over_ours": f"PEFT merge + unmerge {switch['lora']:.0f} ms, ours {switch['ours']:.1f} ms",
        "batch_ours_over_lora": f"batched LoRA {batch['lora']:.0f} ms, ours {batch['ours']:.0f} ms; "
        f"compiled {compiled['lora']:.0f} and {compiled['ours']:.0f} ms",
        "batch_ours_over_base": f"base model alone {batch['base']:.0f} ms; compiled {compiled['base']:.0f} ms",
        "file_over_numbers": f"{file['files'] / 1e6:.1f} MB on disk",
        "merge_peak_gib": f"{done['checkpoint_bytes'] / 1e9:.1f} GB in 4 shards, {done['seconds']:.0f} s",
        "onnx_base_speed": f"room for {result['onnx']['slices']} slices, none active / plain export, float32",
    }
    model = result["model"]
    title = (
        f"{model['layers']} layers of width {model['hidden']}, {model['dtype']}, {result['device']}, "
        f"{result['threads']} threads, {result['adapters']} adapters"
    )
    return goal_table(GOALS, result["ratios"], notes, title)


if __name__ == "__main__":
    main()
