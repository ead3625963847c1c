"""`s2ft train`: a model folder and a data file in, an adapter, a merged model and metrics out.

The loop is transformers' Trainer. TRL supplies the chat templates that mark what an assistant says; its
SFTTrainer replaces the model's forward by one that computes the head outside the compiled graph, so it is not
used.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from s2ft_compile.errors import ConfigError
from s2ft_compile.exporters import save_adapter, save_merged
from s2ft_compile.exporters.files import new_directory
from s2ft_compile.layers import compile_layers
from s2ft_compile.optimizers import optimizer
from s2ft_compile.preparation import prepare

from .data import Blocks, example_inputs, load_model, load_tokenizer, split, tokenize
from .options import TrainOptions, check
from .terminal import counter, progress, versions, write_json

WARM_UP = 3  # steps left out of the timings: the first ones compile


def train(options: TrainOptions, console: Console) -> dict[str, Any]:
    """Runs the whole job and returns what it wrote to metrics.json. Raises an `S2FTError`, leaving nothing
    behind.
    """
    started = time.perf_counter()
    records = check(options)
    tokenizer = load_tokenizer(options.model)
    with console.status("tokenizing"):
        blocks = tokenize(records, tokenizer, options.seq_len)
    training, held_out = split(blocks, options.held_out, options.seed, shuffle=records.form != "text")
    if len(training) < options.batch_size:
        raise ConfigError(
            f"the data gives {len(training)} blocks of {blocks.input_ids.shape[1]} tokens to train on, "
            f"less than one batch of {options.batch_size}; use a batch size of at most {len(training)}"
        )
    if len(training) < options.batch_size * options.grad_accum:
        batches = len(training) // options.batch_size
        raise ConfigError(
            f"the data gives {batches} batches of {options.batch_size} to train on, less than one optimizer step of "
            f"{options.grad_accum}; use a gradient accumulation of at most {batches}"
        )
    with new_directory(options.output) as work:
        with console.status("loading the model"):
            model = load_model(options.model, options.dtype).to("cuda" if torch.cuda.is_available() else "cpu")
        _check_vocabulary(model, blocks)
        with console.status("finding coupled structures and selecting slices"):
            plan = prepare(model, example_inputs(model), options.s2ft, calibration(model, training, options))
        with progress(console) as bars:
            before = loss(model, held_out, options.batch_size, on_batch=counter(bars, "loss before"))
            times = fit(model, training, options, work, bars)
            after = loss(model, held_out, options.batch_size, on_batch=counter(bars, "loss after"))
        with console.status("writing adapter and merged model"):
            save_adapter(model, work / "adapter")
            save_merged(model, work / "merged")
            tokenizer.save_pretrained(work / "merged")
        metrics = {
            "loss_before": before,
            "loss_after": after,
            **_sizes(model, plan),
            **_speed(times, options, blocks),
            "blocks": len(training),
            "held_out_blocks": len(held_out),
            "form": records.form,
            "examples_truncated": blocks.truncated,
            "examples_dropped": blocks.dropped,
            "seconds": time.perf_counter() - started,
            "device": str(next(model.parameters()).device),
            "options": asdict(options),
            "versions": versions(),
        }
        write_json(work / "metrics.json", metrics)
    return metrics


def calibration(model: nn.Module, blocks: Blocks, options: TrainOptions) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of the training blocks, spread evenly over them, for a selection that looks at data."""
    device = next(model.parameters()).device
    size = min(options.calibration_batches * options.batch_size, len(blocks))
    chosen = blocks.take([i * len(blocks) // size for i in range(size)])
    for start in range(0, size, options.batch_size):
        yield {k: v.to(device) for k, v in chosen[start : start + options.batch_size].items()}


def fit(model: nn.Module, blocks: Blocks, options: TrainOptions, work: Path, bars: Progress) -> list[float]:
    """Trains a prepared model through torch.compile(backend="s2ft") and Trainer; the seconds of each step."""
    from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator

    steps = options.steps or max(1, len(blocks) // (options.batch_size * options.grad_accum))
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.grad_accum,
        lr_scheduler_type="cosine",
        warmup_steps=min(10, steps // 10),
        seed=options.seed,
        dataloader_drop_last=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=next(model.parameters()).device.type == "cpu",
        remove_unused_columns=False,
    )
    _use_one_gpu(arguments)
    with _without_cache(model):
        how = {"inner": options.inner, "activation_budget": options.activation_budget}
        compiled = compile_layers(model, **how) if options.by_layer else [model]
        if not options.by_layer:
            model.compile(backend="s2ft", options={**how, "logits": False})
        trained = optimizer(model, options.optimizer, options.lr)
        watch = _watch(bars, steps)
        trainer = Trainer(
            model, arguments, default_data_collator, train_dataset=blocks, callbacks=[watch], optimizers=(trained, None)
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    for module in compiled:
        module._compiled_call_impl = None  # what compile() set; the exporters want the plain call
    model.eval()
    return watch.seconds


@torch.no_grad()
def loss(
    model: nn.Module, blocks: Blocks, batch_size: int, on_batch: Callable[[int, int], None] | None = None
) -> float:
    """Cross-entropy per learned token, in nats. Eager: a second compilation would cost more."""
    device = next(model.parameters()).device
    model.eval()
    total, count = 0.0, 0
    batches = range(0, len(blocks), batch_size)
    with torch.compiler.set_stance("force_eager"):
        for number, start in enumerate(batches, 1):
            batch = {k: v.to(device) for k, v in blocks[start : start + batch_size].items()}
            tokens = int((batch["labels"][:, 1:] >= 0).sum())  # the model shifts: the first label is never used
            if tokens:
                total += model(**batch, use_cache=False).loss.double().item() * tokens
                count += tokens
            if on_batch:
                on_batch(number, len(batches))
    return total / max(count, 1)


def _watch(bars: Progress, steps: int):
    """A Trainer callback that shows the progress and times the steps."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self):
            self.seconds: list[float] = []
            self.task = bars.add_task("training (the first step compiles)", total=steps)

        def on_step_begin(self, args, state, control, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.began)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                bars.update(
                    self.task, completed=state.global_step, description=f"training, loss {float(logs['loss']):.3f}"
                )

    return Watch()


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    was = getattr(model.config, "use_cache", None)
    model.config.use_cache = False
    try:
        yield
    finally:
        model.config.use_cache = was


def _use_one_gpu(arguments) -> None:
    """Several visible GPUs in one process would make Trainer use nn.DataParallel, whose replicas have no
    slices.
    """
    arguments._n_gpu = min(arguments.n_gpu, 1)


def _check_vocabulary(model: nn.Module, blocks: Blocks) -> None:
    rows, highest = model.get_input_embeddings().weight.shape[0], int(blocks.input_ids.max())
    if highest >= rows:
        raise ConfigError(
            f"the tokenizer gives token {highest}, but the model has {rows} embeddings; they do not belong together"
        )


def _sizes(model: nn.Module, plan) -> dict[str, Any]:
    deltas = {id(s.delta) for s in plan.slices}
    trained = sum(s.delta.numel() for s in plan.slices)
    total = sum(p.numel() for p in model.parameters() if id(p) not in deltas)
    return {"parameters": total, "trainable_parameters": trained, "trainable_fraction": trained / total}


def _speed(seconds: list[float], options: TrainOptions, blocks: Blocks) -> dict[str, Any]:
    """Step time and tokens per second without the first steps, which compile."""
    tokens = options.batch_size * options.grad_accum * blocks.input_ids.shape[1]
    median = statistics.median(seconds[WARM_UP:] or seconds[-1:])
    return {
        "steps": len(seconds),
        "tokens_per_step": tokens,
        "step_ms": 1e3 * median,
        "tokens_per_second": tokens / median,
        "first_step_seconds": seconds[0],
    }


def report(metrics: Mapping[str, Any], output: Path) -> Table:
    """The table that ends a run."""
    table = Table(title="s2ft train", show_header=False)
    rows = {
        "held-out loss": f"{metrics['loss_before']:.4f} → {metrics['loss_after']:.4f}",
        "trainable": f"{metrics['trainable_parameters']:,} of {metrics['parameters']:,} parameters "
        f"({metrics['trainable_fraction']:.2%})",
        "steps": f"{metrics['steps']} × {metrics['tokens_per_step']:,} tokens",
        "step time": f"{metrics['step_ms']:.1f} ms, {metrics['tokens_per_second']:,.0f} tokens/s "
        f"(first step, with compilation: {metrics['first_step_seconds']:.1f} s)",
        "data": f"{metrics['blocks']} blocks, {metrics['held_out_blocks']} held out",
        "adapter": str(Path(output) / "adapter"),
        "merged model": str(Path(output) / "merged"),
        "metrics": str(Path(output) / "metrics.json"),
    }
    if metrics["examples_truncated"] or metrics["examples_dropped"]:
        rows["examples"] = f"{metrics['examples_truncated']} cut, {metrics['examples_dropped']} dropped"
    for name, value in rows.items():
        table.add_row(name, value)
    return table
