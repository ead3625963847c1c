"""Tables and the figure of a file of runs.

    python benchmarks/compare/report.py compare-default.jsonl [--into docs/results.md] [--figure docs/results.svg]

A method's rows are those at the rate that its first seed chose; a figure is the mean over the seeds, with half of its
95% confidence interval (Student's t). Every rate that was tried is a point of the figure.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev

from contenders import CONTENDERS, MAIN, VARIANTS
from run import STEP, Row, read

T95 = (math.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # by degrees of freedom
TASKS = ("near", "far", "skill", "facts", "form")
TITLES = {
    "near": "near: other docs",
    "far": "far: source code",
    "skill": "skill: reverse",
    "facts": "new facts",
    "form": "known facts, new form",
}
TEXT = ("near", "far")  # whose figure is a loss; of the others the share of exact answers
BEGIN, END = "<!-- made by benchmarks/compare/report.py: begin -->", "<!-- end -->"


class Runs:
    """The rows of a file, by task and method."""

    def __init__(self, rows: Iterable[Row]):
        self.all: dict[tuple[str, str], list[Row]] = defaultdict(list)
        for row in rows:
            self.all[row["task"], row["method"]].append(row)

    def best(self, task: str, method: str) -> list[Row]:
        """The rows at the rate whose first seed has the least loss on the rows for choosing, of the rates that a search
        tries; empty without runs."""
        rows = [r for r in self.all.get((task, method), []) if r["exponent"] % STEP == 0]
        finite = [r for r in rows if r["seed"] == 0 and math.isfinite(r["choose_loss"])]
        if not finite:
            return []
        chosen = min(finite, key=lambda r: r["choose_loss"])["exponent"]
        return [r for r in rows if r["exponent"] == chosen]

    def curve(self, task: str, method: str) -> list[Row]:
        """One row a rate, of the first seed."""
        rows = [r for r in self.all.get((task, method), []) if r["seed"] == 0 and math.isfinite(r["test_loss"])]
        return sorted(rows, key=lambda r: r["exponent"])

    def below(self, task: str, method: str) -> list[Row]:
        """The rows at the rate halfway from the best one to the next smaller one."""
        at = {r["exponent"] - STEP / 2 for r in self.best(task, method)}
        return [r for r in self.all[task, method] if r["exponent"] in at]

    def gain(self, task: str, method: str, rows: Sequence[Row] | None = None) -> float | None:
        """The share of full fine-tuning's fall of the test loss; of some rows, by default the best ones."""
        ours = self.best(task, method) if rows is None else rows
        full, base = (self.best(task, m) for m in ("full", "base"))
        if not ours or not full:
            return None
        start = base[0]["test_loss"]
        return (start - mean(r["test_loss"] for r in ours)) / (start - mean(r["test_loss"] for r in full))


def spread(values: Sequence[float], form: str) -> str:
    """Mean and half of the 95% confidence interval."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    half = T95[min(len(values) - 1, len(T95) - 1)] * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):{form}} ± {half:{form}}"


def cell(rows: Sequence[Row], name: str, text: bool) -> str:
    if text:
        return spread([r[f"{name}_loss"] for r in rows], ".3f")
    return spread([100 * r[f"{name}_exact"] for r in rows], ".0f")


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def learned(runs: Runs, methods: Sequence[str], name: str) -> str:
    """name: "test" or "far"."""
    lines = [
        [
            _title(m),
            *(
                cell(runs.best(t, m), name, t in TEXT or f"{name}_exact" not in (runs.best(t, m) or [{}])[0])
                for t in TASKS
            ),
        ]
        for m in ("base", *methods)
    ]
    return table(["", *(f"{TITLES[t]}, {'loss' if t in TEXT else '%'}" for t in TASKS)], lines)


def kept(runs: Runs, methods: Sequence[str], rows_of: Callable[[str, str], list[Row]]) -> str:
    """Means over the tasks. rows_of: (task, method) -> the rows at a rate."""
    columns = {"docs_loss": ".3f", "facts_exact": ".0%", "skills_exact": ".0%", "kl": ".3f"}
    lines = []
    for method in methods:
        by_task = [rows for t in TASKS if (rows := rows_of(t, method))]
        cells = (
            [f"{mean(mean(r[c] for r in rows) for rows in by_task):{form}}" for c, form in columns.items()]
            if by_task
            else []
        )
        gains = [g for t in TASKS if (g := runs.gain(t, method, rows_of(t, method))) is not None]
        share = f"{mean(gains):.0%}" if gains and method != "base" else ""
        lines.append([_title(method), share, *cells])
    head = [
        "mean over the tasks",
        "learned, of full's",
        "documentation, loss",
        "old facts",
        "old skills",
        "KL to the base",
    ]
    return table(head, lines)


def equally(runs: Runs, methods: Sequence[str], margin: float = 0.01) -> str:
    """What a method keeps where it learns as much as LoRA at LoRA's best rate: of the first seed's runs whose loss on
    the test rows is at most LoRA's (with a margin of 1% of what LoRA learned), the one that moved least; its KL to the
    base and the share of the old facts that it kept.
    """
    lines = []
    for method in methods:
        cells = []
        for task in TASKS:
            least, base = runs.best(task, "lora")[:1], runs.best(task, "base")[:1]
            if not least or not base or not runs.curve(task, method):
                cells.append("")
                continue
            limit = least[0]["test_loss"] + margin * (base[0]["test_loss"] - least[0]["test_loss"])
            enough = [r for r in runs.curve(task, method) if r["test_loss"] <= limit]
            kept = min(enough, key=lambda r: r["kl"]) if enough else None
            cells.append(f"{kept['kl']:.3f}, {kept['facts_exact']:.0%}" if kept else "never")
        lines.append([_title(method), *cells])
    return table(["learned as much as LoRA at a KL of", *(TITLES[t] for t in TASKS)], lines)


def costs(runs: Runs, methods: Sequence[str], task: str = "far") -> str:
    lines = []
    for method in methods:
        rows = runs.best(task, method)
        if rows:
            r = rows[0]
            rates = ", ".join(f"{b[0]['rate']:.1g}" if (b := runs.best(t, method)) else "-" for t in TASKS)
            lines.append(
                [
                    _title(method),
                    f"{r['numbers']:,}",
                    f"{r['training_bytes'] / 2**20:.1f}",
                    f"{min(x['step_cpu_ms'] for x in runs.all[task, method]):.0f}",
                    rates,
                ]
            )
    head = ["", "numbers", "gradients and optimizer, MiB", "step, CPU ms", "rates, by task"]
    return table(head, lines)


def variants(runs: Runs, tasks: Sequence[str] = TASKS) -> str:
    """Shares of full fine-tuning's gain, and KL in brackets."""
    lines = []
    for method in ("s2ft", *VARIANTS, "lora"):
        cells = []
        for task in tasks:
            gain, rows = runs.gain(task, method), runs.best(task, method)
            cells.append("" if gain is None else f"{gain:.0%} ({mean(r['kl'] for r in rows):.2f})")
        if any(cells):
            lines.append([_title(method), *cells])
    return table(["share of full's gain (KL to the base)", *(TITLES[t] for t in tasks)], lines)


