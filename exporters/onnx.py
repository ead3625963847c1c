"""The trained model as an ONNX file that ONNX Runtime runs.

torch.export traces the merged model with its first two dimensions dynamic, torch.onnx translates the graph,
and the file is checked before it appears: by onnx.checker, and by ONNX Runtime against the model itself.
"""

import logging
import os
import re
import warnings
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, TensorArgument
from torch.utils import _pytree as pytree

from ..capture import arguments, inference_mode_of, tied_names, unwrap
from ..errors import CaptureError, ExportError
from .files import new_files
from .merged import plain
from .onnx_adapter import add_places, places_of, untrained
from .verify import check, first_line, named_tensors, tensors

log = logging.getLogger(__name__)
OPSET = 20  # 18, 20, 21, 22 and 24 ran in ONNX Runtime; 23 failed on RotaryEmbedding
INLINE_BYTES = 1 << 20  # weights up to this size lie in the .onnx file itself, which can hold 2 GB at most
AXES = ("batch", "sequence")  # the names of an input's first two dimensions


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike,
    example_inputs: Any,
    adapters: str | Sequence[str | os.PathLike] = "merged",
) -> Path:
    """Writes the model, merged, in eval mode and without a KV cache, as an ONNX file, and returns its path.

    Inputs are named like the forward's arguments, outputs as the model names them (`logits`; `output`, or
    `output_0` and so on, where it does not), weights like the parameters. The first two dimensions of each
    input are dynamic where the model's code allows it; a warning names what is not. Weights over 1 MiB in
    total lie beside the file, in `<path>.data`. bfloat16 weights are written as float32, because ONNX
    Runtime has no bfloat16 kernels on a CPU. The model is afterwards as it was.

    adapters: "merged"; "separate", the untrained base model with inputs for what a prepared model trains; or a list
    of adapter folders, the same for all that these change. `save_onnx_adapter` writes what goes there.

    Raises `ConfigError` for adapters that leave nothing to make room for, `CaptureError` for a
    model that cannot be traced, `ExportError` for a file that exists, an operator without translation, or a
    result that differs from the model's.
    """
    target, module = Path(path), unwrap(model)
    if target.suffix != ".onnx":
        raise ExportError(f"{target} is not the name of an ONNX file; {target.with_suffix('.onnx')} would be")
    inputs = pytree.tree_map(_widened, arguments(example_inputs))
    places = [] if adapters == "merged" else places_of(model, adapters)
    with (
        new_files(target, target.with_name(target.name + ".data")) as folder,
        untrained(model) if places else plain(model),
        inference_mode_of(module),
        _bfloat16_as_float32(module),
        _quiet(),
    ):
        file = folder / target.name
        program = _traced(module, inputs)
        onnx_model = _translated(module, program)
        _name_values(onnx_model.graph, module, program, inputs)
        add_places(onnx_model.graph, places)
        _write(onnx_model, file)
        check(module, file, inputs)
    log.info("ONNX model written to %s", target)
    return target


# --- from module to graph ----------------------------------------------------------------------------------


def _traced(module: nn.Module, inputs: tuple[tuple, dict]) -> torch.export.ExportedProgram:
    """The module's graph: dynamic where it can be, of the example's sizes if it is not traced otherwise."""
    args, kwargs = _without_ones(inputs)
    dims = torch.export.ShapesCollection()
    for tensor in tensors((args, kwargs)):
        dims[tensor] = {d: torch.export.Dim.AUTO for d in range(min(tensor.dim(), len(AXES)))}
    try:
        return torch.export.export(module, args, kwargs, dynamic_shapes=dims, strict=False)
    except Exception as error:  # export raises many unrelated types
        refused = first_line(error)
    args, kwargs = inputs
    try:
        program = torch.export.export(module, args, kwargs, strict=False)
    except Exception as error:
        raise CaptureError(
            f"{type(module).__name__} could not be traced by torch.export: {first_line(error)}. The "
            f"forward has to run on the example inputs without branching on tensor values"
        ) from error
    log.warning("the ONNX file takes inputs of the example's sizes only: %s", refused)
    return program


