"""What `s2ft report` shows: runs of `s2ft train` side by side, as one page that needs no network, and as a picture."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from string import Template
from typing import Any

import torch
from torch import Tensor

from s2ft_compile.adapters.format import Adapter, read_adapter
from s2ft_compile.errors import ConfigError
from s2ft_compile.plan import Slice

from .fit import LOG
from .inspect import LAYER

BINS = 96  # of a weight's units, in the map of what moved
SMOOTHED = 20  # of a curve: how many points are left, at least


@dataclass(frozen=True)
class Run:
    """metrics: what `s2ft train` wrote at its end. steps: a mapping for each line of its log."""

    name: str
    metrics: Mapping[str, Any]
    steps: Sequence[Mapping[str, float]]
    adapter: Adapter

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) of what has this key in the log."""
        points = [(line["step"], line[key]) for line in self.steps if key in line]
        return [x for x, _ in points], [y for _, y in points]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Raises `ConfigError` for a folder that no finished run left, `AdapterError` for a damaged adapter."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [_read(folder, name) for folder, name in zip(folders, names, strict=True)]


def _read(folder: Path, name: str) -> Run:
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        lines = (folder / LOG).read_text(encoding="utf-8").splitlines()
        return Run(name, metrics, [json.loads(line) for line in lines], read_adapter(folder / "adapter"))
    except OSError as error:
        raise ConfigError(
            f"{folder} is no finished run of `s2ft train`: {Path(error.filename or folder).name} is missing"
        ) from error
    except ValueError as error:
        if isinstance(error, ConfigError) or not isinstance(error, json.JSONDecodeError):
            raise
        raise ConfigError(f"{folder} has a damaged metrics.json or {LOG}: {error}") from error


# --- which units moved -------------------------------------------------------------------------------------------


def moved(adapter: Adapter) -> dict[str, Tensor]:
    """Role -> float64 (layers, at most BINS): the norm of the deltas of all weights of that role in a layer, by where
    their units lie in the base model's order."""
    by_role: dict[str, list[Slice]] = {}
    for s in adapter.slices:
        by_role.setdefault(", ".join(s.roles), []).append(s)
    return {role: _norms(slices) for role, slices in by_role.items()}


