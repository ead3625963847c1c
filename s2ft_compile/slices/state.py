"""What `prepare` leaves on a model: the plan, the way back, and who watches that nothing is lost.

The slices themselves live in the modules that hold their weights (`sliced`). `State` is a plain attribute of the user's
model; it knows all of them, and what was permuted and frozen. Invariant, whenever weights are "trained":
W[block] == cast(W0 + delta) for every block.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from s2ft_compile.capture.models import tensors_of, unwrap
from s2ft_compile.errors import StateError
from s2ft_compile.passes.couple.recheck import Crossing, Permuted
from s2ft_compile.passes.permute import move, moves_for
from s2ft_compile.plan import Plan, Slice, delta_of
from s2ft_compile.quantized import quantized_in
from s2ft_compile.structure import Analysis

from .blocks import Beside, Block, InPlace, blocks_in, check_extra, check_same, refresh
from .processes import check_processes

NAME = "_s2ft_state"
WRITTEN = "_s2ft_written"  # beside it, of a model with quantized weights: what others were where an adapter wrote them
ANEW = "units were chosen anew; those that trained before keep what they learned"  # a note of a plan
_live: "weakref.WeakSet[State]" = weakref.WeakSet()


@dataclass(frozen=True, eq=False)
class Left:
    """What trained in one parameter before a reselection, on the CPU, or before it was released. indices: int64 (n,),
    along `dim`, in the base's order. delta: float32, backup: W0, both of the parameter's shape with n along `dim`.
    beside: whether the weight is quantized and never written, so that a block keeps this beside it."""

    name: str
    dim: int
    indices: Tensor
    delta: Tensor
    backup: Tensor
    beside: bool = False

    def trained(self, dtype: torch.dtype | None = None) -> Tensor:
        """cast(W0 + D), as `InPlace.trained`. dtype: by default W0's."""
        wide = torch.promote_types(self.backup.dtype, self.delta.dtype)
        return self.backup.to(wide).add(self.delta.to(wide)).to(dtype or self.backup.dtype)

    def take(self, rows: Tensor) -> "Left":
        delta, backup = (t.index_select(self.dim, rows) for t in (self.delta, self.backup))
        return replace(self, indices=self.indices[rows], delta=delta, backup=backup)

    def moved(self) -> "Left | None":
        """The part that is not the base's, None without any."""
        others = [d for d in range(self.delta.ndim) if d != self.dim]
        differs = self.delta.ne(0).any(others) if others else self.delta.ne(0)
        return self.take(differs.nonzero().squeeze(1)) if differs.any() else None

    @torch.no_grad()
    def put(self, weight: Tensor, order: Tensor | None, trained: bool) -> None:
        """Writes it into the weight, or the base's values; without its version counter. order: gather index of the
        weight's order, None for the base's."""
        if self.beside:
            return
        places = self.indices if order is None else torch.argsort(order.cpu())[self.indices]
        values = self.trained() if trained else self.backup
        weight.data.index_copy_(self.dim, places.to(weight.device), values.to(weight))


def keep_written(module: nn.Module, written: Iterable[Left]) -> None:
    """Remembers what weights were that an adapter is written into, beside the quantized ones that it lies beside."""
    module.__dict__.setdefault(WRITTEN, []).extend(written)


def on(module: nn.Module) -> set[str]:
    """The names of a quantized model's weights that an adapter lies beside, or was written into."""
    return {b.name for b in blocks_in(module)} | {left.name for left in module.__dict__.get(WRITTEN, ())}


def take_off(module: nn.Module) -> bool:
    """Takes off the slices beside quantized weights, and gives those that were written their values back; whether there
    was anything."""
    blocks, written = blocks_in(module), module.__dict__.pop(WRITTEN, [])
    for block in blocks:
        block.uninstall()
    for left in reversed(written):
        left.put(module.get_parameter(left.name), None, trained=False)
    return bool(blocks or written)


