"""Where the kernels run: what every one of them asks first.

Triton is optional. Without it, on the CPU, and on GPUs that it does not compile bf16 for or fails on, aten runs.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

try:
    import triton
    import triton.language as tl
except ImportError:  # not Linux: the references are what is left
    triton, tl = None, SimpleNamespace(constexpr=object)

# Here, since a `kernels/__init__.py` would hide the package of that name from transformers.
if __name__ != "s2ft_compile.kernels.support":  # a second copy would define every operator again
    raise ImportError(f"{__name__} is a part of s2ft_compile: import s2ft_compile.kernels instead")

log = logging.getLogger(__name__)
AMPERE = (8, 0)  # the first with bf16 in its matrix units and in Triton


def jit(**options: Any) -> Callable:
    """`triton.jit` with options; where there is no Triton, a kernel is the plain function that nothing calls."""
    return triton.jit(**options) if triton else lambda function: function


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability for which Triton kernels are compiled on this device, or None where aten runs."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _capability(device)


@lru_cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    """Asked once for each device, so what it has to say is said once."""
    why = _why_not(device) or _failure(device)
    if why is None:
        return torch.cuda.get_device_capability(device)
    log.log(
        logging.INFO if device.type == "cpu" else logging.WARNING,
        "%s runs aten instead of the Triton kernels: %s",
        device,
        why,
    )
    return None


def _why_not(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.cuda is None:
        return "they are for CUDA GPUs"
    if triton is None:
        return "Triton is not installed"
    version = torch.cuda.get_device_capability(device)
    return f"its compute capability is {version[0]}.{version[1]}, under 8.0" if version < AMPERE else None


@jit()
def _probe(x, out):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    a = tl.load(x + at)
    tl.store(out + at, tl.dot(a, a))


def _failure(device: torch.device) -> str | None:
    """What goes wrong with a first small kernel, such as a GPU that this Triton is too old for; None if all is well."""
    try:
        with unset_fake_temporarily(), torch.no_grad():
            x = torch.eye(16, dtype=torch.bfloat16, device=device) * 3
            out = torch.empty(16, 16, device=device)
            with placed(x):
                _probe[(1,)](x, out)
            return None if torch.equal(out, x.float() * 3) else "a first kernel gives wrong results"
    except Exception as error:  # Triton raises what its compiler, the assembler or the driver do
        return f"a first kernel fails with {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def placed(x: torch.Tensor) -> AbstractContextManager:
    """Context for a launch on x's GPU: Triton takes the current one, and a model may lie on several. Nothing while a
    graph is traced; what Inductor compiles sees to its own devices."""
    plain = type(x) in (torch.Tensor, torch.nn.Parameter)
    return torch.cuda.device(x.device) if plain and x.is_cuda else nullcontext()


@lru_cache
def processors(index: int) -> int:
    """How many blocks of threads a GPU runs side by side."""
    return torch.cuda.get_device_properties(index).multi_processor_count
