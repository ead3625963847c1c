"""`analyze`, `permute` and `prepare`: from a model to a prepared one."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from s2ft_compile.adapters.apply import check_fits
from s2ft_compile.adapters.format import read_adapter
from s2ft_compile.passes.backward.trainable import trainable, trained_bands
from s2ft_compile.passes.couple.couple import couple
from s2ft_compile.passes.permute import dense_orders, move, moves_for
from s2ft_compile.passes.ranges import ranges
from s2ft_compile.passes.select.calibrate import Loss, calibrate
from s2ft_compile.passes.select.calibrate import check as check_calibration
from s2ft_compile.passes.select.ranking import WHOLE, Band, Taken
from s2ft_compile.passes.select.select import Selection, candidates, notes, roles_of, select, targeted_bands

from .adapters.fingerprint import fingerprint
from .capture.models import tensors_of, unwrap
from .capture.traces import captures
from .config import DEFAULT, S2FTConfig, looks_at_data
from .errors import ConfigError, StateError, VerificationError
from .plan import Plan, Slice
from .quantized import Values, check_gradients, settle
from .slices.blocks import Beside, Block, InPlace, beside_of, blocks_in, free_key, places_of
from .slices.processes import check_not_sharded
from .slices.state import State, find_state, live_states, watch_optimizers
from .structure import Analysis, Coupling
from .verification import verify as verify_couplings

log = logging.getLogger(__name__)


def analyze(model: nn.Module, example_inputs: Any, verify: bool = False, train: bool = True) -> Analysis:
    """Finds every coupled structure of a model; changes nothing. A model on the `meta` device will do.

    example_inputs: a tuple or a dict of the forward's arguments; a list of those for a model that takes different ones.
    What is found holds in eval and in train mode, and at another batch size and length where the inputs have such.
    verify: also permute all couplings at random and compare outputs (`s2ft.verify`). train: whether train mode is
    looked at. Raises `CaptureError` if the model cannot be traced in a mode, `VerificationError` if verify finds a
    difference.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> print(*analyze(model, (torch.ones(2, 4),)).couplings)
    ffn × 8: 0.weight[0] (ffn.in), 0.bias[0] (ffn.in), 2.weight[1] (ffn.out)
    """
    analysis = couple(*captures(unwrap(model), example_inputs, train))
    if verify and not (verified := verify_couplings(model, example_inputs, analysis)).ok:
        raise VerificationError(str(verified))
    return analysis


def permute(model: nn.Module, coupling: Coupling, order: Tensor | Sequence[int]) -> None:
    """Reorders one coupling's units in place, everywhere they occur: new unit i is old unit order[i].

    order: int64 (coupling.units,). Raises `ConfigError` if it is not a permutation or the model is another one.
    """
    model = unwrap(model)
    if find_state(model) is not None:
        raise StateError(
            "this model is prepared, and its plan records where its units are; call s2ft.release(model) first"
        )
    order = torch.as_tensor(order, dtype=torch.int64).cpu()
    if order.shape != (coupling.units,) or not torch.equal(order.sort().values, torch.arange(coupling.units)):
        raise ConfigError(f"order must hold each of 0 to {coupling.units - 1} once, got {order.numel()} values")
    tensors = tensors_of(model)
    for (name, dim), layout in coupling.layouts.items():
        if name not in tensors or tensors[name].ndim <= dim or tensors[name].shape[dim] != layout.size:
            raise ConfigError(
                f"this coupling is of another model: {name} has no dimension {dim} of size {layout.size} here"
            )
    for (name, dim), index in moves_for({coupling.axis: order}, coupling.layouts).items():
        move(tensors[name], dim, index)


def prepare(
    model: nn.Module,
    example_inputs: Any,
    config: S2FTConfig | Plan | None = None,
    calibration: Iterable[Any] | None = None,
    loss: Loss | None = None,
    train: bool = True,
) -> Plan:
    """Selects slices, permutes the weights so that they are dense, freezes the rest and registers the deltas.

    example_inputs, train: as for `analyze`. config: what to select; or a `Plan` of this base, whose slices are taken as
    they are, with nothing measured, to go on with a run on another machine.
    calibration: batches, each a tuple or a dict of the forward's arguments, for the selections that look at data. loss:
    (output, batch) -> scalar, for the selection "gradient" of a model whose output is neither a loss nor has one.
    The model stays the user's: same class, same `state_dict()` keys, same outputs (up to the rounding of reordered
    sums). Raises `ConfigError`, `CaptureError`, `StateError`, or `AdapterError` for an adapter
    in `config.exclude` that cannot be read or is of another base model, each before anything is changed.
    """
    if isinstance(model, DistributedDataParallel):
        raise StateError(
            "this model is wrapped in DistributedDataParallel, which would not reduce the slices' gradients; "
            "call s2ft.prepare first and wrap the prepared model"
        )
    given = config if isinstance(config, Plan) else None
    model, config = unwrap(model), given.config if given else config or S2FTConfig()
    if not isinstance(config, S2FTConfig):
        raise ConfigError(f"config must be an S2FTConfig, got {type(config).__name__}")
    check_not_sharded(model)
    if find_state(model) is not None:
        raise StateError("this model is prepared already; call s2ft.release(model) before preparing it again")
    if given is None:
        config = replace(config, selection=config.selection or ("gradient" if calibration is not None else "random"))
        check_calibration(config.selection, calibration)
    parameters = Values(model)
    of_others = taken(model, config) if given is None else None
    _check_not_shared(model, parameters.own)
    check_gradients(parameters.quantized.values())
    for weight in parameters.quantized.values():
        settle(weight.layer, weight.key)
    analysis = analyze(model, example_inputs, train=train)
    return prepare_analyzed(model, example_inputs, analysis, config, given, calibration, loss, of_others)


def prepare_analyzed(
    model: nn.Module,
    example_inputs: Any,
    analysis: Analysis,
    config: S2FTConfig,
    given: Plan | None = None,
    calibration: Iterable[Any] | None = None,
    loss: Loss | None = None,
    of_others: Taken | None = None,
) -> Plan:
    """The same of a model of which all else is known: `prepare` checks it. given: the plan whose slices are taken.
    of_others: what adapters that are excluded change."""
    parameters, base = Values(model), fingerprint(model)
    if given is None and (config.targets is None or DEFAULT in config.targets):
        config = replace(config, targets=config.targets_of(roles_of(analysis, of_others)))
    asked = candidates(analysis, config)
    if given is not None:
        wanted = _selected(given, base, analysis)
        asked[""] = [Band(s.parameter_name, s.dim, role, (), s.indices[None]) for s in wanted for role in s.roles]
    _, refused = trained_bands(model, example_inputs, analysis, asked)
    analysis = replace(analysis, untrained=frozenset((*place, role) for place in refused for role in refused[place]))
    if given is None:
        scores = measured(model, analysis, config, calibration, loss)
        wanted = select(analysis, config, parameters, scores, of_others)
    _check_trainable(wanted, parameters, analysis)
    selections = trainable(model, config, wanted, refused)
    lines = (*notes(analysis, config), *_left_out(wanted, selections))
    for line in lines:
        log.info("%s", line)
    orders = dense_orders(analysis, selections, parameters.quantized)
    index = moves_for(orders, analysis.layouts)
    moves = [(name, dim, order) for (name, dim), order in index.items()]
    frozen = [name for name, p in parameters.own.items() if p.requires_grad]
    with ExitStack() as undo:
        tensors = tensors_of(model)  # batch norms' statistics follow their channels
        for name, dim, order in moves:
            move(tensors[name], dim, order)
            undo.callback(move, tensors[name], dim, torch.argsort(order))
        pairs = [_block(model, parameters, s, index) for s in selections]
        for name in frozen:
            parameters.own[name].requires_grad_(False)
            undo.callback(parameters.own[name].requires_grad_, True)
        plan = Plan(config, base, tuple(piece for _, piece in pairs), lines)
        state = State(plan, [block for block, _ in pairs], orders, frozen, analysis)
        undo.callback(state.uninstall, model)
        state.install(model)
        undo.pop_all()
    watch_optimizers()
    trained = sum(b.delta.numel() for b in state.blocks)
    log.info("prepared %s: %d slices, %d parameters train", type(model).__name__, len(pairs), trained)
    return plan


def _check_not_shared(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    if (held := blocks_in(model)) and all(isinstance(b, Beside) and not b.delta.requires_grad for b in held):
        raise StateError(
            f"an adapter's slices lie beside the quantized weights of this {type(model).__name__}; take them off first "
            f"with s2ft.exporters.unload_adapter(model)"
        )
    if held or any(state.holds(list(parameters.values())) for state in live_states()):
        raise StateError(
            f"a part of this {type(model).__name__} belongs to another prepared model; prepare the outermost model "
            f"once, or call s2ft.release on the other one first"
        )


def taken(model: nn.Module, config: S2FTConfig) -> Taken:
    """What the adapters in `config.exclude` change: parameter -> (dim, indices) of each."""
    units: dict[str, list[tuple[int, Tensor]]] = {}
    for folder in config.exclude:
        adapter = read_adapter(folder)
        check_fits(model, adapter)
        for s in adapter.slices:
            units.setdefault(s.parameter_name, []).append((s.dim, s.indices))
    return units


def measured(
    model: nn.Module, analysis: Analysis, config: S2FTConfig, calibration: Any, loss: Loss | None
) -> dict[tuple[str, int], Tensor]:
    """What `select` wants of a selection that looks at data: (parameter, dim) -> float64 (size of dim,)."""
    if not looks_at_data(config.selection):
        return {}
    assert isinstance(config.selection, str)
    bands = [b for bands in targeted_bands(analysis, config).values() for b in bands if b.role != WHOLE]
    places = [(b.parameter_name, b.dim) for b in bands]
    return calibrate(model, places, config.selection, calibration, loss)


def _selected(plan: Plan, base: str, analysis: Analysis) -> tuple[Selection, ...]:
    """The selections that a plan records. Raises `ConfigError` for one of another base, or of a structure not here."""
    if plan.fingerprint != base:
        raise ConfigError(f"the plan is of another base model: of fingerprint {plan.fingerprint}, not {base}")
    for s in plan.slices:
        layout = analysis.layouts.get((s.parameter_name, s.dim))
        if layout is None or not len(s.indices) or int(s.indices.min()) < 0 or int(s.indices.max()) >= layout.size:
            raise ConfigError(f"the plan's slice of {s.parameter_name} along dim {s.dim} is none of this model")
    return tuple(Selection(s.parameter_name, s.dim, s.roles, s.indices.sort().values) for s in plan.slices)


def _check_trainable(selections: Sequence[Selection], parameters: Values, analysis: Analysis) -> None:
    for s in selections:
        dtype, weight = parameters.dtype(s.parameter_name), parameters.quantized.get(s.parameter_name)
        if weight is not None and (not weight.is_linear or s.parameter_name in analysis.elsewhere):
            why = "something else reads it" if weight.is_linear else "it is not that of a linear layer"
            raise ConfigError(
                f"{s.parameter_name} is quantized, and {why}: a slice can only lie beside a weight that its own linear "
                f"layer alone reads. Leave it out of the targets, or load it without quantization"
            )
        if not dtype.is_floating_point:
            raise ConfigError(f"{s.parameter_name} is {dtype}; only floating-point weights train")


def _left_out(wanted: Sequence[Selection], selections: Sequence[Selection]) -> list[str]:
    kept = {s.parameter_name for s in selections}
    names = [s.parameter_name for s in wanted if s.parameter_name not in kept]
    return [f"left out, since their gradients have no slice rule: {', '.join(names)}"] if names else []


def _block(
    model: nn.Module, parameters: Values, selection: Selection, index: Mapping[tuple[str, int], Tensor]
) -> tuple[Block, Slice]:
    """The block of a selection in the permuted weight, or beside it. Its order along `dim` is that of `indices`."""
    name, dim = selection.parameter_name, selection.dim
    shape = parameters.shape(name)
    moved = index.get((name, dim), torch.arange(shape[dim]))
    mask = torch.isin(moved, selection.indices)
    if name in parameters.quantized:
        block: Block = beside_of(model, parameters.quantized[name], dim, moved[mask])
    else:
        weight = parameters.own[name]
        delta_shape = [*shape[:dim], len(selection.indices), *shape[dim + 1 :]]
        block = in_place = InPlace(
            name=name,
            weight=weight,
            dim=dim,
            delta=nn.Parameter(torch.zeros(delta_shape, dtype=torch.float32, device=weight.device)),
            places=(places := places_of(model, weight)),
            delta_key=free_key(places),
            ranges=ranges(mask),
        )
        in_place.backup = in_place.read()
    return block, Slice(name, dim, moved[mask], shape, selection.roles, block.delta)
