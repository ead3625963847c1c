"""`S2FTCallback`: what a prepared model may ask of a Trainer of transformers or TRL beyond what it does anyway."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from .config import looks_at_data
from .errors import ConfigError
from .passes.select.calibrate import Loss
from .reselection import reselect
from .slices.state import state_of
from .slices.units import check_can_change

PLAN = "s2ft_plan.json"  # in each checkpoint


class S2FTCallback(TrainerCallback):
    """Has other units train after every so many steps (`s2ft.reselect`), and puts the plan into each checkpoint.

    `Trainer(model, ..., callbacks=[s2ft.S2FTCallback(reselect_every=100)])` of a prepared model. Checkpoints are
    Trainer's own: `resume_from_checkpoint` goes on with the units that trained, bit for bit on a CPU, and
    `load_best_model_at_end` goes back to those of the best.

    reselect_every: optimizer steps; None keeps the units. calibration: batches for a selection that looks at data, or a
    function that makes them; by default one batch of the training data, spread evenly over it. loss: as for `prepare`.
    Raises `ConfigError` for no whole number of steps; when training begins, and at those steps, what `reselect` raises.
    """

    def __init__(
        self,
        reselect_every: int | None = None,
        calibration: Sequence[Any] | Callable[[], Iterable[Any]] | None = None,
        loss: Loss | None = None,
    ):
        if reselect_every is not None and (type(reselect_every) is not int or reselect_every < 1):
            raise ConfigError(f"reselect_every is a whole number of steps from 1, or None, got {reselect_every!r}")
        self.reselect_every, self.calibration, self.loss = reselect_every, calibration, loss

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Refuses a model whose units cannot change."""
        if self.reselect_every:
            check_can_change(state_of(model))

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Chooses other units, every so many steps."""
        step = state.global_step
        if not self.reselect_every or not step or step % self.reselect_every:
            return
        batches: Iterable[Any] | None = None
        if looks_at_data(state_of(model).plan.config.selection):
            if self.calibration is None:
                batches = [_spread(train_dataloader, args.per_device_train_batch_size, model.device)]
            else:
                batches = self.calibration() if callable(self.calibration) else self.calibration
        reselect(model, batches, self.loss)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Writes the plan into the checkpoint."""
        assert args.output_dir is not None  # transformers names a folder where nobody does
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and folder.is_dir():
            partial = folder / f".{PLAN}"
            partial.write_text(state_of(model).plan.to_json(), encoding="utf-8")
            os.replace(partial, folder / PLAN)


def _spread(loader: Any, size: int, device: torch.device) -> Any:
    """A batch of a loader's data set, spread evenly over it: the same in every process, and at any time."""
    try:
        rows = len(loader.dataset)
    except TypeError as error:
        raise ConfigError(
            "the training data has no length, so a batch cannot be spread over it: S2FTCallback(calibration=...) "
            "takes a list of batches, or a function that makes them"
        ) from error
    size = min(size, rows)
    batch = loader.collate_fn([loader.dataset[i * rows // size] for i in range(size)])
    return pytree.tree_map_only(Tensor, lambda t: t.to(device), batch)
