"""The adapter: what was trained, and nothing else. `format.py` says what lies in its folder.

Saving and loading are inverse of each other, bit for bit:

    load(base, save(prepared)) == merged(prepared)        W[indices] = cast(W0 + delta)
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from s2ft_compile.adapters.apply import check_fits, dtypes_of, overflow_of, summed
from s2ft_compile.adapters.fingerprint import samples_of
from s2ft_compile.adapters.format import (
    Adapter,
    ascending,
    describe_base,
    hash_of_block,
    named_base,
    read_adapter,
    write_adapter,
)
from s2ft_compile.capture.models import unwrap
from s2ft_compile.errors import AdapterError, ExportError, StateError
from s2ft_compile.plan import Plan, Slice, delta_of
from s2ft_compile.quantized import Values, settle
from s2ft_compile.slices.blocks import beside_of
from s2ft_compile.slices.processes import first_does
from s2ft_compile.slices.state import Left, State, disabled, is_prepared, keep_written, on, state_of, take_off

from . import sharded
from .card import CARD, card
from .files import new_directory

log = logging.getLogger(__name__)


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Writes what a prepared model has trained into a new folder, and returns its path.

    Of a model sharded by FSDP2, every process calls this, and process 0 writes. Raises `StateError` for a model that is
    not prepared, `ExportError` if the folder exists, a delta is not finite, or more than the slices trains.
    """
    _check_all_in_slices(model)
    if sharded.is_sharded(model):
        gathered = sharded.adapter_of(model, _check_trained, named_base(*named_in(unwrap(model))))
        first_does(lambda: _write(lambda: gathered, directory))
    else:
        _write(partial(adapter_of, model), directory)
    return Path(directory)


def _write(made: Callable[[], Adapter], directory: str | os.PathLike[str]) -> None:
    """made: called once the folder can be written."""
    with new_directory(directory) as folder:
        write_all(folder, adapter := made())
    log.info("adapter written to %s: %d slices", directory, len(adapter.slices))


def write_all(folder: Path, adapter: Adapter) -> None:
    """An adapter's files and its card, into a folder that exists."""
    write_adapter(folder, adapter)
    (folder / CARD).write_text(card(adapter), encoding="utf-8")


def adapter_of(model: nn.Module) -> Adapter:
    """A copy of what a prepared model has trained. Raises `StateError` for a model that is not prepared, `ExportError`
    for deltas, or sums with the weights, that are not finite."""
    _check_all_in_slices(model)
    plan, module = ascending(state_of(model).all_trained), unwrap(model)
    with untrained(model):
        values, samples = Values(module), samples_of(module)
        blocks: dict[str, str] = {}
        for s in plan.slices:
            W = values[s.parameter_name]
            _check_trained(W, s)
            is_quantized = s.parameter_name in values.quantized
            blocks[s.parameter_name] = samples[s.parameter_name] if is_quantized else hash_of_block(W, s)
        named, quantized = named_base(*named_in(module)), {n: w.turned for n, w in sorted(values.quantized.items())}
        base = describe_base(type(module).__name__, dtypes_of(module), samples, blocks, named, quantized)
    return Adapter(plan, base)


def _check_all_in_slices(model: nn.Module) -> None:
    """Raises `ExportError` where more than the slices trains: an adapter would lose it, and take it for the base's."""
    deltas = {id(block.delta) for block in state_of(model).blocks}
    others = [n for n, p in unwrap(model).named_parameters() if p.requires_grad and id(p) not in deltas]
    if others:
        raise ExportError(
            f"{', '.join(others[:3])} ({len(others)} in all) train besides the slices, and an adapter would lose them. "
            f"Prepare the model with them as targets ({{{others[0]!r}: 1.0}} is all of one), or use save_merged; "
            f"requires_grad_(False) says that they did not train"
        )


def named_in(module: nn.Module) -> tuple[str | None, str | None]:
    """The name and the commit that transformers loaded a model by."""
    config = getattr(module, "config", None)
    return getattr(config, "_name_or_path", None) or None, getattr(config, "_commit_hash", None)


@contextmanager
def untrained(model: nn.Module) -> Iterator[None]:
    """Context in which `model` is the plain base model, whatever it has trained."""
    if not is_prepared(model):
        yield
        return
    state, module = state_of(model), unwrap(model)
    with disabled(model):
        state.uninstall(module)
        try:
            yield
        finally:
            state.install(module)


