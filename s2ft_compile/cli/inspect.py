"""What `s2ft inspect` shows: couplings by layer, what each role would train, and refusals."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from itertools import takewhile
from string import Template
from typing import Any

from rich.table import Column, Table
from torch import nn

from s2ft_compile.config import ROLES, S2FTConfig, units_for
from s2ft_compile.passes.backward.trainable import trained_bands
from s2ft_compile.passes.editor import Mismatch
from s2ft_compile.passes.select.ranking import Band
from s2ft_compile.structure import Analysis, Coupling

LAYER = re.compile(r"\.(\d+)\.")
IN_TEXT = re.compile(r"(?<=\.)\d+(?=\.\w)")


def describe(model: nn.Module, inputs: Any, analysis: Analysis) -> dict[str, Any]:
    """Everything that analysis found of a model on these inputs, and what of it trains, as plain values for JSON."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    of_roles, untrained = trained_bands(model, inputs, analysis)
    places = {(b.parameter_name, b.dim) for bands in of_roles.values() for b in bands}
    by_default = S2FTConfig().targets_of(list(of_roles))
    return {
        "model": type(model).__name__,
        "parameters": sum(sizes.values()),
        "couplings": [_coupling(c, analysis, sizes) for c in analysis.couplings],
        "targets": {role: _target(of_roles.get(role, []), by_default.get(role), sizes) for role in ROLES},
        "refusals": [
            {
                "layer": _layer(m.parameter_name for m in r.members),
                "units": r.units,
                "reason": r.reason,
                "operator": r.operator,
                "source": r.source,
                "members": [m._asdict() for m in r.members],
            }
            for r in analysis.refusals
        ],
        "untrained": [
            {
                "layer": _layer([name]),
                "units": analysis.layouts[name, dim].size,
                "reason": _untrained(whys, (name, dim) in places),
                "members": [{"parameter_name": name, "dim": dim}],
            }
            for (name, dim), whys in untrained.items()
        ],
    }


def _untrained(whys: Mapping[str, Mismatch], otherwise: bool) -> str:
    """Why an axis does not train; as what, where it does otherwise."""
    of_reason: dict[str, list[str]] = {}
    for role, why in whys.items():
        of_reason.setdefault(f"its gradient would be {why}", []).append(role)
    return "; ".join(f"as {', '.join(roles)} {why}" if otherwise else why for why, roles in of_reason.items())


def page(facts: Mapping[str, Any]) -> str:
    """`describe`'s facts as one HTML page that needs no network: layers × units as a map, with what is coupled."""
    template = Template((files(__package__) / "page.html").read_text(encoding="utf-8"))
    return template.substitute(facts=json.dumps(facts).replace("<", "\\u003c"))  # ends no script element early


def _kind(coupling: Coupling, analysis: Analysis) -> str:
    """What one of a coupling's units is; in attention a unit to select is a head, which several axes may make up."""
    if coupling.role == "attention":
        return "heads" if coupling.axis in analysis.heads else "channels of a head"
    return "channels"


def _coupling(coupling: Coupling, analysis: Analysis, sizes: Mapping[str, int]) -> dict[str, Any]:
    names = dict.fromkeys(m.parameter_name for m in coupling.members)
    return {
        "layer": _layer(names),
        "role": coupling.role,
        "units": coupling.units,
        "kind": _kind(coupling, analysis),
        "parameters": sum(sizes.get(n, 0) for n in names),
        "members": [m._asdict() for m in coupling.members],
    }


def _target(bands: Sequence[Band], share: int | float | None, sizes: Mapping[str, int]) -> dict[str, Any]:
    """What a role may train of: its weights, and how many units its layers have, fewest and most. default: how many of
    them train by default, `share` of them."""
    names = dict.fromkeys(b.parameter_name for b in bands)
    units = sorted({len(b.positions) for b in bands})
    trained = sum(sizes[n] for n in names)
    return {
        "weights": len(names),
        "parameters": trained,
        "share": trained / max(sum(sizes.values()), 1),
        "units": [units[0], units[-1]] if units else [],
        "default": [units_for(share, n, "default") if share else 0 for n in (units[0], units[-1])] if units else [],
    }


