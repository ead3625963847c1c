"""How the units of a parameter's dimension lie along it: the frozen result of axis inference.

A layout is a tree. A `Leaf` is one axis (all leaves with the same `axis` are permuted together), a `Product` is
the row-major flattening of its factors (heads × head_dim) and a `Sum` their concatenation (query | key | value).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Leaf:
    """One axis. size: its units. role: what its positions are for, such as "ffn.in"."""

    axis: int
    size: int
    role: str | None = None


@dataclass(frozen=True)
class Product:
    """Heads × channels: the row-major flattening of its factors."""

    factors: tuple["Layout", ...]

    @property
    def size(self) -> int:
        return prod(f.size for f in self.factors)


@dataclass(frozen=True)
class Sum:
    """Query | key | value: its terms, one after another."""

    terms: tuple["Layout", ...]

    @property
    def size(self) -> int:
        return sum(t.size for t in self.terms)


Layout = Leaf | Product | Sum


def leaves(layout: Layout) -> Iterator[Leaf]:
    """The leaves from left to right."""
    if isinstance(layout, Leaf):
        yield layout
    else:
        for part in layout.factors if isinstance(layout, Product) else layout.terms:
            yield from leaves(part)


def gather_index(layout: Layout, orders: Mapping[int, Tensor]) -> Tensor:
    """Where each position takes its value from when the axes in `orders` are reordered.

    orders: axis -> int64 (units,), new unit i is old unit orders[axis][i]. Returns int64 (layout.size,).
    Inverse: the same call with every order inverted.
    """
    if isinstance(layout, Leaf):
        order = orders.get(layout.axis)
        return torch.arange(layout.size) if order is None else order
    if isinstance(layout, Product):
        index = torch.zeros(1, dtype=torch.int64)
        for factor in layout.factors:
            index = (index[:, None] * factor.size + gather_index(factor, orders)[None, :]).reshape(-1)
        return index
    parts, offset = [], 0
    for term in layout.terms:
        parts.append(gather_index(term, orders) + offset)
        offset += term.size
    return torch.cat(parts)


def coordinates(layout: Layout, axis: int) -> Tensor:
    """The unit of `axis` that each position belongs to: int64 (layout.size,), -1 where the axis does not occur."""
    if isinstance(layout, Leaf):
        return torch.arange(layout.size) if layout.axis == axis else torch.full((layout.size,), -1)
    if isinstance(layout, Product):
        result = torch.full((1,), -1)
        for factor in layout.factors:
            inner = coordinates(factor, axis)
            result = torch.where(result[:, None] >= 0, result[:, None], inner[None, :]).reshape(-1)
        return result
    return torch.cat([coordinates(term, axis) for term in layout.terms])


def end_roles(layout: Layout) -> list[str | None]:
    """The roles of a layout's positions, each once. A position has the role of the minor-most leaf it lies in."""
    if isinstance(layout, Leaf):
        return [layout.role]
    if isinstance(layout, Product):
        return end_roles(layout.factors[-1])
    return list(dict.fromkeys(role for term in layout.terms for role in end_roles(term)))


def role_mask(layout: Layout, role: str) -> Tensor:
    """Which positions have a role: bool (layout.size,)."""
    if isinstance(layout, Leaf):
        return torch.full((layout.size,), layout.role == role)
    if isinstance(layout, Product):
        minor = role_mask(layout.factors[-1], role)
        return minor.repeat(layout.size // len(minor))
    return torch.cat([role_mask(term, role) for term in layout.terms])


def leaf_roles(layout: Layout) -> Iterator[tuple[Leaf, str | None]]:
    """Every leaf with each role that positions along it have."""
    if isinstance(layout, Leaf):
        yield layout, layout.role
    elif isinstance(layout, Product):
        roles = end_roles(layout)
        for factor in layout.factors[:-1]:
            yield from ((leaf, role) for leaf in leaves(factor) for role in roles)
        yield from leaf_roles(layout.factors[-1])
    else:
        for term in layout.terms:
            yield from leaf_roles(term)
