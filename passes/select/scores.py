"""What a unit is worth by its weights alone (paper section 3.2: R and W; LIFT's principal weights).

Scores are squares, so they add: over the entries of a unit, over the bands of one structure (gate, up and down), over
uses, tokens and batches. The score of a unit is the square of one norm over all that it trains.
Everything is float64, sums run in a fixed order and nothing is drawn but by Python's generator: the same on any machine
up to the rounding of float64.
"""

import random
from collections.abc import Iterator

import torch
from torch import Tensor

PART = 2**15  # elements that are looked at in float64 at a time: 256 KiB, whatever the size of the tensor
RANK = 128  # of `low_rank_squares`, at most (LIFT trains best with 128 for models of 1 to 8 billion parameters)


def random_scores(seed: int, key: object, units: int) -> list[float]:
    """R: any order, from seed and key alone; Python's generator gives the same one everywhere."""
    draw = random.Random(f"{seed}:{key}")
    return [draw.random() for _ in range(units)]


def parts(x: Tensor, dim: int) -> Iterator[tuple[slice, Tensor]]:
    """x in pieces of about `PART` elements along `dim`, each with where it lies."""
    step = max(1, PART * x.shape[dim] // max(x.numel(), 1))
    for start in range(0, x.shape[dim], step):
        yield slice(start, min(start + step, x.shape[dim])), x.narrow(dim, start, min(step, x.shape[dim] - start))


@torch.no_grad()
def squares(x: Tensor, *dims: int, minus: Tensor | None = None) -> Tensor:
    """Σ (x - minus)² over all dimensions but `dims`: float64, of the sizes of `dims` (ascending), on x's device."""
    keep = sorted(d % x.ndim for d in dims)
    others = [d for d in range(x.ndim) if d not in keep]
    along = max(others or [0], key=lambda d: x.shape[d])
    total = torch.zeros([x.shape[d] for d in keep], dtype=torch.float64, device=x.device)
    for where, part in parts(x, along):
        wide = part.to(torch.float64, copy=True)
        if minus is not None:
            wide -= minus.expand_as(x)[(slice(None),) * along + (where,)]
        wide.square_()
        if others:
            total += wide.sum(others)
        else:
            total[where] = wide
    return total


@torch.no_grad()
def low_rank_squares(weight: Tensor, dim: int, rank: int | None = None) -> Tensor:
    """Σ over all dimensions but `dim` of the squared entries of the weight's best approximation of a lower rank.

    The weight is taken as the matrix M of `dim` against everything else. rank: by default min(128, a quarter of M's
    smaller side), at least 1. Returns float64 (weight.shape[dim],) on the weight's device. LIFT, arXiv 2506.00772.
    With the eigenvectors U of M Mᵀ (or V of Mᵀ M, whichever is smaller), M_r = U_r U_rᵀ M = M V_r V_rᵀ.
    """
    M = weight.movedim(dim, 0).flatten(1) if weight.ndim > 1 else weight[:, None]
    side = 0 if M.shape[0] <= M.shape[1] else 1
    rank = rank or min(RANK, max(1, min(M.shape) // 4))
    gram = torch.zeros(M.shape[side], M.shape[side], dtype=torch.float64, device=M.device)
    for _, part in parts(M, 1 - side):
        wide = part.double()
        gram += wide @ wide.T if side == 0 else wide.T @ wide
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values[-rank:].clamp(min=0), vectors[:, -rank:]
    if side == 0:
        return vectors.square() @ values
    return torch.cat([(part.double() @ vectors).square().sum(1) for _, part in parts(M, 0)])
