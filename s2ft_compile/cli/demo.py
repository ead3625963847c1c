"""`s2ft demo`: the whole way on one small model, on text that every Python installation has.

A language model is pretrained on the standard library's documentation, then fine-tuned on its source code
with `torch.compile(model, backend="s2ft")`, exported three ways, and all forms are compared on the same
batch. Full fine-tuning and, where PEFT is installed, a LoRA of as many numbers take the same steps beside it.
Everything trains for a budget of seconds, so a slow machine takes fewer steps rather than longer.
"""

import math
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from s2ft_compile import exporters
from s2ft_compile.config import S2FTConfig
from s2ft_compile.errors import ExportError
from s2ft_compile.preparation import prepare
from s2ft_compile.reselection import reselect
from s2ft_compile.slices.optimizers import optimizer

from .corpus import Text, corpus
from .data import example_inputs
from .fit import loss
from .terminal import progress, versions, write_json

SEED = 0
BATCH, LENGTH = 4, 128
WARM_UP = 3  # steps that compile and settle, and do not count
METHODS = {"s2ft": "S²FT", "lora": "LoRA", "full": "full"}
MARK = ".s2ft-demo"  # a file that says: this folder is the demo's own
# The default's roles, more of each: in every layer 26 of 672 channels, two heads of queries and one of keys, 2 of 16
# channels of every head of values and output, and the norms, which are few.
TARGETS = {"default": 0.039}
SELECTIONS = 10  # in the fine-tuning
RATES = {"full": 1e-3, "s2ft": 1e-2, "lora": 1e-2}  # of this size and these steps, as benchmarks/compare found them


def run(output: Path, seconds: float, console: Console) -> dict[str, Any]:
    """Runs the demo into the folder `output`, training for about `seconds`; what it wrote to summary.json."""
    started = time.perf_counter()
    clear(output)
    torch.manual_seed(SEED)
    with console.status("reading the standard library and building a tokenizer"):
        docs, code, tokenizer = corpus(LENGTH, SEED)
    console.print(f"blocks of {LENGTH} tokens: {len(docs.train)} of documentation, {len(code.train)} of source code")
    model = build_model(tokenizer)
    with progress(console) as bars:
        full = Stepper(model, torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0, fused=True), "inductor")
        pretrained = train_for(0.6 * seconds, 1500, docs, [full], bars, "pretraining on documentation")
        save(model, tokenizer, output / "base")
        before = losses(model, docs, code)

        tuned = load(output / "base")
        batches = [{"input_ids": x, "labels": x} for x in code.train.input_ids[: 4 * BATCH].split(BATCH)]
        config = S2FTConfig(targets=TARGETS, selection="gradient")
        plan = prepare(tuned, example_inputs(tuned), config, batches)
        trained = sum(s.delta.numel() for s in plan.slices)
        ours = Stepper(tuned, optimizer(tuned, lr=RATES["s2ft"]), "s2ft", again=partial(reselect, tuned, batches[:1]))
        full.reset(lr=RATES["full"])
        others = {"full": full, **lora(output / "base", trained)}
        steps = train_for(0.4 * seconds, 1000, code, [ours, *others.values()], bars, "fine-tuning on source code")
        after = measured(ours, docs, code)
        beside = {name: measured(stepper, docs, code) for name, stepper in others.items()}
    with console.status("exporting merged, adapter and ONNX, and running each"):
        forms = compare(ours, tokenizer, output, code.held_out.input_ids[:BATCH])
    total = sum(p.numel() for p in load(output / "base").parameters())
    summary = {
        "base_loss": before["code"],
        "tuned_loss": after["code_loss"],
        "docs_base_loss": before["docs"],
        "docs_tuned_loss": after["docs_loss"],
        "parameters": total,
        "trainable_parameters": trained,
        "trainable_fraction": trained / total,
        **forms,
        "s2ft_step_ms": ours.step_ms(),
        "full_step_ms": full.step_ms(),
        "full_over_s2ft_step_time": full.step_ms() / ours.step_ms(),
        "methods": {"s2ft": after, **beside},
        "tokens_per_step": BATCH * LENGTH,
        "pretraining_steps": pretrained,
        "finetuning_steps": steps,
        "seconds": time.perf_counter() - started,
        "versions": versions(),
    }
    write_json(output / "summary.json", summary)
    console.print(report(summary), samples(output, tokenizer), f"everything is in {output}/", sep="\n")
    return summary


