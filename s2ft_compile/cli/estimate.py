"""`s2ft estimate`: the estimate of a folder's model, and the table of it."""

from collections.abc import Mapping

import torch
from rich.table import Table
from torch import Tensor, nn

from s2ft_compile.config import CompileOptions, S2FTConfig, check_choice
from s2ft_compile.errors import ConfigError
from s2ft_compile.estimation import Estimate, estimate
from s2ft_compile.planned import plan_quantization

from .data import DTYPES, checkpoint_if, example_inputs, load_config, load_structure, takes_labels
from .quantize import QUANTIZE, check_fp8, check_not_stored, check_some, stored_as


def estimate_folder(
    model: str,
    batch: int,
    length: int,
    dtype: str,
    config: S2FTConfig,
    options: CompileOptions,
    quantize: str = "none",
    optimizer: str = "muon",
    checkpointing: bool | None = None,
    grad_accum: int = 1,
    selections: int = 1,
) -> Estimate:
    """`estimate` for a Hugging Face folder or hub id, on `batch` rows of `length` tokens with labels. quantize: its
    linear layers but the head, to one of `QUANTIZE`. checkpointing: whether layers are computed again in the
    backward; None as in `s2ft train`, with a quantized base. grad_accum: forwards in a step. selections: as for
    `estimate`."""
    of_model = load_config(model)
    check_not_stored(model, of_model, quantize)
    quantize = stored_as(of_model) or quantize
    if quantize not in QUANTIZE:
        raise ConfigError(
            f"{model} is stored as {quantize}, of which no estimate is made; valid: {', '.join(QUANTIZE)}"
        )
    check_fp8(options.fp8, quantize)
    for name, times in (("grad_accum", grad_accum), ("selections", selections)):
        if times < 1:
            raise ConfigError(f"{name} is at least 1, got {times}")
    loaded, inputs = structure_and_step(model, batch, length, dtype)
    if quantize != "none":
        plan_quantization(loaded, quantize)
        check_some(loaded, quantize)
    checkpoint_if(loaded, checkpointing)
    return estimate(loaded, inputs, config, options, optimizer, grad_accum > 1, selections)


def structure_and_step(model: str, batch: int, length: int, dtype: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model without storage, and the inputs of one training step, with labels where it takes them."""
    check_choice("dtype", dtype, DTYPES)
    if batch < 1 or length < 2:
        raise ConfigError(f"a step has at least 1 sequence of 2 tokens, got {batch} of {length}")
    loaded = load_structure(model, dtype)
    if hasattr(loaded.config, "use_cache"):
        loaded.config.use_cache = False
    inputs = example_inputs(loaded, batch, length)
    if takes_labels(loaded):
        inputs |= _labels(loaded, inputs)
    return loaded, inputs


def _labels(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A label for each token of a language model, for each row of logits of another: a number for a single logit."""
    tokens = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if tokens is not None and model.get_output_embeddings() is not None:
        return {"labels": tokens}
    with torch.no_grad():
        logits = getattr(model(**inputs), "logits", None)
    if logits is None:
        return {}
    kind = logits.dtype if logits.shape[-1] == 1 else torch.int64
    return {"labels": torch.zeros_like(logits[..., 0], dtype=kind)}


def table(estimated: Estimate) -> Table:
    """What a person reads, in MiB."""
    rows = {
        "weights": estimated.weights,
        f"slices ({estimated.trainable:,} numbers) and backups": estimated.slices,
        "optimizer": estimated.optimizer,
        f"activations saved for the backward ({_amount(estimated)})": estimated.activations,
        "working memory at the peak, gradients too": estimated.working,
        "total": estimated.total,
    }
    shown = Table("memory of a training step", "MiB")
    shown.columns[1].justify = "right"
    for name, size in rows.items():
        shown.add_row(name, f"{size / 2**20:,.1f}", end_section=name.startswith("working"))
    return shown


def _amount(estimated: Estimate) -> str:
    return f"{estimated.tokens:,} tokens" if estimated.tokens else f"a batch of {estimated.batch:,}"
