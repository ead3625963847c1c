"""Every model type of transformers, tiny and at random: does it trace, are its structures found, are they right?

    python benchmarks/sweep.py                                    the causal-LM mapping; writes results/sweep.json
    python benchmarks/sweep.py --mapping masked-lm --only bert    another one, or some types of it
    python benchmarks/sweep.py --layers 2,8,32,128                seconds by number of layers instead

A configuration is the type's own default with every size that its name explains made small, and nothing else; a model is
random in every parameter (a norm of ones would hide a wrong permutation). What a type should have is counted from
its modules by name, which the compiler never looks at: an FFN or attention module that holds weights, or a layer that
holds its projections itself, should have a coupling of that role.
"""

import argparse
import gc
import json
import multiprocessing
import os
import re
import resource
import time
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

MAPPINGS = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "ctc": "MODEL_FOR_CTC_MAPPING_NAMES", "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "text-encoder": "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES",
}
LIMIT_S, MEMORY, LARGEST = 240, 9 * 2**30, 150e6
RESULTS = Path(__file__).parent / "results"
console = Console(width=160)

# --- a tiny configuration: (what an attribute's name looks like, its size), the first that matches ------------------

CORE = (
    (r"num_feat_extract_layers", 10**9),  # lists have an entry for each: as it is
    (r"num_kv_shared_layers|num_nextn_predict_layers|.*mtp.*layers", 0),
    (r"first_k_dense_replace|num_dense_layers|n_dense_layers", 1),
    (r".*vocab_size(_per_layer_input)?", 97),
    (r"(.*_)?(num_)?(hidden_|encoder_|decoder_|n_)?layers?|depth", 2),
    (r"(.*_)?(num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num|num_key_heads)", 2),
    (r"n_head|n_heads|(.*_)?num_heads|(.*_)?attention_heads|(.*_)?num_value_heads|index_n_heads|swa_num_attention_heads", 4),
    (r"hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|(input|output)_embedding_size|word_embed_proj_dim"
     r"|attention_hidden_size|projection_dim|backbone_hidden_size|lru_width|emb_dim|channels", 32),
    (r"(.*_)?(intermediate_size|intermediate_size_mlp|ffn_dim|ffn_hidden_size|ff_dim)|d_ff|dff|dim_ff|n_inner|feed_forward_size|mlp_dim", 48),
    (r"(.*_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|max_sequence_length|context_length", 64),
)
DETAIL = (
    (r"(.*_)?(num_(local_|routed_)?experts|n_routed_experts|moe_num_experts)", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k|num_selected_experts|experts_per_token", 2),
    (r"(n|num)_shared_experts|moe_num_shared_experts|n_group|topk_group|num_expert_group", 1),
    (r"head_dim|d_kv|kv_channels|v_head_dim|attention_head_(size|dim)|qk_nope_head_dim|(linear|swa|index)(_\w+)?_head_dim"
     r"|global_head_dim|(linear_(key|value)_head_dim)", 8),
    (r"rotary_dim", 4), (r"qk_rope_head_dim", 8), (r"qk_head_dim", 16), (r"(q|kv|o)_lora_rank", 12),
    (r".*_(period|interval)", 2), (r".*_layer_offset", 1),
    (r"mamba_(n|num)_heads|n_mamba_heads|mamba_(d_head|head_dim)", 8), (r"image_size", 32), (r"patch_size", 8), (r"hidden_size_per_layer_input", 8),
    (r"num_(feature_levels|codebooks)", 2),
    (r"index_topk", 4),
)


def tiny(config_class, rules, depth: int = 0):
    """A configuration with its class's defaults and small sizes; configurations inside it likewise."""
    default = config_class()
    made = layer_lists(default)
    inner = dict(getattr(config_class, "sub_configs", {}) or {})
    for name, value in vars(default).items():
        if name in inner or (hasattr(value, "to_dict") and hasattr(type(value), "model_type")):
            if value is not None and hasattr(value, "to_dict") and depth < 3:
                made[name] = tiny(type(value), rules, depth + 1).to_dict()
        elif value is None and name in ("head_dim", "num_experts_per_tok", "topk_group", "n_group"):
            made.update({name: n for pattern, n in rules if re.fullmatch(pattern, name)})
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((n for pattern, n in rules if re.fullmatch(pattern, name)), None)
            if "key_value" in name and value == vars(default).get("num_attention_heads"):
                size = 4  # no groups where the default has none: some attention allows none
            if size is not None and size < max(value, 1):
                made.setdefault(name, size)
            elif name.endswith("token_id") and value >= 97:
                made[name] = 1
    return config_class(**made)


def layer_lists(config) -> dict:
    """Lists with an entry for each layer, cut to one layer of each kind (at least two), and the number of layers."""
    count = vars(config).get("num_hidden_layers")
    lists = {k: v for k, v in vars(config).items() if isinstance(v, (list, tuple)) and count and len(v) == count > 4
             and all(isinstance(x, (str, int)) for x in v)}
    kinds = list(zip(*lists.values()))
    chosen = sorted({kinds.index(k) for k in kinds[::-1]}) if all(len(set(v)) < 5 for v in lists.values()) else [0, 1]
    if not lists:
        return {}
    chosen = (chosen + [i for i in range(count) if i not in chosen])[: max(2, min(len(chosen), 4))]
    return {"num_hidden_layers": len(chosen), **{k: [v[i] for i in sorted(chosen)] for k, v in lists.items()}}


def attempts(config_class):
    """Configurations from the smallest to the default with fewer layers, until one is valid."""
    layers = tuple(r for r in CORE if "layers" in r[0] or "vocab" in r[0])
    for rules in (CORE + DETAIL, CORE, layers):
        yield lambda rules=rules: tiny(config_class, rules)
        yield lambda rules=rules: tiny(config_class, rules).get_text_config(decoder=True)


# --- a model and its inputs -----------------------------------------------------------------------------------------


def candidates(model, config):
    """Inputs worth trying, by what the forward's main argument is called."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    random = torch.Generator().manual_seed(0)
    high = min([n for n in (getattr(text, "vocab_size", None), getattr(config, "vocab_size", None)) if n] or [97])
    ids = torch.randint(3, max(high, 4), (2, 11), generator=random)
    seq2seq = {"decoder_input_ids": ids[:, :7]} if getattr(config, "is_encoder_decoder", False) else {}
    main = getattr(model, "main_input_name", "input_ids")
    made = {}
    if main == "pixel_values" or hasattr(config, "image_size") and not hasattr(text, "vocab_size"):
        size = getattr(config, "image_size", None) or 64
        size = size if isinstance(size, (list, tuple)) else (size, size)
        for s in (size, (64, 64), (224, 224)):
            yield {"pixel_values": torch.randn(2, getattr(config, "num_channels", 3), *s, generator=random)}
    if main == "input_values":
        yield {"input_values": torch.randn(2, 2000, generator=random)}
        yield {"input_values": torch.randn(2, getattr(config, "max_length", 1024), getattr(config, "num_mel_bins", 128), generator=random)}
    if main == "input_features":
        for shape in ((2, 40, getattr(config, "num_mel_bins", 80)), (2, 40, getattr(config, "feature_size", 160)),
                      (2, getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 100)),
                      (2, 40, 128), (2, 40, 80)):
            features = torch.randn(shape, generator=random)
            yield {"input_features": features, **seq2seq}
            yield {"input_features": features, "attention_mask": torch.ones(shape[:2], dtype=torch.long), **seq2seq}
    made = {"input_ids": ids, **seq2seq}
    yield made
    yield {**made, "attention_mask": torch.ones_like(ids)}
    yield {**made, "bbox": torch.zeros(2, 11, 4, dtype=torch.long)}
    long = torch.randint(3, max(high, 4), (2, 64), generator=random)
    yield {"input_ids": long, **({"decoder_input_ids": long} if seq2seq else {})}
    yield dict(getattr(model, "dummy_inputs", {}))


def configs(config):
    """A configuration and those inside it."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            yield from configs(value)


def parameters(model_class, config) -> int:
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in model_class(config).parameters())
    except TypeError:  # one that makes its tensors in a way that no device can be set for
        return 0