def clear(output: Path) -> None:
    """Makes `output` an empty folder. Raises `ExportError` if it holds anything but an earlier demo."""
    if output.exists():
        if not output.is_dir() or (any(output.iterdir()) and not (output / MARK).is_file()):
            raise ExportError(f"{output} exists and is no earlier demo (it has no {MARK}); give another --output")
        shutil.rmtree(output)
    output.mkdir(parents=True)
    (output / MARK).write_text("made by `s2ft demo`, which replaces this folder\n")


# Training ---------------------------------------------------------------------------------------------------


def build_model(tokenizer) -> nn.Module:
    """A Llama-style causal LM: grouped queries (3 for each kv head), RoPE, SwiGLU of 3.5 times the hidden
    size.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=672,
            num_hidden_layers=4,
            num_attention_heads=12,
            num_key_value_heads=4,
            max_position_embeddings=2 * LENGTH,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            use_cache=False,
        )
    )


@dataclass
class Stepper:
    """A model compiled with `backend`, and its optimizer. again: chooses other units, `SELECTIONS` times in a run.
    seconds: of each step of the last run.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    backend: str
    again: Callable[[], Any] | None = None
    seconds: list[float] = field(default_factory=list)
    selection: int = 0

    def __post_init__(self):
        for group in self.optimizer.param_groups:
            group["peak"] = group["lr"]
        self.compiled = torch.compile(self.model, backend=self.backend)

    def reset(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["peak"] = lr
        self.optimizer.state.clear()
        self.seconds.clear()

    def step(self, tokens: Tensor, done: float) -> float:
        """One step at a share `done` of the run, which sets the learning rate; the loss."""
        factor = min(1.0, done * 20 + 0.1) * (0.55 + 0.45 * math.cos(math.pi * done))
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        if self.again and int(done * SELECTIONS) > self.selection:
            self.selection = int(done * SELECTIONS)
            self.again()
        self.model.train()
        began = time.perf_counter()
        value = self.compiled(input_ids=tokens, labels=tokens).loss
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds.append(time.perf_counter() - began)
        return value.item()

    def logits(self, tokens: Tensor) -> Tensor:
        """What the graph that trained gives: the same mode and shapes, so nothing is compiled again."""
        self.model.train()
        return self.compiled(input_ids=tokens, labels=tokens).logits.detach()

    def step_ms(self) -> float:
        return 1e3 * statistics.median(self.seconds[WARM_UP:])

    def numbers(self) -> int:
        return sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])

    def training_bytes(self) -> int:
        """Of gradients and of the optimizer's state: float32."""
        return sum(4 * p.numel() * (1 + _states(self.optimizer.state[p])) for p in self.optimizer.state)


def _states(state: dict[str, Any]) -> int:
    return sum(isinstance(value, Tensor) and value.ndim > 0 for value in state.values())


def train_for(seconds: float, most: int, text: Text, steppers: list[Stepper], bars: Progress, title: str) -> int:
    """Trains all on the same batches, in turn, for about `seconds` in all, without the first steps, which compile, or
    `most` steps. Returns the number of steps.
    """
    generator = torch.Generator().manual_seed(SEED)
    task = bars.add_task(title, total=most)
    began, step, done = 0.0, 0, 0.0
    while done < 1.0:
        batch = text.train.input_ids[torch.randint(len(text.train), (BATCH,), generator=generator)]
        if step == WARM_UP:
            began = time.perf_counter()
        value, *_ = [stepper.step(batch, done) for stepper in steppers]
        step += 1
        spent = time.perf_counter() - began if began else 0.0
        done = max(spent / seconds, step / most) if step > 4 * WARM_UP else 0.0
        bars.update(task, completed=step, total=max(step, round(step / done)) if done else most)
        bars.update(task, description=f"{title}, loss {value:.2f}")
    return step


def lora(folder: Path, numbers: int) -> dict[str, Stepper]:
    """PEFT's LoRA on all linear layers, of about as many numbers; none where PEFT is not installed."""
    try:
        import peft
    except ImportError:
        return {}
    model = load(folder)
    linears = [m for m in model.model.modules() if isinstance(m, nn.Linear)]
    rank = max(1, round(numbers / sum(m.in_features + m.out_features for m in linears)))
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, config)
    leaves = [p for p in tuned.parameters() if p.requires_grad]
    return {
        "lora": Stepper(tuned, torch.optim.AdamW(leaves, lr=RATES["lora"], weight_decay=0.0, fused=True), "inductor")
    }