class State:
    """blocks: what trains. left_behind: what trained before a reselection. analysis: of the model in the base's order.
    orders: axis -> the order of its units that makes the blocks dense. moves: (parameter or buffer, dim, gather index)
    of that. frozen: the names of the parameters that `prepare` froze. permuted: the axes that are not in the base's
    order, and left: those that a graph returned to others so. `active` is False while the weights are not the trained
    ones in training order."""

    def __init__(
        self, plan: Plan, blocks: list[Block], orders: Mapping[int, Tensor], frozen: list[str], analysis: Analysis
    ):
        self._plan = plan
        self.analysis = analysis
        self.blocks = blocks
        self.left_behind: list[Left] = []
        self.reselected = 0  # how often
        self.first = [s.indices for s in plan.slices]  # what trained before the first time
        self.arranged = 0  # how often blocks became other units
        self.frozen = frozen
        self.reorder(orders)
        self.left: set[Crossing] = set()
        self.compared = False  # with what other processes selected
        self.active = True
        self.warned = False  # of slices without a gradient
        self._hooks: list[RemovableHandle] = []  # of saving and loading
        self._conversions: list[Any] | None = None  # of names in files, by transformers
        _live.add(self)

    def __setstate__(self, values: dict[str, Any]) -> None:  # copy.deepcopy and pickle arrive here
        self.__dict__.update(values)
        _live.add(self)

    @property
    def plan(self) -> Plan:
        """With the deltas that the modules hold now: a load that assigns, or `fully_shard`, replaces them."""
        pairs = list(zip(self._plan.slices, self.blocks))
        for block in self.blocks:
            block.follow_shards()
        if any(s.delta is not b.delta for s, b in pairs):
            self._plan = replace(self._plan, slices=tuple(replace(s, delta=b.delta) for s, b in pairs))
        return self._plan

    @property
    def all_trained(self) -> Plan:
        """The plan with what trained before a reselection, too: all that differs from the base. Such unions lie on the
        CPU, for they may be many times what trains."""
        earlier = {left.name: left for left in self.left_behind}
        slices = []
        for s in self.plan.slices:
            if left := earlier.get(s.parameter_name):
                delta = torch.cat([delta_of(s).detach().cpu(), left.delta], s.dim)
                s = replace(s, indices=torch.cat([s.indices, left.indices]), delta=nn.Parameter(delta, False))
            slices.append(s)
        return replace(self.plan, slices=tuple(slices))

    @property
    def unmovable(self) -> set[str]:
        """The parameters whose units stay where they are: quantized ones."""
        return set(quantized_in(self.model))

    def replan(self, slices: tuple[Slice, ...]) -> None:
        notes = [*(note for note in self._plan.notes if note != ANEW), *([ANEW] if self.left_behind else [])]
        self.arranged += 1
        self._plan = replace(self._plan, slices=slices, notes=tuple(notes))

    def put_left_behind(self, trained: bool, base_order: bool) -> None:
        """Writes what trained before a reselection into its weights, or the base's values."""
        if self.left_behind:
            now = self.tensors()
            orders = {} if base_order else {(name, dim): index for name, dim, index in self.moves}
            for left in self.left_behind:
                left.put(now[left.name], orders.get((left.name, left.dim)), trained)

    def holds(self, parameters: list[Tensor]) -> bool:
        """Whether one of these parameters is trained, frozen or permuted here."""
        now = self.tensors()
        held = [now.get(name) for name in {*self.frozen, *(name for name, _, _ in self.moves)}]
        held += [p for b in self.blocks for p in (b.weight, b.delta)]
        return not {id(p) for p in held}.isdisjoint(map(id, parameters))

    def tensors(self) -> dict[str, Tensor]:
        """The model's parameters and buffers, as they are now."""
        return tensors_of(self.model)

    def check_whole(self) -> None:
        """Raises `StateError` where a layer was removed or replaced: its units would not follow those of the others."""
        now = self.tensors()
        lost = [n for n, dim, index in self.moves if n not in now or now[n].shape[dim] != len(index)]
        if lost:
            raise StateError(
                f"{lost[0]} ({len(lost)} in all) is not in this model as it was prepared: layers were removed or "
                f"replaced. Put them back, or do that before s2ft.prepare or after s2ft.release(model)"
            )

    def reorder(self, orders: Mapping[int, Tensor]) -> None:
        """Says that the units are in these orders; `move` brings them there."""
        self.orders = orders
        self.moves = [(*place, index) for place, index in moves_for(orders, self.analysis.layouts).items()]
        self.permuted = Permuted.of(self.analysis, orders)

    def move(self, back: bool) -> None:
        """Brings the units into training order, or back into the base model's."""
        now = self.tensors()
        for name, dim, index in reversed(self.moves) if back else self.moves:
            move(now[name], dim, torch.argsort(index) if back else index)

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def refresh(self) -> None:
        """Writes every delta into its weight."""
        if self.active:
            refresh(self.blocks)

    def install(self, model: nn.Module) -> None:
        """Lets reading a weight attach its delta, from `model` down."""
        self.model = model
        setattr(model, NAME, self)
        for block in self.blocks:
            block.install()
        loads: Callable[..., RemovableHandle] = model.register_load_state_dict_pre_hook
        saves: Callable[..., RemovableHandle] = model.register_state_dict_post_hook
        self._hooks = [loads(_check_loaded), saves(_add_units)]
        self._keep_names(model)

    def uninstall(self, model: nn.Module, trained: bool = False) -> None:
        """The inverse: no delta is among the model's parameters, and its modules have the classes they had. trained:
        but for the slices beside weights that cannot take them, which stay where they are, and count."""
        for hook in self._hooks:
            hook.remove()
        for block in self.blocks:
            if trained and isinstance(block, Beside):
                block.active = True
            else:
                block.uninstall()
        self._restore_names(model)
        model.__dict__.pop(NAME, None)

    def _keep_names(self, model: nn.Module) -> None:
        """transformers stores experts under other names, which its Trainer does not turn back when it resumes."""
        if hasattr(model, "save_pretrained"):
            self._conversions = model.__dict__.get("_weight_conversions")
            model.__dict__["_weight_conversions"] = []

    def _restore_names(self, model: nn.Module) -> None:
        model.__dict__.pop("_weight_conversions", None)
        if self._conversions is not None:
            model.__dict__["_weight_conversions"] = self._conversions

    @contextmanager
    def names_as_stored(self, model: nn.Module) -> Iterator[None]:
        """Context in which `save_pretrained` uses the names of checkpoints on the hub."""
        self._restore_names(model)
        try:
            yield
        finally:
            self._keep_names(model)

    def set_active(self, active: bool) -> None:
        self.active = active
        for block in self.blocks:
            block.active = active


