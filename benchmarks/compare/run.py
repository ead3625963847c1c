"""What S²FT learns and forgets beside other ways of fine-tuning, each at the learning rate that suits it best.

    python benchmarks/compare/run.py [--quick | --small | --large] [--tasks far,skill] [--methods s2ft,lora] [--seeds 3]

A small model is pretrained on the spot (once; it lies in the user's cache folder), then tuned on every task by every
method. A method's learning rates are powers of the square root of ten, searched until the best one by the task's rows
for choosing has a worse one on both sides; that rate is run with every seed. One line of JSON is written per run into
`--rows`, and a run whose line is there is not run again. `report.py` makes tables and the figure of it.
"""

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median

import torch
from base import DEVICE, SETTINGS, Setting, base
from contenders import CONTENDERS, MAIN, Contender, Tuned, optimizer, tuned
from material import IGNORED, Material, Rows, Task
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from torch.optim.lr_scheduler import LambdaLR

HERE = Path(__file__).resolve().parent
STEP = 0.5  # of the exponent of ten, between two learning rates
LIMITS = (-6.0, 1.0)  # of the exponent
CALIBRATION = 4  # batches of the task that a selection looks at
Row = dict[str, object]


class Bench:
    """A setting's base model, its tasks, and what the base model says of them."""

    def __init__(self, setting: Setting, say: Callable[[str], None] = print):
        self.setting = setting
        self.material = Material(setting.length)
        self.base = base(setting, self.material, say)
        self.tasks, self.kept = self.material.tasks(), self.material.kept()

    def batch_size(self, task: Task) -> int:
        return self.setting.lines if task.train.exact else self.setting.rows

    @cached_property
    def known(self) -> Tensor:
        """Log-probabilities of the base model on the documentation, (rows, length, vocabulary)."""
        return self._logits(self.base, self.kept["docs"]).log_softmax(-1)

    def row(self, task_name: str, method: str, exponent: float, seed: int) -> Row:
        """One run: trains a copy of the base model, and measures all that is reported."""
        trial, opt, spent = self.train(task_name, CONTENDERS[method], exponent, seed)
        held = sum(v.numel() * v.element_size() for s in opt.state.values() for v in s.values() if v.ndim)
        return {
            "setting": self.setting.name,
            "steps": self.setting.steps,
            "task": task_name,
            "method": method,
            "exponent": exponent,
            "rate": 10**exponent,
            "seed": seed,
            "numbers": trial.numbers,
            "step_cpu_ms": 1e3 * median(spent),
            "training_bytes": held + 4 * trial.numbers,
            **self.measured(trial.model, self.tasks[task_name]),
        }

    def train(
        self, task_name: str, contender: Contender, exponent: float, seed: int
    ) -> tuple[Tuned, torch.optim.Optimizer, list[float]]:
        """A trained copy of the base model, its optimizer, and the CPU seconds of each step."""
        setting, batches = self.setting, self._batches(self.tasks[task_name], seed)
        calibration = [next(batches) for _ in range(CALIBRATION)]
        trial = tuned(contender, self.base, setting, seed, calibration)
        trial.model.train()
        spent = []
        opt = optimizer(contender, trial, 10**exponent, setting.steps)
        rates = LambdaLR(opt, partial(schedule, steps=setting.steps))
        period = math.ceil(setting.steps / contender.again)
        for step in range(setting.steps):
            if step and step % period == 0:
                trial.again(seed + 1000 * step)
            began = time.process_time()
            loss = trial.net(**next(batches)).loss
            loss.backward()
            opt.step()
            rates.step()
            opt.zero_grad()
            spent.append(time.process_time() - began)
            if not math.isfinite(loss.item()):
                break
        return trial, opt, spent

    def measured(self, net: nn.Module, task: Task) -> Row:
        net.eval()
        parts = {name: getattr(task, name) for name in ("choose", "test", "far")} | self.kept
        logits = {name: self._logits(net, rows) for name, rows in parts.items()}
        scores = {f"{name}_{key}": v for name in parts for key, v in score(logits[name], parts[name]).items()}
        docs = logits["docs"].log_softmax(-1)
        kl = kl_div(docs, self.known, log_target=True, reduction="sum").item() / docs[..., 0].numel()
        return {**scores, "kl": kl}

    @torch.no_grad()
    def _logits(self, net: nn.Module, rows: Rows) -> Tensor:
        parts = rows.tokens.to(DEVICE).split(32)
        return torch.cat([net(input_ids=part).logits.float() for part in parts])

    def _batches(self, task: Task, seed: int) -> Iterator[dict[str, Tensor]]:
        generator, size = torch.Generator().manual_seed(seed), self.batch_size(task)
        while True:
            order = torch.randperm(len(task.train), generator=generator)
            for start in range(0, len(order) - size + 1, size):
                rows = task.train[order[start : start + size]]
                yield {"input_ids": rows.tokens.to(DEVICE), "labels": rows.labels.to(DEVICE)}


def score(logits: Tensor, rows: Rows) -> dict[str, float]:
    """loss: nats per learned token. exact: the share of the rows all of whose answer is the likeliest, token by token,
    which is what greedy decoding gives.
    """
    logits, labels = logits[:, :-1], rows.labels[:, 1:].to(logits.device)
    scores = {"loss": cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED).item()}
    if rows.exact:
        right = (logits.argmax(-1) == labels) | (labels == IGNORED)
        scores["exact"] = right.all(1).double().mean().item()
    return scores


