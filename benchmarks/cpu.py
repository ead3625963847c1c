"""Step times, saved activations and compile times on a CPU, against LoRA, full fine-tuning and the frozen floor.

    python benchmarks/cpu.py [--quick] [--output benchmarks/results/cpu.json] [--steps 12] [--threads 2]

All methods train the same Llama-style model in one process and take turns, one step each, so that whatever else the
machine does meets them all alike; a figure is the median over the rounds. First steps are measured in processes of
their own, each pair with a fresh compile cache. `--quick` is a rehearsal on a tiny model: its figures mean nothing, and
are written only where `--output` says.
"""

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from methods import CPU_METHODS, FULL_SIZE, METHODS, QUICK_SIZE, TITLES, Setting, batch, build
from rich.progress import track
from rich.table import Table
from saved import saved_bytes, units_per_layer
from turns import console, facts, goal_table, in_turn, parser, save, wall_ms

import s2ft_compile as s2ft

HERE = Path(__file__).resolve().parent
WARM_UP = 3
# hidden d, FFN 3.5 d, 4 queries per kv head, bf16; slices of attention too, whose inputs are saved as well
BLOCK = Setting(
    hidden=256,
    layers=1,
    ffn=896,
    heads=8,
    kv_heads=2,
    vocabulary=64,
    batch=2,
    length=512,
    dtype="bfloat16",
    targets={"attention.out": 1, "ffn.out": 0.01},
)
DEPTHS = (2, 4)  # layers; the difference leaves out what lies outside of them
GOALS = {
    "full_over_ours": (">=", 1.5),
    "lora_compiled_over_ours": (">=", 1.15),
    "lora_eager_over_ours": (">=", 1.3),
    "ours_over_floor": ("<=", 1.08),
    "saved_activation_d": ("<=", 11.8),
    "prepare_s": ("<=", 5.0),
    "compile_ours_over_stock": ("<=", 1.2),
    "compile_cold_over_warm": (">=", 2.0),
}


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    setting = QUICK_SIZE if arguments.quick else FULL_SIZE
    parameters = sum(p.numel() for p in build(setting).parameters())
    result = {**facts("cpu", arguments.quick), "model": {**asdict(setting), "parameters": parameters}}
    result["compile"] = compile_times(arguments.quick, arguments.threads)
    result["prepare_s"] = prepare_seconds(setting)
    result["rows"] = step_rows(setting, 2 if arguments.quick else arguments.steps)
    result["saved_activations"] = saved_activations(arguments.quick)
    result["ratios"] = ratios(result["rows"], result["saved_activations"])
    for table in tables(result):
        console.print(table)
    save(result, "cpu", arguments.output)


def _arguments() -> Namespace:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=12, help="steps of each method that count (default 12)")
    options.add_argument("--threads", type=int, default=2)
    return options.parse_args()


# --- measurements ----------------------------------------------------------------------------------------------


def prepare_seconds(setting: Setting) -> float:
    """Seconds of `prepare`, all of it: tracing, inference, selection, fingerprint and permutation."""
    model, inputs = build(setting), {"input_ids": batch(setting)["input_ids"]}
    return wall_ms(lambda: s2ft.prepare(model, inputs, s2ft.S2FTConfig(setting.targets))) / 1e3


def step_rows(setting: Setting, steps: int) -> list[dict[str, Any]]:
    """One row a method."""
    inputs = batch(setting)
    trials = {name: METHODS[name](setting) for name in CPU_METHODS}
    with console.status("training steps"):
        times = in_turn({name: partial(trial.step, inputs) for name, trial in trials.items()}, steps, WARM_UP)
    return [
        {
            "method": name,
            "step_ms": median(times[name]),
            "step_ms_quartiles": quantiles(times[name], n=4)[::2],
            "tokens_per_step": setting.tokens,
            "trainable_parameters": trial.trainable,
            "saved_activation_bytes": saved_bytes(trial.model, inputs),
        }
        for name, trial in trials.items()
    ]


def saved_activations(quick: bool) -> list[dict[str, Any]]:
    """Per token and layer of a bf16 Llama block, in units of the hidden size, from two depths."""
    setting = replace(QUICK_SIZE, dtype="bfloat16") if quick else BLOCK
    names = track([name for name in CPU_METHODS if name != "floor"], "saved activations", console=console)
    return [{"method": name, "d_per_token_and_layer": units_per_layer(name, setting, DEPTHS)} for name in names]


def compile_times(quick: bool, threads: int) -> dict[str, float]:
    """First steps of stock Inductor on the frozen model and of ours, each with an empty cache; then ours again."""
    with tempfile.TemporaryDirectory() as folder:
        order = [("stock_cold_s", "floor"), ("ours_cold_s", "ours"), ("ours_warm_s", "ours")]
        seconds = {
            key: _first_step(method, Path(folder) / method, quick, threads)
            for key, method in track(order, "first steps", console=console)
        }
    return {
        **seconds,
        "ours_over_stock": seconds["ours_cold_s"] / seconds["stock_cold_s"],
        "cold_over_warm": seconds["ours_cold_s"] / seconds["ours_warm_s"],
    }


def _first_step(method: str, cache: Path, quick: bool, threads: int) -> float:
    command = [sys.executable, HERE / "first_step.py", method, "--threads", str(threads), *["--quick"] * quick]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["compile_s"]


# --- what is made of them --------------------------------------------------------------------------------------


def ratios(rows: list[dict[str, Any]], saved: list[dict[str, Any]]) -> dict[str, float]:
    ms = {row["method"]: row["step_ms"] for row in rows}
    return {
        "full_over_ours": ms["full"] / ms["ours"],
        "lora_compiled_over_ours": ms["lora_compiled"] / ms["ours"],
        "lora_eager_over_ours": ms["lora_eager"] / ms["ours"],
        "ours_over_floor": ms["ours"] / ms["floor"],
        "saved_activation_d": next(s["d_per_token_and_layer"] for s in saved if s["method"] == "ours"),
    }


def tables(result: Mapping[str, Any]) -> list[Table]:
    model, saved = result["model"], {s["method"]: s["d_per_token_and_layer"] for s in result["saved_activations"]}
    title = (
        f"{model['parameters'] / 1e6:.1f}M-parameter Llama, {model['batch']} × {model['length']} tokens a step, "
        f"{model['dtype']}, {result['threads']} threads"
    )
    methods = Table("method", "step", "trainable", "saved activations", "per token and layer (bf16)", title=title)
    for row in result["rows"]:
        name = row["method"]
        methods.add_row(
            TITLES[name],
            f"{row['step_ms']:.0f} ms",
            f"{row['trainable_parameters'] / model['parameters']:.2%}",
            f"{row['saved_activation_bytes'] / 2**20:.1f} MiB",
            f"{saved[name]:.2f} d" if name in saved else "",
        )
    measured = {
        **result["ratios"],
        "prepare_s": result["prepare_s"],
        **{f"compile_{key}": value for key, value in result["compile"].items()},
    }
    return [methods, goal_table(GOALS, measured)]


if __name__ == "__main__":
    main()
