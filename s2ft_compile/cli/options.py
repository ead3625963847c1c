"""What `s2ft train` is asked for, and what can be refused before anything slow."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from s2ft_compile.adapters.format import read_adapter
from s2ft_compile.config import DEFAULT, OPTIMIZERS, ROLES, SHARE, CompileOptions, S2FTConfig, check_choice, is_glob
from s2ft_compile.errors import ConfigError, ExportError
from s2ft_compile.exporters.files import remove_left_behind
from s2ft_compile.passes.backward.fp8 import check_device

from .data import DTYPES, load_config, model_class
from .quantize import QUANTIZE, check_fp8, check_not_stored
from .records import Records, read_records

COUNTS = ("batch_size", "grad_accum", "seq_len", "calibration_batches", "save_every", "keep")
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")
REPORTS = ("none", "tensorboard", "wandb")
RUN, PLAN = "run.json", "plan.json"  # what was asked for, written first, and what the run is made of


@dataclass(frozen=True)
class TrainOptions:
    """Everything `s2ft train` takes. steps: optimizer steps; None for `epochs` passes over the data. held_out: the
    share of the blocks that is only measured. batch_size: blocks in a forward. optimizer, lr: see `s2ft.optimizer`.
    calibration_batches: how many batches of the training blocks a selection looks at, if it looks at data; None: four
    for the first one, one for each later one.
    reselect_every: after how many steps, or below 1 what share of them, other units train (`s2ft.reselect`); 0: never.
    None: a tenth of the run, at least 20 steps; never for a quantized base, or a budget of the whole model.
    quantize: the linear layers but the head, while they are loaded (docs/quantized.md). fp8, activation_budget: see
    `CompileOptions`. gradient_checkpointing: see `checkpoint_if`. by_layer: see `compile_layers`. warmup: steps, or
    below 1 a share of them; None for a tenth, at most 10. clip: the largest norm of a step's gradients, 0 for none.
    save_every, eval_every: in steps. keep: how many checkpoints. patience: evaluations without an improvement, after
    which the run ends with its best deltas. resume: goes on from the last checkpoint in `output`. given: what was asked
    for, as it was written.
    Raises `ConfigError` when it is made.
    """

    model: str
    data: Path
    output: Path
    s2ft: S2FTConfig = field(default_factory=S2FTConfig)
    steps: int | None = None
    optimizer: str = "muon"
    lr: float | None = None
    batch_size: int = 4
    seq_len: int = 512
    grad_accum: int = 1
    seed: int = 0
    dtype: str = "auto"
    quantize: str = "none"
    fp8: bool = False
    inner: str = "inductor"
    held_out: float = 0.05
    calibration_batches: int | None = None
    reselect_every: float | None = None
    activation_budget: float = 1.0
    gradient_checkpointing: bool | None = None
    by_layer: bool = False
    epochs: float = 1.0
    packing: bool = False
    warmup: float | None = None
    schedule: str = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    save_every: int = 200
    keep: int = 2
    eval_every: int | None = None
    patience: int | None = None
    report_to: str = "none"
    resume: bool = False
    given: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        for name in (*COUNTS, "steps", "eval_every", "patience"):
            least, value = (2 if name == "seq_len" else 1), getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is at least {least}, got {value}")
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        if self.lr is not None and not 0 < self.lr < 100:
            raise ConfigError(f"lr is a positive number such as 1e-3, got {self.lr}")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out is a share from 0 to less than 1, got {self.held_out}")
        if not 0 < self.epochs < 1e6:
            raise ConfigError(f"epochs is a positive number, got {self.epochs}")
        if self.reselect_every is not None:
            self._check_reselection()
        for name in ("weight_decay", "clip", "warmup"):
            if not 0 <= (getattr(self, name) or 0) < 1e9:
                raise ConfigError(f"{name} is a number from 0, got {getattr(self, name)}")
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("report_to", self.report_to, REPORTS)
        if self.patience and not self.eval_every:
            raise ConfigError("patience counts evaluations: it needs eval_every, the steps between two of them")
        if self.eval_every and not self.held_out:
            raise ConfigError("eval_every needs data that is held out, and held_out is 0")
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("quantize", self.quantize, QUANTIZE)
        check_fp8(self.fp8, self.quantize)
        CompileOptions(self.inner, self.activation_budget, fp8=self.fp8)

    def _check_reselection(self) -> None:
        if not 0 <= self.reselect_every < 1e9:
            raise ConfigError(f"reselect_every is a number of steps, a share, or 0, got {self.reselect_every}")
        if self.reselect_every and self.s2ft.budget != "layer":
            raise ConfigError(f"reselect_every: {self.keeps_units()}; 0 keeps the units")

    def keeps_units(self, quantized: bool = False) -> str | None:
        """Why no other units train later on unless that is asked for. quantized: whether the base is, by `quantize` or
        as it is stored."""
        if self.s2ft.budget != "layer":
            return f"layers keep their size only with budget='layer', got {self.s2ft.budget!r}"
        if quantized or self.quantize != "none":
            return "beside a quantized base those of before take memory; --reselect-every 0.1 chooses units anew"
        return None

    def total_steps(self, blocks: int) -> int:
        """Optimizer steps of the run over this many blocks."""
        return self.steps or max(1, int(self.epochs * (blocks // (self.batch_size * self.grad_accum))))

    def reselection_steps(self, steps: int) -> int:
        """For how many of these steps a unit trains: all of them where units are not chosen anew."""
        every = self.reselect_every
        if every is None:
            every = 0 if self.keeps_units() else max(20, steps / 10)
        return min(steps, round(every if every >= 1 else max(1, every * steps))) if every else steps

    def warmup_steps(self, steps: int) -> int:
        if self.warmup is None:
            return min(10, steps // 10)
        return int(self.warmup if self.warmup >= 1 else self.warmup * steps)


def parse_targets(text: str | None) -> dict[str, int | float] | None:
    """`ffn.out=0.03,attention.out=4` as {role or glob: ratio or units}; without a point it is units. `default` alone is
    at its own ratio.
    """
    if text is None:
        return None
    targets: dict[str, int | float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        part = f"{DEFAULT}={SHARE}" if part == DEFAULT else part
        name, equals, amount = (piece.strip() for piece in part.rpartition("="))
        if not equals or not name:
            raise ConfigError(
                f"target {part!r} is not of the form ROLE=AMOUNT, such as ffn.out=0.02 (a ratio) or "
                f"ffn.out=4 (units); roles: {', '.join(ROLES)}"
            )
        if name in targets:
            raise ConfigError(f"target {name!r} is given twice")
        targets[name] = _amount(name, amount)
    if not targets:
        raise ConfigError(f"no target in {text!r}; for example ffn.in=0.02,ffn.out=0.02")
    return targets


def layered(ctx: Any, *files: Path | None) -> dict[str, Any]:
    """The options of a command: what was typed, else what the first of these YAML (or JSON) files says, else defaults.

    Raises `ConfigError` for a file that cannot be read, a name that is no option, and a value of another type.
    """
    known = {p.name: p for p in ctx.command.params if p.name not in ("config", "resume", "debug", "help")}
    typed = {
        n for n in known if (source := ctx.get_parameter_source(n)) and source.name not in ("DEFAULT", "DEFAULT_MAP")
    }
    values, settled = dict(ctx.params), set(typed)
    for path in filter(None, files):
        for name, value in _mapping(path).items():
            key = str(name).replace("-", "_")
            if key not in known:
                valid = ", ".join(sorted(n.replace("_", "-") for n in known))
                raise ConfigError(f"{path}: unknown option {name!r}; valid: {valid}")
            if key not in settled:
                values[key] = _typed(path, known[key], ctx, value)
                settled.add(key)
    return values


def _mapping(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is no map of options, such as `lr: 0.001`")
    return values


def _typed(path: Path, parameter: Any, ctx: Any, value: Any) -> Any:
    """A value of a file as the command line would have taken it."""
    if value is None:
        return None
    if parameter.name == "targets" and isinstance(value, dict):
        value = ",".join(f"{target}={amount}" for target, amount in value.items())
    given = [str(v) for v in value] if isinstance(value, list) else value if isinstance(value, bool) else str(value)
    try:
        return parameter.process_value(ctx, given)
    except Exception as error:  # click's, whose text names the type
        raise ConfigError(f"{path}: {parameter.name} is {value!r}: {getattr(error, 'message', error)}") from error


def _amount(name: str, text: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise ConfigError(
        f"target {name}: {text!r} is no amount; write a ratio such as 0.03 or a number of units such as 4"
    )


def check(options: TrainOptions) -> Records:
    """Everything that can be refused without loading weights; the data file's records."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "`s2ft train` runs in one process; in several, Trainer trains a prepared model (examples/train_trainer.py)"
        )
    (check_begun if options.resume else check_new)(Path(options.output))
    if options.report_to != "none" and find_spec(options.report_to) is None:
        raise ConfigError(f"--report-to {options.report_to} needs the package: pip install {options.report_to}")
    if options.fp8:
        check_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    config = load_config(options.model)
    check_not_stored(options.model, config, options.quantize)
    _check_causal(options.model, config)
    _check_globs(config, options.s2ft)
    for folder in options.s2ft.exclude:
        read_adapter(folder)
    return read_records(options.data)


