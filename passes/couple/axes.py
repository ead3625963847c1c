"""Axis expressions: the unknowns of axis inference, and how equations between them are solved.

An `Axis` starts as an atom. Reading a `view` refines it into a product, a `split` or a `cat` into a sum; `unify`
states that two axes are the same. What a permutation may move is an atom that nothing pinned:

    unify(product, product)   refine each other from the major factor on:  8 = 2 × 4
    unify(sum, sum)           refine each other at their offsets:           8 = 6 + 2
    unify(product, sum)       (a + b) × c = a × c + b × c; what cannot be aligned so is pinned
    unify(atom, anything)     the atom becomes it; pinned if it would contain itself

Every refinement happens in place, so that all tensors that mention the axis see it at once. An axis object is also a
*handle*: two handles may come to mean the same axis, yet each keeps the parts it was refined into itself, which
is how a fused weight still knows which of its rows feed the queries.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

ATOM, PRODUCT, SUM = "atom", "product", "sum"
MAX_TERMS = 256  # x[1:] + x[:-1] takes an axis apart one element at a time; the rest of such a sum is refused


@dataclass(frozen=True)
class Pin:
    """Why the order along an axis matters, and the graph node that says so (None for a source). closed: it is not the
    order alone; nothing of the axis may train."""

    reason: str
    node: object = None
    closed: bool = False


class Axis:
    """A dimension of tensors: an atom, or a product or a sum of other axes. Axes that are found equal become one."""

    __slots__ = ("size", "kind", "parts", "alias", "pin", "role", "uses", "twin")

    def __init__(self, size: int, kind: str = ATOM, parts: Sequence["Axis"] = (), pin: Pin | None = None):
        self.size = size
        self.kind = kind
        self.parts = list(parts)
        self.alias: Axis | None = None
        self.pin = pin
        self.role: str | None = None  # query, key or value: what an attention product used it as
        self.uses: set[str] = set()  # "in" (produced by this weight), "out" (contracted with it)
        self.twin: Axis | None = None  # a bias's axis points at its weight's


ONE = Axis(1)


def find(axis: Axis) -> Axis:
    """The axis that this handle means now."""
    root = axis
    while root.alias is not None:
        root = root.alias
    while axis.alias is not None:
        axis.alias, axis = root, axis.alias
    return root


def product(factors: Iterable[Axis]) -> Axis:
    """The axis that runs over all of the factors, the last one fastest."""
    factors = [f for f in factors if f.size != 1]
    if not factors:
        return ONE
    return factors[0] if len(factors) == 1 else Axis(prod(f.size for f in factors), PRODUCT, factors)


def concat(terms: Iterable[Axis]) -> Axis:
    terms = [t for t in terms if t.size != 0]
    return terms[0] if len(terms) == 1 else Axis(sum(t.size for t in terms), SUM, terms)


def atoms(axis: Axis) -> Iterator[Axis]:
    root = find(axis)
    if root.kind == ATOM:
        yield root
    else:
        for part in root.parts:
            yield from atoms(part)


def pin(axis: Axis, why: Pin) -> None:
    """Marks every atom of the axis as one whose order matters. The first reason stays, unless the new one closes it."""
    for atom in atoms(axis):
        if atom.size > 1 and (atom.pin is None or why.closed and not atom.pin.closed):
            atom.pin = why


def factors(axis: Axis) -> list[Axis]:
    """The factors from major to minor; an atom or a sum is its own only factor."""
    root = find(axis)
    return [f for part in root.parts if part.size != 1 for f in factors(part)] if root.kind == PRODUCT else [axis]


def terms(axis: Axis) -> list[Axis]:
    """The terms from first to last, with a product distributed over its major factor's terms."""
    root = find(axis)
    if root.kind == SUM:
        return [t for part in root.parts for t in terms(part)]
    if root.kind == PRODUCT:
        major, *minor = factors(root)
        if find(major).kind == SUM:
            return [product([t, *minor]) for t in terms(major)]
    return [axis]


