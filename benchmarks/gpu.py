"""Step times and peak memory on one GPU, bf16, against PEFT's methods, full fine-tuning and the frozen floor.

    python benchmarks/gpu.py [--quick] [--only 8b,4096] [--seconds 500] [--fresh]

Works down `PLAN`, the rows that say most first. S²FT stays on the GPU and each other method takes turns with it, one
step each, so a ratio compares steps of the same seconds; then the other one is freed. Peak memory is what a method's
own step reaches over what the other holds. A run that nears its time limit stops, writes what it has, and says what is
missing; the next run goes on from there (`--fresh`: from the beginning). `--quick` is a rehearsal on any device with a
tiny model: its figures mean nothing, and are written only where `--output` says.
"""

import gc
import json
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from methods import METHODS, NEEDS, QUICK_SIZE, TITLES, Setting, Trial, batch, build
from rich.table import Table
from turns import DEVICE, RESULTS, Run, console, facts, in_turn, medians, parser, save, wall_ms

import s2ft_compile as s2ft
from s2ft_compile.quantized import parts_of
from s2ft_compile.slices.blocks import InPlace
from s2ft_compile.slices.state import state_of

WARM_UP, STEPS = 3, 20
BF16 = dict(vocabulary=128256, heads=32, kv_heads=8, head_dim=128, batch=1, length=512, dtype="bfloat16")
SHAPES = {
    "llama-8b": Setting(hidden=4096, layers=32, ffn=14336, **BF16),
    "llama-1b": Setting(hidden=2048, layers=16, ffn=8192, tied=True, **{**BF16, "head_dim": 64}),
    "qwen3-4b": Setting(hidden=2560, layers=36, ffn=9728, family="qwen3", tied=True, **{**BF16, "vocabulary": 151936}),
}
MAIN = ("floor", "ours_loss", "lora_bf16", "lora_eager", "full")
REST = ("ours_fp8", "ours_recomputed", "lora_recomputed", "lora_liger", "dora", "shira")
# shape, rows, tokens in a row, forwards in a step, methods beside ours
PLAN = (
    ("llama-8b", 1, 4096, 1, MAIN),
    ("llama-8b", 1, 512, 1, MAIN + ("ours_graphs",)),
    ("llama-1b", 1, 4096, 1, MAIN),
    ("llama-8b", 1, 2048, 1, MAIN),
    ("llama-8b", 2, 4096, 1, MAIN),
    ("llama-8b", 1, 4096, 1, REST),
    ("llama-8b", 4, 2048, 4, MAIN),
    ("qwen3-4b", 1, 4096, 1, MAIN),
    ("llama-1b", 4, 2048, 1, MAIN + REST),
    ("llama-1b", 1, 512, 1, MAIN + ("ours_graphs",)),
)


def main() -> None:
    arguments = _arguments()
    torch._dynamo.config.recompile_limit = 64  # every method compiles the same forward
    ends = time.monotonic() + arguments.seconds
    machine = facts(DEVICE, arguments.quick)
    rows = [] if arguments.fresh or arguments.quick else _before(arguments.output or RESULTS / "gpu.json", machine)
    missing: list[str] = []
    for label, setting, methods in settings(arguments):
        have = {row["method"] for row in rows if row["setting"] == label}
        wanted = [m for m in ("ours", *methods) if m not in have]
        if wanted:
            console.print(f"{label}: {', '.join(wanted)}")
            rows += measured(label, setting, wanted, ends, missing)
    tflops = gemm_tflops()
    shapes = {name: asdict(setting) for name, setting in SHAPES.items()}
    console.print(table(rows, tflops))
    save(
        {**machine, "gemm_tflops": tflops, "shapes": shapes, "rows": rows, "missing": missing}, "gpu", arguments.output
    )
    if missing:
        console.print(f"not measured: {'; '.join(missing)}")


def _arguments() -> Namespace:
    options = parser(__doc__)
    options.add_argument("--only", default="", help="parts of a setting's name that it must have, by commas")
    options.add_argument("--seconds", type=float, default=500, help="start nothing new after this (default 500)")
    options.add_argument("--fresh", action="store_true", help="measure again what the output has already")
    return options.parse_args()