def load_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> Plan:
    """Puts an adapter on the model it was trained from, and returns its plan.

    A plain model's weights become the trained ones, bit for bit those of `save_merged`. Quantized weights are not
    written: the slices lie beside them, the outputs are those of training bit for bit (of dense weights that trained in
    another order, to rounding), and `unload_adapter` takes them off. On a model prepared with the same slices the
    deltas (and the weights) become the adapter's.

    Warns where the slices were trained beside quantized weights, and these are not. Raises `AdapterError` for files
    that are missing, damaged or made for another base, and for a model prepared with other slices; the model is then
    unchanged.
    """
    module, adapter = unwrap(model), read_adapter(directory)
    if not is_prepared(model):
        _check_none_on(module, adapter)
    with untrained(model):
        check_fits(module, adapter)
    if is_prepared(model):
        _into_deltas(state_of(model), adapter.plan)
    else:
        _into_weights(module, adapter.plan)
    log.info("adapter %s loaded: %d slices", directory, len(adapter.slices))
    return adapter.plan


def _check_trained(W: Tensor, s: Slice) -> None:
    if not delta_of(s).isfinite().all():
        raise ExportError(
            f"the delta of {s.parameter_name} has NaN or infinite entries: training diverged; "
            f"a lower learning rate may help"
        )
    block = summed(W, [(s, 1.0)])[2]
    if not block.isfinite().all():
        raise ExportError(f"{s.parameter_name}: {overflow_of(block)}")


def _check_none_on(module: nn.Module, adapter: Adapter) -> None:
    """Raises `AdapterError` where one lies beside a quantized model's weights already, or in them."""
    held = on(module)
    if twice := [s.parameter_name for s in adapter.slices if s.parameter_name in held]:
        raise AdapterError(
            f"an adapter is on this quantized model already, and changes {twice[0]} too; "
            f"s2ft.exporters.unload_adapter(model) takes it off"
        )


# --- into the model: computed first, then written ----------------------------------------------------------


@torch.no_grad()
def _into_weights(module: nn.Module, plan: Plan) -> None:
    values = Values(module)
    for weight in values.quantized.values():
        settle(weight.layer, weight.key)
    beside = [
        beside_of(module, values.quantized[s.parameter_name], s.dim, s.indices, s.delta)
        for s in plan.slices
        if s.parameter_name in values.quantized
    ]
    in_place = [s for s in plan.slices if s.parameter_name not in values.quantized]
    sums = [(values[s.parameter_name], *summed(values[s.parameter_name], [(s, 1.0)])) for s in in_place]
    with ExitStack() as undo:
        for block in beside:
            undo.callback(block.uninstall)
            block.install()
        undo.pop_all()
    if values.quantized:
        were = [W.index_select(dim, indices).cpu() for W, dim, indices, _ in sums]
        keep_written(module, [Left(s.parameter_name, s.dim, s.indices, delta_of(s), w) for s, w in zip(in_place, were)])
    for W, dim, indices, total in sums:
        W.index_copy_(dim, indices, total)


def unload_adapter(model: nn.Module) -> None:
    """Takes off what `load_adapter` or `release` has left on a model with quantized weights: the slices beside those,
    and what is in others, such as norms. Raises `StateError` for a prepared model, and for one without an adapter."""
    if is_prepared(model):
        raise StateError("this model is prepared: s2ft.disabled(model) is its base, s2ft.release(model) ends it")
    if not take_off(unwrap(model)):
        raise StateError(f"no slices lie beside the weights of this {type(unwrap(model)).__name__}")


@torch.no_grad()
def _into_deltas(state: State, plan: Plan) -> None:
    if wide := [s.parameter_name for s in plan.slices if delta_of(s).dtype != torch.float32]:
        raise AdapterError(
            f"the deltas of {', '.join(wide[:3])} are float64, which the float32 deltas of a prepared "
            f"model cannot hold; load the adapter into a model that is not prepared"
        )
    if state.left_behind:
        raise AdapterError(
            "the model's units were chosen anew, so it has trained more than its slices hold now; load the adapter "
            "into a model that is not prepared"
        )
    mine = {s.parameter_name: s for s in state.plan.slices}
    theirs = {s.parameter_name: s for s in plan.slices}
    names = sorted(mine.keys() | theirs.keys())
    differ = [n for n in names if not (n in mine and n in theirs and _same(mine[n], theirs[n]))]
    if differ:
        raise AdapterError(
            f"the model is prepared with other slices than the adapter's: {', '.join(differ[:3])}"
            f"{', ...' if len(differ) > 3 else ''}. Prepare it with the adapter's configuration "
            f"({plan.config}), or load the adapter into a model that is not prepared"
        )
    for name, s in mine.items():
        own, given = delta_of(s), delta_of(theirs[name])
        own.index_copy_(s.dim, s.indices.argsort().to(own.device), given.to(own.device))
    state.refresh()


def _same(mine: Slice, theirs: Slice) -> bool:
    """Whether the adapter's slice is this one."""
    indices = mine.indices.cpu().sort().values
    return mine.dim == theirs.dim and torch.equal(indices, theirs.indices)