def build(config_class, model_class):
    """The first configuration that makes a model whose forward runs: (model, inputs). Raises the last failure."""
    failure = None
    for make in attempts(config_class):
        try:
            torch.manual_seed(0)
            config = make()
            if parameters(model_class, config) > LARGEST:
                raise ValueError("the sizes that can be made small leave it too large")
            model = model_class(config).float().eval()
            for config in configs(model.config):
                config.use_cache = False
        except Exception as error:  # whatever an invalid combination of sizes raises
            failure = failure or error
            continue
        with torch.no_grad():
            for p in model.parameters():
                if p.is_floating_point():
                    p.add_(torch.randn_like(p), alpha=0.1)
        for inputs in candidates(model, model.config):
            try:
                with torch.no_grad():
                    model(**inputs)
                return model, inputs
            except Exception as error:
                failure = error if failure is None or "input_ids" in inputs else failure
    raise failure


# --- what there should be, by the names of modules -------------------------------------------------------------------

ATTENTION = re.compile(r"att(entio)?n(?!.*(norm|rotary))", re.I)
FFN = re.compile(r"mlp|ffn|feed_?forward|(^|_)ff(_|$|\d)|moe|expert|intermediate|^(fc|lin|wi)_?[01]?$", re.I)
FFN_CLASS = re.compile(r"mlp|ffn|feed_?forward|experts$|intermediate", re.I)
EXPERTS = re.compile(r"experts?$")
NEITHER = re.compile(r"norm|embed|router|dropout|pool|head$|classif|mask|conv_pos|position_bias|^gate$|_hc$", re.I)