def _title(method: str) -> str:
    return "base model" if method == "base" else CONTENDERS[method].title


def figure(runs: Runs, methods: Sequence[str], path: Path) -> None:
    """Learning against keeping: for each task one line a method, one point a learning rate."""
    import matplotlib

    matplotlib.use("svg" if path.suffix == ".svg" else "agg")
    from matplotlib import pyplot, ticker

    pyplot.rcParams.update({"svg.hashsalt": "compare", "font.size": 8})
    tasks = [t for t in TASKS if any(runs.best(t, m) for m in methods)]
    drawn, panels = pyplot.subplots(1, len(tasks), figsize=(2.6 * len(tasks), 3.4))
    for task, panel in zip(tasks, panels if len(tasks) > 1 else [panels]):
        base = runs.best(task, "base")[0]["test_loss"]
        for number, method in enumerate(methods):
            points = [r for r in runs.curve(task, method) if r["test_loss"] < base]
            if points:
                x, y = [r["kl"] for r in points], [r["test_loss"] for r in points]
                strong = method == "s2ft"
                panel.plot(
                    x,
                    y,
                    ".-",
                    color=f"C{number}",
                    lw=2.2 if strong else 1,
                    zorder=3 if strong else 2,
                    label=_title(method),
                )
                best = runs.best(task, method)[0]
                panel.plot(best["kl"], best["test_loss"], "o", ms=6, color=f"C{number}", zorder=4)
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
        panel.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
        panel.xaxis.set_minor_formatter(ticker.NullFormatter())
        panel.set_title(TITLES[task], fontsize=9)
        panel.set_xlabel("KL to the base on old text")
    (panels if len(tasks) == 1 else panels[0]).set_ylabel("test loss of the task")
    handles, labels = (panels if len(tasks) == 1 else panels[0]).get_legend_handles_labels()
    drawn.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
    drawn.tight_layout(rect=(0, 0.2, 1, 1))
    drawn.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def text(runs: Runs) -> str:
    tried = [m for m in (*MAIN, *VARIANTS) if any((t, m) in runs.all for t in TASKS)]
    methods = [m for m in tried if m in MAIN]
    whole = [m for m in methods if all((t, m) in runs.all for t in TASKS)]  # whose means over the tasks compare
    lower = [m for m in whole if all(runs.below(t, m) for t in TASKS)]
    parts = {
        "Learned: the task's test rows": learned(runs, methods, "test"),
        "Far: the same ability in another form, never tuned on": learned(runs, methods, "far"),
        "Kept": kept(runs, ["base", *whole], runs.best),
        "Kept at 0.56 of the best rate (the first seed)": kept(runs, lower, runs.below),
        "Kept at equal learning": equally(runs, tried),
        "Costs": costs(runs, methods),
        "Variants": variants(runs),
    }
    return "\n\n".join(f"### {title}\n\n{table_of}" for title, table_of in parts.items())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("rows", type=Path)
    options.add_argument("--into", type=Path, help="a Markdown file, whose marked part is replaced")
    options.add_argument("--figure", type=Path, help="an SVG or PNG file")
    given = options.parse_args()
    runs = Runs(read(given.rows))
    tables = text(runs)
    if given.into:
        whole = given.into.read_text(encoding="utf-8")
        before, _, rest = whole.partition(BEGIN)
        given.into.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    else:
        print(tables)
    if given.figure:
        figure(runs, [m for m in MAIN if any((t, m) in runs.all for t in TASKS)], given.figure)


if __name__ == "__main__":
    main()
