"""Axis expressions on their own: whatever equations are stated, permuting what stays free satisfies all of them.

A drawn program states equations between axes (unify, reshape, cut, concat, product, pin). Every free atom then gets a
random order, and each equation is checked as arithmetic on positions, which knows nothing of trees.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ft_compile.layout import Leaf, Product, Sum, coordinates, gather_index, leaves
from s2ft_compile.passes.couple.axes import (
    ONE,
    PRODUCT,
    Axis,
    Pin,
    atoms,
    concat,
    cut,
    factors,
    find,
    pin,
    product,
    reshape,
    split_product,
    terms,
    unify,
)
from s2ft_compile.testing import Solution, frozen

WHY = Pin("test")
SIZES = (1, 2, 3, 4, 6, 8, 12)


@st.composite
def factorings(draw, size: int):
    """Sizes whose product is `size`, ones among them."""
    factors = []
    while size > 1:
        factor = draw(st.sampled_from([f for f in range(2, size + 1) if size % f == 0]))
        factors.append(factor)
        size //= factor
    for _ in range(draw(st.integers(0, 1))):
        factors.insert(draw(st.integers(0, len(factors))), 1)
    return factors


@st.composite
def programs(draw):
    """A few axes, the equations stated about them, and how to check each."""
    axes = [Axis(draw(st.sampled_from(SIZES))) for _ in range(draw(st.integers(2, 4)))]
    checks = []
    pick = lambda: draw(st.sampled_from(axes))  # noqa: E731
    for _ in range(draw(st.integers(1, 8))):
        step = draw(st.sampled_from(["new", "unify", "reshape", "cut", "concat", "product", "pin"]))
        if step == "new":
            axes.append(Axis(draw(st.sampled_from(SIZES))))
        elif step == "unify":
            a = pick()
            b = draw(st.sampled_from([x for x in axes if x.size == a.size]))
            unify(a, b, WHY)
            checks.append(lambda s, a=a, b=b: torch.equal(s.index(a), s.index(b)))
        elif step == "reshape":
            dims = [pick() for _ in range(draw(st.integers(1, 2)))]
            if (total := torch.Size(d.size for d in dims).numel()) > 144:
                continue
            result = reshape(dims, draw(factorings(total)), WHY)
            axes += result
            checks.append(lambda s, dims=dims, result=result: torch.equal(s.flat(dims), s.flat(result)))
        elif step == "cut":
            a = pick()
            offsets = sorted(draw(st.sets(st.integers(1, a.size), max_size=2)) - {a.size})
            pieces = cut(a, offsets, WHY)
            axes += pieces
            bounds = [0, *offsets, a.size]
            checks.append(
                lambda s, a=a, pieces=pieces, bounds=bounds: all(
                    torch.equal(s.index(a)[lo:hi] - lo, s.index(p)) for p, lo, hi in zip(pieces, bounds, bounds[1:])
                )
            )
        elif step in ("concat", "product"):
            parts = [pick() for _ in range(draw(st.integers(1, 3)))]
            result = concat(parts) if step == "concat" else product(parts)
            if result.size <= 96:
                axes.append(result)
        else:
            pinned = pick()
            pin(pinned, WHY)
            checks.append(lambda s, a=pinned: torch.equal(s.index(a), torch.arange(a.size)))
    return axes, checks


@given(programs(), st.integers(0, 99))
@settings(max_examples=20 * settings.default.max_examples)
def test_every_equation_holds(program, seed):
    axes, checks = program
    solution = Solution(axes, seed)
    for axis in axes:
        assert frozen(axis, solution.ids).size == axis.size
        assert torch.equal(solution.index(axis).sort().values, torch.arange(axis.size))
    for number, check in enumerate(checks):
        assert check(solution), f"equation {number}"


@given(st.lists(st.sampled_from([2, 3, 4]), min_size=1, max_size=3), st.integers(0, 99))
def test_gather_index_moves_coordinates(sizes, seed):
    """Position i takes its value from index[i]: there the unit of each axis is the one the order names."""
    layout = Sum((Product(tuple(Leaf(i, n) for i, n in enumerate(sizes))), Leaf(0, sizes[0])))
    random = torch.Generator().manual_seed(seed)
    orders = {i: torch.randperm(n, generator=random) for i, n in enumerate(sizes)}
    index = gather_index(layout, orders)
    for axis, order in orders.items():
        here = coordinates(layout, axis)
        assert torch.equal(coordinates(layout, axis)[index][here >= 0], order[here[here >= 0]])
    inverse = gather_index(layout, {axis: order.argsort() for axis, order in orders.items()})
    assert torch.equal(index[inverse], torch.arange(layout.size))


def sizes_of(axis: Axis) -> list[int]:
    return [leaf.size for leaf in leaves(frozen(axis, {}))]


def test_an_atom_is_refined_into_a_product():
    channels, heads, width = Axis(12), Axis(3), Axis(4)
    unify(channels, product([heads, width]))
    assert find(channels).kind == PRODUCT and factors(channels) == [heads, width]


def test_a_sum_of_single_units_is_not_divided_into_them():
    a = concat([Axis(1), Axis(2)])
    high, low = split_product(a, 3)
    assert (high.size, low.size) == (3, 1) and find(a.parts[1]).kind == "atom"


def test_products_refine_each_other_from_the_major_factor_on():
    a, b = product([Axis(8), Axis(3)]), product([Axis(2), Axis(12)])
    unify(a, b)
    assert sizes_of(a) == sizes_of(b) == [2, 4, 3]


def test_sums_refine_each_other_at_their_offsets():
    a, b = concat([Axis(6), Axis(2)]), concat([Axis(3), Axis(5)])
    unify(a, b)
    assert sizes_of(a) == sizes_of(b) == [3, 3, 2]


def test_a_sum_distributes_over_a_product():
    a, b = product([concat([Axis(2), Axis(3)]), Axis(4)]), concat([Axis(8), Axis(12)])
    unify(a, b)
    assert all(atom.pin is None for atom in atoms(a))
    assert [t.size for t in terms(a)] == [8, 12]


def test_what_cannot_be_aligned_is_pinned():
    a, b = product([Axis(2), Axis(3)]), product([Axis(3), Axis(2)])
    unify(a, b, WHY)
    assert all(atom.pin is WHY for atom in [*atoms(a), *atoms(b)])


def test_an_axis_within_itself_is_pinned():
    """x = x[:2] | x[2:] with one of them x again: sizes forbid it, except beside an empty or unit part."""
    a = Axis(6)
    parts = cut(a, [2], WHY)
    unify(parts[1], product([Axis(2), Axis(2)]))
    unify(concat([parts[1], parts[0]]), a, WHY)
    assert all(atom.pin is not None or atom.size <= 2 for atom in atoms(a))


@pytest.mark.parametrize("a, b", [(2, 3), (6, 4)])
def test_sizes_that_differ_pin_both(a, b):
    x, y = Axis(a), Axis(b)
    unify(x, y, WHY)
    assert x.pin is WHY and y.pin is WHY


def test_a_size_of_one_says_nothing():
    x = Axis(5)
    unify(x, ONE)
    unify(Axis(1), x)
    assert find(x) is x and x.pin is None and ONE.alias is None and ONE.kind == "atom"


def test_a_factor_of_one_does_not_stop_alignment():
    """Joined blocks are viewed as 2 × 4, so each becomes 1 × 4; aligning that with 2 × 2 has to end."""
    a, b = Axis(4), Axis(4)
    reshape([concat([a, b])], [2, 4], WHY)
    unify(a, product([Axis(2), Axis(2)]))
    assert sizes_of(b) == sizes_of(a) and [s for s in sizes_of(a) if s > 1] == [2, 2]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("size", [200, 5000])
def test_a_shift_leaves_nothing_to_permute(size):
    """x[1:] + x[:-1] relates every element to the next: refused, in time, at any length."""
    x = Axis(size)
    left, right = cut(x, [1], WHY)[1], cut(x, [size - 1], WHY)[0]
    unify(left, right, WHY)
    assert all(atom.pin is not None or atom.size == 1 for atom in atoms(x))


def test_the_first_reason_stays():
    x, first = Axis(3), Pin("first")
    pin(x, first)
    pin(x, WHY)
    assert x.pin is first
