"""What a batch adds to a linear layer's result, where every row has an adapter of its own:

    columns (what the layer contracts)      y += x[indices] @ delta        x: (..., in), indices: (n,), delta: (n, out)
    rows (what it produces)                 y[indices] += x @ delta        y: (..., out), delta: (in, n)

What that costs besides the base model is the traffic of the deltas. On a GPU one kernel reads them once. On a CPU
`delta[ids]` would read them, write them, and read them again; both products here read them once, from blocks of columns
that lie in one piece each:

    delta: (M, blocks, k, width), the matrix of id i is (k, blocks * width), and that of id 0 is zeros

With 16 adapters, one token each, of 311 columns of a 2048 x 8192 weight, in bfloat16 on two cores: with `delta[ids]`
7.9 ms, as batched products of whole matrices 1.4 ms, as `sums_by_id` of blocks 0.65 ms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from s2ft_compile.kernels.adapters import adapter_add_
from s2ft_compile.kernels.support import capability

WIDTH = 256  # of a block at most; 64 to 512 are read at the speed of memory, 2048 at two thirds of it
NARROW = 32


@dataclass(frozen=True, eq=False)
class Stack:
    """The slices of one layer and one side, of all adapters; row 0 is no adapter, shorter ones are padded with zeros.

    contracts: whether they are columns. index: int64 (adapters + 1, n). delta, of the weight's type: (adapters + 1, n,
    out) for columns and (adapters + 1, in, n) for rows where the kernel runs, and the same in blocks elsewhere.
    ranks: how many of the n count. rank: the same, int32, where the kernel runs.
    """

    contracts: bool
    index: Tensor
    delta: Tensor
    ranks: tuple[int, ...]
    rank: Tensor | None

    @classmethod
    def of(cls, contracts: bool, index: Tensor, delta: Tensor, ranks: Sequence[int]) -> "Stack":
        """In the form that its device reads best. delta: not in blocks, with zeros from an adapter's rank on."""
        if capability(delta.device):
            rank = torch.tensor(ranks, dtype=torch.int32, device=delta.device)
            return cls(contracts, index, delta, tuple(ranks), rank)
        return cls(contracts, index, in_blocks(delta), tuple(ranks), None)

    def packed(self, each: Tensor, tokens: Mapping[int, Tensor] | None, terms: dict[tuple, Tensor]) -> "Packed":
        """each: the id of every token. tokens: what `places` says of them."""
        if tokens is None or self.rank is not None:
            return Packed(self.picked(each, terms))
        return Packed(Picked(self, each), tokens)

    def picked(self, ids: Tensor, terms: dict[tuple, Tensor]) -> "Picked":
        """ids: (N,). terms: what other stacks of the same sizes have worked out for these ids, and this one adds to."""
        ids = ids.to(self.index.device)  # a model may lie on several
        if self.rank is not None or ids.device.type != "cpu":
            return Picked(self, ids)
        counts = self.ranks if self.contracts else (self.delta.shape[2],) * len(self.ranks)
        key = counts, self.delta.shape, ids.device
        if key not in terms:
            terms[key] = terms_of(ids, torch.tensor(counts, device=ids.device), self.delta)
        return Picked(self, ids, self.index.index_select(0, ids), terms[key])


@dataclass(frozen=True, eq=False)
class Picked:
    """What the rows of one batch take from a stack: ids (N,); on a CPU index (N, n) and the terms of `sums_by_id`."""

    stack: Stack
    ids: Tensor
    index: Tensor | None = None
    terms: Tensor | None = None

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """y (N * times, ..., out) with the delta of each row added, which counts for `times` rows, one after the other.

        x: (N * times, ..., in).
        """
        stack, tokens = self.stack, x.reshape(self.ids.shape[0], -1, x.shape[-1])
        if stack.rank is not None and not y.requires_grad:
            there = y.reshape(*tokens.shape[:2], -1)
            adapter_add_(there, tokens, self.ids, stack.index, stack.delta, stack.rank, stack.contracts)
            return there.view(y.shape)
        index = stack.index.index_select(0, self.ids) if self.index is None else self.index
        index = index[:, None, :].expand(-1, tokens.shape[1], -1)
        if stack.contracts:
            return y + self._product(tokens.gather(2, index)).to(y.dtype).view(y.shape)
        total = self._product(tokens).to(y.dtype)
        return y.reshape(*tokens.shape[:2], -1).scatter_add(2, index, total).view(y.shape)

    def _product(self, x: Tensor) -> Tensor:
        """x (N, tokens, k) times the deltas of its rows."""
        delta = self.stack.delta
        if self.stack.rank is not None:
            return x @ delta[self.ids].to(x.dtype)
        if torch.is_grad_enabled() or self.terms is None:
            return (x[:, None] @ delta[self.ids].to(x.dtype)).transpose(1, 2).flatten(2)
        if x.shape[1] == 1:
            return sums_by_id(x, delta, self.terms)
        return products_by_id(x, delta.to(x.dtype), self.ids)


