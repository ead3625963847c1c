"""Every model type of transformers, tiny and at random: does it trace, are its structures found, are they right?

    python benchmarks/sweep/run.py                                 the causal-LM mapping; writes results/sweep.json
    python benchmarks/sweep/run.py --mapping masked-lm --only bert others, or some types of them
    python benchmarks/sweep/run.py --mapping zoo                   other libraries (the extra `zoo`); results/zoo.json
    python benchmarks/sweep/run.py --mapping all --resume          all, without what the results hold already
    python benchmarks/sweep/run.py --layers 2,8,32,128             seconds by number of layers instead
    python benchmarks/sweep/run.py --report                        the results' counts, into docs/speed.md

What a type should have is counted from its modules by name, which the compiler never looks at: an FFN or attention
module that holds weights, or a layer that holds its projections itself, should have a coupling of that role.
"""

import argparse
import gc
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tiny import build
from torch import fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from s2ft_compile.capture.capture import capture
from s2ft_compile.capture.traces import captures
from s2ft_compile.passes.couple.couple import couple

sys.path.append(str(Path(__file__).resolve().parents[1]))
from turns import RESULTS, versions  # noqa: E402

MAPPINGS = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "ctc": "MODEL_FOR_CTC_MAPPING_NAMES",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "text-encoder": "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES",
}
LIMIT_S, MEMORY = 600, 9 * 2**30  # of CPU time
WAIT_S = 20 * LIMIT_S  # where other work has the cores
console = Console(width=160)

# --- what there should be, by the names of modules -------------------------------------------------------------------

ATTENTION = re.compile(r"att(entio)?n(?!.*(norm|rotary))", re.I)
FFN = re.compile(r"mlp|ffn|feed_?forward|(^|_)ff(_|$|\d)|moe|expert|intermediate|^(fc|lin)_?[01]$|^wi(_?[01])?$", re.I)
FFN_CLASS = re.compile(r"mlp|ffn|feed_?forward|experts$|intermediate", re.I)
EXPERTS = re.compile(r"experts?$")
NEITHER = re.compile(
    r"norm|embed|router|dropout|pool|head$|classif|mask|conv_pos|position_bias|cpb|^gate$|_hc$|hyper_conn", re.I
)
POSITIONS = re.compile(r"rel_pos|meta_mlp")  # makes a bias of attention from positions; so does all that is in it


def kind_of(name: str, module: nn.Module) -> str | None:
    label, matrices = type(module).__name__, sum(p.dim() > 1 and min(p.shape) > 1 for p in module.parameters())
    if not matrices or NEITHER.search(name):
        return None
    if ATTENTION.search(name) or ATTENTION.search(label) and not re.search(r"layer|block", label, re.I):
        if hasattr(module, "receptance") or "ConvAttention" in label:
            return None  # a recurrence or a convolution under the name of attention: no product of two activations
        return "attention" if sum(p.dim() > 1 for p in module.parameters()) > 1 else None
    return "ffn" if FFN.search(name) or FFN_CLASS.search(label) and matrices > 1 else None


def units(module: nn.Module, path: str = "") -> list[tuple[str, str]]:
    """(kind, path) of each FFN and attention module inside repeated layers, outermost first; mixed ones are opened."""
    paths = []
    for name, child in module.named_children():
        if POSITIONS.search(name):
            continue
        at, kind = f"{path}.{name}".strip("."), kind_of(name, child)
        if kind == "ffn" and EXPERTS.search(name) and ATTENTION.search(path.rpartition(".")[2]):
            kind = "attention"  # a mixture of heads
        inside = (
            set()
            if kind == "attention" and EXPERTS.search(name)
            else {
                k
                for n, m in child.named_modules()
                if n and not EXPERTS.search(n) and not POSITIONS.search(n) and (k := kind_of(n.rsplit(".", 1)[-1], m))
            }
        )
        experts = kind == "ffn" and not EXPERTS.search(at) and any(EXPERTS.search(n) for n, _ in child.named_modules())
        if kind and not experts and not inside - {kind} and re.search(r"(^|\.)\d+(\.|$)", at):
            direct = isinstance(child, (nn.Linear, nn.Conv1d)) or re.fullmatch(r"(fc|lin)_?[01]|wi(_?[01])?", name)
            paths.append((kind, f"{path}" if direct else at))
        else:
            paths += units(child, at)
    return list(dict.fromkeys(paths))