def _before(output: Path, machine: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run on the same device."""
    before = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"quick": True}
    return [] if before["quick"] or before["device"] != machine["device"] else before["rows"]


def settings(arguments) -> Iterator[tuple[str, Setting, tuple[str, ...]]]:
    if arguments.quick:
        quick = replace(QUICK_SIZE, device=DEVICE, dtype="bfloat16")
        yield "tiny", quick, tuple(m for m in METHODS if m != "ours")
        yield "tiny, 2 forwards", replace(quick, forwards=2), ("floor", "full")
        return
    for shape, rows, length, forwards, methods in PLAN:
        label = f"{shape}, {rows} x {length}" + (f", {forwards} forwards" if forwards > 1 else "")
        if all(part in label for part in filter(None, arguments.only.split(","))):
            yield label, replace(SHAPES[shape], batch=rows, length=length, forwards=forwards, device=DEVICE), methods


def gemm_tflops(n: int = 8192) -> float | None:
    """TFLOP/s of an n × n × n product in bf16 on random data, the median of 20; none without a GPU."""
    if DEVICE == "cpu":
        return None
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / median(timed(lambda: a @ b, 23)[3:]) / 1e9


def floor_tflop(setting: Setting) -> float:
    """Forward and dX: two products with every weight of the linear layers and the head, and causal attention's two
    products forwards and four backwards."""
    head_dim = setting.head_dim or setting.hidden // setting.heads
    attention = 2 * setting.hidden * head_dim * (setting.heads + setting.kv_heads)
    weights = setting.layers * (attention + 3 * setting.hidden * setting.ffn) + setting.hidden * setting.vocabulary
    scores = setting.layers * setting.heads * head_dim * setting.length / 2
    return setting.tokens * (4 * weights + 12 * scores) / 1e12


# --- measurements ----------------------------------------------------------------------------------------------


def measured(label: str, setting: Setting, methods: list[str], ends: float, missing: list[str]) -> list[dict[str, Any]]:
    """A row for each method that fits into time and memory; ours runs beside each."""
    inputs, rows, ours = batch(setting), [], None
    for method in methods:
        lacks = [p for p in NEEDS.get(method, ()) if not find_spec(p)]
        if lacks or time.monotonic() > ends:
            missing.append(f"{label}, {method} ({'no ' + lacks[0] if lacks else 'no time left'})")
            continue
        try:
            ours = ours or METHODS["ours"](setting)
            if method == "ours":
                rows.append(
                    {
                        **_row(label, method, setting, ours, inputs),
                        "over_ours": 1.0,
                        "predicted_bytes": predicted_bytes(setting),
                    }
                )
            else:
                rows.append(_against(label, method, setting, ours, inputs))
        except torch.cuda.OutOfMemoryError:
            missing.append(f"{label}, {method} (out of memory)")
        _free()
    del ours
    _free()
    return rows


def predicted_bytes(setting: Setting) -> int:
    """What `s2ft estimate` says of ours."""
    shape = replace(setting, device="cpu", batch=setting.batch // setting.forwards)
    return s2ft.estimate(build(replace(shape, device="meta")), batch(shape), s2ft.S2FTConfig(setting.targets)).total


def _against(label: str, method: str, setting: Setting, ours: Trial, inputs) -> dict[str, Any]:
    """The other method's row, with its step time over that of our steps between its own."""
    other = METHODS[method](setting)
    row = _row(label, method, setting, other, inputs)
    both = {"ours": partial(ours.step, inputs), method: partial(other.step, inputs)}
    step_ms = medians(in_turn(both, STEPS, WARM_UP, device_ms))  # ours compiles again where `_free` forgot the graphs
    return {**row, "over_ours": step_ms[method] / step_ms["ours"]}


def _row(label: str, method: str, setting: Setting, trial: Trial, inputs) -> dict[str, Any]:
    for _ in range(WARM_UP):
        trial.step(inputs)
    others = _held() - _weights(trial)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step_ms = median(timed(partial(trial.step, inputs), STEPS))
    peak = torch.cuda.max_memory_allocated() - others if DEVICE == "cuda" else None
    return {
        "setting": label,
        "method": method,
        "tokens_per_step": setting.tokens,
        "length": setting.length,
        "step_ms": step_ms,
        "tokens_per_s": 1e3 * setting.tokens / step_ms,
        "peak_bytes": peak,
        "weight_bytes": _bytes([*trial.model.parameters(), *trial.model.buffers()]),
        "floor_tflop": floor_tflop(setting),
        "trainable_parameters": trial.trainable,
    }


def device_ms(run: Run) -> float:
    """Milliseconds of one call, by device events where there is a GPU."""
    return timed(run, 1)[0]


def timed(run: Run, times: int) -> list[float]:
    """Milliseconds of each of some calls, one right after the other."""
    if DEVICE == "cpu":
        return [wall_ms(run) for _ in range(times)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]


def _held() -> int:
    return torch.cuda.memory_allocated() if DEVICE == "cuda" else 0


def _weights(trial: Trial) -> int:
    """Bytes that a trial holds between its steps: weights, buffers, backups, gradients and optimizer state."""
    tensors = [*trial.model.parameters(), *trial.model.buffers()]
    if s2ft.is_prepared(trial.model):
        blocks = state_of(trial.model).blocks
        tensors += [block.backup for block in blocks if isinstance(block, InPlace)]
    tensors += [p.grad for p in trial.leaves if p.grad is not None]
    for state in (trial.optimizer.state if trial.optimizer else {}).values():
        tensors += [t for t in state.values() if isinstance(t, torch.Tensor)]
    return _bytes(tensors)


def _bytes(tensors: list[torch.Tensor]) -> int:
    """Of the storages of tensors, plain or made of others."""
    storages = [t.untyped_storage() for _, t in parts_of(("", t) for t in tensors)]
    return sum(storage.nbytes() for storage in {storage.data_ptr(): storage for storage in storages}.values())


def _free() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def table(rows: list[dict[str, Any]], tflops: float | None) -> Table:
    table = Table("setting", "method", "step", "tokens/s", "× ours", "of the FLOP floor", "peak")
    for row in rows:
        peak = f"{row['peak_bytes'] / 2**30:.1f} GiB" if row["peak_bytes"] else ""
        share = f"{1e3 * row['floor_tflop'] / tflops / row['step_ms']:.0%}" if tflops else ""
        table.add_row(
            row["setting"],
            TITLES[row["method"]],
            f"{row['step_ms']:.1f} ms",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['over_ours']:.2f}",
            share,
            peak,
        )
    return table


if __name__ == "__main__":
    main()
