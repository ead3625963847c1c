"""Weights quantized a piece at a time while a model is loaded.

Of a whole weight bitsandbytes' 4 bits (on a CPU) and torchao's fp8 make three copies in float32 on their way, which for
an 8B model's largest are more than a layer has in bf16. Blocks and rows are quantized by themselves, so the pieces of a
weight have the bits of the whole. torchao's int8 takes less than a layer as it is.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PIECE = 1 << 20  # elements of a weight: 4 MiB in float32


def in_pieces(quantize: str) -> AbstractContextManager[Any]:
    """Context in which "nf4" and "fp8" are made so."""
    return {"nf4": _Blocks, "fp8": _rows}.get(quantize, nullcontext)()


class _Blocks(TorchDispatchMode):
    """Context in which bitsandbytes rounds some blocks of a weight to 4 bits at a time."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is not torch.ops.bitsandbytes.quantize_4bit.default:
            return op(*args, **kwargs or {})
        weight, size, *how = args
        pieces = [op(piece, size, *how) for piece in weight.reshape(-1).split(max(PIECE // size, 1) * size)]
        return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))


@contextmanager
def _rows() -> Iterator[None]:
    """Context in which torchao rounds some rows of a weight to fp8 at a time."""
    from torchao.quantization import Float8Tensor

    whole = Float8Tensor.from_hp

    def by_rows(weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows = max(PIECE // weight.shape[1], 1)
        return torch.cat([whole(piece, *args, **kwargs) for piece in weight.split(rows)])

    Float8Tensor.from_hp = by_rows
    try:
        yield
    finally:
        Float8Tensor.from_hp = whole