def coverage(model: nn.Module, traces, analysis) -> dict:
    """Expected and found structures, and why the missing ones are missing. What the forward never reads has none."""
    read = {
        captured.parameters[n.name]
        for captured in traces
        for n in _reached(captured.graph_module.graph)
        if n.name in captured.parameters
    }
    read |= {other for other, first in traces[0].tied.items() if first in read}
    roles = {"ffn": ("ffn", "moe", "conv"), "attention": ("attention", "ssm")}
    report = {}
    for kind in roles:
        wanted = [path for k, path in units(model) if k == kind and any(n.startswith(path + ".") for n in read)]
        members = [
            m
            for c in analysis.couplings
            if c.role in roles[kind]
            and (kind == "ffn" or any(m.role in ("attention.out", "ssm.out") for m in c.members))
            for m in c.members
        ]
        names = {m.parameter_name for m in members}
        aliases = names | {other for other, first in analysis.tied.items() if first in names}
        missing = [path for path in wanted if not any(n.startswith(path + ".") for n in aliases)]
        report[kind] = {
            "expected": len(wanted),
            "found": len(wanted) - len(missing),
            "missing": missing[:4],
            "why": _reasons(analysis, missing[:2]),
        }
    return report


def _reached(graph: fx.Graph) -> set[fx.Node]:
    """The nodes on which an output depends: a last layer may compute what nothing uses."""
    reached, stack = set(), [graph.output_node()]
    while stack:
        if (node := stack.pop()) not in reached:
            reached.add(node)
            stack += node.all_input_nodes
    return reached


def _reasons(analysis, paths) -> list[str]:
    why = Counter()
    for r in analysis.refusals:
        if any(m.parameter_name.startswith(path + ".") for m in r.members for path in paths):
            source = re.sub(r"\S*/site-packages/", "", r.source)  # wherever that is on this machine
            why[f"{r.reason} [{r.operator}] × {r.units} {source}"] += 1
    others = [
        f"{c.role} × {c.units}"
        for c in analysis.couplings
        if any(m.parameter_name.startswith(p + ".") for m in c.members for p in paths)
    ]
    return [w for w, _ in why.most_common(6)] + others[:6]


# --- one type, in a process of its own ---------------------------------------------------------------------------


def examine(model_type: str, names) -> dict:
    result = {"type": model_type, "class": names if isinstance(names, str) else names[0]}
    try:
        model, inputs = build(*_classes(model_type, result["class"]))
    except Exception as error:
        return {**result, "status": "no model", "reason": f"{type(error).__name__}: {str(error)[:300]}"}
    return result | examine_made(model, inputs)


def examine_zoo(name: str) -> dict:
    """The same of a model of another library."""
    import zoo

    try:
        with torch.no_grad():  # a weight that another one makes is copied with its model
            model, inputs = zoo.models()[name]()
    except Exception as error:
        return {"status": "no model", "reason": f"{type(error).__name__}: {str(error)[:300]}"}
    return examine_made(zoo.roused(model), inputs)


def trains(model: nn.Module, inputs, analysis, whole: bool) -> dict:
    """Whether every role that it offers trains, with exact gradients: role -> [weights that train, weights that are
    left out]. What does not trace in whole is trained in eager mode, role by role."""
    from s2ft_compile.testing import assert_sliced, assert_trains

    try:
        if whole:
            try:
                return {"trains": assert_sliced(model, inputs, analysis=analysis)}
            except (DataDependentOutputException, DynamicOutputShapeException):  # what it does depends on values
                pass
        of_roles = assert_trains(model, inputs, None, analysis=analysis)
        return {"eager": True, "trains": {role: (n, 0) for role, n in of_roles.items()}}
    except Exception as error:
        if isinstance(error, AssertionError) and "s2ft_compile" in _raised_in(error):  # offered, and does not train
            return {"not trained": str(error)[:600]}
        return {"not comparable": f"{type(error).__name__}: {str(error)[:600]}"}


def _raised_in(error: Exception) -> str:
    """The file whose code raised it; a model has assertions, too."""
    return traceback.extract_tb(error.__traceback__)[-1].filename


