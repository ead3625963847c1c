"""Whether an ONNX file is valid, and computes what the model does."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from s2ft_compile.errors import ExportError

log = logging.getLogger(__name__)


def check(
    module: nn.Module,
    file: Path,
    inputs: tuple[tuple, dict],
    others: Sequence[tuple[tuple, dict]] = (),
    adapted: AbstractContextManager[Any] | None = None,
    limit: float = 0.0,
) -> None:
    """The file is valid ONNX, and gives the module's outputs for the example and for inputs of other sizes.

    others: these inputs; none: the example with a row more and a token less, if the module takes it. adapted: a context
    in which the module has an adapter, and which yields the `RunOptions` of a run with it; the file has to give the
    module's outputs then too. limit: how far the outputs may be, as a share of their norm; 0: by rounding only. Raises
    `ExportError`. What ONNX Runtime has no CPU kernel for is not run, with a warning.
    """
    session = _session(file)
    if session is None:
        return
    cases = [inputs, *(others or _resized_for(module, session, inputs))]
    for given in cases:
        _compare(module, session, given, limit=limit)
    if adapted is None:
        return
    before = _outputs(module, inputs)
    with adapted as options:
        if all(close(before[name], value) for name, value in _outputs(module, inputs).items()):
            log.warning("what the adapters change has no effect on the example's outputs, so it was not checked")
        for given in cases:
            _compare(module, session, given, options, limit)


def _session(file: Path) -> Any | None:
    """None, with a warning, where ONNX Runtime has no kernels."""
    import onnx
    import onnxruntime

    try:
        onnx.checker.check_model(str(file))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
        log.warning("the ONNX file was not run: ONNX Runtime has no CPU kernel for it (%s)", first_line(error))
        return None
    except Exception as error:  # neither library has a base class for its errors
        raise ExportError(f"the exported graph is not valid: {first_line(error)}") from error


def _resized_for(module: nn.Module, session: Any, inputs: tuple[tuple, dict]) -> list[tuple[tuple, dict]]:
    resized = _resized(session, inputs)
    try:
        _outputs(module, resized)
    except Exception as error:  # whatever a model raises on sizes that it does not take
        log.info("the model itself does not take inputs of another size: %s", first_line(error))
        return []
    return [resized]


def _outputs(module: nn.Module, inputs: tuple[tuple, dict]) -> dict[str, Tensor]:
    args, kwargs = inputs
    with torch.no_grad():
        return {name: value.detach().cpu() for name, value in named_tensors(module(*args, **kwargs))}


def _compare(
    module: nn.Module, session: Any, inputs: tuple[tuple, dict], options: Any = None, limit: float = 0.0
) -> None:
    expected = _outputs(module, inputs)
    feeds = {i.name: t.detach().cpu().numpy() for i, t in zip(session.get_inputs(), tensors(inputs), strict=True)}
    active = "" if options is None else " with an adapter"
    try:
        output = session.run(None, feeds, options)
    except Exception as error:
        shapes = {name: value.shape for name, value in feeds.items()}
        raise ExportError(
            f"ONNX Runtime cannot run the exported graph{active} on {shapes}: {first_line(error)}"
        ) from error
    for (name, want), got in zip(expected.items(), map(torch.from_numpy, output), strict=True):
        where = f"ONNX Runtime differs from the model{active} in output {name!r}"
        if want.shape != got.shape:
            raise ExportError(f"{where}: shape {tuple(got.shape)} instead of {tuple(want.shape)}")
        if limit and want.is_floating_point():
            error = apart(want, got)
            log.info("output %r%s: %.2g of its norm from the model's", name, active, error)
            if not error <= limit:
                raise ExportError(
                    f"{where}: by {error:.2g} of its norm, and {limit:g} is the limit of such weights; "
                    f"more bits are nearer, and quantize=None is the model itself"
                )
        elif not close(want, got):
            raise ExportError(f"{where}: by up to {(want.double() - got.double()).abs().max():.3g}")


def apart(want: Tensor, got: Tensor) -> float:
    """The norm of the difference, as a share of the norm of what is wanted."""
    size = float(want.double().norm())
    return float((got.double() - want.double()).norm()) / size if size else float(got.any())


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
