"""A batched product in which every row picks its matrix, without copies of them: the deltas of a batch on a CPU.

What a batch costs besides the base model is the traffic of its adapters' deltas. `delta[ids]` reads them, writes them,
and reads them again; both products here read them once, from blocks of columns that lie in one piece each:

    delta: (M, blocks, k, width), the matrix of id i is (k, blocks * width), and that of id 0 is zeros

With 16 adapters, one token each, of 311 columns of a 2048 x 8192 weight, in bfloat16 on two cores: with `delta[ids]`
7.9 ms, as batched products of whole matrices 1.4 ms, as `sums_by_id` of blocks 0.65 ms.
"""

from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

WIDTH = 256  # of a block at most; 64 to 512 are read at the speed of memory, 2048 at two thirds of it
NARROW = 32


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
    made = embedding_bag(terms, delta.flatten(0, 2), mode="sum", per_sample_weights=weights)
    return made.view(x.shape[0], 1, -1)


@torch.library.custom_op("s2ft::products_by_id", mutates_args=())
def products_by_id(x: Tensor, delta: Tensor, ids: Tensor) -> Tensor:
    """More tokens a row (prefill): x[i] @ delta[ids[i]]. x: (N, tokens, k), ids: (N,). (N, tokens, m). No backward.

    An operator that dynamo does not look into, since what it does depends on the values of the ids.
    """
    made = x.new_zeros(*x.shape[:2], delta.shape[1], delta.shape[3])
    for row, k in enumerate(ids.tolist()):
        if k:
            made[row].transpose(0, 1).copy_(x[row] @ delta[k])
    return made.flatten(2)


@products_by_id.register_fake
def _(x, delta, ids):
    return x.new_empty(*x.shape[:2], delta.shape[1] * delta.shape[3])