def split_product(axis: Axis, major: int) -> tuple[Axis, Axis] | None:
    """Refines an axis into (major, size // major), or says None where that is not possible."""
    root = find(axis)
    if root.size % major:
        return None
    minor = root.size // major
    if minor == 1 or major == 1:  # nothing is divided
        return (axis, ONE) if minor == 1 else (ONE, axis)
    if root.kind == ATOM:
        root.kind, root.parts = PRODUCT, [Axis(major, pin=root.pin), Axis(minor, pin=root.pin)]
        return root.parts[0], root.parts[1]
    if root.kind == PRODUCT:
        sides = split_factors(factors(root), major)
        return sides and (product(sides[0]), product(sides[1]))
    halves = [_split_run(run, minor) for run in _runs(terms(root), minor)]
    if any(h is None for h in halves):
        return None
    for _, low in halves[1:]:
        unify(halves[0][1], low)
    return concat(high for high, _ in halves), halves[0][1]


def _runs(parts: Sequence[Axis], minor: int) -> Iterator[list[Axis]]:
    """The shortest runs of consecutive terms whose sizes are multiples of `minor`; what is left over comes last."""
    run: list[Axis] = []
    for part in parts:
        run.append(part)
        if sum(p.size for p in run) % minor == 0:
            yield run
            run = []
    if run:
        yield run