def _norms(slices: Sequence[Slice]) -> Tensor:
    layers = [int(match.group(1)) if (match := LAYER.search(s.parameter_name)) else 0 for s in slices]
    bins = min(BINS, *(s.shape[s.dim] for s in slices))
    squares = torch.zeros(max(layers) + 1, bins, dtype=torch.float64)
    for layer, s in zip(layers, slices, strict=True):
        squares[layer].index_add_(0, s.indices * bins // s.shape[s.dim], norms_of(s).square())
    return squares.sqrt()


def norms_of(s: Slice) -> Tensor:
    """float64 (trained units,)."""
    return s.delta.detach().double().movedim(s.dim, 0).flatten(1).norm(dim=1)


# --- the picture -------------------------------------------------------------------------------------------------


def figure(runs: Sequence[Run]):
    """A matplotlib figure: loss, tokens per second and memory by step; below, for each run, layers × units."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("s2ft report draws with matplotlib: pip install 's2ft-compile[report]'") from error

    maps = [moved(run.adapter) for run in runs]
    columns = max(map(len, maps))
    drawn = Figure(figsize=(11, 3.2 + 2.2 * len(runs)), layout="constrained")
    curves, *below = drawn.subfigures(1 + len(runs), 1, height_ratios=[3.2, *[2.2] * len(runs)])
    for axes, (title, key, scale) in zip(curves.subplots(1, 3), CURVES, strict=True):
        for i, run in enumerate(runs):
            _draw_curve(axes, run, key, scale, f"C{i}")
        axes.set_title(title, fontsize=10)
        if key != "loss":
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step", fontsize=9)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
    curves.axes[0].legend(fontsize=8)
    for i, (part, run, roles) in enumerate(zip(below, runs, maps, strict=True)):
        part.suptitle(f"{run.name}: how far units moved, layers × units", fontsize=10, color=f"C{i}")
        for axes, (role, norms) in zip(part.subplots(1, columns, squeeze=False)[0], roles.items()):
            shown = axes.imshow(norms.numpy(), aspect="auto", cmap="magma", vmin=0, interpolation="nearest")
            axes.set_title(role, fontsize=8)
            axes.set_xticks([])
            axes.set_yticks(range(0, len(norms), max(1, len(norms) // 8)))
            axes.tick_params(labelsize=7)
            part.colorbar(shown, ax=axes, fraction=0.04, pad=0.02).ax.tick_params(labelsize=6)
        for axes in part.axes[len(roles) : columns]:
            axes.set_visible(False)
    return drawn


CURVES = (("loss", "loss", 1), ("tokens/s", "tokens_per_second", 1), ("most memory so far, GB", "memory", 1e9))


def _draw_curve(axes, run: Run, key: str, scale: float, colour: str) -> None:
    """A curve faintly, and its running mean; of the loss also what was held out."""
    steps, values = run.curve(key)
    values = [value / scale for value in values]
    windows = [values[max(0, i - len(values) // SMOOTHED) : i + 1] for i in range(len(values))]
    means = [fmean(window) for window in windows]
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, means, color=colour, linewidth=1.6, label=run.name)
    if key == "loss" and run.metrics["held_out_blocks"]:
        at, held_out = run.curve("eval_loss")
        last = steps[-1] if steps else 0
        points = {0: run.metrics["loss_before"], **dict(zip(at, held_out)), last: run.metrics["loss_after"]}
        axes.plot(list(points), list(points.values()), "o--", color=colour, markersize=4, label=f"{run.name}, held out")


# --- the page ----------------------------------------------------------------------------------------------------


def page(runs: Sequence[Run]) -> str:
    """One HTML page with the picture in it."""
    drawing = io.StringIO()
    figure(runs).savefig(drawing, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = drawing.getvalue()
    template = Template((files(__package__) / "report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(", ".join(run.name for run in runs)),
        figure=svg[svg.index("<svg") :],
        facts=_table(["", *(run.name for run in runs)], _facts(runs)),
        plans="".join(_plan(run) for run in runs),
    )


def _facts(runs: Sequence[Run]) -> list[list[str]]:
    columns = [_facts_of(run) for run in runs]
    return [[name, *(column[name] for column in columns)] for name in columns[0]]


def _facts_of(run: Run) -> dict[str, str]:
    m, options = run.metrics, run.metrics["options"]
    config = run.adapter.plan.config
    _, memory = run.curve("memory")
    return {
        "base model": str(options["model"]),
        "data": f"{Path(options['data']).name}, {m['blocks']} blocks of {m['form']}, {m['held_out_blocks']} held out",
        "held-out loss": f"{m['loss_before']:.4f} → {m['loss_after']:.4f}" if m["held_out_blocks"] else "none held out",
        "trained": f"{m['trainable_parameters']:,} of {m['parameters']:,} ({m['trainable_fraction']:.2%})",
        "targets": ", ".join(f"{target}={amount}" for target, amount in (config.targets or {}).items()),
        "units chosen by": f"{config.to_dict()['selection']}, budget by {config.budget}",
        "steps": f"{m['steps']} × {m['tokens_per_step']:,} tokens",
        "learning rate": f"{options['lr']:g}, {options['schedule']}",
        "step": f"{m['step_ms']:.1f} ms, {m['tokens_per_second']:,.0f} tokens/s",
        "first step": f"{m['first_step_seconds'] or 0:.1f} s, with compilation",
        "most memory": f"{max(memory) / 1e9:.2f} GB ({m['device']})" if memory else "not measured",
        "versions": ", ".join(f"{name} {version}" for name, version in m["versions"].items()),
    }


def _plan(run: Run) -> str:
    """What trained in a run, what moved most, and how its adapter is loaded."""
    plan = run.adapter.plan
    rows = []
    for s in run.adapter.slices:
        norms = norms_of(s)
        most = s.indices[norms.topk(min(4, len(norms))).indices].tolist()
        trained = f"{len(s.indices)} of {s.shape[s.dim]}"
        rows.append([s.parameter_name, ", ".join(s.roles), trained, f"{norms.norm():.4g}", ", ".join(map(str, most))])
    notes = "".join(f"<p>{escape(note)}</p>" for note in plan.notes)
    table = _table(["weight", "roles", "units", "norm of the delta", "moved most"], rows)
    return (
        f"<h2>{escape(run.name)}</h2>{notes}<details><summary>{len(rows)} slices</summary>{table}</details>"
        f"<pre>{escape(LOAD.format(folder=run.name))}</pre>"
    )


LOAD = """\
import s2ft_compile as s2ft

s2ft.exporters.load_adapter(model, "{folder}/adapter")  # into its base model, in place
# {folder}/merged is an ordinary model: AutoModelForCausalLM.from_pretrained("{folder}/merged")"""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + row(head, "th") + "".join(row(cells, "td") for cells in rows) + "</table>"