def kind_of(name: str, module: nn.Module) -> str | None:
    label = type(module).__name__
    if not sum(p.dim() > 1 and min(p.shape) > 1 for p in module.parameters()) or NEITHER.search(name):
        return None
    if ATTENTION.search(name) or ATTENTION.search(label) and not re.search(r"layer|block", label, re.I):
        if hasattr(module, "receptance"):
            return None  # a recurrence under the name of attention: no product of two activations
        return "attention" if sum(p.dim() > 1 for p in module.parameters()) > 1 else None
    return "ffn" if FFN.search(name) or FFN_CLASS.search(label) else None


def units(module: nn.Module, path: str = "") -> list[tuple[str, str]]:
    """(kind, path) of each FFN and attention module inside repeated layers, outermost first; mixed ones are opened."""
    found = []
    for name, child in module.named_children():
        at, kind = f"{path}.{name}".strip("."), kind_of(name, child)
        inside = {k for n, m in child.named_modules() if n and not EXPERTS.search(n) and (k := kind_of(n.rsplit(".", 1)[-1], m))}
        experts = kind == "ffn" and not EXPERTS.search(at) and any(EXPERTS.search(n) for n, _ in child.named_modules())
        if kind and not experts and not inside - {kind} and re.search(r"(^|\.)\d+(\.|$)", at):
            direct = isinstance(child, (nn.Linear, nn.Conv1d)) or re.fullmatch(r"(fc|lin|wi)_?[01]?", name)
            found.append((kind, f"{path}" if direct else at))
        else:
            found += units(child, at)
    return list(dict.fromkeys(found))


def coverage(model: nn.Module, captured, analysis) -> dict:
    """Expected and found structures, and why the missing ones are missing. What the forward never reads has none."""
    read = {captured.parameters[n.name] for n in captured.graph_module.graph.nodes if n.name in captured.parameters and n.users}
    read |= {other for other, first in captured.tied.items() if first in read}
    roles = {"ffn": ("ffn", "moe"), "attention": ("attention",)}
    report = {}
    for kind in roles:
        wanted = [path for k, path in units(model) if k == kind and any(n.startswith(path + ".") for n in read)]
        members = [m for c in analysis.couplings if c.role in roles[kind] for m in c.members
                   if kind == "ffn" or m.role == "attention.out"]
        names = {m.parameter_name for m in members}
        aliases = names | {other for other, first in analysis.tied.items() if first in names}
        missing = [path for path in wanted if not any(n.startswith(path + ".") for n in aliases)]
        report[kind] = {"expected": len(wanted), "found": len(wanted) - len(missing), "missing": missing[:4],
                        "why": _reasons(analysis, missing[:2])}
    return report