def _split_run(run: Sequence[Axis], minor: int) -> tuple[Axis, Axis] | None:
    size = sum(p.size for p in run)
    if len(run) == 1 and size % minor == 0:
        return split_product(run[0], size // minor)
    return (ONE, concat(run)) if size == minor else None


def split_factors(parts: Sequence[Axis], major: int) -> tuple[list[Axis], list[Axis]] | None:
    """Divides a list of factors where their product from the left is `major`, refining the one it falls into."""
    head, tail = [], list(parts)
    while major > 1:
        first = tail.pop(0)
        if major % first.size == 0:
            head.append(first)
            major //= first.size
            continue
        sides = split_product(first, major) if first.size % major == 0 else None
        if sides is None:
            return None
        head.append(sides[0])
        tail.insert(0, sides[1])
        major = 1
    return head, tail


def split_terms(parts: Sequence[Axis], offset: int) -> tuple[list[Axis], list[Axis]] | None:
    """Divides a list of terms at an offset, refining the term it falls into; None where that is not possible."""
    head, tail = [], [t for part in parts for t in terms(part)]
    while offset > 0:
        first = tail.pop(0)
        if first.size <= offset:
            head.append(first)
            offset -= first.size
            continue
        sides = _split_term(first, offset)
        if sides is None:
            return None
        head.append(sides[0])
        tail.insert(0, sides[1])
        offset = 0
    return head, tail


def _split_term(axis: Axis, offset: int) -> tuple[Axis, Axis] | None:
    root = find(axis)
    if root.kind == ATOM:
        root.kind, root.parts = SUM, [Axis(offset, pin=root.pin), Axis(root.size - offset, pin=root.pin)]
        return root.parts[0], root.parts[1]
    major, *minor = factors(root)
    inner = prod(f.size for f in minor)
    if offset % inner:
        return None
    sides = split_terms([major], offset // inner)
    return sides and (product([concat(sides[0]), *minor]), product([concat(sides[1]), *minor]))


def cut(axis: Axis, offsets: Sequence[int], why: Pin) -> list[Axis]:
    """The consecutive pieces of an axis between ascending offsets; pins it where it cannot be refined so."""
    pieces, rest, done = [], [axis], 0
    for offset in [*offsets, axis.size]:
        sides = split_terms(rest, offset - done)
        if sides is None:
            pin(axis, why)
            bounds = [0, *offsets, axis.size]
            return [Axis(b - a, pin=why) for a, b in zip(bounds, bounds[1:])]
        pieces.append(concat(sides[0]) if offset > done else Axis(0))
        rest, done = sides[1], offset
    return pieces


def unify(a: Axis, b: Axis, why: Pin = Pin("two axes that cannot be aligned")) -> None:
    """States that two axes are one. A size of 1 broadcasts and says nothing; other sizes that differ pin both."""
    if a.size == 1 or b.size == 1:
        return
    if a.size != b.size:
        pin(a, why)
        return pin(b, why)
    a, b = find(a), find(b)
    if a is b:
        return
    if a.kind == ATOM:  # of two atoms the second stays, with what it is divided into later
        return _bind(a, b, why)
    if b.kind == ATOM:
        return _bind(b, a, why)
    aligned = _unify_products(a, b, why) if a.kind == b.kind == PRODUCT else _unify_sums(a, b, why)
    if not aligned:
        pin(a, why)
        pin(b, why)


def _bind(atom: Axis, other: Axis, why: Pin) -> None:
    if other.kind != ATOM and any(inside is atom for inside in atoms(other)):
        return pin(other, why)
    if other.kind == ATOM and _is_source(other.pin) and not _is_source(atom.pin):
        atom, other = other, atom  # keep the side whose pin names an operator, or can still name the one they met in
    atom.alias = other
    if atom.pin is not None:
        pin(other, atom.pin if atom.pin.node is not None else replace(atom.pin, node=why.node))


def _is_source(why: Pin | None) -> bool:
    return why is not None and why.node is None


def _unify_products(a: Axis, b: Axis, why: Pin) -> bool:
    left, right = factors(a), factors(b)
    while left and right:
        # what was unified on the way may have refined what is left
        left, right = [f for x in left for f in factors(x)], [f for x in right for f in factors(x)]
        x, y = left[0], right[0]
        size = min(x.size, y.size)
        xs, ys = split_factors(left, size), split_factors(right, size)
        if xs is None or ys is None:
            return _unify_sums(a, b, why) if SUM in (find(x).kind, find(y).kind) else False
        unify(product(xs[0]), product(ys[0]), why)
        left, right = xs[1], ys[1]
    return True


def _unify_sums(a: Axis, b: Axis, why: Pin) -> bool:
    left, right = terms(a), terms(b)
    if len(left) == len(right) == 1:
        return False
    if all(atom.pin for axis in (a, b) for atom in atoms(axis)):
        return True
    for _ in range(MAX_TERMS):
        if not left:
            return True
        left, right = [t for x in left for t in terms(x)], [t for x in right for t in terms(x)]
        size = min(left[0].size, right[0].size)
        xs, ys = split_terms(left, size), split_terms(right, size)
        if xs is None or ys is None:
            return False
        unify(concat(xs[0]), concat(ys[0]), why)
        left, right = xs[1], ys[1]
    return False


def reshape(dims: Sequence[Axis], sizes: Sequence[int], why: Pin) -> list[Axis]:
    """The dimensions of a row-major reinterpretation (view, flatten, unsqueeze, ...) of a tensor."""
    if 0 in sizes:
        return [Axis(size) for size in sizes]
    result = [ONE] * len(sizes)
    left, right = [d for d in dims if d.size != 1], [i for i, size in enumerate(sizes) if size != 1]
    while left:
        # the smallest runs of dimensions on both sides that hold the same number of elements
        group, regrouped = [left.pop(0)], [right.pop(0)]
        while (a := prod(d.size for d in group)) != (b := prod(sizes[i] for i in regrouped)):
            if a < b:
                group.append(left.pop(0))
            else:
                regrouped.append(right.pop(0))
        for i, axis in zip(regrouped, _regroup(group, [sizes[i] for i in regrouped], why)):
            result[i] = axis
    return result


def _regroup(group: Sequence[Axis], sizes: Sequence[int], why: Pin) -> list[Axis]:
    regrouped, rest = [], [f for d in group for f in factors(d)]
    for size in sizes:
        sides = split_factors(rest, size)
        if sides is None:
            for axis in group:
                pin(axis, why)
            return [Axis(size, pin=why) for size in sizes]
        regrouped.append(product(sides[0]))
        rest = [f for x in sides[1] for f in factors(x)]
    return regrouped
