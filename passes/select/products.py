"""`Uses`: sees every product that a weight takes part in, and adds up what its units read or make.

A dispatch mode below autograd sees core operators, whatever modules or functions they come from. A weight is known by
the memory it lies in, so views of it (transposed, split, one expert of a batch) need no bookkeeping: strides and
offset say which entries they are. A copy is the same entries in another place. A product is named by the labels of its
operands, as in einsum.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from s2ft_compile.errors import ConfigError

from .scores import parts, squares

aten = torch.ops.aten


class Use(NamedTuple):
    """One product of weight and input. `W` labels weight's dimensions, `XW` those of the squared input norms `read()`
    returns (float64, all in `W`), `Y` those of the output `made` from which `bias` is taken off again."""

    weight: Tensor
    W: str
    read: Callable[[], Tensor]
    XW: str
    output: Tensor
    Y: str
    bias: Tensor | None = None


class Held(NamedTuple):
    """What lies in one piece of memory: the weight or a copy of it. `locate(offsets, dim)` gives the positions along
    `dim` of the weight that elements of the memory hold; `start` and `end` are the elements it takes up."""

    name: str
    locate: Callable[[Tensor, int], Tensor]
    start: int
    end: int


class Uses(TorchDispatchMode):
    """Adds to sums[name, dim], float64 (size of dim,), for every use of weights[name] what `score` makes of it (one of
    `SCORES`). Raises `ConfigError` where a weight goes into an operator that is no product.
    """

    def __init__(self, weights: Mapping[str, Tensor], sums: Mapping[tuple[str, int], Tensor], score: Callable):
        super().__init__()
        self.score = score
        self.sums: dict[str, list[tuple[int, Tensor]]] = {}
        for (name, dim), total in sums.items():
            self.sums.setdefault(name, []).append((dim, total))
        self.stored: dict[int, list[Held]] = {}
        self.copies: list[StorageWeakRef] = []  # keep the address of a copy from being given to another tensor
        for name, weight in weights.items():
            self._hold(weight, Held(name, _locate_in(weight), *_span(weight)))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        held = [hit for t in given if (hit := self._held(t))]
        if held and func in PRODUCTS:
            for use in PRODUCTS[func](output, *args, **(kwargs or {})):
                if hit := self._held(use.weight):
                    self._add(hit, use)
        elif held and func in COPIES and not self._held(output):
            self.copies.append(StorageWeakRef(output.untyped_storage()))
            self._hold(output, Held(held[0].name, _locate_copied(args[0], output, held[0].locate), *_span(output)))
        elif held and any(t.is_floating_point() and not self._held(t) for t in _tensors(output)):
            raise ConfigError(
                f"activations of {held[0].name} cannot be told: it goes into {func}, which is no product "
                f"with an input; use selection 'weight', 'lowrank' or 'gradient', or another target"
            )
        return output

    def add_linear(self, name: str, weight: Tensor, X: Tensor, output: Tensor, bias: Tensor | None) -> None:
        """Counts a product with values of a weight that is held in another form."""
        _, use = linear_uses(output, X, weight, bias)
        self._add(Held(name, _locate_in(weight), *_span(weight)), use)

    def _hold(self, t: Tensor, held: Held) -> None:
        self.stored.setdefault(t.untyped_storage()._cdata, []).append(held)

    def _held(self, t: Tensor) -> Held | None:
        """What t is or is a view of."""
        pieces = self.stored.get(t.untyped_storage()._cdata, ()) if t.layout == torch.strided else ()
        return next((held for held in pieces if held.start <= t.storage_offset() < held.end), None)

    def _add(self, held: Held, use: Use) -> None:
        for dim, total in self.sums[held.name] if use.weight.numel() and use.output.numel() else ():
            unit, positions = _along(use, held, dim)
            values = self.score(use, unit)
            total.index_add_(0, positions.reshape(-1), values.reshape(-1))


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]


def _span(t: Tensor) -> tuple[int, int]:
    start = t.storage_offset()
    return start, start + 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))


def _locate_in(weight: Tensor) -> Callable[[Tensor, int], Tensor]:
    shape, stride, start = weight.shape, weight.stride(), weight.storage_offset()
    return lambda offsets, dim: (offsets - start) // stride[dim] % shape[dim]


def _locate_copied(source: Tensor, copy: Tensor, locate: Callable) -> Callable[[Tensor, int], Tensor]:
    """Element for element, whatever the two orders in memory."""
    dims = [(n, c, s) for n, c, s in zip(copy.shape, copy.stride(), source.stride()) if n > 1]
    start, origin = copy.storage_offset(), source.storage_offset()

    def located(offsets: Tensor, dim: int) -> Tensor:
        moved = torch.full_like(offsets, origin)
        for n, c, s in dims:
            moved += (offsets - start) // c % n * s
        return locate(moved, dim)

    return located


def _along(use: Use, held: Held, dim: int) -> tuple[str, Tensor]:
    """The labels of the view's dimensions that run along `dim` of the weight, and where: int64, of their sizes."""
    view = use.weight
    first = torch.tensor(view.storage_offset(), device=view.device)
    steps = [s * torch.arange(n, device=view.device) for n, s in zip(view.shape, view.stride())]
    runs = [d for d, step in enumerate(steps) if len(held.locate(first + step, dim).unique()) > 1]
    offsets = first
    for d in runs:
        offsets = offsets[..., None] + steps[d]
    return "".join(use.W[d] for d in runs), held.locate(offsets, dim)


