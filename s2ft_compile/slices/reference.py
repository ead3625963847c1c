"""The base model as the reference of a preference or reinforcement loss, in the trained weights: no second copy.

`disabled` gives the base model bit for bit, in its own order, by moving every permuted weight. A loss that compares
with the base at every step needs only its function: here the trained blocks alone are written over, and written back.
Autograd need not know of it: between a forward and its backward each weight has the same bits again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from s2ft_compile.capture.models import in_mode, unwrap
from s2ft_compile.errors import StateError

from .blocks import refresh
from .state import State, state_of


class Reference(nn.Module):
    """The base of a prepared model, to be called without gradients: `DPOTrainer(model, ref_model=Reference(model))`.

    It has no parameters of its own, is in eval mode, and follows the model wherever it goes. What is not a module's own
    (`config`, `get_output_embeddings`) is the model's.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        state_of(model)
        self.__dict__["of"] = unwrap(model)  # no child: it has no weights, and is in no optimizer or checkpoint
        self.eval()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own call: a trainer that replaces this `forward` has replaced the model's, too."""
        model = self.__dict__["of"]
        with torch.no_grad(), base_values(model), in_mode(model, training=False):
            return model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["of"], name)


@contextmanager
def base_values(model: nn.Module) -> Iterator[None]:
    """Context in which a prepared model computes what its base does, up to the rounding of reordered sums.

    For forwards without gradients; allowed between a forward and its backward. Raises `StateError` inside `disabled`.
    """
    state = state_of(model)
    if not state.active:
        raise StateError("the model is inside disabled() or merged() already")
    refresh(state.blocks)
    _write(state, trained=False)
    state.set_active(False)
    try:
        yield
    finally:
        state.set_active(True)
        _write(state, trained=True)


@torch.no_grad()
def _write(state: State, trained: bool) -> None:
    for block in state.blocks:
        block.put(trained)
    state.put_left_behind(trained, base_order=False)
    if any(hasattr(block.weight, "placements") for block in state.blocks):
        from torch.distributed.fsdp import FSDPModule

        for module in state.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what it gathered before has the other values
