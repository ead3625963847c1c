"""Partial backpropagation without a compiler: a weight that was read in eager mode carries its slice along.

`attached(W, D)` is a tensor with W's values. A product that it takes part in gets a backward of its own, which makes
the slice of dW and no more:

    y = x Wᵀ        rows of W:     dD = dY[:, block]ᵀ x          columns of W:  dD = dYᵀ x[:, block]

A view, a cast or an entry of it is such a tensor again. Everything else sees an ordinary tensor whose gradient, made at
full size, is cut to the slice: right, and said once.
"""

import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import resolve_name
from torch.utils import _pytree as pytree

from s2ft_compile.errors import StateError
from s2ft_compile.passes.ranges import Ranges, take


class Where(NamedTuple):
    """Where a slice lies in a weight: the (start, length) ranges along `dim`. name: of the weight. whole: the functions
    without a partial backward that have read it."""

    dim: int
    ranges: Ranges
    name: str
    whole: list[Callable]


def composed(weight: Tensor, backup: Tensor, delta: Tensor, dim: int, ranges: Ranges) -> Tensor:
    """weight with cast(backup + delta) in the block, as a function of both tensors that any transform goes through."""
    wide = torch.promote_types(backup.dtype, delta.dtype)
    block = (backup.to(wide) + delta.to(wide)).to(weight.dtype)
    index = torch.cat([torch.arange(s, s + n, device=weight.device) for s, n in ranges])
    return torch.index_copy(weight, dim, index, block)


def attached(
    weight: Tensor, delta: Tensor, dim: int, ranges: Ranges, name: str, whole: list[Callable] | None = None
) -> Tensor:
    """weight, with the gradient of its ranges along `dim` going to `delta`."""
    where = Where(dim % weight.ndim, ranges, name, [] if whole is None else whole)
    read = _Attached.apply(weight, delta, where)
    if weight.requires_grad:
        return read  # somebody trains all of it: there is nothing to leave out
    read = read.as_subclass(AttachedWeight)
    read.parts = weight, delta, where
    read._is_param = True  # `isinstance(module.weight, nn.Parameter)` as before, which `get_parameter` asks
    return read


_warned: set[str] = set()  # the first weight whose gradient was made at full size


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(weight, delta, where):
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, delta, ctx.where = inputs
        ctx.dtype = delta.dtype

    @staticmethod
    def backward(ctx, grad):
        if not _warned and grad.ndim > 1 and not ctx.needs_input_grad[0]:  # a bias's is as small as one token's
            _warned.add(ctx.where.name)
            names = dict.fromkeys(resolve_name(func) or str(func) for func in ctx.where.whole)
            readers = " and ".join(names) or "what reads it"
            warnings.warn(
                f"the gradient of {ctx.where.name} was made at full size and then cut to its slice, for {readers}: "
                f"outside of a graph that backend='s2ft' compiles, only matrix products and embeddings have a partial "
                f"backward",
                stacklevel=2,
            )
        taken = take(grad, ctx.where.dim, ctx.where.ranges).to(ctx.dtype)
        return grad if ctx.needs_input_grad[0] else None, taken, None


class AttachedWeight(Tensor):
    """A weight as it was read. parts: the weight, its delta, and where in the weight that is."""

    parts: tuple[Tensor, Tensor, Where]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _writes(func) and args and _is_attached(args[0]):
            raise StateError(
                f"{args[0].parts[2].name} has a slice that trains: {func.__name__} on it would be lost, or undone in a "
                f"part. Change weights before s2ft.prepare, by load_state_dict, or after s2ft.release(model)"
            )
        rule = PARTIAL.get(func)
        if rule is not None and not torch.compiler.is_compiling() and torch.is_grad_enabled() and _takes(rule, kwargs):
            output = rule(*args, **kwargs)
            if output is not NotImplemented:
                return output
        with torch._C.DisableTorchFunctionSubclass():
            output = func(*args, **kwargs)
        if isinstance(output, Tensor) and output.requires_grad and not torch.compiler.is_compiling():
            for x in pytree.tree_leaves((args, kwargs)):
                if _is_attached(x):
                    x.parts[2].whole.append(func)
        return output


def _takes(rule: Callable, keywords: dict[str, Any]) -> bool:
    """Whether a rule knows these keywords. Where it does not, the call is an ordinary one."""
    code = rule.__code__
    return bool(code.co_flags & inspect.CO_VARKEYWORDS) or keywords.keys() <= {
        *code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    }


def _is_attached(x: Any) -> bool:
    return isinstance(x, AttachedWeight) and hasattr(x, "parts")