def _without_ones(inputs: tuple[tuple, dict]) -> tuple[tuple, dict]:
    """The inputs, doubled along a dimension that is 1 in all of them: the tracer takes a 1 for a constant."""
    rows = [t for t in tensors(inputs) if t.dim() > 0]
    tokens = [t for t in rows if t.dim() > 1 and not t.is_floating_point()]
    for dim, group in ((0, rows), (1, tokens)):
        if group and all(t.shape[dim] == 1 for t in group):
            chosen = [id(t) for t in group]
            repeated = {i: torch.cat([t, t], dim) for i, t in zip(chosen, group)}
            tokens = [repeated.get(id(t), t) for t in tokens]
            inputs = pytree.tree_map(lambda x: repeated.get(id(x), x), inputs)
    return inputs


def _translated(module: nn.Module, program: torch.export.ExportedProgram) -> Any:
    """The traced graph as an `onnx_ir.Model` whose initializers are the module's parameters, each once.

    torch.onnx folds the transposition of a weight into a new constant, a second copy of a weight that is
    tied. So its optimizer sees the weights as inputs of unknown value; ONNX Runtime does that folding when
    it loads the file.
    """
    import onnx_ir as ir

    try:
        onnx_program = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False
        )
        graph, tied = onnx_program.model.graph, tied_names(module)
        weights = {
            value: value.const_value
            for name, value in graph.initializers.items()
            if name in program.state_dict
        }
        for value in weights:
            del graph.initializers[value.name]
            value.const_value = None
            graph.inputs.append(value)
        onnx_program.optimize()
    except Exception as error:  # onnxscript and torch.onnx raise many unrelated types
        raise ExportError(
            f"{type(module).__name__} could not be translated to ONNX opset {OPSET}: "
            f"{first_line(_innermost(error))}"
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
        tensor = ir.tensor(content, name=name)
        graph.initializers.add(
            ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        )
    user.replace_input_with(2, graph.initializers[name])
    if not old.uses():
        graph.initializers.pop(old.name, None)


# --- names -------------------------------------------------------------------------------------------------


def _name_values(
    graph: Any, module: nn.Module, program: torch.export.ExportedProgram, inputs: tuple[tuple, dict]
) -> None:
    """Names inputs like the forward's arguments, outputs as the module does, dynamic dimensions by `AXES`."""
    args, kwargs = inputs
    with torch.no_grad():
        names = [name for name, _ in named_tensors(module(*args, **kwargs))]
    arguments = [
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument)
    ]
    for value, name in zip(graph.outputs, names, strict=True):
        value.name = f"{name}_out" if name in arguments or name in graph.initializers else name
    axes: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for value, name, tensor in zip(graph.inputs, arguments, tensors(inputs), strict=True):
        value.name = name
        for axis, dim, size in zip(AXES, value.shape, tensor.shape):
            if str(dim).isdigit():
                _warn_of_fixed(name, axis, tensor)
            elif str(dim) not in axes:
                shared = sizes.setdefault(axis, size) == size
                axes[str(dim)] = axis if shared else f"{axis}_{name}"
    for value in chain(graph.inputs, (v for node in graph.all_nodes() for v in node.outputs)):
        _rename_dims(value, axes)


def _warn_of_fixed(name: str, axis: str, tensor: Tensor) -> None:
    """A feature dimension is meant to be fixed; a batch is not, nor is the length of what holds tokens."""
    dim = AXES.index(axis)
    if tensor.shape[dim] > 1 and (dim == 0 or not tensor.is_floating_point()):
        log.warning("the model's code fixes the %s of input %s to %d", axis, name, tensor.shape[dim])


def _rename_dims(value: Any, axes: Mapping[str, str]) -> None:
    import onnx_ir as ir

    def renamed(dim: Any) -> int | str | None:
        text = re.sub(r"\w+", lambda m: axes.get(m[0], m[0]), str(dim))
        if text.isdigit():  # torch leaves "2" for what it fixed
            return int(text)
        return None if text == "None" else text

    if value.shape is not None:
        value.shape = ir.Shape([renamed(dim) for dim in value.shape])


# --- the file, and its check -------------------------------------------------------------------------------


def _write(onnx_model: Any, file: Path) -> None:
    """Without the tracer's notes on where in the source a node is from, ten times the size of the graph."""
    import onnx_ir as ir

    ir.passes.common.ClearMetadataAndDocStringPass()(onnx_model)
    size = sum(v.const_value.nbytes for v in onnx_model.graph.initializers.values())
    ir.save(onnx_model, file, external_data=f"{file.name}.data" if size > INLINE_BYTES else None)


# --- small things ------------------------------------------------------------------------------------------


def _widened(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x


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
def _quiet() -> Iterator[None]:
    """The exporter notes each rule it tries, packages that are missing, outputs that are None: no faults."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
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
