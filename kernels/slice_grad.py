"""slice_grad: the gradient of a slice, C = Aᵀ B.

    A: (T, M), B: (T, N)    bf16, fp16 or float32, any strides: views of activations and of slices of them
    C: (M, N)               float32, summed in float32; `slice_grad_` adds to a C that is there

T is the number of tokens; M and N are a side of a weight and the slice that trains. A slice is thin, so its C has few
tiles: 32 of 128 × 128 for one head of 128 channels under a side of 4096, where an H200 runs 132 at a time. The tokens
are then split, each part into its own buffer, and the buffers are summed. That is deterministic, and the buffers (at
most one tile for each processor) cost less than atomic additions would, which need C to be zeroed first. How many parts
there are depends on M, N and the GPU only, and T is not specialised: a new sequence length compiles nothing.

The tile sizes are reasoned, not measured: three stages of 128 × 128 × 64 are 96 KiB, which every GPU since Ampere has.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .support import jit, processors, tl

MAX_SPLITS = 32


def slice_grad_reference(A: Tensor, B: Tensor) -> Tensor:
    """(M, N) float32 of (T, M) and (T, N)."""
    return A.float().T @ B.float()


@jit(do_not_specialize=["T"])
def _kernel(A, B, C, T, M, N, a_t, a_m, b_t, b_n, c_s, c_m, c_n,
            ADD: tl.constexpr, SPLITS: tl.constexpr,
            BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    across = (N + BLOCK_N - 1) // BLOCK_N
    tile, part = tl.program_id(0), tl.program_id(1)
    m = ((tile // across) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = ((tile % across) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    steps = ((T + BLOCK_T - 1) // BLOCK_T + SPLITS - 1) // SPLITS
    begin = part * steps * BLOCK_T
    end = tl.minimum(T, begin + steps * BLOCK_T)
    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for start in range(begin, end, BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        a = tl.load(A + t[:, None] * a_t + m[None, :] * a_m, mask=(t[:, None] < T) & (m[None, :] < M), other=0.0)
        b = tl.load(B + t[:, None] * b_t + n[None, :] * b_n, mask=(t[:, None] < T) & (n[None, :] < N), other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
    at = C + part.to(tl.int64) * c_s + m[:, None] * c_m + n[None, :] * c_n
    inside = (m[:, None] < M) & (n[None, :] < N)
    if ADD:
        total += tl.load(at, mask=inside, other=0.0)
    tl.store(at, total, mask=inside)


@dataclass(frozen=True)
class Tiles:
    """How an (M, N) result is cut up."""

    BLOCK_T: int
    BLOCK_M: int
    BLOCK_N: int
    SPLITS: int
    num_warps: int
    num_stages: int = 3


def tiles(M: int, N: int, itemsize: int, at_once: int) -> Tiles:
    """The least padding of at most 128 × 128, and as many parts of the tokens as fill `at_once` processors."""
    m, n = _side(M), _side(N)
    count = -(-M // m) * -(-N // n)
    splits = min(max(at_once // count, 1), MAX_SPLITS)
    return Tiles(64 if itemsize == 2 else 32, m, n, splits, num_warps=8 if m * n == 128 * 128 else 4)


def _side(size: int) -> int:
    """16, 32 or 64 if that covers it; else 64 or 128, whichever has less to pad."""
    if size <= 64:
        return next(side for side in (16, 32, 64) if side >= size)
    return 64 if -(-size // 64) % 2 else 128


def launch(kernel, A: Tensor, B: Tensor, C: Tensor, add: bool, at_once: int) -> None:
    """C = Aᵀ B, or C += Aᵀ B. kernel: the Triton kernel, interpreted or wrapped for a graph. C: (M, N) float32."""
    T, M, N = A.shape[0], A.shape[1], B.shape[1]
    if M == 0 or N == 0:
        return
    how = tiles(M, N, A.element_size(), at_once)
    parts = C if how.SPLITS == 1 else C.new_empty((how.SPLITS, M, N))
    strides = (0, *C.stride()) if how.SPLITS == 1 else parts.stride()
    grid = (-(-M // how.BLOCK_M) * -(-N // how.BLOCK_N), how.SPLITS, 1)
    kernel[grid](A, B, parts, T, M, N, *A.stride(), *B.stride(), *strides, ADD=add and how.SPLITS == 1, **vars(how))
    if how.SPLITS > 1:
        total = parts.sum(0)
        C.add_(total) if add else C.copy_(total)


def _check(A: Tensor, B: Tensor) -> None:
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[0] or A.dtype != B.dtype:
        raise ValueError(f"slice_grad takes (T, M) and (T, N) of one type, got {A.dtype} {list(A.shape)} and "
                         f"{B.dtype} {list(B.shape)}")


@triton_op("s2ft::slice_grad", mutates_args=())
def slice_grad(A: Tensor, B: Tensor) -> Tensor:
    """Aᵀ B in float32. Raises `ValueError` for operands of two types or numbers of tokens."""
    _check(A, B)
    C = A.new_empty((A.shape[1], B.shape[1]), dtype=torch.float32)
    launch(wrap_triton(_kernel), A, B, C, False, processors(A.device.index))
    return C


@triton_op("s2ft::slice_grad_", mutates_args={"C"})
def slice_grad_(C: Tensor, A: Tensor, B: Tensor) -> None:
    """C += Aᵀ B, in float32."""
    _check(A, B)
    launch(wrap_triton(_kernel), A, B, C, True, processors(A.device.index))


@slice_grad.register_fake
def _(A, B):
    _check(A, B)
    return A.new_empty((A.shape[1], B.shape[1]), dtype=torch.float32)


@slice_grad_.register_fake
def _(C, A, B):
    _check(A, B)


slice_grad.register_kernel("cpu")(slice_grad_reference)


@slice_grad_.register_kernel("cpu")
def _(C, A, B):
    C += slice_grad_reference(A, B)