def read_from(x: Any) -> Tensor | None:
    """The weight that a read gave as this tensor."""
    return x.parts[0] if _is_attached(x) else None


def _writes(func: Callable) -> bool:
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") and name not in ("requires_grad_", "share_memory_")
    return in_place or func in WRITES


WRITES = {Tensor.__setitem__, Tensor.data.__set__, *(getattr(Tensor, f"__i{op}__") for op in ("add", "sub", "mul"))}


# --- products --------------------------------------------------------------------------------------------------------


def _cast_as_autocast_would(*tensors: Tensor | None) -> list[Tensor | None]:
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if t is not None and t.dtype in HALF_OR_SINGLE else t for t in tensors]


HALF_OR_SINGLE = (torch.float32, torch.float16, torch.bfloat16)


class _Product(torch.autograd.Function):
    """product(x, W, b) for x (…, in) and W (out, in), or (in, out) if not `turned`, or batches of such matrices."""

    @staticmethod
    def forward(x, weight, delta, bias, where, turned, product):
        return product(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, delta, _, where, ctx.turned, _ = inputs
        ctx.reads = (where.dim == weight.ndim - 1) == ctx.turned  # whether the slice is of what W contracts
        ctx.where, ctx.dtype, ctx.batched = where, delta.dtype, weight.ndim == 3
        x = x.detach()
        ctx.save_for_backward(weight, take(x, -1, where.ranges).clone() if ctx.reads else x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, x = ctx.saved_tensors
        dx = dd = db = None
        if ctx.needs_input_grad[0]:
            dx = grad @ (weight if ctx.turned else weight.mT)
        if not ctx.batched:
            grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        dy = grad if ctx.reads else take(grad, -1, ctx.where.ranges)
        if ctx.needs_input_grad[2]:
            dd = (dy.mT @ x if ctx.turned else x.mT @ dy).to(ctx.dtype)
        if ctx.needs_input_grad[3]:
            db = grad.sum(0)
        return dx, None, dd, db, None, None, None


def _linear(input, weight, bias=None):
    if not _is_attached(weight) or _is_attached(input) or weight.ndim != 2:
        return NotImplemented
    W, D, where = weight.parts
    x, W, bias = _cast_as_autocast_would(input, W, bias)
    return _Product.apply(x, W, D, bias, where, True, F.linear)


def _matmul(a, b, *, out=None):
    """x W; or W x, which is (xᵀ Wᵀ)ᵀ."""
    if out is not None or _is_attached(a) == _is_attached(b) or not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return NotImplemented
    if _is_attached(a):
        transposed = _matmul(b.mT, _transposed(a, -2, -1)) if a.ndim == b.ndim >= 2 else NotImplemented
        return transposed if transposed is NotImplemented else transposed.mT
    W, D, where = b.parts
    if W.ndim == 3 and (a.ndim != 3 or where.dim == 0 or len(a) != len(W)) or W.ndim not in (2, 3):
        return NotImplemented
    a, W = _cast_as_autocast_would(a, W)
    return _Product.apply(a, W, D, None, where, False, lambda x, W, _: torch.matmul(x, W))


def _addmm(bias, x, weight, *, beta=1, alpha=1, out=None):
    plain = beta == 1 and alpha == 1 and out is None and not _is_attached(x)
    if not plain or not _is_attached(weight) or bias.ndim != 1:
        return NotImplemented
    W, D, where = weight.parts
    bias, x, W = _cast_as_autocast_would(bias, x, W)
    return _Product.apply(x, W, D, bias, where, False, lambda x, W, b: torch.addmm(b, x, W))


class _GroupedProduct(torch.autograd.Function):
    """product(x, W, offs): rows of x (tokens, in) in groups that end at `offs`, each with one of W (E, in, out)."""

    @staticmethod
    def forward(x, weight, delta, offs, where, product):
        return product(x, weight, offs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, delta, offs, ctx.where, ctx.product = inputs
        ctx.shape, ctx.dtype, ctx.reads = delta.shape, delta.dtype, ctx.where.dim == 1
        x = x.detach()
        ctx.save_for_backward(weight, take(x, -1, ctx.where.ranges).clone() if ctx.reads else x, offs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, x, offs = ctx.saved_tensors
        dx = dd = None
        if ctx.needs_input_grad[0]:
            dx = ctx.product(grad.contiguous(), weight.mT, offs)
        if ctx.needs_input_grad[2]:
            dy, start = grad if ctx.reads else take(grad, -1, ctx.where.ranges), 0
            dd = torch.zeros(ctx.shape, dtype=ctx.dtype, device=grad.device)
            for expert, end in enumerate(offs.tolist()):
                dd[expert] = x[start:end].mT @ dy[start:end]
                start = end
        return dx, None, dd, None, None, None


def _grouped(product: Callable) -> Callable:
    def rule(x, weight, offs=None, bias=None, out_dtype=None):
        plain = offs is not None and bias is None and out_dtype is None and x.ndim == 2 and not _is_attached(x)
        if not plain or not _is_attached(weight) or weight.ndim != 3 or weight.parts[2].dim == 0:
            return NotImplemented
        W, D, where = weight.parts
        return _GroupedProduct.apply(x, W, D, offs, where, product)

    return rule


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ids, weight, delta, where, padding_idx):
        return F.embedding(ids, weight, padding_idx)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ids, weight, delta, ctx.where, ctx.padding_idx = inputs
        ctx.rows, ctx.dtype = len(weight), delta.dtype
        ctx.save_for_backward(ids)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (ids,) = ctx.saved_tensors
        padding = -1 if ctx.padding_idx is None else ctx.padding_idx % ctx.rows
        taken = take(grad, -1, ctx.where.ranges)
        dd = torch.ops.aten.embedding_dense_backward(taken, ids, ctx.rows, padding, False)
        return None, None, dd.to(ctx.dtype), None, None


def _embedding(ids, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
    if not _is_attached(weight) or max_norm is not None or scale_grad_by_freq or sparse or weight.parts[2].dim != 1:
        return NotImplemented
    W, D, where = weight.parts
    return _Embedding.apply(ids, W, D, where, padding_idx)


# --- what is such a weight again -------------------------------------------------------------------------------------


def _transposed(x, a, b):
    """Two dimensions exchanged, in the weight and in its delta."""
    if not _is_attached(x):
        return NotImplemented
    W, D, where = x.parts
    a, b = a % W.ndim, b % W.ndim
    return attached(W.transpose(a, b), D.transpose(a, b), {a: b, b: a}.get(where.dim, where.dim), *where[1:])


def _t(x, *_):
    return _transposed(x, 0, 1) if x.ndim == 2 else NotImplemented


def _mt(x, *_):
    return _transposed(x, -2, -1)


def _permuted(x, *dims):
    dims = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    return _t(x) if _is_attached(x) and [d % x.ndim for d in dims] == [1, 0] else NotImplemented


def _entry(x, index):
    """One expert of a batch of them, or the experts that an index tensor names."""
    if not _is_attached(x) or x.parts[2].dim == 0 or isinstance(index, bool):
        return NotImplemented
    W, D, where = x.parts
    if isinstance(index, int) or (isinstance(index, Tensor) and index.dtype == torch.int64 and index.ndim <= 1):
        entry = W[index]
        return attached(entry, D[index], where.dim - W.ndim + entry.ndim, *where[1:])
    return NotImplemented


def _cast(x, *args, **kwargs):
    """To another type; what goes to another device is an ordinary tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        cast = x.to(*args, **kwargs) if _is_attached(x) else None
    if cast is None or cast.device != x.device or not cast.is_floating_point():
        return NotImplemented
    W, D, where = x.parts
    return x if W.dtype == cast.dtype else attached(W.to(cast.dtype), D, *where)


def _cast_to(dtype: torch.dtype) -> Callable:
    return lambda x: _cast(x, dtype)


PARTIAL: dict[Any, Callable] = {
    F.linear: _linear,
    **dict.fromkeys(
        [torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__], _matmul
    ),
    Tensor.__rmatmul__: lambda b, a: _matmul(a, b),
    **dict.fromkeys([torch.addmm, Tensor.addmm], _addmm),
    torch._grouped_mm: _grouped(lambda x, W, offs: torch._grouped_mm(x, W, offs=offs)),
    F.embedding: _embedding,
    **dict.fromkeys([torch.t, Tensor.t, Tensor.T.__get__], _t),
    **dict.fromkeys([Tensor.mT.__get__], _mt),
    **dict.fromkeys([torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes], _transposed),
    **dict.fromkeys([torch.permute, Tensor.permute], _permuted),
    Tensor.__getitem__: _entry,
    Tensor.to: _cast,
    Tensor.float: _cast_to(torch.float32),
    Tensor.bfloat16: _cast_to(torch.bfloat16),
    Tensor.half: _cast_to(torch.float16),
    Tensor.double: _cast_to(torch.float64),
}
if hasattr(F, "grouped_mm"):
    PARTIAL[F.grouped_mm] = _grouped(lambda x, W, offs: F.grouped_mm(x, W, offs=offs))
