"""`s2ft train`: a model and a data set in, an adapter, a merged model and metrics out; checkpoints on the way.

The loop is in `fit`. TRL supplies packing, and the chat templates that mark what an assistant says (`data`).
"""

import hashlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from s2ft_compile.errors import ConfigError, ExportError, S2FTError, TrainingError, of_memory, of_the_system
from s2ft_compile.exporters import save_adapter, save_merged
from s2ft_compile.exporters.card import CARD
from s2ft_compile.plan import Plan
from s2ft_compile.preparation import prepare
from s2ft_compile.quantized import Values, quantized_in
from s2ft_compile.slices.optimizers import learning_rate
from s2ft_compile.slices.state import state_of

from .data import Blocks, checkpoint_if, example_inputs, load_model, load_tokenizer, split, tokenize
from .fit import Interrupted, calibration, fit, last_checkpoint, loss, tokens_of_step
from .options import PLAN, RUN, TrainOptions, check
from .terminal import counter, progress, versions, write_json

WARM_UP = 3  # steps left out of the timings: the first ones compile


def train(options: TrainOptions, console: Console) -> dict[str, Any]:
    """Runs the whole job and returns what it wrote to metrics.json.

    Raises an `S2FTError`: leaving nothing behind before the first checkpoint, and all checkpoints after it.
    """
    started = time.perf_counter()
    records = check(options)
    tokenizer = load_tokenizer(options.model)
    with console.status("tokenizing"):
        blocks = tokenize(records, tokenizer, options.seq_len, options.packing)
    training, held_out = split(blocks, options.held_out, options.seed, shuffle=records.form != "text")
    _check_batches(training, options)
    with _folder(options) as work:
        if not (work / PLAN).exists():
            write_json(work / RUN, {k: v for k, v in options.given.items() if k not in ("resume", "config")})
        with console.status("loading the model"):
            model = load_model(options.model, options.dtype, options.quantize)
            if not (quantized := bool(quantized_in(model))):
                model.to("cuda" if torch.cuda.is_available() else "cpu")
        checkpoint_if(model, options.gradient_checkpointing)
        _check_vocabulary(model, blocks)
        with console.status("finding coupled structures and selecting slices"):
            plan = _prepared(model, training, options, work)
        if options.reselect_every is None and (why := options.keeps_units(quantized)):
            console.print(f"the same units train to the end: {why}", highlight=False)
            options = replace(options, reselect_every=0)
        options = replace(options, lr=options.lr or learning_rate(model, options.total_steps(len(training))))
        _remember(work, options, plan, blocks)
        with progress(console) as bars:
            before = loss(model, held_out, options.batch_size, on_batch=counter(bars, "loss before"))
            steps, seconds = fit(model, training, held_out, options, work, bars)
            after = loss(model, held_out, options.batch_size, on_batch=counter(bars, "loss after"))
        with console.status("writing adapter and merged model"):
            for name in ("adapter", "merged"):  # of an earlier run that was resumed with more steps
                shutil.rmtree(work / name, ignore_errors=True)
            save_adapter(model, work / "adapter")
            save_merged(model, work / "merged")
            tokenizer.save_pretrained(work / "merged")
        metrics = {
            "loss_before": before,
            "loss_after": after,
            **_sizes(model, plan),
            "steps": steps,
            **_speed(seconds, options, blocks),
            "blocks": len(training),
            "held_out_blocks": len(held_out),
            "form": records.form,
            "examples_truncated": blocks.truncated,
            "examples_dropped": blocks.dropped,
            "seconds": time.perf_counter() - started,
            "device": str(next(model.parameters()).device),
            "options": {k: v for k, v in asdict(options).items() if k != "given"},
            "versions": versions(),
        }
        describe(work / "adapter" / CARD, options, metrics, getattr(model.config, "_commit_hash", None))
        write_json(work / "metrics.json", metrics)
    return metrics


def describe(card: Path, options: TrainOptions, metrics: Mapping[str, Any], revision: str | None) -> None:
    """Adds the run to the adapter's card, and the base model, where the card has none, by which the hub links it."""
    text = card.read_text(encoding="utf-8")
    if not Path(options.model).exists() and "\nbase_model:" not in text:  # a hub id, the same for everybody
        text = text.replace("library_name:", f"base_model: {options.model}\nlibrary_name:", 1)
    rows = {
        "base model": f"{Path(options.model).name if Path(options.model).exists() else options.model}"
        + (f", revision {revision}" if revision else ""),
        "data": f"{Path(options.data).name}, {metrics['blocks']} blocks of `{metrics['form']}`",
        "steps": f"{metrics['steps']} of {metrics['tokens_per_step']:,} tokens",
        "rate": f"{options.lr:g}, {options.schedule}, weight decay {options.weight_decay:g}",
    }
    if metrics["held_out_blocks"]:
        rows["held-out loss"] = f"{metrics['loss_before']:.4f} before, {metrics['loss_after']:.4f} after"
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    card.write_text(f"{text.rstrip()}\n\n## Training\n\n| | |\n|---|---|\n{table}", encoding="utf-8")


def _check_batches(training: Blocks, options: TrainOptions) -> None:
    if len(training) < options.batch_size:
        raise ConfigError(
            f"the data gives {len(training)} blocks of {training.input_ids.shape[1]} tokens to train on, "
            f"less than one batch of {options.batch_size}; use a batch size of at most {len(training)}"
        )
    if len(training) < options.batch_size * options.grad_accum:
        batches = len(training) // options.batch_size
        raise ConfigError(
            f"the data gives {batches} batches of {options.batch_size} to train on, less than one optimizer step of "
            f"{options.grad_accum}; use a gradient accumulation of at most {batches}"
        )


