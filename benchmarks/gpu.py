"""Step times and peak memory on one GPU, bf16, against LoRA, full fine-tuning and the frozen floor.

    python benchmarks/gpu.py [--quick] [--models llama-1b,llama-8b] [--tokens 512,2048,8192] [--seconds 500]

Ours stays on the GPU and each other method takes turns with it, one step each, so a ratio compares steps of the same
seconds; then the other one is freed. Peak memory is what a method's own step reaches over what the other holds. A
run that nears its time limit stops, writes what it has, and says what is missing. `--quick` is a rehearsal on any
device with a tiny model: its figures mean nothing.
"""

import argparse
import gc
import json
import platform
import time
from dataclasses import asdict, replace
from datetime import date
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, Callable, Iterator

import torch
from methods import METHODS, QUICK_SIZE, TITLES, Setting, Trial, batch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
WARM_UP, STEPS = 3, 20
SHAPES = {
    "llama-1b": Setting(hidden=2048, layers=16, ffn=8192, heads=32, kv_heads=8, vocabulary=128256, batch=1, length=512),
    "llama-8b": Setting(hidden=4096, layers=32, ffn=14336, heads=32, kv_heads=8, vocabulary=128256, batch=1, length=512),
}
OTHERS = ("floor", "lora_compiled", "lora_eager", "full")
console = Console()


def main() -> None:
    arguments = _arguments()
    ends = time.monotonic() + arguments.seconds
    rows, missing = [], []
    for name, setting in settings(arguments):
        console.print(f"{name}, {setting.batch} × {setting.length} tokens")
        rows += measured(name, setting, ends, missing)
    result = {"date": date.today().isoformat(), "quick": arguments.quick, **facts(arguments), "rows": rows,
              "missing": missing}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(table(rows), f"wrote {arguments.output}", sep="\n")
    if missing:
        console.print(f"not measured: {'; '.join(missing)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that everything runs")
    parser.add_argument("--models", default="llama-1b,llama-8b")
    parser.add_argument("--tokens", default="512,2048,8192", help="tokens per step, in rows of at most 4096")
    parser.add_argument("--seconds", type=float, default=500, help="start nothing new after this (default 500)")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "gpu.json")
    arguments = parser.parse_args()
    unknown = set(arguments.models.split(",")) - set(SHAPES)
    if unknown:
        parser.error(f"unknown model {', '.join(unknown)}; valid: {', '.join(SHAPES)}")
    return arguments


def settings(arguments) -> Iterator[tuple[str, Setting]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.quick:
        yield "tiny", replace(QUICK_SIZE, device=device, dtype="bfloat16")
        return
    for name in arguments.models.split(","):
        for tokens in map(int, arguments.tokens.split(",")):
            length = min(tokens, 4096)
            yield name, replace(SHAPES[name], batch=tokens // length, length=length, device=device, dtype="bfloat16")


def facts(arguments) -> dict[str, Any]:
    """What the figures depend on, and the rate of a large product in the same run."""
    packages = [p for p in ("torch", "triton", "transformers", "peft") if find_spec(p)]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "gpu": gpu,
        "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}},
        "gemm_tflops": gemm_tflops() if gpu else None,
        "shapes": {name: asdict(setting) for name, setting in SHAPES.items()},
    }


def gemm_tflops(n: int = 8192) -> float:
    """TFLOP/s of an n × n × n product in bf16 on random data, the median of 20."""
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / median(timed(lambda: a @ b, 23)[3:]) / 1e9


# --- measurements ----------------------------------------------------------------------------------------------


def measured(name: str, setting: Setting, ends: float, missing: list[str]) -> list[dict[str, Any]]:
    """A row for ours and for each other method that fits into time and memory."""
    inputs, rows = batch(setting), []
    ours = METHODS["ours"](setting)
    row = _row(name, "ours", setting, ours, inputs)
    rows.append({**row, "over_ours": 1.0})
    for method in OTHERS:
        label = f"{name}, {setting.tokens} tokens, {method}"
        if method.startswith("lora") and not find_spec("peft"):
            missing.append(f"{label} (no peft)")
        elif time.monotonic() > ends:
            missing.append(f"{label} (no time left)")
        else:
            try:
                rows.append(_against(name, method, setting, ours, inputs))
            except torch.cuda.OutOfMemoryError:
                missing.append(f"{label} (out of memory)")
        _free()
    del ours
    _free()
    return rows


def _against(name: str, method: str, setting: Setting, ours: Trial, inputs) -> dict[str, Any]:
    """The other method's row, with its step time over that of our steps between its own."""
    other = METHODS[method](setting)
    row = _row(name, method, setting, other, inputs)
    ours.step(inputs)
    pairs = [(timed(lambda: ours.step(inputs), 1)[0], timed(lambda: other.step(inputs), 1)[0]) for _ in range(STEPS)]
    return {**row, "over_ours": median(theirs for _, theirs in pairs) / median(mine for mine, _ in pairs)}


def _row(name: str, method: str, setting: Setting, trial: Trial, inputs) -> dict[str, Any]:
    for _ in range(WARM_UP):
        trial.step(inputs)
    others = _held() - _weights(trial)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    step_ms = median(timed(lambda: trial.step(inputs), STEPS))
    peak = torch.cuda.max_memory_allocated() - others if torch.cuda.is_available() else None
    return {"model": name, "method": method, "tokens_per_step": setting.tokens, "length": setting.length,
            "step_ms": step_ms, "tokens_per_s": 1e3 * setting.tokens / step_ms, "peak_bytes": peak,
            "trainable_parameters": trial.trainable}


def timed(run: Callable, times: int) -> list[float]:
    """Milliseconds of each call, by device events where there is a GPU."""
    if not torch.cuda.is_available():
        return [_host_ms(run) for _ in range(times)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]


def _host_ms(run: Callable) -> float:
    began = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - began)


def _held() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _weights(trial: Trial) -> int:
    """Bytes that a trial holds between its steps: weights, buffers, gradients and optimizer state."""
    tensors = [*trial.model.parameters(), *trial.model.buffers()]
    tensors += [p.grad for p in trial.leaves if p.grad is not None]
    for state in (trial.optimizer.state if trial.optimizer else {}).values():
        tensors += [t for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(storage.nbytes() for storage in {t.untyped_storage().data_ptr(): t.untyped_storage()
                                                for t in tensors}.values())


def _free() -> None:
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table("model", "tokens", "method", "step", "tokens/s", "× ours", "peak")
    for row in rows:
        peak = f"{row['peak_bytes'] / 2**30:.1f} GiB" if row["peak_bytes"] else ""
        made.add_row(row["model"], str(row["tokens_per_step"]), TITLES[row["method"]], f"{row['step_ms']:.1f} ms",
                     f"{row['tokens_per_s']:,.0f}", f"{row['over_ours']:.2f}", peak)
    return made


if __name__ == "__main__":
    main()
