"""adapters: what each row's own adapter adds to a linear layer's result, in place.

    columns (what the layer contracts)      y += x[index] @ delta        x: (N, L, in), delta: (A, n, out)
    rows (what it produces)                 y[index] += x @ delta        y: (N, L, out), delta: (A, in, n)

    ids: (N,) the adapter of each row, index: (A, n) int64, rank: (A,) int32, how many of the n count

One kernel does both, since both are y[.., column(c)] += sum over k of x[.., position(k)] delta[k, c]: for columns
position = index and column = c, for rows position = k and column = index. Padding costs nothing: a row's sums and
stores end at its own adapter's rank, and a row of rank 0 (no adapter) ends at once. With one token a row (decode) the
time is that of reading the deltas, so tiles are small to have many readers; with more (prefill), one read of a delta
serves up to 64 tokens. The indices of one adapter differ from each other, so no two programs write one place.
"""

from torch import Tensor
from torch.library import triton_op, wrap_triton

from .support import jit, placed, tl


def adapter_add_reference(
    y: Tensor, x: Tensor, ids: Tensor, index: Tensor, delta: Tensor, rank: Tensor, contracts: bool
) -> None:
    for row, k in enumerate(ids.tolist()):
        n = int(rank[k])
        at, D = index[k, :n], delta[k].narrow(0 if contracts else 1, 0, n).to(x.dtype)
        if contracts:
            y[row] += (x[row].index_select(1, at) @ D).to(y.dtype)
        else:
            y[row].index_add_(1, at, (x[row] @ D).to(y.dtype))


@jit(do_not_specialize=["L"])
def _kernel(
    Y,
    X,
    ids,
    index,
    delta,
    rank,
    L,
    width,
    y_n,
    y_l,
    y_c,
    x_n,
    x_l,
    x_c,
    i_a,
    d_a,
    d_k,
    d_c,
    CONTRACTS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    along = (L + BLOCK_L - 1) // BLOCK_L
    row = (tl.program_id(0) // along).to(tl.int64)
    adapter = tl.load(ids + row)
    used = tl.load(rank + adapter)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    K, C = (used, width) if CONTRACTS else (width, used)
    if used > 0 and tl.program_id(1) * BLOCK_C < C:
        t = (tl.program_id(0) % along) * BLOCK_L + tl.arange(0, BLOCK_L)
        x = X + row * x_n + t[:, None].to(tl.int64) * x_l
        total = tl.full((BLOCK_L, BLOCK_C), 0.0, tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            position = tl.load(index + adapter * i_a + k, mask=k < K, other=0) if CONTRACTS else k.to(tl.int64)
            a = tl.load(x + position[None, :] * x_c, mask=(t[:, None] < L) & (k[None, :] < K), other=0.0)
            d = tl.load(
                delta + adapter * d_a + k[:, None].to(tl.int64) * d_k + c[None, :] * d_c,
                mask=(k[:, None] < K) & (c[None, :] < C),
                other=0.0,
            )
            total = tl.dot(a, d.to(a.dtype), total, input_precision="ieee")
        column = c.to(tl.int64) if CONTRACTS else tl.load(index + adapter * i_a + c, mask=c < C, other=0)
        at = Y + row * y_n + t[:, None].to(tl.int64) * y_l + column[None, :] * y_c
        inside = (t[:, None] < L) & (c[None, :] < C)
        tl.store(at, (tl.load(at, mask=inside, other=0.0).to(tl.float32) + total).to(Y.dtype.element_ty), mask=inside)


def tiles(L: int, contracts: bool) -> dict[str, int]:
    """BLOCK_L, BLOCK_K, BLOCK_C: reasoned, not measured (see the module)."""
    if L > 16:
        return dict(BLOCK_L=32 if L <= 32 else 64, BLOCK_K=64, BLOCK_C=64)
    return dict(BLOCK_L=16, BLOCK_K=64, BLOCK_C=64) if contracts else dict(BLOCK_L=16, BLOCK_K=128, BLOCK_C=16)


def launch(
    kernel, y: Tensor, x: Tensor, ids: Tensor, index: Tensor, delta: Tensor, rank: Tensor, contracts: bool
) -> None:
    """kernel: the Triton kernel, interpreted or wrapped for a graph."""
    N, L = x.shape[:2]
    how = tiles(L, contracts)
    width, reach = (delta.shape[2],) * 2 if contracts else delta.shape[1:]
    grid = (N * -(-L // how["BLOCK_L"]), -(-reach // how["BLOCK_C"]), 1)
    if 0 not in (N, L, reach):
        with placed(x):
            kernel[grid](
                y,
                x,
                ids,
                index,
                delta,
                rank,
                L,
                width,
                *y.stride(),
                *x.stride(),
                index.stride(0),
                *delta.stride(),
                CONTRACTS=contracts,
                **how,
            )


@triton_op("s2ft::adapter_add_", mutates_args={"y"})
def adapter_add_(
    y: Tensor, x: Tensor, ids: Tensor, index: Tensor, delta: Tensor, rank: Tensor, contracts: bool
) -> None:
    """Adds to y (N, L, out) what the adapter ids[i] makes of x[i] (N, L, in); see the module."""
    launch(wrap_triton(_kernel), y, x, ids, index, delta, rank, contracts)


@adapter_add_.register_fake
def _(y, x, ids, index, delta, rank, contracts):
    return None


adapter_add_.register_kernel("cpu")(adapter_add_reference)