def _add_units(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, _: Any) -> None:
    """Where units were chosen anew, which ones train, and what the others learned, is a part of the state, too."""
    from .units import units_of

    if (state := find_state(model)) is not None and state.reselected:
        state_dict.update({prefix + name: t for name, t in units_of(model).items()})


def _check_loaded(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Refuses weights of another order or base before the first of them is loaded. Those of another selection of the
    same base's units are in another order: the model takes it."""
    from .units import follow_units

    state = find_state(model)
    if state is None:
        return
    go_back = follow_units(model, state_dict, prefix)
    try:
        _check_same_base(model, state, state_dict, prefix)
    except StateError:
        go_back()
        raise


def _check_same_base(model: nn.Module, state: State, state_dict: dict[str, Tensor], prefix: str) -> None:
    for weight in quantized_in(model).values():
        check_extra(weight, state_dict, prefix)
    blocks, now = {b.name: b for b in state.blocks}, dict(model.named_parameters())
    known = {*now, *(n for n, _ in model.named_buffers())}
    absent = [n for n in blocks if prefix + n not in state_dict and prefix + blocks[n].delta_name not in state_dict]
    if absent and (unknown := [k for k in state_dict if k.startswith(prefix) and k[len(prefix) :] not in known]):
        raise StateError(
            f"the weights to load have nothing for {absent[0]}, which trains, but {unknown[0]}, which this model does "
            f"not have: they are named for another class, or as transformers stores them. Save and load the prepared "
            f"model's own state_dict(), or load the others before s2ft.prepare"
        )
    for name, dim in {**{b.name: b.dim for b in state.blocks}, **{name: dim for name, dim, _ in state.moves}}.items():
        given, held = state_dict.get(prefix + name), now.get(name)
        if held is None:  # a statistic: training changes it, and its order is that of the weights beside it
            continue
        if given is None or given.is_meta or held.is_meta or given.shape != held.shape:
            continue
        if name in blocks:
            blocks[name].check_loaded(name, given, state_dict.get(prefix + blocks[name].delta_name))
        else:
            check_same(name, given, held, dim, torch.arange(held.shape[dim]))


def find_state(model: nn.Module) -> State | None:
    """The model's state, None of a model that is not prepared."""
    return unwrap(model).__dict__.get(NAME)


def is_prepared(model: nn.Module) -> bool:
    """Whether `prepare` or `load_adapter` has changed this model, and `release` has not given it back."""
    return find_state(model) is not None


def state_of(model: nn.Module) -> State:
    """The model's state. Raises `StateError` for a model that was not prepared."""
    state = find_state(model)
    if state is None:
        kind = type(unwrap(model)).__name__
        raise StateError(f"{kind} is not prepared; call s2ft.prepare(model, example_inputs) first")
    return state


def live_states() -> list[State]:
    """The states of all prepared models of this process that still exist."""
    return list(_live)


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """The deltas of a prepared model, for an optimizer. Of a sharded one (FSDP2) they are its shards."""
    blocks = state_of(model).blocks
    for block in blocks:
        block.follow_shards()
    return [block.delta for block in blocks]


@contextmanager
def _arranged(model: nn.Module, trained: bool) -> Iterator[None]:
    """The base model's order, with the trained weights or the base's; afterwards the prepared model again."""
    state = state_of(model)
    if not state.active:
        raise StateError("the model is already inside disabled() or merged()")
    to_base_order(state, trained)
    try:
        yield
    finally:
        if not trained:
            state.put_left_behind(trained=True, base_order=True)
        state.move(back=False)
        for block in state.blocks:
            block.adopt()
        state.set_active(True)
        refresh(state.blocks)


def to_base_order(state: State, trained: bool) -> None:
    state.check_whole()
    if any([block.follow_shards() for block in state.blocks]):
        raise StateError(
            "this model is sharded (fully_shard), and no process has all of its weights: save_adapter and save_merged "
            "write its files, and s2ft.base_values(model) computes what the base does. For anything else gather them "
            "with torch.distributed.checkpoint.state_dict.get_model_state_dict (full_state_dict), and load them into "
            "the same model, prepared alike and not sharded"
        )
    if trained:
        refresh([block for block in state.blocks if not block.edited()])  # what somebody edited is kept
    else:
        state.refresh()
        for block in state.blocks:
            block.put(trained=False)
    state.set_active(False)
    state.move(back=True)
    if not trained:
        state.put_left_behind(trained=False, base_order=True)


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Context in which the model has the base model's weights, bit for bit, in the base model's order."""
    return _arranged(model, trained=False)


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Context in which the model is a plain one in the base model's order, with the trained weights in place."""
    state, module = state_of(model), unwrap(model)
    with _arranged(model, trained=True):
        state.uninstall(module, trained=True)
        try:
            yield
        finally:
            state.install(module)


def release(model: nn.Module) -> None:
    """Turns a prepared model into a plain one: original order, trained weights, what was frozen trains again.

    Quantized weights cannot take their slices, which stay beside them, frozen: as after `exporters.load_adapter` into
    such a model, and `exporters.unload_adapter` gives its base.
    """
    state, module = state_of(model), unwrap(model)
    to_base_order(state, trained=True)
    if quantized_in(module):
        pairs = [(s.indices, b) for s, b in zip(state.plan.slices, state.blocks) if isinstance(b, InPlace)]
        written = [Left(b.name, b.dim, i, b.delta.detach(), b.backup) for i, b in pairs]
        keep_written(module, [*written, *(left for left in state.left_behind if not left.beside)])
    state.uninstall(module, trained=True)
    for block in state.blocks:
        if isinstance(block, Beside):
            block.delta.requires_grad_(False).grad = None
    now = dict(module.named_parameters())
    for name in state.frozen:
        now[name].requires_grad_(True)
    _live.discard(state)


# --- optimizers ------------------------------------------------------------------------------------------------------


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _check_not_stale(optimizer)
    for state, blocks in _blocks_in(optimizer):
        for block in blocks:
            _remember(optimizer, block)
        if not state.compared and blocks[0].follow_shards():
            check_processes(state.plan, blocks[0].weight)
            state.compared = True
    if not _closure(args, kwargs):  # with one, the gradients are made inside the step
        _check_gradients(optimizer)


def _remember(optimizer: Optimizer, block: Block) -> None:
    """After units were chosen anew: of what trains whole, such as norms, the optimizer goes on with what it knows, in
    the order that the units have now. Of others it forgets all."""
    came_from, block.came_from = block.came_from, None
    known = optimizer.state.get(block.delta)
    if came_from is None or known is None:
        return
    if (came_from < 0).any():
        optimizer.state.pop(block.delta)
        return
    for name, value in known.items():
        if isinstance(value, Tensor) and value.shape == block.delta.shape:
            known[name] = value.index_select(block.dim, came_from.to(value.device))


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if _closure(args, kwargs):
        _check_gradients(optimizer)
    for state, blocks in _blocks_in(optimizer):
        if state.active:
            refresh(blocks)
            for block in blocks:
                if block.follow_shards():
                    block.refresh_shards()


def _closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    return kwargs.get("closure", next((a for a in args if callable(a)), None))


def _check_not_stale(optimizer: Optimizer) -> None:
    """An optimizer that was made before its model was prepared holds what is frozen now, and would train nothing."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    ids, frozen = {id(p) for p in held}, [p for p in held if not p.requires_grad]
    for state in _live:  # the names are not walked each step
        if frozen and not any(id(b.delta) in ids for b in state.blocks) and state.holds(frozen):
            raise StateError(
                f"this optimizer was made before the model was prepared: it holds {len(held)} parameters, but none of "
                f"the {len(state.blocks)} slices. Call s2ft.prepare first, then make the optimizer, of "
                f"s2ft.parameters(model) or model.parameters()"
            )


def _check_gradients(optimizer: Optimizer) -> None:
    for state, blocks in _blocks_in(optimizer):
        without = [b for b in blocks if b.delta.grad is None]
        lost = [b for b in without if not b.attached]
        if len(lost) == len(blocks):
            raise StateError(
                f"{_named(lost, blocks)} have no gradient, and their weights were never read with gradients on: the "
                f"forward of this model did not run, or it keeps its weights elsewhere"
            )
        if without and not state.warned:
            state.warned = True
            warnings.warn(
                f"{_named(without, blocks)} have no gradient in this step: the loss does not reach them"
                + (f", and {len(lost)} were never read with gradients on" if lost else ""),
                stacklevel=4,
            )


def _named(which: list[Block], blocks: list[Block]) -> str:
    return f"{len(which)} of {len(blocks)} slices ({', '.join(b.name for b in which[:3])})"


def _blocks_in(optimizer: Optimizer) -> list[tuple[State, list[Block]]]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for block in (b for state in _live for b in state.blocks):
        block.follow_shards()
    pairs = [(state, [b for b in state.blocks if id(b.delta) in held]) for state in _live]
    return [(state, blocks) for state, blocks in pairs if blocks]


_optimizer_hooks: list[RemovableHandle] = []


def watch_optimizers() -> None:
    """Has every optimizer's step write the deltas it changed into the weights. Once per process."""
    if not _optimizer_hooks:
        _optimizer_hooks.append(register_optimizer_step_pre_hook(_before_step))
        _optimizer_hooks.append(register_optimizer_step_post_hook(_after_step))