def examine_made(model: nn.Module, inputs) -> dict:
    import s2ft_compile as s2ft

    result = {}
    result["parameters"] = sum(p.numel() for p in model.parameters())
    start = time.process_time()
    try:
        traces = captures(model, inputs)
    except s2ft.CaptureError as error:
        try:
            traces = captures(model, inputs, train=False)
        except s2ft.CaptureError:
            return {**result, "status": "not traced", "reason": str(error)[:600]}
        result["eval mode only"] = str(error)[:600]
    captured, traced = traces[0], time.process_time()
    analysis = couple(*traces)
    done = time.process_time()
    operators = Counter(r.operator for r in analysis.refusals if "no rule" in r.reason)
    result |= {
        "status": "traced",
        "nodes": len(captured.graph_module.graph.nodes),
        **({"pieces": len({c.border for c in traces})} if captured.border != "the model" else {}),
        "trace_s": round(traced - start, 2),
        "couple_s": round(done - traced, 3),
        "couplings": dict(Counter(c.role for c in analysis.couplings)),
        "members": dict(analysis.roles()),
        "no_rule": dict(operators),
        **coverage(model, traces, analysis),
    }
    try:
        verification = s2ft.verify(model, inputs, analysis)
        result["verified"] = "wrong" if not verification.ok else "yes" if verification.sharp else "blunt"
        result["verification"] = str(verification)[:1500]
    except s2ft.S2FTError as error:
        result |= {"verified": "no", "verification": str(error)[:600]}
    return result | trains(model, inputs, analysis, captured.border == "the model")


def warm() -> None:
    """What all types need is imported and made once, before any fork; so are what torch keeps of operators."""
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4))
    examine_made(model, (torch.ones(2, 4, 8),))
    build(*_classes("bert", "BertForMaskedLM"))
    gc.collect()
    gc.freeze()  # what is imported here is no garbage there


def _classes(model_type: str, name: str):
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type], getattr(transformers, name)


def _child(connection, function, arguments):
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S))
    warnings.simplefilter("ignore")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        result = function(*arguments)
        connection.send({**result, "seconds": round(time.process_time(), 1)})
    except BaseException as error:  # a crash of the compiler itself is a finding, too
        reason = f"{error!r}: {traceback.format_exc()[-1500:]}"
        connection.send({"status": "crashed", "reason": reason, "seconds": round(time.process_time(), 1)})
    connection.close()


def isolated(function, *arguments) -> dict:
    """function(*arguments) in a process of its own, with bounds on CPU time and memory; what it took of the former."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(False)
    process = context.Process(target=_child, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        if ours.poll(WAIT_S):
            return ours.recv()
    except EOFError:
        process.join()
        if process.exitcode not in (-signal.SIGXCPU, -signal.SIGKILL):
            return {"status": "crashed", "reason": f"the process died: {process.exitcode}", "seconds": 0.0}
    finally:
        process.kill()
        process.join()
    return {"status": "time limit", "reason": f"more than {LIMIT_S} s of CPU time", "seconds": float(LIMIT_S)}


# --- all types --------------------------------------------------------------------------------------------------


def aggregate(rows: list[dict]) -> dict:
    """Shares over the types that trace. `wrong` counts types in which a permutation changed an output."""
    traced = [r for r in rows if r["status"] == "traced"]

    def all_found(kind):
        relevant = [r for r in traced if r[kind]["expected"]]
        return sum(r[kind]["found"] == r[kind]["expected"] for r in relevant), len(relevant)

    ffn, attention = all_found("ffn"), all_found("attention")
    return {
        "types": len(rows),
        "traced": len(traced),
        **Counter(r["status"] for r in rows),
        "all FFN couplings": f"{ffn[0]} of {ffn[1]} ({ffn[0] / max(ffn[1], 1):.1%})",
        "all attention couplings": f"{attention[0]} of {attention[1]} ({attention[0] / max(attention[1], 1):.1%})",
        **{
            name: sum(r["verified"] == verdict for r in traced)
            for name, verdict in (("verified", "yes"), ("blunt", "blunt"), ("not comparable", "no"), ("wrong", "wrong"))
        },
        "trains all that it offers": sum("trains" in r for r in traced),
        "offered but not trained": sum("not trained" in r for r in traced),
        "training not comparable": sum("not comparable" in r for r in traced),
        "training not tried": sum(not complete(r) for r in traced),
        "weights left out of a role": sum(left for r in traced for _, left in r.get("trains", {}).values()),
        "in eval mode only": sum("eval mode only" in r for r in traced),
        "in pieces": sum("pieces" in r for r in traced),
        "seconds": round(sum(r["seconds"] for r in rows)),
        "operators without a rule": dict(Counter(op for r in traced for op in r.get("no_rule", ())).most_common()),
    }


def table(rows: list[dict], title: str) -> Table:
    rendered = Table("type", "status", "couplings", "FFN", "attention", "verified", "s", "why", title=title)
    for r in rows:
        why = r.get("reason", "")
        if r["status"] == "traced":
            why = "; ".join(
                f"{k}: {', '.join(r[k]['missing'])}: {' | '.join(r[k]['why'])}"
                for k in ("ffn", "attention")
                if r[k]["missing"]
            )
        counts = [f"{r[k]['found']}/{r[k]['expected']}" if k in r else "" for k in ("ffn", "attention")]
        rendered.add_row(
            r["type"],
            r["status"],
            " ".join(f"{n} {k}" for k, n in r.get("couplings", {}).items()),
            *counts,
            r.get("verified", ""),
            f"{r['seconds']:.0f}",
            why[:200],
        )
    return rendered


def _wrong(row: dict) -> str:
    return row.get("reason") or row.get("not trained") or row.get("not comparable") or ""


def listed(mapping: str) -> dict:
    """Type -> what builds it."""
    if mapping == "zoo":
        import zoo

        return dict.fromkeys(zoo.models(), None)
    from transformers.models.auto import modeling_auto

    return getattr(modeling_auto, MAPPINGS[mapping])


def commit() -> str:
    """Of this checkout, which rows say that they are of."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def complete(row: dict) -> bool:
    """Whether it was tried whether it trains, where it traces."""
    return row["status"] != "traced" or not {"trains", "not trained", "not comparable"}.isdisjoint(row)