def _reasons(analysis, paths) -> list[str]:
    why = Counter()
    for r in analysis.refusals:
        if any(m.parameter_name.startswith(path + ".") for m in r.members for path in paths):
            why[f"{r.reason} [{r.operator}] × {r.units} {r.source}"] += 1
    others = [f"{c.role} × {c.units}" for c in analysis.couplings
              if any(m.parameter_name.startswith(p + ".") for m in c.members for p in paths)]
    return [w for w, _ in why.most_common(6)] + others[:6]


# --- one type, in a process of its own -------------------------------------------------------------------------------


def examine(model_type: str, names) -> dict:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    import s2ft_compile as s2ft

    result = {"type": model_type, "class": names if isinstance(names, str) else names[0]}
    try:
        model, inputs = build(CONFIG_MAPPING[model_type], getattr(transformers, result["class"]))
    except Exception as error:
        return {**result, "status": "no model", "reason": f"{type(error).__name__}: {str(error)[:300]}"}
    result["parameters"] = sum(p.numel() for p in model.parameters())
    start = time.perf_counter()
    try:
        captured = s2ft.capture.capture(model, inputs)
    except s2ft.CaptureError as error:
        return {**result, "status": "not traced", "reason": str(error)[:600]}
    traced = time.perf_counter()
    analysis = s2ft.passes.couple.couple(captured)
    done = time.perf_counter()
    operators = Counter(r.operator for r in analysis.refusals if "no rule" in r.reason)
    result |= {"status": "traced", "nodes": len(captured.graph_module.graph.nodes), "trace_s": round(traced - start, 2),
               "couple_s": round(done - traced, 3), "couplings": dict(Counter(c.role for c in analysis.couplings)),
               "members": dict(analysis.roles()), "no_rule": dict(operators), **coverage(model, captured, analysis)}
    try:
        made = s2ft.verify(model, inputs, analysis)
        result["verified"] = "wrong" if not made.ok else "yes" if made.sharp else "blunt"
        result["verification"] = str(made)[:1500]
    except s2ft.S2FTError as error:
        result |= {"verified": "no", "verification": str(error)[:600]}
    return result


def _child(connection, function, arguments):
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        connection.send(function(*arguments))
    except BaseException as error:  # a crash of the compiler itself is a finding, too
        import traceback

        connection.send({"status": "crashed", "reason": f"{error!r}: {traceback.format_exc()[-1500:]}"})
    connection.close()


