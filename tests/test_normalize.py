"""Slices in disguise: the rewritten graph computes the same, bit for bit, and its parts have axes of their own."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small import QUICK
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import s2ft_compile as s2ft
from s2ft_compile.capture.capture import capture
from s2ft_compile.passes.couple.normalize import concretize, normalize
from s2ft_compile.testing.models import Drawn, models, rotate

B, L, HIDDEN, KV, GROUPS, WIDTH = 2, 5, 8, 2, 3, 4
HEADS = KV * GROUPS


def flat(t):
    return t.transpose(1, 2)


def per_kv(x, key):
    """(batch, length, kv, queries + key + value, width), read in three ways."""
    t = x.view(B, L, KV, GROUPS + 2, WIDTH)
    q, k, v = t[:, :, :, :-2], key(t, -2), key(t, -1)
    return q.flatten(2, 3), *(s.expand(q.shape).flatten(2, 3) for s in (k, v))


# how a fused projection is laid out: (its width, how queries, keys and values (batch, length, heads, width) are read)
LAYOUTS = {
    "thirds, unbind": (
        3 * HEADS,
        lambda x: [flat(t) for t in x.view(B, L, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)],
    ),
    "thirds, select": (3 * HEADS, lambda x: [x.view(B, L, 3, HEADS, WIDTH)[:, :, i] for i in range(3)]),
    "thirds, from the end": (
        3 * HEADS,
        lambda x: [x.reshape(B, L, 3, HEADS, WIDTH).transpose(1, 2)[:, i - 3] for i in range(3)],
    ),
    "per head, select": (3 * HEADS, lambda x: [x.view(B, L, HEADS, 3, WIDTH)[..., i, :] for i in range(3)]),
    "per head, chunk": (3 * HEADS, lambda x: [t.squeeze(3) for t in x.view(B, L, HEADS, 3, WIDTH).chunk(3, 3)]),
    "per head, below": (3 * HEADS, lambda x: x.view(B, L, HEADS, 3 * WIDTH).chunk(3, -1)),
    "per kv head, list": ((GROUPS + 2) * KV, lambda x: per_kv(x, lambda t, i: t[:, :, :, [i]])),
    "per kv head, slice": ((GROUPS + 2) * KV, lambda x: per_kv(x, lambda t, i: t[:, :, :, i, None])),
    "per kv head, tensor": (
        (GROUPS + 2) * KV,
        lambda x: per_kv(x, lambda t, i: t[:, :, :, torch.tensor([i % (GROUPS + 2)])]),
    ),
}


class Fused(nn.Module):
    def __init__(self, layout: str):
        super().__init__()
        self.units, self.parts = LAYOUTS[layout]
        self.qkv, self.out = nn.Linear(HIDDEN, self.units * WIDTH), nn.Linear(HEADS * WIDTH, HIDDEN)

    def forward(self, x):
        q, k, v = (t.transpose(1, 2) for t in self.parts(self.qkv(x)))
        return x + self.out(F.scaled_dot_product_attention(rotate(q), rotate(k), v).transpose(1, 2).flatten(2))


def inputs():
    return (torch.randn(B, L, HIDDEN, dtype=torch.float64),)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_queries_keys_and_values_have_axes_of_their_own(layout: str):
    """Rotary positions pin the channels of queries and keys; those of the values stay free, whatever the layout."""
    model = Fused(layout).double()
    analysis = s2ft.analyze(model, inputs(), verify=True)
    values = [c for c in analysis.couplings if {m.role for m in c.members} == {"attention.value", "attention.out"}]
    assert [c.units for c in values] == [WIDTH], str(analysis)
    expected = [KV, GROUPS, WIDTH] if "kv" in layout else [HEADS, WIDTH]
    assert Counter(c.units for c in analysis.couplings) == Counter(expected), str(analysis)


class Interleaved(nn.Module):
    """Gate and up as every other row of one projection."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 12), nn.Linear(6, HIDDEN)

    def forward(self, x):
        h = self.up(x)
        return x + self.down(h[..., ::2].sigmoid() * h[..., 1::2])


def test_gate_and_up_interleaved():
    analysis = s2ft.analyze(Interleaved().double(), inputs(), verify=True)
    (coupling,) = analysis.couplings
    assert (
        coupling.units == 6 and coupling.role == "ffn" and {m.role for m in coupling.members} == {"ffn.in", "ffn.out"}
    )


def assert_same_values(model, given):
    captured = capture(model, given)
    module, operands = captured.graph_module, []
    for node in module.graph.find_nodes(op="placeholder"):
        held = dict(model.named_parameters()) | dict(model.named_buffers())
        name = captured.parameters.get(node.name)
        operands.append(held[name] if name else captured.constants.get(node.name, None))
    operands = [given[0] if o is None else o for o in operands]
    before = module(*operands)
    normalize(module.graph, captured.constants)
    module.graph.lint()
    module.recompile()
    for a, b in zip(before, module(*operands), strict=True):
        assert a is None or torch.equal(a, b)
    return module


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "per head, below"])
def test_the_graph_computes_the_same(layout: str):
    module = assert_same_values(Fused(layout).double(), inputs())
    left = {n.target for n in module.graph.nodes}
    assert not left & {torch.ops.aten.unbind.int, torch.ops.aten.split.Tensor, torch.ops.aten.select.int}, (
        "nothing was rewritten"
    )


def test_strides_compute_the_same():
    assert_same_values(Interleaved().double(), inputs())


@given(models(max_blocks=1).filter(lambda d: not d.spec.tied and d.spec.positions == "none" and not d.spec.causal))
@settings(max_examples=max(3, settings.default.max_examples // 6), phases=QUICK)
def test_drawn_models_compute_the_same(drawn: Drawn):
    assert_same_values(drawn.model, drawn.inputs)


@given(st.lists(st.tuples(*[st.integers(-3, 3)] * 4), min_size=1, max_size=4))
@settings(max_examples=20)
def test_sizes_that_depend_on_data_become_numbers_of_which_only_equal_ones_are_equal(terms):
    """Differences of two of them, too."""
    env = ShapeEnv()
    with FakeTensorMode(shape_env=env):
        a, b = env.create_unbacked_symint(), env.create_unbacked_symint()
        sizes = [i * a + j * b + k * a * b + l for i, j, k, l in terms]
        graph = fx.Graph()
        for size in (a, b, *sizes, *sizes):
            graph.placeholder("x").meta["val"] = size
    concretize(graph)
    first, second, *numbers = (node.meta["val"] for node in graph.nodes)
    assert all(isinstance(n, int) and n >= 0 for n in (first, second, *numbers))
    assert numbers[: len(terms)] == numbers[len(terms) :]
    for (i, j, k, l), n in zip(terms, numbers):
        value = i * first + j * second + k * first * second + l
        assert n == value or value < 0