# --- the output folder ----------------------------------------------------------------------------------------------


@contextmanager
def _folder(options: TrainOptions) -> Iterator[Path]:
    """The output folder, made where it is not there; after an error it is gone again, unless it has a checkpoint."""
    work = Path(options.output)
    new_folders = [folder for folder in (work, *work.parents) if not folder.exists()]
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"could not write {work}: {error}") from error
    try:
        yield work
    except BaseException as error:
        last = last_checkpoint(work)
        if last is None and not options.resume:
            shutil.rmtree(work, ignore_errors=True)
            for folder in new_folders[1:]:
                folder.rmdir()
        raise _as_one_line(error, last, options.report_to) from error


def _as_one_line(error: BaseException, last: Path | None, reporter: str = "none") -> BaseException:
    """What went wrong while training, and what is left, as an error for a person. reporter: what `report_to` is."""
    text, left = str(error), f"; {last} is complete, go on with --resume" if last else ""
    if isinstance(error, (KeyboardInterrupt, Interrupted)):
        return TrainingError(f"stopped{left or ', before there was a checkpoint'}")
    if type(error).__module__.partition(".")[0] == reporter:
        return TrainingError(f"--report-to {reporter}: {(text.splitlines() or [type(error).__name__])[0]}{left}")
    if of_memory(error):
        return TrainingError(
            f"out of memory: use a smaller batch (and more gradient accumulation), shorter sequences or "
            f"--gradient-checkpointing; `s2ft estimate` predicts what a step takes{left}"
        )
    if isinstance(error, S2FTError):
        return type(error)(f"{text}{left}") if last and not isinstance(error, ConfigError) else error
    if of_the_system(error):
        full = " (is the disk full?)" if "inline_container" in text else ""  # torch's words for a file cut off
        return ExportError(f"could not write{full}: {text.splitlines()[0]}{left}")
    return error


def _prepared(model: nn.Module, training: Blocks, options: TrainOptions, work: Path) -> Plan:
    """Selects; a run that goes on has its slices already, wherever it was begun. Raises `ConfigError` for others."""
    if not (work / PLAN).exists():
        return prepare(model, example_inputs(model), options.s2ft, calibration(model, training, options, default=4))
    begun = Plan.from_dict(json.loads((work / PLAN).read_text(encoding="utf-8"))["plan"])
    if not options.s2ft.is_that_of(begun.config):
        raise ConfigError(f"{work} was begun with other slices: {begun.config}; this is {options.s2ft}")
    return prepare(model, example_inputs(model), begun)


def _remember(work: Path, options: TrainOptions, plan: Plan, blocks: Blocks) -> None:
    """Writes what the run is made of; of one that goes on, raises `ConfigError` where something else is."""
    data = hashlib.sha256(blocks.input_ids.numpy().tobytes() + blocks.labels.numpy().tobytes()).hexdigest()
    now = {"batches": [options.batch_size, options.grad_accum, options.held_out, options.seed], "data": data}
    if (work / PLAN).exists():
        then = json.loads((work / PLAN).read_text(encoding="utf-8"))
        differ = [name for name in now if then[name] != now[name]]
        if differ:
            raise ConfigError(
                f"{work} was begun with other {' and '.join(differ)}; a run goes on with the same, or anew"
            )
        return
    write_json(work / PLAN, {**now, "plan": plan.to_dict()})


def _check_vocabulary(model: nn.Module, blocks: Blocks) -> None:
    rows, highest = model.get_input_embeddings().weight.shape[0], int(blocks.input_ids.max())
    if highest >= rows:
        raise ConfigError(
            f"the tokenizer gives token {highest}, but the model has {rows} embeddings; they do not belong together"
        )


def _sizes(model: nn.Module, plan) -> dict[str, Any]:
    deltas, values = {id(s.delta) for s in plan.slices}, Values(model)
    trained = sum(s.delta.numel() for s in plan.slices)
    total = sum(math.prod(values.shape(name)) for name, p in values.own.items() if id(p) not in deltas)
    moved = trained + sum(left.delta.numel() for left in state_of(model).left_behind)
    return {
        "parameters": total,
        "trainable_parameters": trained,
        "trainable_fraction": trained / total,
        "moved_parameters": moved,
    }


def _speed(seconds: list[float], options: TrainOptions, blocks: Blocks) -> dict[str, Any]:
    """Step time and tokens per second without the first steps, which compile."""
    tokens = tokens_of_step(blocks, options)
    median = statistics.median(seconds[WARM_UP:] or seconds[-1:] or [float("nan")])
    return {
        "tokens_per_step": tokens,
        "step_ms": 1e3 * median,
        "tokens_per_second": tokens / median,
        "first_step_seconds": seconds[0] if seconds else None,
    }


def report(metrics: Mapping[str, Any], output: Path) -> Table:
    """The table that ends a run."""
    table = Table(title="s2ft train", show_header=False)
    rows = {
        "held-out loss": f"{metrics['loss_before']:.4f} → {metrics['loss_after']:.4f}"
        if metrics["held_out_blocks"]
        else "nothing was held out",
        "trainable": f"{metrics['trainable_parameters']:,} of {metrics['parameters']:,} parameters "
        f"({metrics['trainable_fraction']:.2%}) at a time; {metrics['moved_parameters']:,} moved",
        "steps": f"{metrics['steps']} × {metrics['tokens_per_step']:,} tokens",
        "step time": f"{metrics['step_ms']:.1f} ms, {metrics['tokens_per_second']:,.0f} tokens/s "
        f"(first step, with compilation: {metrics['first_step_seconds'] or 0:.1f} s)",
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
