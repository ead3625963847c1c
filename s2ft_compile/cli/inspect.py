"""What `s2ft inspect` shows: couplings by layer, what each role would train, and refusals."""

import json
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from string import Template
from typing import Any

from rich.table import Table
from torch import nn

from s2ft_compile.config import ROLES
from s2ft_compile.structure import Analysis, Coupling

LAYER = re.compile(r"\.(\d+)\.")


def describe(model: nn.Module, analysis: Analysis) -> dict[str, Any]:
    """Everything that analysis found, as plain values for JSON."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return {
        "model": type(model).__name__,
        "parameters": sum(sizes.values()),
        "couplings": [_coupling(c, sizes) for c in analysis.couplings],
        "targets": {role: _target(role, analysis, sizes) for role in ROLES},
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
    }


def page(facts: Mapping[str, Any]) -> str:
    """`describe`'s facts as one HTML page that needs no network: layers × units as a map, with what is coupled."""
    template = Template((files(__package__) / "page.html").read_text(encoding="utf-8"))
    return template.substitute(facts=json.dumps(facts).replace("<", "\\u003c"))  # ends no script element early


def _coupling(coupling: Coupling, sizes: Mapping[str, int]) -> dict[str, Any]:
    names = dict.fromkeys(m.parameter_name for m in coupling.members)
    return {
        "layer": _layer(names),
        "role": coupling.role,
        "units": coupling.units,
        "parameters": sum(sizes[n] for n in names),
        "members": [m._asdict() for m in coupling.members],
    }


def _target(role: str, analysis: Analysis, sizes: Mapping[str, int]) -> dict[str, Any]:
    """What ratio 1 of a role would train: every parameter that has a dimension with that role."""
    names = {m.parameter_name for c in analysis.couplings for m in c.members if m.role == role}
    trained = sum(sizes[n] for n in names)
    return {"weights": len(names), "parameters": trained, "share": trained / max(sum(sizes.values()), 1)}


def _layer(names: Iterable[str]) -> int | None:
    """The layer that all of these parameters lie in, or None for a structure of the whole model."""
    found = {match.group(1) if (match := LAYER.search(name)) else None for name in names}
    return int(found.pop()) if len(found) == 1 and None not in found else None


def tables(facts: Mapping[str, Any]) -> list[Table]:
    """The tables that `s2ft inspect` prints: couplings, targets, and refusals where there are any."""
    found = [_couplings(facts), _targets(facts)]
    return found + [_refusals(facts)] if facts["refusals"] else found


def _couplings(facts: Mapping[str, Any]) -> Table:
    table = Table(
        "layers",
        "role",
        "units",
        "parameters of each",
        "permuted together",
        title=f"{facts['model']}: {facts['parameters']:,} parameters, {len(facts['couplings'])} couplings",
    )
    for layers, coupling in _merge(facts["couplings"]):
        members = ", ".join(f"{_shorten(m['parameter_name'])}[{m['dim']}]" for m in coupling["members"][:6])
        more = f", and {len(coupling['members']) - 6} more" if len(coupling["members"]) > 6 else ""
        table.add_row(layers, coupling["role"], str(coupling["units"]), f"{coupling['parameters']:,}", members + more)
    return table


def _targets(facts: Mapping[str, Any]) -> Table:
    table = Table("target", "weights", "parameters", "share", title="what a target would train with ratio 1")
    for role, target in facts["targets"].items():
        if target["weights"]:
            table.add_row(role, str(target["weights"]), f"{target['parameters']:,}", f"{target['share']:.1%}")
    return table


def _refusals(facts: Mapping[str, Any]) -> Table:
    table = Table(
        "layers", "units", "parameters", "why", title=f"{len(facts['refusals'])} axes that must keep their order"
    )
    for layers, refusal in _merge(facts["refusals"]):
        members = ", ".join(f"{_shorten(m['parameter_name'])}[{m['dim']}]" for m in refusal["members"][:4])
        more = f", and {len(refusal['members']) - 4} more" if len(refusal["members"]) > 4 else ""
        table.add_row(layers, str(refusal["units"]), members + more, refusal["reason"])
    return table


def _merge(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """(layers, row) with rows that differ only in their layer as one."""
    groups: dict[tuple, tuple[list, Mapping[str, Any]]] = {}
    for row in rows:
        members = tuple((LAYER.sub(".*.", m["parameter_name"], count=1), m["dim"]) for m in row["members"])
        key = (row.get("role"), row["units"], row.get("reason"), members)
        groups.setdefault(key, ([], row))[0].append(row["layer"])
    return [(_spans([i for i in layers if i is not None]), row) for layers, row in groups.values()]


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
