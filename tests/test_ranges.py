"""Ranges along a dimension: read and written the same whether they are spaced or not."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from s2ft_compile.config import HEADS
from s2ft_compile.passes.ranges import put, ranges, spaced, take
from s2ft_compile.testing import assert_trains


@st.composite
def masks(draw):
    """Any ranges, and those of channels of heads."""
    part = draw(st.lists(st.booleans(), min_size=1, max_size=6).filter(any))
    mask = torch.tensor(part * draw(st.integers(1, 4)))
    if draw(st.booleans()):
        mask[draw(st.integers(0, len(mask) - 1))] = True
    return mask


@given(masks(), st.integers(0, 2), st.booleans())
def test_ranges_are_what_a_mask_holds(mask, dim, negative):
    shape = [2, 3, 2]
    shape[dim] = len(mask)
    x = torch.arange(torch.Size(shape).numel()).view(shape)
    listed, positions = ranges(mask), mask.nonzero().squeeze(1)
    assert torch.equal(take(x, dim - 3 * negative, listed), x.index_select(dim, positions))
    values = -1 - x.index_select(dim, positions)
    expected = x.clone().index_copy_(dim, positions, values)
    put(x, dim - 3 * negative, listed, values)
    assert torch.equal(x, expected)


def test_spaced_ranges_are_the_same_part_of_equal_parts():
    assert spaced(ranges(torch.tensor([0, 1, 1, 0] * 3, dtype=torch.bool)), 12) == 4
    assert spaced(ranges(torch.tensor([0, 1, 1, 0] * 2 + [1, 1, 0, 0], dtype=torch.bool)), 12) is None
    assert spaced([(0, 2), (3, 2)], 7) is None and spaced([(0, 2)], 4) is None
    assert spaced([(2, 2), (4, 2)], 4) is None  # the second would reach beyond the end


class Apart(torch.nn.Module):
    """Attention that takes its weights' heads and channels apart, so that their gradients are joined by views."""

    def __init__(self, heads: int = 2, hidden: int = 6):
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.randn(hidden, hidden) for _ in "qkvo")
        self.heads = heads

    def forward(self, x):
        *inside, o = self.weights
        q, k, v = (torch.einsum("btx,hdx->bhtd", x, w.unflatten(0, (self.heads, -1))) for w in inside)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return x + torch.einsum("bhtd,xhd->btx", y, o.unflatten(1, (self.heads, -1)))


def test_channels_train_where_a_view_joins_them():
    torch.manual_seed(0)
    trained = assert_trains(Apart(), (torch.randn(2, 4, 6),))
    assert {f"{role}.channels" for role in HEADS[:4]} <= trained.keys()