def isolated(function, *arguments, limit: float = LIMIT_S) -> dict:
    """function(*arguments) in a process of its own, with bounds on time and memory."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(False)
    process = context.Process(target=_child, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(limit) else {"status": "time limit", "reason": f"more than {limit} s"}
    except EOFError:
        return {"status": "crashed", "reason": "the process died"}
    finally:
        process.kill()
        process.join()


# --- all types ---------------------------------------------------------------------------------------------------------


def aggregate(rows: list[dict]) -> dict:
    """Shares over the types that trace. `wrong` counts types in which a permutation changed an output."""
    traced = [r for r in rows if r["status"] == "traced"]

    def complete(kind):
        relevant = [r for r in traced if r[kind]["expected"]]
        return sum(r[kind]["found"] == r[kind]["expected"] for r in relevant), len(relevant)

    ffn, attention = complete("ffn"), complete("attention")
    return {
        "types": len(rows), "traced": len(traced), **Counter(r["status"] for r in rows),
        "all FFN couplings": f"{ffn[0]} of {ffn[1]} ({ffn[0] / max(ffn[1], 1):.1%})",
        "all attention couplings": f"{attention[0]} of {attention[1]} ({attention[0] / max(attention[1], 1):.1%})",
        "verified": sum(r["verified"] == "yes" for r in traced), "blunt": sum(r["verified"] == "blunt" for r in traced),
        "not comparable": sum(r["verified"] == "no" for r in traced), "wrong": sum(r["verified"] == "wrong" for r in traced),
        "seconds": round(sum(r["seconds"] for r in rows)),
        "operators without a rule": dict(Counter(op for r in traced for op in r["no_rule"]).most_common()),
    }


def table(rows: list[dict], title: str) -> Table:
    made = Table("type", "status", "couplings", "FFN", "attention", "verified", "s", "why", title=title)
    for r in rows:
        why = r.get("reason", "")
        if r["status"] == "traced":
            why = "; ".join(f"{k}: {', '.join(r[k]['missing'])}: {' | '.join(r[k]['why'])}" for k in ("ffn", "attention") if r[k]["missing"])
        counts = [f"{r[k]['found']}/{r[k]['expected']}" if k in r else "" for k in ("ffn", "attention")]
        made.add_row(r["type"], r["status"], " ".join(f"{n} {k}" for k, n in r.get("couplings", {}).items()), *counts,
                     r.get("verified", ""), f"{r['seconds']:.0f}", why[:200])
    return made


def sweep(mapping: str, only: list[str]) -> list[dict]:
    from transformers.models.auto import modeling_auto

    names, rows = getattr(modeling_auto, MAPPINGS[mapping]), []
    for i, (model_type, classes) in enumerate(names.items()):
        if only and model_type not in only:
            continue
        start = time.perf_counter()
        row = {"type": model_type, **isolated(examine, model_type, classes)}
        row["seconds"] = round(time.perf_counter() - start, 1)
        rows.append(row)
        found = " ".join(f"{k} {row[k]['found']}/{row[k]['expected']}" for k in ("ffn", "attention") if k in row)
        console.print(f"{i + 1:3}/{len(names)} {model_type:28} {row['status']:10} {found} {row.get('verified', '')} "
                      f"{row['seconds']} s {row.get('reason', '')[:80]}", markup=False, highlight=False)
    return rows


def cost(layers: int) -> dict:
    """Seconds to trace and to couple a Llama of so many layers on the meta device; CPU time, and couple's without the
    garbage collector, whose pauses grow with all that torch holds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import s2ft_compile as s2ft

    config = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=8,
                         num_key_value_heads=2)
    with torch.device("meta"):
        model, inputs = LlamaForCausalLM(config).eval(), {"input_ids": torch.zeros(2, 16, dtype=torch.long)}
    start = time.process_time()
    captured = s2ft.capture.capture(model, inputs)
    gc.disable()
    traced = time.process_time()
    analysis = s2ft.passes.couple.couple(captured)
    done = time.process_time()
    nodes = len(captured.graph_module.graph.nodes)
    return {"layers": layers, "nodes": nodes, "trace_s": round(traced - start, 2), "couple_s": round(done - traced, 3),
            "couple_us_per_node": round(1e6 * (done - traced) / nodes, 1), "couplings": len(analysis.couplings),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def save(path: Path, stored: dict) -> None:
    stored["versions"] = {"torch": torch.__version__, "transformers": version("transformers")}
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = f"{Path(torch.__file__).parents[1]}/"  # where packages are is nobody's business
    path.write_text(json.dumps(stored, indent=1).replace(machine, "") + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mapping", default="causal-lm", help=f"by commas, or all: {', '.join(MAPPINGS)}")
    parser.add_argument("--only", default="", help="model types, by commas")
    parser.add_argument("--layers", default="", help="measure the cost for these numbers of layers, by commas")
    parser.add_argument("--output", type=Path, default=RESULTS / "sweep.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    import transformers
    from transformers.models.auto import modeling_auto  # noqa: F401, imported once, before any fork

    import s2ft_compile  # noqa: F401

    transformers.logging.set_verbosity_error()
    stored = json.loads(options.output.read_text()) if options.output.exists() else {}
    if options.layers:
        rows = [isolated(cost, int(n)) for n in options.layers.split(",")]
        made = Table(*rows[0], title="cost by number of layers")
        for row in rows:
            made.add_row(*map(str, row.values()))
        console.print(made)
        stored["cost"] = rows
    else:
        for mapping in MAPPINGS if options.mapping == "all" else options.mapping.split(","):
            only = [n for n in options.only.split(",") if n]
            rows = sweep(mapping, only)
            if only:  # the rest as it was
                rows += [r for r in stored.get(mapping, {}).get("types", []) if r["type"] not in only]
                rows.sort(key=lambda r: r["type"])
            console.print(table(rows, mapping))
            console.print(mapping, aggregate(rows))
            stored[mapping] = {"aggregate": aggregate(rows), "types": rows}
            save(options.output, stored)
    save(options.output, stored)


if __name__ == "__main__":
    main()
