"""What the benchmarks share: methods that take turns, the facts of a run, goals with their verdicts, and its file."""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import date
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel", "onnxruntime", "s2ft-compile")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RESULTS = Path(__file__).resolve().parent / "results"
Run = Callable[[], Any]
Goals = Mapping[str, tuple[str, float]]  # figure -> (">=" or "<=", value)

console = Console()


# --- turns -------------------------------------------------------------------------------------------------------


def wall_ms(run: Run) -> float:
    """Milliseconds of one call, with what it does on a GPU."""
    _wait()
    began = time.perf_counter()
    run()
    _wait()
    return 1e3 * (time.perf_counter() - began)


def cpu_ms(run: Run) -> float:
    """Milliseconds of the process's CPU time in one call."""
    began = time.process_time()
    run()
    return 1e3 * (time.process_time() - began)


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def in_turn(
    trials: Mapping[str, Run], rounds: int, warm_up: int, clock: Callable[[Run], float] = wall_ms
) -> dict[str, list[float]]:
    """What the clock says of each call, in milliseconds, by method.

    Every round runs all methods and starts with another one; the first `warm_up` rounds are thrown away.
    """
    names, spent = list(trials), {name: [] for name in trials}
    for turn in range(warm_up + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            spent[name].append(clock(trials[name]))
    return {name: times[warm_up:] for name, times in spent.items()}


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: median(seconds) for name, seconds in times.items()}


# --- one run of a benchmark --------------------------------------------------------------------------------------


def parser(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models and few rounds, to see that everything runs")
    parser.add_argument("--output", type=Path, help="JSON (default: in benchmarks/results/; with --quick none)")
    return parser


def facts(device: str, quick: bool) -> dict[str, Any]:
    """What the figures of a run depend on, whatever it measures."""
    return {
        "date": date.today().isoformat(),
        "quick": quick,
        "versions": versions(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def goal_table(goals: Goals, measured: Mapping[str, float], notes: Mapping[str, str] = {}, title: str = "") -> Table:
    """Each goal, what was measured, and whether it is met."""
    table = Table("figure", "measured", "goal", "", "", title=title)
    for name, (sense, goal) in goals.items():
        met = measured[name] >= goal if sense == ">=" else measured[name] <= goal
        verdict = "[green]met[/]" if met else "[red]missed[/]"
        table.add_row(name, f"{measured[name]:.3g}", f"{sense} {goal:g}", verdict, notes.get(name, ""))
    return table


def save(result: Mapping[str, Any], name: str, output: Path | None) -> None:
    """As JSON, into `results/` if not elsewhere; a rehearsal's figures only where one asks for them."""
    if output is None and result["quick"]:
        return
    output = output or RESULTS / f"{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(f"wrote {output}")
