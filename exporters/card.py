"""The card of an adapter: a README.md beside its files that says what it is, and how to load it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from s2ft_compile.adapters.format import Adapter, base_of
from s2ft_compile.plan import Slice

CARD = "README.md"

NATIVE = """\
```python
import s2ft_compile as s2ft

s2ft.exporters.load_adapter(model, "this-folder")     # in place; W[indices] = cast(W0 + delta), bit for bit
```

Without building the model, on a checkpoint on disk: `s2ft merge BASE this-folder OUT`. As a LoRA for PEFT, vLLM
and llama.cpp:
`s2ft export lora --model BASE --adapter this-folder --output OUT`.
"""

PEFT = """\
```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "this-folder")     # model.merge_and_unload() adds it to the weights
```

"""

LORA = (
    PEFT
    + """\
vLLM: {vllm}. llama.cpp: {llama_cpp}.

The LoRA is exact: one factor of each pair is one-hot, and `lora_alpha == r`. That takes {size}.
"""
)

SHIRA = (
    PEFT
    + """\
A SHiRA: it adds single numbers to each weight, at positions that its files hold. vLLM does not take it.
"""
)


def card(
    adapter: Adapter,
    how: str = NATIVE,
    errors: Mapping[str, float] | None = None,
    whole: Sequence[str] = (),
    left_out: Mapping[str, float] | None = None,
) -> str:
    """Markdown. how: to load it. errors: relative, of modules that were cut to a rank. whole: modules that are stored
    whole. left_out: parameters that are not in it, and how far they had moved."""
    base, config = adapter.base, adapter.plan.config
    changed = sum(s.delta.numel() for s in adapter.slices)
    lines = [
        "---",
        "library_name: " + ("s2ft-compile" if how is NATIVE else "peft"),
        *([f"base_model: {base['name']}"] if "/" in str(base.get("name")) else []),  # a hub id
        "tags:",
        "- s2ft",
        "---",
        "",
        "# S²FT adapter",
        "",
        "Dense slices of coupled weights, trained with the rest frozen ([S²FT](https://arxiv.org/abs/2412.06289)).",
        "",
        "| | |",
        "|---|---|",
        f"| base model | {base_of(adapter)} |",
        f"| fingerprint of the base | `{adapter.plan.fingerprint}` |",
        f"| targets | {', '.join(f'`{t}` = {amount}' for t, amount in list((config.targets or {}).items())[:8])}"
        f"{', ...' if len(config.targets or {}) > 8 else ''} |",
        f"| selection | {config.selection}, seed {config.seed}, budget per {config.budget} |",
        f"| trained | {changed:,} numbers in {len(adapter.slices)} weights |",
        "",
        "## What it changes",
        "",
        "| role | weights | of each |",
        "|---|---|---|",
        *_rows(adapter.slices),
        "",
        "## How to load it",
        "",
        how,
    ]
    if whole:
        lines += ["Stored whole, as `modules_to_save`:", "", *(f"- `{name}`" for name in whole), ""]
    if left_out:
        lines += [
            "## Left out",
            "",
            "These trained too, and a LoRA of linear layers has no place for them, so this is not what was trained.",
            "How far each had moved, as a share of its norm:",
            "",
            *(f"- `{name}`: {share:.3g}" for name, share in left_out.items()),
            "",
        ]
    if errors:
        lines += [
            "## Not exact",
            "",
            "These were cut to the rank by SVD; relative errors in the Frobenius norm:",
            "",
            *(f"- `{name}`: {error:.3g}" for name, error in errors.items()),
            "",
        ]
    return "\n".join(lines)


def _rows(slices: Sequence[Slice]) -> list[str]:
    """One line for all layers of a role."""
    groups: dict[tuple, int] = defaultdict(int)
    for s in slices:
        side = f"{len(s.indices)} of {s.shape[s.dim]} along dim {s.dim}"
        groups[", ".join(s.roles), s.parameter_name.rsplit(".", 2)[-2] if "." in s.parameter_name else "", side] += 1
    return [f"| {role or '-'} | {count} × `{kind}` | {side} |" for (role, kind, side), count in groups.items()]
