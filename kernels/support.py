"""Where the kernels run: what every one of them asks first.

Triton is optional. Without it, on the CPU and on GPUs that it does not compile bf16 for, aten runs.
"""

import logging
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Callable

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # not Linux: the references are what is left
    triton, tl = None, SimpleNamespace(constexpr=object)

log = logging.getLogger(__name__)
AMPERE = (8, 0)  # the first with bf16 in its matrix units and in Triton


def jit(**options: Any) -> Callable:
    """`triton.jit` with options; where there is no Triton, a kernel is the plain function that nothing calls."""
    return triton.jit(**options) if triton else lambda function: function


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability for which Triton kernels are compiled on this device, or None where aten runs."""
    if torch.device(device).type != "cuda":
        return None
    index = torch.device(device).index
    return _of_gpu(torch.cuda.current_device() if index is None else index)


@lru_cache
def _of_gpu(index: int) -> tuple[int, int] | None:
    """Asked once for each GPU, so what it has to say is said once."""
    found = torch.cuda.get_device_capability(index)
    if triton is None or torch.version.cuda is None or found < AMPERE:
        why = "Triton is not installed" if triton is None else f"its compute capability is {found[0]}.{found[1]}, under 8.0"
        log.warning("GPU %d runs aten instead of the Triton kernels: %s", index, why)
        return None
    return found


@lru_cache
def processors(index: int) -> int:
    """How many blocks of threads a GPU runs side by side."""
    return torch.cuda.get_device_properties(index).multi_processor_count
