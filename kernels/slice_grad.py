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

from .support import jit, placed, processors, tl

MAX_SPLITS = 32


def slice_grad_reference(A: Tensor, B: Tensor, C: Tensor | None = None) -> Tensor:
    """(M, N) float32 of (T, M) and (T, N), added to C if there is one."""
    product = A.float().T @ B.float()
    return product if C is None else C + product


@jit(do_not_specialize=["T"])
def _kernel(
    A,
    B,
    C,
    out,
    T,
    M,
    N,
    a_t,
    a_m,
    b_t,
    b_n,
    c_s,
    c_m,
    c_n,
    ADD: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
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
    at = part.to(tl.int64) * c_s + m[:, None] * c_m + n[None, :] * c_n
    inside = (m[:, None] < M) & (n[None, :] < N)
    if ADD:
        total += tl.load(C + at, mask=inside, other=0.0)
    tl.store(out + at, total, mask=inside)


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


def launch(kernel, A: Tensor, B: Tensor, C: Tensor | None, out: Tensor, at_once: int) -> Tensor:
    """Aᵀ B, plus C if there is one, in `out` or, if the tokens are split, in a tensor of its own. kernel: the Triton
    kernel, interpreted or wrapped for a graph. out: (M, N) float32; C: the same with its strides, or `out` itself."""
    T, M, N = A.shape[0], A.shape[1], B.shape[1]
    if M == 0 or N == 0:
        return out
    how = tiles(M, N, A.element_size(), at_once)
    whole = how.SPLITS == 1
    parts = out if whole else out.new_empty((how.SPLITS, M, N))
    strides = (0, *out.stride()) if whole else parts.stride()
    grid = (-(-M // how.BLOCK_M) * -(-N // how.BLOCK_N), how.SPLITS, 1)
    with placed(A):
        kernel[grid](
            A,
            B,
            out if C is None else C,
            parts,
            T,
            M,
            N,
            *A.stride(),
            *B.stride(),
            *strides,
            ADD=whole and C is not None,
            **vars(how),
        )
    if whole:
        return out
    return parts.sum(0) if C is None else C + parts.sum(0)


def _result(A: Tensor, B: Tensor, C: Tensor | None = None) -> Tensor:
    """An empty result."""
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[0] or A.dtype != B.dtype:
        raise ValueError(
            f"slice_grad takes (T, M) and (T, N) of one type, got {A.dtype} {list(A.shape)} and "
            f"{B.dtype} {list(B.shape)}"
        )
    shape = A.shape[1], B.shape[1]
    if C is not None and (C.shape != shape or C.dtype != torch.float32):
        raise ValueError(f"slice_grad adds to a float32 {list(shape)}, got {C.dtype} {list(C.shape)}")
    return A.new_empty(shape, dtype=torch.float32) if C is None else torch.empty_like(C)


@triton_op("s2ft::slice_grad", mutates_args=())
def slice_grad(A: Tensor, B: Tensor, C: Tensor | None = None) -> Tensor:
    """Aᵀ B in float32, plus C (M, N) float32 if there is one, which stays as it is.

    Raises `ValueError` for operands of two types or numbers of tokens.
    """
    return launch(wrap_triton(_kernel), A, B, C, _result(A, B, C), processors(A.device.index))


@triton_op("s2ft::slice_grad_", mutates_args={"C"})
def slice_grad_(C: Tensor, A: Tensor, B: Tensor) -> None:
    """C += Aᵀ B, in float32."""
    _result(A, B, C)
    result = launch(wrap_triton(_kernel), A, B, C, C, processors(A.device.index))
    if result is not C:
        C.copy_(result)


slice_grad.register_fake(_result)
slice_grad.register_kernel("cpu")(slice_grad_reference)


@slice_grad_.register_fake
def _(C, A, B):
    _result(A, B, C)


@slice_grad_.register_kernel("cpu")
def _(C, A, B):
    C += slice_grad_reference(A, B)