def sweep(mapping: str, only: list[str], before: list[dict]) -> Iterator[list[dict]]:
    """All rows so far, after each type. before: rows that are not made again, where they are complete."""
    names, rows, code = listed(mapping), {r["type"]: r for r in before}, commit()
    for i, (model_type, classes) in enumerate(names.items()):
        if model_type not in only if only else model_type in rows and complete(rows[model_type]):
            continue
        task = (examine_zoo, model_type) if mapping == "zoo" else (examine, model_type, classes)
        row = {"type": model_type, **isolated(*task), "code": code}
        rows[model_type] = row
        counts = " ".join(f"{k} {row[k]['found']}/{row[k]['expected']}" for k in ("ffn", "attention") if k in row)
        console.print(
            f"{i + 1:3}/{len(names)} {model_type:28} {row['status']:10} {counts} {row.get('verified', '')} "
            f"{row['seconds']} s {_wrong(row)[:90]}",
            markup=False,
            highlight=False,
        )
        yield [rows[name] for name in names if name in rows]


def cost(layers: int) -> dict:
    """Seconds to trace and to couple a Llama of so many layers on the meta device; CPU time, and couple's without the
    garbage collector, whose pauses grow with all that torch holds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    with torch.device("meta"):
        model, inputs = LlamaForCausalLM(config).eval(), {"input_ids": torch.zeros(2, 16, dtype=torch.long)}
    start = time.process_time()
    captured = capture(model, inputs)
    gc.disable()
    traced = time.process_time()
    analysis = couple(captured)
    done = time.process_time()
    nodes = len(captured.graph_module.graph.nodes)
    return {
        "layers": layers,
        "nodes": nodes,
        "trace_s": round(traced - start, 2),
        "couple_s": round(done - traced, 3),
        "couple_us_per_node": round(1e6 * (done - traced) / nodes, 1),
        "couplings": len(analysis.couplings),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def cost_table(rows: list[dict]) -> Table:
    rendered = Table(*rows[0], title="cost by number of layers")
    for row in rows:
        rendered.add_row(*map(str, row.values()))
    return rendered


def short(row: dict) -> dict:
    """What is kept of a type: what was found, why what is missing is, and in words only what went wrong."""
    kept = {k: v for k, v in row.items() if k not in ("class", "members", "nodes", "no_rule") or k == "no_rule" and v}
    if row.get("verified") == "yes":
        kept.pop("verification", None)
    for kind in ("ffn", "attention"):
        if kind in row:
            kept[kind] = {k: v for k, v in row[kind].items() if v or k in ("expected", "found")}
    return kept


def stored_in(path: Path) -> dict:
    stored = json.loads(path.read_text()) if path.exists() else {}
    for part in stored.values():
        for row in part.get("types", []) if isinstance(part, dict) else []:
            for kind in {"ffn", "attention"} & set(row):
                row[kind] = {"expected": 0, "found": 0, "missing": [], "why": [], **row[kind]}
    return stored


def save(path: Path, stored: dict) -> None:
    """One line for each type; the file is there whole or not at all."""
    stored["versions"] = versions()
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = {}
    for name, part in stored.items():
        rows = part.get("types") if isinstance(part, dict) else None
        if rows is None:
            lines[name] = json.dumps(part, indent=1)
        else:
            of_rows = ",\n".join(json.dumps(short(row), ensure_ascii=False) for row in rows)
            lines[name] = f'{{"aggregate": {json.dumps(part["aggregate"], indent=1)},\n"types": [\n{of_rows}\n]}}'
    text = "{\n" + ",\n".join(f"{json.dumps(name)}: {part}" for name, part in lines.items()) + "\n}\n"
    machine = f"{Path(torch.__file__).parents[1]}/"  # where packages are is nobody's business
    unfinished = path.with_suffix(".new")
    unfinished.write_text(text.replace(machine, ""))
    unfinished.replace(path)


# --- the counts, for the documentation -------------------------------------------------------------------------------

PAGE = Path(__file__).resolve().parents[2] / "docs" / "speed.md"
MARKS = "<!-- counts of the sweep -->", "<!-- end of the counts -->"
COLUMNS = "mapping, types, tried, traced, all FFN couplings, all attention couplings, verified, blunt, wrong, train all"


def counts(name: str, of: int | str, rows: list[dict]) -> str:
    """A row of the page's table."""
    a, trained = aggregate(rows), [r for r in rows if "trains" in r or "not trained" in r]
    found = [a[f"all {kind} couplings"].partition(" (")[0] for kind in ("FFN", "attention")]
    trains = f"{sum('trains' in r for r in trained)} of {len(trained)}"
    cells = (
        name,
        of,
        a["types"] - a.get("no model", 0),
        a["traced"],
        *found,
        a["verified"],
        a["blunt"],
        a["wrong"],
        trains,
    )
    return f"| {' | '.join(map(str, cells))} |"