def check_begun(output: Path) -> None:
    """That there is a run to go on with. One that was killed before it had slices begins anew."""
    if not _begun(output):
        raise ConfigError(f"{output} has no run to go on with: {RUN} is missing; start it without --resume")


def check_new(output: Path) -> None:
    """That a run finds its folder new."""
    if _begun(output):
        raise ExportError(f"output folder {output} holds a run already: go on with --resume, or name a new folder")
    if output.is_dir():
        remove_left_behind(output)  # by a run that was killed as it began
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        what = "is not empty" if output.is_dir() else "is a file"
        raise ExportError(
            f"output folder {output} exists and {what}; name a folder that does not exist yet, or an empty one"
        )


def _begun(output: Path) -> bool:
    return any((output / name).is_file() for name in (RUN, PLAN))


def _check_causal(model: str, config) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if model_class(config).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ConfigError(
            f"{model} is a {model_class(config).__name__}; `s2ft train` trains causal language models "
            f"(a class of AutoModelForCausalLM), other models are trained from Python"
        )


def _check_globs(config, s2ft: S2FTConfig) -> None:
    """Targets that are no roles must match parameters; their names come from a model without storage."""
    globs = [target for target in s2ft.targets or () if is_glob(target)]
    if not globs:
        return
    with torch.device("meta"):
        names = [name for name, _ in model_class(config)(config).named_parameters()]
    for target in globs:
        if not any(fnmatchcase(name, target) for name in names):
            raise ConfigError(
                f"unknown target {target!r}: neither a role ({', '.join(ROLES)}) nor a glob that matches "
                f"a parameter, such as {names[len(names) // 2]!r}"
            )