def schedule(step: int, steps: int) -> float:
    """A tenth of warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / (0.1 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


# --- the search --------------------------------------------------------------------------------------------------


def search(loss: Callable[[float], float], start: float) -> float:
    """The exponent whose loss is least among neighbours on both sides, found from `start` on; a limit where there is
    none. loss: infinite where a run diverged.
    """
    losses: dict[float, float] = {}

    def at(exponent: float) -> float:
        if exponent not in losses:
            value = loss(exponent)
            losses[exponent] = value if math.isfinite(value) else math.inf
        return losses[exponent]

    at(start)
    while True:
        best = min(losses, key=lambda e: (losses[e], e))
        around = [e for e in (best + STEP, best - STEP) if LIMITS[0] <= e <= LIMITS[1] and e not in losses]
        if not around:
            return best
        at(around[0])


def job(
    run: Callable[[float, int], Row],
    start: float,
    seeds: int,
    done: list[Row],
    write: Callable[[Row], None],
    between: bool = False,
) -> None:
    """Searches a method's rate for a task with the first seed, from the exponent `start` on, and runs the best one with
    the others. done: rows that are not run again. between: also the rate halfway to the next smaller one, with the
    first seed, for another point of what is kept by what is learned.
    """
    rows = {(r["exponent"], r["seed"]): r for r in done}

    def loss(exponent: float, seed: int) -> float:
        if (exponent, seed) not in rows:
            rows[exponent, seed] = run(exponent, seed)
            write(rows[exponent, seed])
        return rows[exponent, seed]["choose_loss"]

    best = search(lambda exponent: loss(exponent, 0), start)
    for seed in range(1, seeds):
        loss(best, seed)
    if between:
        loss(best - STEP / 2, 0)


# --- the command -------------------------------------------------------------------------------------------------


def main() -> None:
    given = _arguments()
    setting = replace(SETTINGS[given.setting], **({"steps": given.steps} if given.steps else {}))
    bench = Bench(setting)
    done = read(given.rows)
    if not any(r["method"] == "base" for r in done):
        for name, task in bench.tasks.items():
            row = {"setting": setting.name, "task": name, "method": "base", "exponent": 0.0, "seed": 0}
            append(given.rows, {**row, **bench.measured(bench.base, task)})
    tasks, methods = given.tasks or list(bench.tasks), given.methods or list(MAIN)
    jobs = [(t, m) for m in methods for t in tasks]
    of = {(t, m): [r for r in done if (r["task"], r["method"]) == (t, m)] for t, m in jobs}
    for number, line in enumerate(_all(bench, jobs, given, of), 1):
        print(f"{number}/{len(jobs)}: {line}", flush=True)


def _all(bench: Bench, jobs: list, given: argparse.Namespace, of: dict) -> Iterator[str]:
    """Does all jobs, here or in processes of their own, and says what each one took."""
    global _bench
    how = given.seeds, given.between, given.rows
    if given.workers == 1:
        _bench = bench
        yield from (_work(t, m, of[t, m], *how) for t, m in jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.workers, context, _start, (asdict(bench.setting),)) as pool:
        waiting = [pool.submit(_work, t, m, of[t, m], *how) for t, m in jobs]
        yield from (ended.result() for ended in as_completed(waiting))


_bench: Bench | None = None
_parent = 0  # the process that asks, where this is one of its workers


def _start(setting: dict) -> None:
    global _bench, _parent
    torch.set_num_threads(1)
    _bench, _parent = Bench(Setting(**setting)), os.getppid()


def _work(task: str, method: str, done: list[Row], seeds: int, between: bool, rows: Path) -> str:
    began, written = time.perf_counter(), []

    def write(row: Row) -> None:
        written.append(row)
        append(rows, row)
        if _parent and os.getppid() != _parent:  # it was killed, and nobody waits for more
            os._exit(1)

    job(partial(_bench.row, task, method), CONTENDERS[method].rate, seeds, done, write, between)
    return f"{task}, {method}: {len(written)} runs in {time.perf_counter() - began:.0f} s"


def read(path: Path) -> list[Row]:
    """The rows of a file; a last line that was cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append(path: Path, row: Row) -> None:
    """One write, which the system does whole: several processes append to the file."""
    with open(path, "ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        cut = size and file.read(1) != b"\n"  # a run that was killed as it wrote
        file.write(b"\n" * bool(cut) + json.dumps(row).encode() + b"\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("quick", "small", "large"):
        parser.add_argument(f"--{name}", action="store_const", const=name, dest="setting", default="default")
    parser.add_argument("--tasks", type=lambda s: s.split(","), help="default: all")
    parser.add_argument("--methods", type=lambda s: s.split(","), help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--between", action="store_true", help="also a rate halfway below the best, with one seed")
    parser.add_argument("--steps", type=int, help="of tuning (default: the setting's); give --rows with it")
    parser.add_argument("--workers", type=int, default=1 if DEVICE == "cuda" else os.cpu_count())
    parser.add_argument("--rows", type=Path, help="the file of runs (default: compare-SETTING.jsonl)")
    given = parser.parse_args()
    given.rows = given.rows or Path(f"compare-{given.setting}.jsonl")
    return given


if __name__ == "__main__":
    main()
