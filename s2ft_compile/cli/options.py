"""What `s2ft train` is asked for, and what can be refused before anything slow."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from s2ft_compile.adapters.format import read_adapter
from s2ft_compile.config import OPTIMIZERS, ROLES, CompileOptions, S2FTConfig, check_choice, is_glob
from s2ft_compile.errors import ConfigError, ExportError

from .data import DTYPES, Records, load_config, model_class, read_records


@dataclass(frozen=True)
class TrainOptions:
    """Everything `s2ft train` takes. steps: optimizer steps, None for one pass over the data. held_out: the
    share of the blocks that is only measured. batch_size: blocks in a forward.
    optimizer, lr: see `s2ft.optimizer`. calibration_batches: how many batches of the training blocks a selection looks
    at, if it looks at data. activation_budget: see `CompileOptions`. by_layer: see `compile_layers`. Raises
    `ConfigError` when it is made.
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
    inner: str = "inductor"
    held_out: float = 0.05
    calibration_batches: int = 4
    activation_budget: float = 1.0
    by_layer: bool = False

    def __post_init__(self):
        for name in ("steps", "batch_size", "grad_accum", "seq_len", "calibration_batches"):
            least, value = (2 if name == "seq_len" else 1), getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is at least {least}, got {value}")
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        if self.lr is not None and not 0 < self.lr < 100:
            raise ConfigError(f"lr is a positive number such as 1e-3, got {self.lr}")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out is a share between 0 and 1, got {self.held_out}")
        check_choice("dtype", self.dtype, DTYPES)
        CompileOptions(self.inner, self.activation_budget)


def parse_targets(text: str) -> dict[str, int | float]:
    """`ffn.out=0.03,attention.out=4` as {role or glob: ratio or units}; without a point it is units."""
    targets: dict[str, int | float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
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
    _check_output(options.output)
    config = load_config(options.model)
    _check_causal(options.model, config)
    _check_globs(config, options.s2ft)
    for folder in options.s2ft.exclude:
        read_adapter(folder)
    return read_records(options.data)


def _check_output(output: Path) -> None:
    """What `exporters.files.new_directory` refuses, before anything slow."""
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        what = "is not empty" if output.is_dir() else "is a file"
        raise ExportError(
            f"output folder {output} exists and {what}; name a folder that does not exist yet, or an empty one"
        )


def _check_causal(model: str, config) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if model_class(config).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ConfigError(
            f"{model} is a {model_class(config).__name__}; `s2ft train` trains causal language models "
            f"(a class of AutoModelForCausalLM), other models are trained from Python"
        )


def _check_globs(config, s2ft: S2FTConfig) -> None:
    """Targets that are no roles must match parameters; their names come from a model without storage."""
    globs = [target for target in s2ft.targets if is_glob(target)]
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
