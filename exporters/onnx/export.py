"""The trained model as an ONNX file that ONNX Runtime runs.

torch.export traces the merged model with its first two dimensions dynamic, torch.onnx translates the graph,
and the file is checked before it appears: by onnx.checker, and by ONNX Runtime against the model itself.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from s2ft_compile.capture.examples import Inputs, arguments
from s2ft_compile.capture.models import configs_of, inference_mode_of, tied_names, unwrap
from s2ft_compile.config import check_choice
from s2ft_compile.errors import CaptureError, ConfigError, ExportError
from s2ft_compile.exporters.adapter import untrained
from s2ft_compile.exporters.files import new_files
from s2ft_compile.exporters.merged import dense, plain
from s2ft_compile.slices.blocks import blocks_in
from s2ft_compile.slices.state import is_prepared

from .adapter import places_of, probe
from .cache import stepping
from .check import check, first_line, tensors
from .genai import FILE, tokens_of, write_genai_config
from .places import GENAI, NAMES, add_places, check_names
from .values import Call, name_values
from .weights import FORMS, QUANTIZER, orient_weights, quantized

log = logging.getLogger(__name__)
OPSETS = (18, 19, 20, 21, 22, 24, 25)  # of 23, ONNX Runtime refuses the RotaryEmbedding that onnxscript makes
OPSET = 20
INLINE_BYTES = 1 << 20  # weights up to this size lie in the .onnx file itself, which can hold 2 GB at most


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    adapters: str | Sequence[str | os.PathLike[str]] = "merged",
    *,
    cache: bool = False,
    names: str = NAMES[0],
    opset: int = OPSET,
    quantize: str | None = None,
) -> Path:
    """Writes the model, merged and in eval mode, as an ONNX file, and returns its path.

    Inputs are named like the forward's arguments, outputs as the model names them (`logits`; `output`, or
    `output_0` and so on, where it does not), weights like the parameters; those of products are (in, out), as ONNX's
    tools expect them. The first two dimensions of each input are dynamic where the model's code allows it; a warning
    names what is not. Weights over 1 MiB in total lie beside the file, in `<path>.data`, each once. bfloat16 weights
    are written as float32, because ONNX Runtime has no bfloat16 kernels on a CPU. Quantized weights are written as they
    are dequantized (in float, or in the bits of `quantize`), which takes the memory of the dense model. The model is
    afterwards as it was.

    adapters: "merged"; "separate", the untrained base model with inputs for what a prepared model trains; or a list
    of adapter folders, the same for all that these change. `save_onnx_adapter` writes what goes there.
    cache: for causal language models, `past_key_values.N.key` and `.value` are inputs and `present.N.key` and
    `.value` outputs, in one graph for prefill (an empty past) and decoding; `onnx_cache` has the shapes.
    names: "model"; or "genai", with cache=True, what onnxruntime-genai loads: a genai_config.json is written beside
    the file, and adapters are inputs in the form and with the names of Olive's LoRA adapters.
    opset: of the file, one of `OPSETS`.
    quantize: "int8" or "int4", for the weights of products; an adapter's inputs stay in float. `weights.FORMS` says
    how far the file may be from the model, with an adapter and without.

    Raises `ConfigError` for an option that is unknown, adapters that leave nothing to make room for, or a model
    without a cache that is asked for one, `AdapterError` for an adapter of another base model, `CaptureError` for a
    model that cannot be traced, `ExportError` for a file that exists, an operator without translation, or a result
    that differs from the model's.
    """
    target, module = Path(path), unwrap(model)
    _check_options(target, module, cache, names, opset)
    if quantize is not None:
        check_choice("quantization", quantize, tuple(FORMS))
    inputs = Inputs(*pytree.tree_map(_widened, tuple(arguments(example_inputs))))
    places = [] if adapters == "merged" else places_of(model, adapters)
    if places and not is_prepared(model) and blocks_in(module):
        raise ExportError(
            "an adapter's slices lie beside this model's quantized weights, and the graph is to be the base's; "
            "unload_adapter(model) takes them off"
        )
    beside = [target.with_name(FILE)] if names == GENAI else []
    with (
        new_files(target, target.with_name(target.name + ".data"), *beside) as folder,
        untrained(model) if places else plain(model),
        dense(module),
        inference_mode_of(module),
        _bfloat16_as_float32(module),
        _experts_by_index(module),
        _quiet(),
        stepping(module, inputs) if cache else nullcontext(Call(inputs)) as call,
    ):
        file = folder / target.name
        program = _traced(module, call)
        onnx_model = _translated(module, program, opset)
        name_values(onnx_model.graph, module, program, call)
        add_places(onnx_model.graph, places, lora=names == GENAI)
        orient_weights(onnx_model.graph)
        _write(onnx_model, file)
        check(module, file, call.inputs, call.checks, probe(module, places, names, folder) if places else None)
        if beside:
            write_genai_config(module, onnx_model.graph, folder / FILE, target.name)
        if quantize:
            _write(quantized(onnx_model, quantize), file)
            again = probe(module, places, names, folder) if places else None
            check(module, file, call.inputs, call.checks, again, FORMS[quantize].limit)
    log.info("ONNX model written to %s", target)
    return target


def _check_options(target: Path, module: nn.Module, cache: bool, names: str, opset: int) -> None:
    if target.suffix != ".onnx":
        raise ExportError(f"{target} is not the name of an ONNX file; {target.with_suffix('.onnx')} would be")
    if opset not in OPSETS:
        raise ConfigError(f"opset {opset!r} is not supported; valid: {', '.join(map(str, OPSETS))}")
    check_names(names)
    if names == GENAI and not cache:
        raise ConfigError(
            "names='genai' is for graphs with a KV cache, which is all that onnxruntime-genai runs; pass cache=True too"
        )
    if names == GENAI:
        tokens_of(module)


# --- from module to graph ----------------------------------------------------------------------------------


def _traced(module: nn.Module, call: Call) -> torch.export.ExportedProgram:
    """The module's graph: dynamic where it can be; of the example's sizes if it is not traced otherwise, but for a
    call that names what has to be dynamic."""
    inputs, dynamic = (call.inputs, call.dynamic()) if call.axes else _without_ones(call)
    dims = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor, names in dynamic:
        dims[tensor] = dict.fromkeys(names, torch.export.Dim.AUTO)
    try:
        return _exported(module, inputs, dims)
    except CaptureError as error:
        if call.axes:
            raise
        refused = first_line(error.__cause__ or error)
    program = _exported(module, call.inputs, None)
    log.warning("the ONNX file takes inputs of the example's sizes only: %s", refused)
    return program


def _exported(module: nn.Module, inputs: Inputs, dims: Any) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(module, *inputs, dynamic_shapes=dims, strict=False)
    except Exception as error:  # export raises many unrelated types
        raise CaptureError(
            f"{type(module).__name__} could not be traced by torch.export: {first_line(error)}. The "
            f"forward has to run on the example inputs without branching on tensor values"
        ) from error


def _without_ones(call: Call) -> tuple[Inputs, list[tuple[Tensor, Mapping[int, str]]]]:
    """The inputs, doubled along a dimension that is 1 in all of them: the tracer takes a 1 for a constant."""
    inputs = call.inputs
    rows = [t for t in tensors(inputs) if t.dim() > 0]
    tokens = [t for t in rows if t.dim() > 1 and not t.is_floating_point()]
    for dim, group in ((0, rows), (1, tokens)):
        if group and all(t.shape[dim] == 1 for t in group):
            chosen = [id(t) for t in group]
            repeated = {i: torch.cat([t, t], dim) for i, t in zip(chosen, group)}
            tokens = [repeated.get(id(t), t) for t in tokens]
            inputs = pytree.tree_map(lambda x: repeated.get(id(x), x), inputs)
    return inputs, Call(inputs).dynamic()


def _translated(module: nn.Module, program: torch.export.ExportedProgram, opset: int) -> Any:
    """The traced graph as an `onnx_ir.Model` whose initializers are the module's parameters, each once.

    torch.onnx folds the transposition of a weight into a new constant, a second copy of a weight that is
    tied. So its optimizer sees the weights as inputs of unknown value; ONNX Runtime does that folding when
    it loads the file.
    """
    import onnx_ir as ir

    try:
        onnx_program = torch.onnx.export(program, dynamo=True, opset_version=opset, optimize=False, verbose=False)
        assert onnx_program is not None  # with dynamo
        graph: Any = onnx_program.model.graph
        tied = tied_names(module)
        weights = {value: value.const_value for name, value in graph.initializers.items() if name in program.state_dict}
        for value in weights:
            del graph.initializers[value.name]
            value.const_value = None
            graph.inputs.append(value)
        onnx_program.optimize()
    except Exception as error:  # onnxscript and torch.onnx raise many unrelated types
        raise ExportError(
            f"{type(module).__name__} could not be translated to ONNX opset {opset}: {first_line(_innermost(error))}"
        ) from error
    for value, content in weights.items():
        graph.inputs.remove(value)
        value.const_value, value.name = content, tied.get(value.name, value.name)
        if value.name in graph.initializers:  # the other name of a tied weight
            ir.convenience.replace_all_uses_with(value, graph.initializers[value.name])
        elif value.uses():
            graph.initializers.add(value)
    _mask_with_infinity(graph)
    return onnx_program.model


def _mask_with_infinity(graph: Any) -> None:
    """Replaces Where(mask, 0, lowest) with Where(mask, 0, -inf) in front of a Softmax whose NaN become 0.

    A row that may attend to nothing (padding on the left) is 0 in torch: softmax of -inf is NaN, and the
    exporter writes the Where(IsNaN) for that, but masks with the lowest finite number, which gives the mean
    of the values.
    """
    for guard in [node for node in graph.all_nodes() if node.op_type == "IsNaN"]:
        softmax = guard.inputs[0].producer()
        add = softmax and softmax.op_type == "Softmax" and softmax.inputs[0].producer()
        for where in [v.producer() for v in add.inputs] if add and add.op_type == "Add" else ():
            mask = where.inputs[2] if where and where.op_type == "Where" else None
            if mask is None or mask.const_value is None:
                continue
            lowest = mask.const_value.numpy()
            if lowest.size == 1 and lowest == np.finfo(lowest.dtype).min:
                _replace_constant(graph, mask, np.full_like(lowest, -np.inf), f"{mask.name}_infinite", where)


def _replace_constant(graph: Any, old: Any, content: np.ndarray, name: str, user: Any) -> None:
    import onnx_ir as ir

    if name not in graph.initializers:
        tensor: Any = ir.tensor(content, name=name)
        graph.initializers.add(
            ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        )
    user.replace_input_with(2, graph.initializers[name])
    if not old.uses():
        graph.initializers.pop(old.name, None)


# --- the file, and its check -------------------------------------------------------------------------------


def _write(onnx_model: Any, file: Path) -> None:
    """Without the tracer's notes on where in the source a node is from, ten times the size of the graph."""
    import onnx_ir as ir

    ir.passes.common.ClearMetadataAndDocStringPass()(onnx_model)
    size, data = sum(v.const_value.nbytes for v in onnx_model.graph.initializers.values()), f"{file.name}.data"
    if size <= INLINE_BYTES:
        file.with_name(data).unlink(missing_ok=True)  # of the float graph, where the quantized one's fits
    ir.save(onnx_model, file, external_data=data if size > INLINE_BYTES else None)


# --- small things ------------------------------------------------------------------------------------------


def _widened(x: Any) -> Any:
    """A tensor of its own: torch.export writes guards for a view that torch.onnx cannot evaluate."""
    if not isinstance(x, Tensor):
        return x
    return x.detach().clone().to(torch.float32 if x.dtype == torch.bfloat16 else x.dtype)


@contextmanager
def _bfloat16_as_float32(module: nn.Module) -> Iterator[None]:
    kept = [(t, t.data) for t in chain(module.parameters(), module.buffers()) if t.dtype == torch.bfloat16]
    try:
        for tensor, data in kept:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


@contextmanager
def _experts_by_index(module: nn.Module) -> Iterator[None]:
    """Experts as products with the weights of each token's own: their products by groups have no translation."""
    held = [(c, c._experts_implementation) for c in configs_of(module) if hasattr(c, "_experts_implementation")]
    try:
        for config, kind in held:
            if kind == "grouped_mm":
                config._experts_implementation = "batched_mm"
        yield
    finally:
        for config, kind in held:  # outer ones first: they set those inside them too
            config._experts_implementation = kind


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter notes each rule it tries, packages that are missing, outputs that are None: no faults."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", QUANTIZER)]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