def report(folder: Path) -> None:
    """Writes the counts of what the results hold into the page, between its marks."""
    lines = [f"| {' | '.join(COLUMNS.split(', '))} |", "|---" * len(COLUMNS.split(", ")) + "|"]
    everything: list[dict] = []
    for mapping, part in stored_in(folder / "sweep.json").items():
        if mapping in MAPPINGS:
            everything += part["types"]
            lines.append(counts(mapping, len(listed(mapping)), part["types"]))
    lines.append(counts("**transformers**", sum(len(listed(m)) for m in MAPPINGS), everything))
    others = stored_in(folder / "zoo.json")["zoo"]["types"]
    libraries = dict.fromkeys(r["type"].split()[0] for r in others)
    lines += [counts(name, "", [r for r in others if r["type"].split()[0] == name]) for name in libraries]
    lines.append(counts("**other libraries**", "", others))
    codes = Counter(r.get("code", "?") for r in (*everything, *others))
    lines += ["", f"Rows by the commit that they are of: {', '.join(f'{n} of {c}' for c, n in codes.most_common())}."]
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    PAGE.write_text("\n".join([before + MARKS[0], *lines, MARKS[1]]) + rest.partition(MARKS[1])[2])


def main() -> None:
    arguments = _arguments()
    if arguments.report:
        return report(arguments.folder)
    torch.set_num_threads(1)
    import zoo

    zoo.import_torchvision()
    import transformers
    from transformers.models.auto import modeling_auto  # noqa: F401, imported once, before any fork

    import s2ft_compile  # noqa: F401

    transformers.logging.set_verbosity_error()
    if {"zoo", "all"} & set(arguments.mapping):
        zoo.models()
    warm()
    if arguments.layers:
        path = arguments.folder / "sweep.json"
        stored = stored_in(path)
        stored["cost"] = [isolated(cost, int(n)) for n in arguments.layers.split(",")]
        console.print(cost_table(stored["cost"]))
        return save(path, stored)
    for mapping in (*MAPPINGS, "zoo") if "all" in arguments.mapping else arguments.mapping:
        path = arguments.folder / ("zoo.json" if mapping == "zoo" else "sweep.json")
        stored = stored_in(path)
        before = stored.get(mapping, {}).get("types", []) if arguments.only or arguments.resume else []
        rows = before
        for rows in sweep(mapping, arguments.only, before):
            stored[mapping] = {"aggregate": aggregate(rows), "types": rows}
            save(path, stored)
        console.print(table(rows, mapping), mapping, aggregate(rows), sep="\n")


def _arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--mapping", nargs="+", choices=[*MAPPINGS, "zoo", "all"], default=["causal-lm"])
    options.add_argument("--only", nargs="+", default=[], metavar="TYPE", help="model types")
    options.add_argument("--resume", action="store_true", help="go on with what the results hold")
    options.add_argument("--layers", default="", help="measure the cost for these numbers of layers, by commas")
    options.add_argument("--report", action="store_true", help="write the counts into docs/speed.md instead")
    options.add_argument("--folder", type=Path, default=RESULTS, help="of sweep.json and zoo.json")
    return options.parse_args()


if __name__ == "__main__":
    main()
