"""The ways of fine-tuning that are compared, as data. All but full fine-tuning train as many numbers as a LoRA of the
setting's rank on all linear layers, as nearly as whole units allow.
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

import peft
import torch
from base import Setting
from torch import Tensor, nn

import s2ft_compile as s2ft
from s2ft_compile import preparation
from s2ft_compile.backend import s2ft as s2ft_backend

torch._dynamo.config.recompile_limit = 64  # models of one class share a cache

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Contender:
    """kind: "full", "peft" or "s2ft". rate: the exponent of ten that the search for a learning rate starts at.

    options: of PEFT's configuration, with its class's name as "config"; or of `S2FTConfig`, with what `targets` takes
    as "parts". again: how often the units are chosen in a run. batches: what a choice after the first looks at.
    """

    title: str
    kind: str
    optimizer: str = "adamw"
    rate: float = -3.0
    options: Mapping[str, object] = field(default_factory=dict)
    again: int = 1
    batches: int = 1


# of attention, in each layer (INSIDE: in the default's proportions); channels of the FFN make up the rest
LOOKS = {"attention.query": 1, "attention.key": 1}
HEADS = {"attention.out": 1, "attention.value": 1, **LOOKS}
INSIDE = {"attention.out.channels": 2, "attention.value.channels": 2, "attention.query": 2, "attention.key": 1}


def _s2ft(
    title: str, parts=("channels", INSIDE, True), selection="gradient", optimizer="muon", again=10, batches=1, **options
):
    return Contender(
        title, "s2ft", optimizer, -2.0, {"parts": parts, "selection": selection, **options}, again, batches
    )


def _peft(title: str, config="LoraConfig", optimizer="adamw", rate=-2.0, **options):
    return Contender(title, "peft", optimizer, rate, {"config": config, **options})


MAIN = {
    "full": Contender("full fine-tuning", "full"),
    "lora": _peft("LoRA"),
    "rslora": _peft("rsLoRA", use_rslora=True),
    "dora": _peft("DoRA", use_dora=True),
    "shira": _peft("SHiRA", "ShiraConfig", rate=-2.0),
    "s2ft": _s2ft("S²FT, the default: chosen anew ten times"),
    "s2ft_once": _s2ft("S²FT, chosen once", again=1),
    "s2ft_linear": _s2ft("S²FT without norms", ("channels", INSIDE)),
    "s2ft_paper": _s2ft(
        "S²FT as published: columns and a head, at random, AdamW",
        ("columns", {"attention.out": 1}),
        "random",
        "adamw",
        1,
    ),
}
VARIANTS = {
    "s2ft_again25": _s2ft("chosen anew 25 times", again=25),
    "s2ft_again4": _s2ft("chosen anew four times", again=4),
    "s2ft_four": _s2ft("every choice by four batches", batches=4),
    "s2ft_query": _s2ft("one head of the queries", parts=("channels", {**INSIDE, "attention.query": 1}, True)),
    "s2ft_random": _s2ft("drawn anew ten times", selection="random"),
    "s2ft_adamw": _s2ft("AdamW", optimizer="adamw"),
    "s2ft_looks": _s2ft("of attention heads of queries and keys alone", ("channels", LOOKS)),
    "s2ft_heads": _s2ft("whole heads, of values and of the output too, without norms", ("channels", HEADS)),
    "s2ft_even": _s2ft("heads at the channels' rate", optimizer="muon, heads alike"),
    "s2ft_tenth": _s2ft("heads at a tenth of the channels' rate", optimizer="muon, heads a tenth"),
    "s2ft_muon": _s2ft("Muon for the heads too", optimizer="muon of all"),
    "s2ft_channels": _s2ft("channels alone", ("channels", {})),
    "s2ft_channels_once": _s2ft("channels alone, chosen once", ("channels", {}), again=1),
    "s2ft_columns_once": _s2ft("columns of down alone, chosen once", ("columns", {}), again=1),
    "s2ft_random_once": _s2ft("drawn once", selection="random", again=1),
    "s2ft_weight": _s2ft("units with the largest weights", selection="weight"),
    "s2ft_least": _s2ft("channels that do least", selection="weight_activation", largest=False),
    "s2ft_score_once": _s2ft("layers share by score, chosen once", budget="score", again=1),
    "lora_muon": _peft("LoRA with Muon", optimizer="muon"),
}
CONTENDERS = MAIN | VARIANTS


@dataclass
class Tuned:
    """A model that trains: compiled, what the optimizer holds, and how the units are chosen again (None: never)."""

    model: nn.Module
    net: Callable
    leaves: list[nn.Parameter]
    again: Callable[[int], object] | None = None

    @property
    def numbers(self) -> int:
        return sum(p.numel() for p in self.leaves)


def tuned(contender: Contender, base: nn.Module, setting: Setting, seed: int, batches: list[Batch]) -> Tuned:
    """The base model, ready to train. batches: what a selection that looks at data may look at.

    Runs of one kind and size share a model, whose weights are set again, and with it its compiled graphs.
    """
    torch.manual_seed(seed)
    options = dict(contender.options)
    if contender.kind == "s2ft":
        asked = targets(setting, *options.pop("parts"))
        model, net = _compiled(("s2ft", repr(asked)), lambda: copy.deepcopy(base), setting)
        config = s2ft.S2FTConfig(asked, seed=seed, **options)
        again = partial(s2ft.reselect, model, batches[: contender.batches] if config.selection in NEED_DATA else None)
        return Tuned(model, net, _prepare(model, config, batches), lambda seed: again(seed=seed))
    make = copy.deepcopy if contender.kind == "full" else partial(_with_peft, setting=setting, **options)
    model, net = _compiled((contender.kind, repr(options)), lambda: make(base), setting)
    return Tuned(model, net, [p for p in model.parameters() if p.requires_grad])


_models: dict[tuple, tuple[nn.Module, Callable]] = {}


def _compiled(key: tuple, make: Callable[[], nn.Module], setting: Setting) -> tuple[nn.Module, Callable]:
    """A model with the weights of `make()`, and its compiled call."""
    if key not in _models:
        model = make()
        eager = setting.name == "quick" or "Shira" in key[1]  # whose sparse weights are not compiled
        backend = "eager" if eager else s2ft_backend if key[0] == "s2ft" else "inductor"
        _models[key] = model, model if eager else torch.compile(model, backend=backend, dynamic=False)
        return _models[key]
    model, net = _models[key]
    if s2ft.is_prepared(model):
        s2ft.release(model)
    model.load_state_dict(make().state_dict())
    return model, net


def _with_peft(base: nn.Module, setting: Setting, config: str, **options) -> nn.Module:
    if config == "LoraConfig":
        options["lora_alpha"] = 2 * setting.rank
    model = copy.deepcopy(base)
    adapter = getattr(peft, config)(r=setting.rank, target_modules=_linears(model), task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(model, adapter)


def _linears(model: nn.Module) -> list[str]:
    return sorted({name.rpartition(".")[2] for name, m in model.model.named_modules() if isinstance(m, nn.Linear)})


def lora_numbers(setting: Setting) -> int:
    """Of LoRA on all linear layers: the sum of their inputs and outputs, times the rank."""
    d, ffn = setting.hidden, 7 * setting.hidden // 2
    head = d // setting.heads // 2 * 2
    q, kv = head * setting.heads, head * (setting.heads // 3)
    return setting.rank * setting.layers * (2 * (d + q) + 2 * (d + kv) + 3 * (d + ffn))


def targets(setting: Setting, what: str, attention: Mapping[str, int], norms: bool = False) -> dict[str, int | float]:
    """Units of each layer: those of attention; norms; "columns" of down, or whole "channels", for the rest."""
    head = setting.hidden // setting.heads // 2 * 2
    wide = {"attention.out.channels": setting.heads, "attention.value.channels": setting.heads // 3}
    rows = sum(units * wide.get(role, head) for role, units in attention.items())
    left = lora_numbers(setting) // setting.layers - rows * setting.hidden
    left -= norms * (2 * setting.layers + 1) * setting.hidden // setting.layers
    roles = ("ffn.out",) if what == "columns" else ("ffn.in", "ffn.out")
    units = round(left / setting.hidden / (1 if what == "columns" else 3))
    return {**dict.fromkeys(roles, units), **attention} | ({"norm": 1.0} if norms else {})


NEED_DATA = {"gradient", "activation", "weight_activation"}
_known: dict[tuple, object] = {}  # a model's sizes -> its structures: every run has the same model


def _prepare(model: nn.Module, config: s2ft.S2FTConfig, batches: list[Batch]) -> list[nn.Parameter]:
    example = {"input_ids": batches[0]["input_ids"]}
    sizes = tuple(p.shape for p in model.parameters())
    with ExitStack() as stack:
        if sizes in _known:
            known = {"analyze": lambda *_, **__: _known[sizes], "trained_bands": lambda *_: ({}, {})}
            for name, function in known.items():
                stack.enter_context(mock.patch.object(preparation, name, function))
        else:
            _known[sizes] = s2ft.analyze(model, example)
        s2ft.prepare(model, example, config, calibration=batches if config.selection in NEED_DATA else None)
    return s2ft.parameters(model)


def optimizer(contender: Contender, trial: Tuned, lr: float, steps: int) -> torch.optim.Optimizer:
    """S²FT's are the package's, but for "muon of all", which has no other rate for heads."""
    if contender.kind == "s2ft" and contender.optimizer != "muon of all":
        heads = {"muon, heads alike": lr, "muon, heads a tenth": 0.1 * lr}.get(contender.optimizer)
        return s2ft.optimizer(trial.model, contender.optimizer.split(",")[0], lr, steps=steps, heads=heads)
    if contender.optimizer == "adamw":
        return torch.optim.AdamW(trial.leaves, lr=lr, weight_decay=0.0, fused=True)
    return torch.optim.Muon(trial.leaves, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
