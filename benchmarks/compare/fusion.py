"""Two adapters in one model: what each task keeps of what it learned when the changes of both are added.

    python benchmarks/compare/fusion.py [--tasks facts,near] [--seeds 3]

Each method trains an adapter for either task at its best rate of `compare-SETTING.jsonl`'s rows; the fused model is the
base with both changes of weights. S²FT apart: the second adapter trains no entry that the first one changed (`exclude`,
the paper's non-overlapped fusion). One line of JSON for each method and seed.
"""

import argparse
import copy
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from base import SETTINGS
from contenders import CONTENDERS
from run import HERE, Bench, Row, append, read
from torch import Tensor, nn

import s2ft_compile as s2ft
from s2ft_compile import exporters

METHODS = {"full": "full", "lora": "lora", "s2ft": "s2ft", "s2ft_once": "s2ft_once", "s2ft_apart": "s2ft_once"}
ROWS = HERE.parent / "results" / "compare.jsonl"


def fused(bench: Bench, tasks: list[str], method: str, seed: int, best: dict[str, float]) -> Row:
    """One line: of each task the loss and what is right, alone and fused, and what is left of the old facts. overlap:
    how many numbers both change."""
    contender, changes = CONTENDERS[METHODS[method]], []
    result: Row = {"method": method, "seed": seed, "tasks": tasks}
    base = {name: p.detach().clone() for name, p in bench.base.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        for number, task in enumerate(tasks):
            if number and method.endswith("apart"):  # its norms are taken, too
                options = {**contender.options, "parts": contender.options["parts"][:2], "exclude": (f"{folder}/0",)}
                contender = replace(contender, options=options)
            model = bench.train(task, contender, best[task], seed)[0].model
            result[f"{task}_alone"] = _of(bench, model, task)
            if contender.kind == "s2ft":
                exporters.save_adapter(model, f"{folder}/{number}")
            changes.append({name: p - base[name] for name, p in _merged(model).items()})
    model = copy.deepcopy(bench.base)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(sum(change[name] for change in changes))
    overlap = sum(int((first[name].ne(0) & second[name].ne(0)).sum()) for first, second in [changes] for name in base)
    return result | {"overlap": overlap} | {f"{task}_fused": _of(bench, model, task) for task in tasks}


def _merged(model: nn.Module) -> dict[str, Tensor]:
    """The trained weights by the base model's names."""
    model = copy.deepcopy(model)
    if s2ft.is_prepared(model):
        s2ft.release(model)
    elif hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    return {name: p.detach() for name, p in model.named_parameters()}


def _of(bench: Bench, model: nn.Module, task: str) -> dict[str, float]:
    measured = bench.measured(model, bench.tasks[task])
    return {key: measured[key] for key in ("test_loss", "test_exact", "facts_exact", "docs_loss") if key in measured}


def _best(rows: list[Row], method: str, tasks: list[str]) -> dict[str, float]:
    """The exponent of each task's best rate, by the first seed's rows for choosing."""
    of = {task: [r for r in rows if (r["task"], r["method"], r["seed"]) == (task, method, 0)] for task in tasks}
    return {task: min(listed, key=lambda r: r["choose_loss"])["exponent"] for task, listed in of.items()}


def _lines(given: argparse.Namespace) -> Iterator[Row]:
    bench, rows, done = Bench(SETTINGS[given.setting]), read(given.best), read(given.rows)
    for seed in range(given.seeds):
        for method in given.methods:
            if not any((r["method"], r["seed"], r["tasks"]) == (method, seed, given.tasks) for r in done):
                yield fused(bench, given.tasks, method, seed, _best(rows, METHODS[method], given.tasks))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--setting", choices=list(SETTINGS), default="default")
    options.add_argument("--tasks", type=lambda s: s.split(","), default=["facts", "near"])
    options.add_argument("--methods", type=lambda s: s.split(","), default=list(METHODS))
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--best", type=Path, default=ROWS)
    options.add_argument("--rows", type=Path, default=Path("build/compare-fusion.jsonl"))
    given = options.parse_args()
    for line in _lines(given):
        append(given.rows, line)
        print(line, flush=True)


if __name__ == "__main__":
    main()