def measured(stepper: Stepper, docs: Text, code: Text) -> dict[str, float]:
    values = losses(stepper.model, docs, code)
    return {
        "code_loss": values["code"],
        "docs_loss": values["docs"],
        "numbers": stepper.numbers(),
        "training_bytes": stepper.training_bytes(),
        "step_ms": stepper.step_ms(),
    }


def losses(model: nn.Module, docs: Text, code: Text) -> dict[str, float]:
    return {"docs": loss(model, docs.held_out, BATCH), "code": loss(model, code.held_out, BATCH)}


# Exports ----------------------------------------------------------------------------------------------------


def save(model: nn.Module, tokenizer, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def compare(ours: Stepper, tokenizer, output: Path, tokens: Tensor) -> dict[str, Any]:
    """Exports the tuned model, runs every form on `tokens`, and compares logits and weights."""
    expected, tuned = ours.logits(tokens), ours.model.eval()
    exporters.save_merged(tuned, output / "merged")
    tokenizer.save_pretrained(output / "merged")
    exporters.save_adapter(tuned, output / "adapter")
    exporters.export_onnx(tuned, output / "model.onnx", {"input_ids": tokens})
    merged, adapted = load(output / "merged"), load(output / "base")
    exporters.load_adapter(adapted, output / "adapter")
    weights = dict(adapted.named_parameters())
    return {
        "merged_max_abs_diff": difference(expected, logits(merged, tokens)),
        "adapter_max_abs_diff": difference(expected, logits(adapted, tokens)),
        "onnx_max_abs_diff": difference(expected, onnx_logits(output / "model.onnx", tokens)),
        "adapter_bitwise": all(torch.equal(p, weights[name]) for name, p in merged.named_parameters()),
    }


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def onnx_logits(path: Path, tokens: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (values,) = session.run(["logits"], {session.get_inputs()[0].name: tokens.numpy()})
    return torch.from_numpy(values)


def difference(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def samples(output: Path, tokenizer) -> Table:
    """What base and tuned model write after the same words, drawn with the same seed."""
    table = Table("prompt", "base model", "tuned model", title="continuations", show_lines=True)
    models = [load(output / "base"), load(output / "merged")]
    for prompt in ("def __init__(self", "for name in"):
        texts = [continuation(model, tokenizer, prompt) for model in models]
        table.add_row(escape(prompt), *(escape(text.replace("\n", "⏎")) for text in texts))
    return table


def continuation(model: nn.Module, tokenizer, prompt: str) -> str:
    torch.manual_seed(SEED)
    tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
    mask = torch.ones_like(tokens)
    generated = model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=24, do_sample=True, top_k=8)
    return tokenizer.decode(generated[0, tokens.shape[1] :])


def report(summary: dict[str, Any]) -> Table:
    """The table that ends the demo."""
    methods = {name: summary["methods"][name] for name in METHODS if name in summary["methods"]}
    table = Table("", "before", *(METHODS[name] for name in methods), title="s2ft demo")
    rows = {
        "held-out loss, source code (tuned on)": (f"{summary['base_loss']:.3f}", "code_loss", "{:.3f}"),
        "held-out loss, documentation": (f"{summary['docs_base_loss']:.3f}", "docs_loss", "{:.3f}"),
        "numbers that train": ("", "numbers", "{:,}"),
        f"step of {summary['tokens_per_step']:,} tokens, ms": ("", "step_ms", "{:.0f}"),
        "gradients and optimizer, kB": ("", "training_kb", "{:,.0f}"),
    }
    for title, (before, key, form) in rows.items():
        values = [m["training_bytes"] / 1e3 if key == "training_kb" else m[key] for m in methods.values()]
        table.add_row(title, before, *map(form.format, values))
    table.add_section()
    table.add_row(f"S²FT, {summary['finetuning_steps']} steps: largest difference of logits to the trained model")
    for name, title in (("merged", "merged folder"), ("adapter", "base + adapter"), ("onnx", "ONNX Runtime")):
        table.add_row(f"  {title}", "", f"{summary[f'{name}_max_abs_diff']:.1e}")
    table.add_row("base + adapter = merged, bit for bit", "", "yes" if summary["adapter_bitwise"] else "no")
    return table