def activation(use: Use, unit: str) -> Tensor:
    """Σ over everything but the unit's labels of what it reads, or else of what it makes: float64, of their sizes."""
    if set(unit) <= set(use.XW):
        return torch.einsum(f"{use.XW}->{unit}", use.read())
    output = squares(use.output, *(use.Y.index(u) for u in unit), minus=use.bias)
    return torch.einsum(f"{''.join(sorted(unit, key=use.Y.index))}->{unit}", output)


def weighted_activation(use: Use, unit: str) -> Tensor:
    """Σ over everything but the unit's labels of W² times the squared norm of the input it meets."""
    read, W = use.read(), use.weight
    others = [d for d in range(W.ndim) if use.W[d] not in unit]
    if not others:
        return torch.einsum(f"{use.W},{use.XW}->{unit}", W.double().square(), read)
    along = max(others, key=lambda d: W.shape[d])
    total = 0
    for where, part in parts(W, along):
        met = read[tuple(where if label == use.W[along] else slice(None) for label in use.XW)]
        total = total + torch.einsum(f"{use.W},{use.XW}->{unit}", part.to(torch.float64, copy=True).square_(), met)
    return total


# --- products: the uses that each operator may be, with either operand as the weight -------------------------------


def product(A: Tensor, a: str, B: Tensor, b: str, output: Tensor, y: str, bias: Tensor | None = None) -> Iterator[Use]:
    """Both readings of einsum(f"{a},{b}->{y}", A, B) + bias."""
    for W, w, X, x in ((A, a, B, b), (B, b, A, a)):
        shared = "".join(label for label in x if label in w)
        yield Use(W, w, lambda X=X, x=x, s=shared: squares(X, *map(x.index, s)), shared, output, y, bias)


def mm_uses(output, A, B):
    return product(A, "ik", B, "kn", output, "in")


def addmm_uses(output, bias, A, B, *, beta=1, alpha=1):
    return product(A, "ik", B, "kn", output, "in", beta * bias)


def bmm_uses(output, A, B):
    return product(A, "bik", B, "bkn", output, "bin")


def baddbmm_uses(output, bias, A, B, *, beta=1, alpha=1):
    return product(A, "bik", B, "bkn", output, "bin", beta * bias)


def mv_uses(output, A, b):
    return product(A, "ik", b, "k", output, "i")


def linear_uses(output, X, W, bias=None):
    return product(X.flatten(0, -2), "ik", W, "nk", output.flatten(0, -2), "in", bias)


def embedding_uses(output, W, ids, *args, **kwargs):
    """A product with one-hot rows: entry v is met as often as it is looked up."""
    counts = torch.bincount(ids.reshape(-1), minlength=W.shape[0]).double()
    yield Use(W, "vn", lambda: counts, "v", output.flatten(0, -2), "in")


def grouped_mm_uses(output, X, W, offs=None, *args, **kwargs):
    """Rows of X by group (offs: where each group ends), each group with its own matrix of W."""
    ends = [] if offs is None or W.ndim != 3 or X.ndim != 2 else offs.tolist()
    for matrix, start, end in zip(W, [0, *ends], ends):
        yield from product(X[start:end], "ik", matrix, "kn", output[start:end], "in")


def convolution_uses(output, X, W, bias, stride, padding, dilation, transposed, output_padding, groups):
    """Every entry of a kernel meets the inputs at its tap: the weight's gradient where X is squared and dY is 1."""
    if transposed:
        return

    def read():
        ones = X.new_ones((1, groups, *output.shape[2:]), dtype=torch.float64)
        like = ones.new_empty((groups, *W.shape[1:]))
        one = [
            aten.convolution_backward(
                ones,
                x[None].double().square(),
                like,
                None,
                stride,
                padding,
                dilation,
                False,
                output_padding,
                groups,
                [False, True, False],
            )[1]
            for x in X
        ]
        return torch.stack(one).sum(0)

    taps = "uvw"[: W.ndim - 2]
    shift = None if bias is None else bias.view(groups, -1, *[1] * len(taps))
    yield Use(
        W.unflatten(0, (groups, -1)),
        "goc" + taps,
        read,
        "gc" + taps,
        output.unflatten(1, (groups, -1)),
        "igo" + taps.upper(),
        shift,
    )


COPIES = (aten.clone.default, aten._to_copy.default)
PRODUCTS: Mapping[Any, Callable[..., Iterator[Use]]] = {
    aten.mm.default: mm_uses,
    aten.addmm.default: addmm_uses,
    aten.bmm.default: bmm_uses,
    aten.baddbmm.default: baddbmm_uses,
    aten.mv.default: mv_uses,
    aten.linear.default: linear_uses,
    aten.embedding.default: embedding_uses,
    aten._grouped_mm.default: grouped_mm_uses,
    aten.convolution.default: convolution_uses,
}
