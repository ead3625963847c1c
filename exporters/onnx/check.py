"""Whether an ONNX file is valid, and computes what the model does."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from s2ft_compile.errors import ExportError

log = logging.getLogger(__name__)


def check(module: nn.Module, file: Path, inputs: tuple[tuple, dict], others: Sequence[tuple[tuple, dict]] = ()) -> None:
    """The file is valid ONNX, and gives the module's outputs for the example and for inputs of other sizes.

    others: these inputs; none: the example with a row more and a token less, if the module takes it. Raises
    `ExportError`. What ONNX Runtime has no CPU kernel for is not run, with a warning.
    """
    import onnx
    import onnxruntime

    try:
        onnx.checker.check_model(str(file))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
        log.warning("the ONNX file was not run: ONNX Runtime has no CPU kernel for it (%s)", first_line(error))
        return
    except Exception as error:  # neither library has a base class for its errors
        raise ExportError(f"the exported graph is not valid: {first_line(error)}") from error
    for given in (inputs, *others):
        _compare(module, session, given)
    if others:
        return
    resized = _resized(session, inputs)
    try:
        with torch.no_grad():
            module(*resized[0], **resized[1])
    except Exception as error:  # whatever a model raises on sizes that it does not take
        log.info("the model itself does not take inputs of another size: %s", first_line(error))
    else:
        _compare(module, session, resized)


def _compare(module: nn.Module, session: Any, inputs: tuple[tuple, dict]) -> None:
    args, kwargs = inputs
    with torch.no_grad():
        expected = dict(named_tensors(module(*args, **kwargs)))
    feeds = {i.name: t.detach().cpu().numpy() for i, t in zip(session.get_inputs(), tensors(inputs), strict=True)}
    try:
        found = session.run(None, feeds)
    except Exception as error:
        shapes = {name: value.shape for name, value in feeds.items()}
        raise ExportError(f"ONNX Runtime cannot run the exported graph on {shapes}: {first_line(error)}") from error
    for (name, want), got in zip(expected.items(), found, strict=True):
        want, got = want.detach().cpu(), torch.from_numpy(got)
        where = f"ONNX Runtime differs from the model in output {name!r}"
        if want.shape != got.shape:
            raise ExportError(f"{where}: shape {tuple(got.shape)} instead of {tuple(want.shape)}")
        if not close(want, got):
            raise ExportError(f"{where}: by up to {(want.double() - got.double()).abs().max():.3g}")


def close(want: Tensor, got: Tensor) -> bool:
    """Equal to half the digits of the type, of the largest entry: the sums are the same, in another order."""
    if not want.is_floating_point():
        return torch.equal(want, got)
    finite = want[want.isfinite()].abs()
    scale = float(finite.max()) if len(finite) else 1.0
    eps = max(torch.finfo(want.dtype).eps, torch.finfo(torch.float32).eps)  # float64 models have float32 inside
    return torch.allclose(want, got, rtol=0, atol=eps**0.5 * scale, equal_nan=True)


def _resized(session: Any, inputs: tuple[tuple, dict]) -> tuple[tuple, dict]:
    """The inputs with a row more (the first again) and a token less, where these dimensions are dynamic."""
    dynamic = {id(t): [isinstance(d, str) for d in i.shape] for i, t in zip(session.get_inputs(), tensors(inputs))}

    def resize(x):
        for dim, free in enumerate(dynamic.get(id(x), ())[:2]):
            if free:
                size = x.shape[dim]
                more = dim == 0 or size < 3
                x = x.index_select(dim, torch.arange(size + 1 if more else size - 1, device=x.device) % size)
        return x

    return pytree.tree_map(resize, inputs)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def named_tensors(output: Any, name: str = "", separator: str = "_") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of what a forward returns, in the order of its pytree."""
    if isinstance(output, Tensor):
        yield name or "output", output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from named_tensors(value, f"{name}{separator}{key}" if name else str(key), separator)
    elif isinstance(output, (tuple, list)):
        for i, value in enumerate(output):
            yield from named_tensors(value, f"{name or 'output'}{separator}{i}", separator)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
