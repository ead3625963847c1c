"""What `prepare` leaves on a model: the deltas, the backups, and the way back.

`State` is a child module named `s2ft` of the user's model. Its parameters are the deltas, so optimizers, Trainer,
`clip_grad_norm_` and DDP see them; it keeps out of `state_dict`. Invariant, whenever weights are "trained":
W[block] == cast(W0 + delta) for every block.
"""

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback as _dynamo_callback
from torch._dynamo.eval_frame import skip_code
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import any_torch_dispatch_mode_on_stack

from s2ft_compile.passes.backward.attach import attach
from s2ft_compile.passes.permute import move

from .capture import unwrap
from .errors import StateError
from .kernels import refresh as kernel
from .plan import Plan

STATE_NAME = "s2ft"
_live: "weakref.WeakSet[State]" = weakref.WeakSet()


@dataclass(eq=False)
class Block:
    """A slice while it trains. ranges: the (start, length) it occupies along `dim` of the permuted weight."""

    name: str
    weight: nn.Parameter
    dim: int
    ranges: tuple[tuple[int, int], ...]
    delta: nn.Parameter
    backup: Tensor  # W0 of the block, the weight's dtype
    places: list[tuple[nn.Module, str]]  # the modules that hold the weight
    version: int = -1  # of the delta, when the weight was last written
    attached: bool = False  # whether a forward has used the delta, so that it can have a gradient
    owns_gradient: bool = False

    @property
    def layout(self) -> tuple:
        """What a graph that attaches the delta depends on."""
        return self.dim, self.ranges

    def own_gradient(self) -> None:
        """From now on copies the delta's gradients out of the memory they are made in."""
        if not self.owns_gradient:
            self.delta.register_hook(torch.clone)
            self.owns_gradient = True

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Copies a block of the delta's shape into the weight."""
        offset = 0
        for start, length in self.ranges:
            self.weight.narrow(self.dim, start, length).copy_(values.narrow(self.dim, offset, length))
            offset += length

    @torch.no_grad()
    def read(self) -> Tensor:
        return torch.cat([self.weight.narrow(self.dim, s, n) for s, n in self.ranges], self.dim)

    @torch.no_grad()
    def trained(self) -> Tensor:
        """cast(W0 + delta): the sum in the wider of the two types, rounded once."""
        wide = torch.promote_types(self.backup.dtype, self.delta.dtype)
        return (self.backup.to(wide) + self.delta.to(wide)).to(self.backup.dtype)

    def refresh(self) -> None:
        self.write(self.trained())
        self.version = self.delta._version

    @property
    def stale(self) -> bool:
        return self.version != self.delta._version


def refresh(blocks: list[Block]) -> None:
    """Writes the deltas into their weights: on a GPU in one launch, elsewhere and for DTensors one after another."""
    together: list[Block] = []
    for block in blocks:
        if kernel.fits(block.weight, block.backup, block.delta):
            together.append(block)
        else:
            block.refresh()
    if together:
        kernel.refresh([(b.weight, b.backup, b.delta, b.dim, b.ranges) for b in together])
    for block in together:
        block.version = block.delta._version


class State(nn.Module):
    """blocks: what trains. moves: (parameter, dim, gather index) that made the blocks dense. frozen: the parameters
    that `prepare` froze. `active` is False while the weights are not the trained ones in training order."""

    def __init__(self, plan: Plan, blocks: list[Block], moves: list, frozen: list[nn.Parameter]):
        super().__init__()
        self.plan = plan
        self.blocks = blocks
        self.moves = moves
        self.frozen = frozen
        self.active = True
        self.warned = False  # of slices without a gradient
        self._hooks: list = []
        self._swapped = 0
        self._by_weight = {id(block.weight): block for block in blocks}
        for block in blocks:
            self.register_parameter("delta__" + block.name.replace(".", "__"), block.delta)
        _live.add(self)

    def __setstate__(self, state):  # copy.deepcopy and pickle arrive here
        super().__setstate__(state)
        for block in self.blocks:
            block.version, block.owns_gradient = -1, False  # a copied delta counts its versions anew, and has no hooks
        self._by_weight = {id(block.weight): block for block in self.blocks}
        _live.add(self)

    def forward(self, x):
        """Nothing: a container such as `nn.Sequential` runs every child it has."""
        return x

    def block_of(self, parameter: Tensor) -> Block | None:
        block = self._by_weight.get(id(parameter))
        return block if block is not None and block.weight is parameter else None

    def owns(self, parameter: Tensor) -> bool:
        return any(p is parameter for p in self.frozen)

    @torch._dynamo.disable
    def refresh(self) -> None:
        """Writes every delta that has changed into its weight."""
        if self.active:
            refresh([block for block in self.blocks if block.stale])

    # the deltas are not part of the model's own state

    def state_dict(self, *args, destination=None, **kwargs):
        return {} if destination is None else destination

    @torch.no_grad()
    def _load_from_state_dict(self, *args, **kwargs):
        """`load_state_dict` on the model comes here last: what it wrote into the blocks is taken as trained."""
        for block in self.blocks:
            wide = torch.promote_types(block.backup.dtype, block.delta.dtype)
            block.delta.copy_(block.read().to(wide) - block.backup.to(wide))
            block.refresh()

    def _apply(self, fn, recurse=True):
        """Moves with the model, but stays float32 under `model.half()` and its kin."""

        def keep_type(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_type, recurse)
        for block in self.blocks:
            block.backup = fn(block.backup)
            block.version = -1
        return self

    # eager training: correct, at the cost of full-size gradients

    def install(self, model: nn.Module) -> None:
        model.register_module(STATE_NAME, self)
        self._hooks = [
            model.register_forward_pre_hook(self._enter_eager, with_kwargs=True),
            model.register_forward_hook(self._leave_eager, always_call=True),
        ]

    def uninstall(self, model: nn.Module) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        del model._modules[STATE_NAME]

    def _enter_eager(self, model, args, kwargs):
        if torch.compiler.is_compiling():
            return
        self.refresh()
        compiled = callable(_dynamo_callback()) and not any_torch_dispatch_mode_on_stack()  # dynamo skips frames then
        if compiled or not (self.active and torch.is_grad_enabled()):
            return  # a compiled graph attaches the deltas itself
        self._swapped += 1
        if self._swapped > 1:
            return
        for block in self.blocks:
            block.attached = True
            tensor = attach(block.weight, block.delta, block.dim, block.ranges)
            for module, key in block.places:
                module._parameters[key] = tensor

    def _leave_eager(self, model, args, output):
        if self._swapped:
            self._swapped -= 1
            if not self._swapped:
                for block in self.blocks:
                    for module, key in block.places:
                        module._parameters[key] = block.weight