def _layer(names: Iterable[str]) -> int | None:
    """The layer that all of these parameters lie in, or None for a structure of the whole model."""
    numbers = {match.group(1) if (match := LAYER.search(name)) else None for name in names}
    return int(numbers.pop()) if len(numbers) == 1 and None not in numbers else None


def tables(facts: Mapping[str, Any]) -> list[Table]:
    """The tables that `s2ft inspect` prints: couplings, targets, and where there are any, refusals and what has no
    slice rule."""
    refused = {"axes that must keep their order": facts["refusals"], "axes that cannot train": facts["untrained"]}
    return [_couplings(facts), _targets(facts), *(_refusals(rows, title) for title, rows in refused.items() if rows)]


def _couplings(facts: Mapping[str, Any]) -> Table:
    table = Table(
        "layers",
        "role",
        Column("axis", max_width=13),
        "parameters",
        Column("permuted together", overflow="fold"),
        title=f"{facts['model']}: {facts['parameters']:,} parameters, {len(facts['couplings'])} couplings",
    )
    for layers, coupling in _merge(facts["couplings"]):
        members = "\n".join(f"{_shorten(m['parameter_name'])}[{m['dim']}]" for m in coupling["members"][:6])
        more = f"\nand {len(coupling['members']) - 6} more" if len(coupling["members"]) > 6 else ""
        axis = f"{coupling['units']} {coupling['kind']}"
        table.add_row(layers, coupling["role"], axis, f"{coupling['parameters']:,}", members + more)
    return table


def _targets(facts: Mapping[str, Any]) -> Table:
    target = Column("target", no_wrap=True)
    table = Table(target, "units of a layer", "by default", "weights", "parameters", "share", title="what can train")
    for role, target in facts["targets"].items():
        if target["weights"]:
            counts = (_between(*target[key]) for key in ("units", "default"))
            table.add_row(role, *counts, str(target["weights"]), f"{target['parameters']:,}", f"{target['share']:.1%}")
    return table


def _between(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low} to {high}"


def _refusals(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    table = Table("layers", "size", "parameters", "why", title=f"{len(rows)} {title}")
    for layers, refusal in _merge(rows):
        members = ", ".join(f"{_shorten(m['parameter_name'])}[{m['dim']}]" for m in refusal["members"][:4])
        more = f", and {len(refusal['members']) - 4} more" if len(refusal["members"]) > 4 else ""
        table.add_row(layers, str(refusal["units"]), members + more, refusal["reason"])
    return table


def _merge(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """(layers, row) with rows that differ only in their layer as one. A layer is what the names of all members begin
    with; its numbers may be several (stage and block)."""
    groups: dict[tuple, tuple[list, Mapping[str, Any]]] = {}
    for row in rows:
        names = [m["parameter_name"].split(".") for m in row["members"]]
        common = list(takewhile(lambda parts: len(set(parts)) == 1, zip(*(n[:-1] for n in names))))
        numbers = [parts[0] for parts in common if parts[0].isdigit()]
        path = ["*" if parts[0].isdigit() else parts[0] for parts in common]
        members = tuple((*path, *n[len(common) :], m["dim"]) for n, m in zip(names, row["members"]))
        key = (row.get("role"), row["units"], IN_TEXT.sub("*", row.get("reason", "")), members)
        groups.setdefault(key, ([], row))[0].append(tuple(map(int, numbers)))
    merged = {key: row | {"reason": key[2]} if len(layers) > 1 else row for key, (layers, row) in groups.items()}
    return [(_places(groups[key][0]), row) for key, row in merged.items()]


def _places(layers: list[tuple[int, ...]]) -> str:
    """(0,), (1,), (5,) as `0-1, 5`; (0, 0), (0, 1), (1, 0) as `0.0-1, 1.0`."""
    by_stage: dict[tuple[int, ...], list[int]] = {}
    for layer in layers:
        by_stage.setdefault(layer[:-1], []).extend(layer[-1:])
    return ", ".join(".".join(map(str, (*stage, _spans(last)))) for stage, last in by_stage.items())


def _spans(numbers: list[int]) -> str:
    """0, 1, 2, 5 as `0-2, 5`."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) or "-"


def _shorten(name: str) -> str:
    """A parameter's name without what leads to its layer."""
    match = LAYER.search(name)
    return name[match.end() :] if match else name
