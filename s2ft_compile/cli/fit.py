"""The training of a prepared model by transformers' Trainer: with its checkpoints, schedules, clipping, early stopping
and reports. A checkpoint holds the deltas, not the frozen weights: the base model is read again where a run goes on.

TRL's SFTTrainer replaces the model's forward by one that computes the head outside the compiled graph, and makes
batches of many shapes, so it is not used.
"""

import json
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from s2ft_compile.errors import ConfigError, StateError, TrainingError
from s2ft_compile.exporters.files import write_text
from s2ft_compile.layers import compile_layers
from s2ft_compile.quantized import not_quantized
from s2ft_compile.slices.optimizers import optimizer
from s2ft_compile.slices.units import load_trained_state, trained_state

from .data import Blocks
from .options import TrainOptions

EARLY = 100  # steps after which the loss should have fallen
LOG, CHECKPOINTS, WEIGHTS, STATE = "log.jsonl", "checkpoints", "model.safetensors", "trainer_state.json"


def calibration(
    model: nn.Module, blocks: Blocks, options: TrainOptions, default: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of the training blocks, spread evenly over them, for a selection that looks at data. default: how many,
    where the options do not say."""
    device = next(model.parameters()).device
    size = min((options.calibration_batches or default) * options.batch_size, len(blocks))
    chosen = blocks.take([i * len(blocks) // size for i in range(size)])
    for start in range(0, size, options.batch_size):
        yield {k: v.to(device) for k, v in chosen[start : start + options.batch_size].items()}


def fit(
    model: nn.Module, blocks: Blocks, held_out: Blocks, options: TrainOptions, work: Path, bars: Progress
) -> tuple[int, list[float]]:
    """Trains a prepared model, compiled, with Trainer, from its last checkpoint if it has one; the steps that it has
    now, and the seconds of each that was taken here."""
    steps = options.total_steps(len(blocks))
    with _compiled(model, options), not_quantized(model):  # which Trainer takes for a model that cannot train
        start = last_checkpoint(work)
        if start and (end := _end(start, steps, options.patience)):
            load_deltas(model, end)
            return _state(start)["global_step"], []
        watch = _watch(bars, steps, options, work, tokens_of_step(blocks, options))
        callbacks = [watch, _reselection(model, blocks, options, steps)]
        trainer = _trainer(model, blocks, held_out, options, work, steps, callbacks)
        watch.trim(start)
        with watch.interruptible():
            trainer.train(resume_from_checkpoint=str(start) if start else None)
    if watch.interrupted:
        raise Interrupted
    model.eval()
    return trainer.state.global_step, watch.seconds


def last_checkpoint(work: Path) -> Path | None:
    """The last checkpoint that is complete: Trainer writes its state behind everything else."""
    complete = {}
    for folder in (work / CHECKPOINTS).glob("checkpoint-*"):
        try:
            complete[_state(folder)["global_step"]] = folder
        except (OSError, ValueError, KeyError):
            continue
    return complete[max(complete)] if complete else None


def _state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def _end(last: Path, steps: int, patience: int | None) -> Path | None:
    """The checkpoint whose deltas a run ends with, if this was its last: Trainer would take one more step."""
    state = _state(last)
    if state["global_step"] < steps and not (patience and _without_better(state["stateful_callbacks"]) >= patience):
        return None
    best = state["best_model_checkpoint"] if patience else None
    return last.with_name(Path(best).name) if best else last


def _without_better(callbacks: Mapping[str, Any]) -> int:
    """How many evaluations in a row were no better, as `Patience` left it in a checkpoint."""
    return callbacks.get("Patience", {}).get("attributes", {}).get("early_stopping_patience_counter", 0)


class Interrupted(Exception):
    """A person, or the system, asked the run to stop; its checkpoint was written."""


@contextmanager
def _compiled(model: nn.Module, options: TrainOptions) -> Iterator[None]:
    how = {"inner": options.inner, "activation_budget": options.activation_budget, "fp8": options.fp8}
    with _without_cache(model):
        compiled = compile_layers(model, **how) if options.by_layer else [model]
        if not options.by_layer:
            model.compile(backend="s2ft", options={**how, "logits": False})
        try:
            yield
        finally:
            for module in compiled:
                module._compiled_call_impl = None  # what compile() set; the exporters want the plain call


def _trainer(model, blocks, held_out, options: TrainOptions, work: Path, steps: int, callbacks: list):
    from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainingArguments, default_data_collator

    class SliceTrainer(Trainer):
        """Its checkpoints hold the deltas alone, and it measures what is held out as this command does, eagerly."""

        def _save(self, output_dir=None, state_dict=None):
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file({k: v.contiguous() for k, v in trained_state(self.model).items()}, folder / WEIGHTS)

        def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
            load_deltas(self.model, Path(resume_from_checkpoint))

        def _load_best_model(self):
            load_deltas(self.model, Path(self.state.best_model_checkpoint))

        def evaluate(self, *_, **__):
            metrics = {"eval_loss": loss(self.model, held_out, options.batch_size)}
            self.log(dict(metrics))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    class Patience(EarlyStoppingCallback):
        """Counts on from where the checkpoint was written."""

        def on_train_begin(self, args, state, control, **kwargs):
            self.early_stopping_patience_counter = _without_better(state.stateful_callbacks)
            if best := state.best_model_checkpoint:  # of a run that was moved since, or is named from elsewhere
                state.best_model_checkpoint = str(work / CHECKPOINTS / Path(best).name)

    evaluated = "steps" if options.eval_every else "no"
    arguments = TrainingArguments(
        output_dir=str(work / CHECKPOINTS),
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.grad_accum,
        learning_rate=options.lr,
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup_steps(steps),
        weight_decay=options.weight_decay,
        max_grad_norm=options.clip,
        seed=options.seed,
        dataloader_drop_last=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=options.eval_every if options.patience else options.save_every,
        save_total_limit=options.keep,
        eval_strategy=evaluated,
        eval_steps=options.eval_every,
        load_best_model_at_end=options.patience is not None,
        metric_for_best_model="eval_loss" if options.patience else None,
        greater_is_better=False if options.patience else None,
        report_to=options.report_to,
        disable_tqdm=True,
        use_cpu=next(model.parameters()).device.type == "cpu",
        remove_unused_columns=False,
    )
    _use_one_gpu(arguments)
    early = [Patience(options.patience)] if options.patience else []
    trainer = SliceTrainer(
        model,
        arguments,
        default_data_collator,
        train_dataset=blocks,
        eval_dataset=held_out,
        callbacks=[*callbacks, *early],
        optimizers=(optimizer(model, options.optimizer, options.lr, options.weight_decay, steps), None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def load_deltas(model: nn.Module, checkpoint: Path) -> None:
    """Puts the deltas of a checkpoint of this command into the model it was made from, prepared alike."""
    try:
        deltas = load_file(checkpoint / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{checkpoint} is damaged ({error}); remove it to go on from the one before") from error
    try:
        load_trained_state(model, deltas)
    except StateError as error:
        raise ConfigError(f"{checkpoint} has other slices than this model: {error}") from error


@torch.no_grad()
def loss(
    model: nn.Module, blocks: Blocks, batch_size: int, on_batch: Callable[[int, int], None] | None = None
) -> float:
    """Cross-entropy per learned token, in nats; NaN without blocks. Eager: a second compilation would cost more."""
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
    return total / count if count else float("nan")


def tokens_of_step(blocks: Blocks, options: TrainOptions) -> int:
    """In an optimizer step, with the padding."""
    return options.batch_size * options.grad_accum * blocks.input_ids.shape[1]


def _reselection(model: nn.Module, blocks: Blocks, options: TrainOptions, steps: int):
    """A Trainer callback by which other units train from some steps on."""
    from s2ft_compile.callback import S2FTCallback

    every = options.reselection_steps(steps)
    return S2FTCallback(every if every < steps else None, lambda: calibration(model, blocks, options, default=1))


def _watch(bars: Progress, steps: int, options: TrainOptions, work: Path, tokens: int):
    """A Trainer callback that shows the progress, logs every step, and stops for a person or for what is not finite.
    tokens: of a step."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self):
            self.seconds: list[float] = []
            self.losses: list[float] = []
            self.interrupted = False
            self.task = bars.add_task("training (the first step compiles)", total=steps)

        def trim(self, start: Path | None) -> None:
            """Leaves in the log what lies before the checkpoint that the run goes on from."""
            step, path = int(start.name.rsplit("-")[-1]) if start else 0, work / LOG
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            kept = [line for line in lines if _step_of(line) <= step]
            write_text(path, "".join(f"{line}\n" for line in kept))

        @contextmanager
        def interruptible(self):
            """The first Ctrl-C lets the step end and its checkpoint be written; the second ends at once."""

            def ask(number, frame):
                if self.interrupted:
                    raise KeyboardInterrupt
                self.interrupted = True
                bars.console.print("stopping after this step, with a checkpoint; once more stops at once")

            try:
                before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
            except ValueError:  # not in the main thread
                before = {}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        def on_step_begin(self, args, state, control, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.began)
            if self.interrupted:
                control.should_save = control.should_training_stop = True

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                for name in ("loss", "grad_norm"):
                    if not torch.isfinite(torch.tensor(float(logs.get(name, 0.0)))):
                        raise TrainingError(
                            f"the {name.replace('grad_norm', 'gradient')} of step {state.global_step} is "
                            f"{float(logs[name])}: training diverged; a lower learning rate, a longer warm-up or a "
                            f"closer look at the data may help"
                        )
                self.losses.append(float(logs["loss"]))
                if len(self.losses) == EARLY and (problem := hardly_learns(self.losses, options.lr)):
                    bars.console.print(f"[yellow]{problem}[/]")
                bars.update(
                    self.task, completed=state.global_step, description=f"training, loss {float(logs['loss']):.3f}"
                )
            self._write(state.global_step, logs)

        def _write(self, step: int, logs: Mapping[str, Any]) -> None:
            names = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad_norm", "eval_loss": "eval_loss"}
            line = {"step": step, **{new: float(logs[old]) for old, new in names.items() if old in logs}}
            if "loss" in logs and self.seconds:
                line |= {"seconds": self.seconds[-1], "tokens_per_second": tokens / self.seconds[-1], **_memory()}
            if len(line) > 1:
                with open(work / LOG, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")

    return Watch()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # cut off when the process was killed
        return float("inf")


def _memory() -> dict[str, int]:
    """The most that was allocated so far, in bytes: of the GPU, or else of the process."""
    if torch.cuda.is_available():
        return {"memory": torch.cuda.max_memory_allocated()}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    return {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def hardly_learns(losses: list[float], lr: float) -> str | None:
    """What to say where the loss of the first steps has not fallen by twice its standard error."""
    size = max(len(losses) // 4, 2)
    first, last = losses[:size], losses[-size:]
    error = ((statistics.variance(first) + statistics.variance(last)) / size) ** 0.5
    fell = statistics.fmean(first) - statistics.fmean(last)
    if fell > 2 * error:
        return None
    return (
        f"the loss has hardly fallen in {len(losses)} steps ({statistics.fmean(first):.4f} to "
        f"{statistics.fmean(last):.4f}): a learning rate of {lr:g} may be too low to learn"
    )


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