for _hook in (State._enter_eager, State._leave_eager):
    skip_code(_hook.__code__)  # dynamo need not trace them


def find_state(model: nn.Module) -> State | None:
    state = unwrap(model)._modules.get(STATE_NAME)
    return state if isinstance(state, State) else None


def is_prepared(model: nn.Module) -> bool:
    return find_state(model) is not None


def state_of(model: nn.Module) -> State:
    """The model's state. Raises `StateError` for a model that was not prepared."""
    state = find_state(model)
    if state is None:
        kind = type(unwrap(model)).__name__
        raise StateError(f"{kind} is not prepared; call s2ft.prepare(model, example_inputs) first")
    return state


def live_states() -> list[State]:
    return list(_live)


def blocks_for(parameter: Tensor) -> tuple[State, Block] | None:
    """The state and block that train this very parameter, in whatever model it is."""
    for state in _live:
        block = state.block_of(parameter) if state.active else None
        if block is not None:
            return state, block
    return None


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """The deltas of a prepared model, for an optimizer."""
    return [block.delta for block in state_of(model).blocks]


@contextmanager
def _arranged(model: nn.Module, trained: bool) -> Iterator[None]:
    """The base model's order, with the trained weights or the base's; afterwards the prepared model again."""
    state = state_of(model)
    if not state.active:
        raise StateError("the model is already inside disabled() or merged()")
    _to_base_order(state, trained)
    try:
        yield
    finally:
        for parameter, dim, index in state.moves:
            move(parameter, dim, index)
        state.active = True
        refresh(state.blocks)


def _to_base_order(state: State, trained: bool) -> None:
    state.refresh()
    if not trained:
        for block in state.blocks:
            block.write(block.backup)
    state.active = False
    for parameter, dim, index in reversed(state.moves):
        move(parameter, dim, torch.argsort(index))


def disabled(model: nn.Module):
    """Context in which the model has the base model's weights, bit for bit, in the base model's order."""
    return _arranged(model, trained=False)


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Context in which the model is a plain one in the base model's order, with the trained weights in place."""
    state, module = state_of(model), unwrap(model)
    with _arranged(model, trained=True):
        state.uninstall(module)
        try:
            yield
        finally:
            state.install(module)


def release(model: nn.Module) -> None:
    """Turns a prepared model into a plain one: original order, trained weights, what was frozen trains again."""
    state, module = state_of(model), unwrap(model)
    _to_base_order(state, trained=True)
    state.uninstall(module)
    for parameter in state.frozen:
        parameter.requires_grad_(True)
    _live.discard(state)


# --- optimizers ------------------------------------------------------------------------------------------------


def _before_step(optimizer, args, kwargs) -> None:
    for state, blocks in _blocks_in(optimizer):
        without = [b for b in blocks if b.delta.grad is None]
        lost = [b for b in without if not b.attached]
        if lost:
            raise StateError(
                f"{_named(lost, blocks)} have no gradient: their weights were used outside a graph that "
                f'torch.compile(model, backend="s2ft") compiled. Compile the whole model with it, or call the prepared '
                f"model itself"
            )
        if without and not state.warned:
            state.warned = True
            warnings.warn(
                f"{_named(without, blocks)} have no gradient in this step: the loss does not reach them. If it should, "
                f"their weights were used outside of the model's forward; gradient checkpointing does that with "
                f"use_reentrant=True and does not with use_reentrant=False",
                stacklevel=4,
            )


def _named(some: list[Block], blocks: list[Block]) -> str:
    return f"{len(some)} of {len(blocks)} slices ({', '.join(b.name for b in some[:3])})"


def _after_step(optimizer, args, kwargs) -> None:
    for state, blocks in _blocks_in(optimizer):
        if state.active:
            refresh(blocks)


def _blocks_in(optimizer) -> list[tuple[State, list[Block]]]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = [(state, [b for b in state.blocks if id(b.delta) in held]) for state in _live]
    return [(state, blocks) for state, blocks in found if blocks]


_optimizer_hooks: list = []


def watch_optimizers() -> None:
    """Has every optimizer's step write the deltas it changed into the weights. Once per process."""
    if not _optimizer_hooks:
        _optimizer_hooks.append(register_optimizer_step_pre_hook(_before_step))
        _optimizer_hooks.append(register_optimizer_step_post_hook(_after_step))