def places(each: Tensor, requests: int) -> dict[int, Tensor] | None:
    """Adapter -> the places of its tokens, whose ids are `each`; None where each request has one token, or on a GPU."""
    if each.device.type != "cpu" or len(each) == requests:
        return None
    return {int(k): (each == k).nonzero().flatten() for k in each.unique() if k}


@dataclass(frozen=True, eq=False)
class Packed:
    """What the tokens of a packed batch take from a stack: requests of several lengths, one after the other in one row.

    each: a row for every token, which a GPU's kernel and a step of one token a request take. tokens: otherwise, adapter
    -> the places of its tokens, so that each adapter's delta is read once.
    """

    each: Picked
    tokens: Mapping[int, Tensor] | None = None

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """y (..., out) with the delta of each token added. x: (..., in), as many tokens as the batch has."""
        flat, total = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        if self.tokens is None:
            return self.each.add(flat, total).view(y.shape)
        stack, total = self.each.stack, total.clone()
        for k, places in self.tokens.items():
            if not (n := stack.ranks[k]):
                continue
            at, D = stack.index[k, :n], stack.delta[k]  # D in blocks: (blocks, k, width)
            mine = flat.index_select(0, places)
            if stack.contracts:
                product = (mine.index_select(1, at) @ D[:, :n].to(x.dtype)).transpose(0, 1).flatten(1)
                total.index_add_(0, places, product.to(y.dtype))
            else:
                product = (mine @ D.to(x.dtype)).transpose(0, 1).flatten(1)[:, :n]
                total.index_put_((places[:, None], at), product.to(y.dtype), accumulate=True)
        return total.view(y.shape)


# --- products on a CPU ------------------------------------------------------------------------------------------------


def in_blocks(delta: Tensor) -> Tensor:
    """(M, k, m) -> (M, blocks, k, width), contiguous; one block where m and `WIDTH` have no divisor to speak of."""
    width = gcd(delta.shape[2], WIDTH)
    return delta.unflatten(2, (-1, width if width >= NARROW else delta.shape[2])).transpose(1, 2).contiguous()


def terms_of(ids: Tensor, counts: Tensor, delta: Tensor) -> Tensor:
    """int32 (N * blocks, k): the places in delta.flatten(0, 2) of what each row sums, in each of its blocks.

    ids: (N,). counts: (M,), how many of the k rows of each delta count; the others cost nothing, since place 0 stands
    for them, which is of zeros and stays in the cache.
    """
    _, blocks, k, _ = delta.shape
    along = torch.arange(k, device=ids.device)
    places = (ids[:, None, None] * blocks + torch.arange(blocks, device=ids.device)[:, None]) * k + along
    return places.where(along < counts[ids][:, None, None], 0).flatten(0, 1).int()


def sums_by_id(x: Tensor, delta: Tensor, terms: Tensor) -> Tensor:
    """One token a row (decode): weighted sums of rows of the deltas, which is what an `embedding_bag` with weights is.

    x: (N, 1, k), terms: those of its ids. Returns (N, 1, m).
    """
    weights = x.to(delta.dtype).expand(-1, delta.shape[1], -1).flatten(0, 1)
    total = embedding_bag(terms, delta.flatten(0, 2), mode="sum", per_sample_weights=weights)
    return total.view(x.shape[0], 1, -1)


@torch.library.custom_op("s2ft::products_by_id", mutates_args=())
def products_by_id(x: Tensor, delta: Tensor, ids: Tensor) -> Tensor:
    """More tokens a row (prefill): x[i] @ delta[ids[i]]. x: (N, tokens, k), ids: (N,). (N, tokens, m). No backward.

    An operator that dynamo does not look into, since what it does depends on the values of the ids.
    """
    total = x.new_zeros(*x.shape[:2], delta.shape[1], delta.shape[3])
    for row, k in enumerate(ids.tolist()):
        if k:
            total[row].transpose(0, 1).copy_(x[row] @ delta[k])
    return total.flatten(2)


@products_by_id.register_fake
def _(x, delta, ids):
    return x.new_empty(*x.shape[:2], delta.shape[1] * delta.shape[3])
