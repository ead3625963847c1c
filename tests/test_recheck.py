"""`recheck`: a compiled graph is proved in its own shapes and mode, whole or in pieces, or refused with its line."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from small import QUICK, hf, tokens
from test_traces import Auxiliary, Conditional, Feed, Mask, Memory, Untransposed, x
from torch import nn

import s2ft_compile as s2ft
from s2ft_compile.capture.capture import capture
from s2ft_compile.passes.couple.couple import couple
from s2ft_compile.passes.couple.recheck import Permuted, recheck
from s2ft_compile.passes.couple.recheck import _quickly as quickly
from s2ft_compile.testing.models import Drawn, models

FEW = settings(max_examples=max(2, settings.default.max_examples // 8), phases=QUICK)


def one_trace(model, inputs) -> s2ft.Analysis:
    """What eval mode at the example's sizes alone shows."""
    return couple(capture(model, inputs))


def checked(model: nn.Module, permuted: Permuted, call, left=frozenset(), compile=torch.compile):
    """Runs `call` of the compiled model, and rechecks every graph of it; returns the axes that left each, in order."""
    names = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
    crossed, so_far = [], set(left or ())

    def backend(gm, inputs):
        places = [n for n in gm.graph.nodes if n.op == "placeholder"]
        weights = {n: (names[id(t)], permuted) for n, t in zip(places, inputs) if id(t) in names}
        before = str(gm.graph)
        quick = quickly(gm, weights, None if left is None else so_far)
        with patch("s2ft_compile.passes.couple.recheck._quickly", return_value=None):
            crossed.append(recheck(gm, weights, None if left is None else so_far))
        assert quick in (None, crossed[-1]), "what is proved of the quicker graph, the other one says too"
        QUICK_ONES.append(quick is not None)
        assert str(gm.graph) == before
        so_far.update(crossed[-1])
        return gm

    call(compile(model, backend=backend))
    return crossed


def of(analysis) -> Permuted:
    return Permuted.of(analysis, analysis.free)


QUICK_ONES: list[bool] = []


def test_ordinary_graphs_are_proved_quickly():
    QUICK_ONES.clear()
    for name in ("llama", "bert"):
        test_hugging_face(name)
    assert QUICK_ONES and all(QUICK_ONES)


@given(models(dropout=True))
@FEW
def test_what_analysis_proves_passes(drawn: Drawn):
    torch._dynamo.reset()
    permuted = of(s2ft.analyze(drawn.model, drawn.inputs))
    assert checked(drawn.model.train(), permuted, lambda m: m(*drawn.inputs)) == [set()] or not permuted.axes


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_hugging_face(name):
    model = hf(name)
    permuted = of(s2ft.analyze(model, {"input_ids": tokens()}))
    crossed = checked(model.train(), permuted, lambda m: m(tokens(), labels=tokens()).loss.backward())
    assert crossed and (name == "gpt2" or not any(crossed))  # gpt2's graph breaks, and its residual stream crosses


def test_a_cache_leaves_and_enters_by_head():
    model = hf("llama")
    permuted = of(s2ft.analyze(model, {"input_ids": tokens()}))

    def generate(m):
        held = m(tokens(), use_cache=True).past_key_values
        m(tokens(length=1), past_key_values=held, use_cache=True)

    crossed = checked(model, permuted, generate)
    assert len(crossed) == 2 and len(crossed[0]) == 4, "kv heads, and what a head's values hold, of two layers"
    torch._dynamo.reset()
    held = model(tokens(), use_cache=True).past_key_values
    with pytest.raises(Exception, match="an argument in the base order"):
        checked(model, permuted, lambda m: m(tokens(length=1), past_key_values=held))


class MultiQuery(nn.Module):
    """Four heads of queries, a key and a value in one projection, taken apart by lists of positions; rotated."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 24, bias=False), nn.Linear(16, 16, bias=False)

    def forward(self, x):
        qkv = self.qkv(x).view(*x.shape[:2], 6, 4)
        q, k, v = (t.transpose(1, 2) for t in (qkv[..., :-2, :], qkv[..., [-2], :], qkv[..., [-1], :]))
        q, k = (torch.cat([-t[..., 2:], t[..., :2]], -1) + 0.5 * t for t in (q, k))
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v.expand(-1, 4, -1, -1)
        return self.out(mixed.transpose(1, 2).reshape(x.shape))


def test_queries_keys_and_values_that_lists_of_positions_take_apart():
    model, inputs = MultiQuery(), (torch.randn(2, 5, 16),)
    analysis = s2ft.analyze(model, inputs)
    assert "attention.out" in {m.role for c in analysis.couplings for m in c.members}
    assert checked(model, of(analysis), lambda m: m(*inputs)) == [set()]


class Padded(Feed):
    """Hidden units behind a row of zeros that the forward makes."""

    def forward(self, x):
        hidden = F.relu(self.up(x))
        return self.down(torch.cat([torch.tensor([[0.0] * 10]).expand(len(x), -1)[:, None], hidden], 1)[:, :-1])


def test_constants_that_do_not_vary_have_no_order():
    model, inputs = Padded(), (x(),)
    permuted = of(s2ft.analyze(model, inputs))
    assert permuted.axes and checked(model, permuted, lambda m: m(*inputs)) == [set()]


class Mapped(Feed):
    """Compiled it goes through the positions by torch.vmap, which torch.export does not trace."""

    def forward(self, x):
        hidden = self.up(x)
        if torch.compiler.is_exporting() or not torch.compiler.is_compiling():
            return self.down(hidden * hidden.sigmoid())
        return self.down(torch.vmap(lambda a, b: a * b.sigmoid(), in_dims=1, out_dims=1)(hidden, hidden))


def test_what_vmap_computes_is_traced():
    model, inputs = Mapped(), (x(),)
    permuted = of(s2ft.analyze(model, inputs))
    assert permuted.axes and checked(model, permuted, lambda m: m(*inputs)) == [set()]


class InPlace(Feed):
    def forward(self, x, order=False):
        h = self.up(x)
        h.relu_()
        h.mul_(2).clamp_(max=3.0)
        if order:
            h[..., :4] = h[..., 4:8]
        h.masked_fill_(h > 2, 0.0)
        return x + self.down(h) @ torch.eye(6).T


def test_operators_in_place():
    model = InPlace()
    permuted = of(one_trace(model, (x(),)))
    assert permuted.axes and checked(model, permuted, lambda m: m(x())) == [set()]
    with pytest.raises(Exception, match="divided.*test_recheck.py"):
        checked(model, permuted, lambda m: m(x(), order=True))


REFUSED = {
    "train mode": (
        Auxiliary,
        (x(),),
        lambda m: m.train()(x()),
        "up.weight.*cumsum depends on the order.*test_traces.py",
    ),
    "an optional weight": (
        Conditional,
        (x(),),
        lambda m: m(x(), x(n=3)),
        "cond.weight, which no example given to prepare",
    ),
    "a number per head": (Mask, (x(n=8),), lambda m: m(x(n=8), torch.randn(4)), "an argument in the base order"),
    "length equal to heads": (Untransposed, (x(2, 4, 8),), lambda m: m(x(2, 6, 8)), "training order"),
    "a memory cut at the length": (Memory, (x(),), lambda m: m(x(2, 3)), "divided"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_graph_is_refused(case):
    make, example, call, message = REFUSED[case]
    model = make()
    permuted = of(one_trace(model.eval(), example))
    checked(model, permuted, lambda m: m(*example))
    torch._dynamo.reset()
    with pytest.raises(Exception, match=message) as caught:
        checked(model, permuted, call)
    assert "CompileError" in repr(caught.value) or "CompileError" in str(caught.value)
    assert "test_traces.py:" in str(caught.value) and "Give prepare an example" in str(caught.value)


def test_what_no_axis_depends_on_passes():
    """A weight that the analysis never saw, beside the permuted structure, changes nothing."""

    class Beside(Feed):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(6, 6)

        def forward(self, x, more=False):
            return super().forward(x) + (self.extra(x) if more else 0)

    model = Beside()
    assert checked(model, of(one_trace(model, (x(),))), lambda m: m(x(), more=True)) == [set()]


class Broken(Feed):
    def forward(self, x):
        h = self.hidden(x)
        torch._dynamo.graph_break()
        return x + self.down(h)


def test_pieces():
    """Hidden units that leave one piece may enter another; those that left none may not."""
    model = Broken()
    permuted = of(one_trace(Feed(), (x(),)))
    crossed = checked(model, permuted, lambda m: m(x()))
    assert [len(c) for c in crossed] == [1, 0]
    torch._dynamo.reset()

    def down(m):
        return m(torch.randn(2, 10))

    part = model.down
    names = Permuted({(n.removeprefix("down."), d): v for (n, d), v in permuted.layouts.items()}, permuted.axes)
    with pytest.raises(Exception, match="an argument in the base order"):
        checked(part, names, down)
    torch._dynamo.reset()
    assert checked(part, names, down, left=None) == [set()]


def test_layers_by_themselves():
    model = hf("llama").train()
    analysis = s2ft.analyze(model, {"input_ids": tokens()})
    axes = {c.axis for c in analysis.couplings if c.role in ("attention", "ffn")}
    permuted = Permuted.of(analysis, axes)
    names = {id(p): n for n, p in model.named_parameters()}
    seen = []

    def backend(gm, inputs):
        places = [n for n in gm.graph.nodes if n.op == "placeholder"]
        weights = {n: (names[id(t)], permuted) for n, t in zip(places, inputs) if id(t) in names}
        seen.append(recheck(gm, weights))
        return gm

    for layer in model.model.layers:
        layer.compile(backend=backend)
    model(tokens(), use_cache=False)
    assert seen and not any(seen)


def test_dynamic_sizes():
    model = Feed()
    inputs = x(3, 7)
    torch._dynamo.mark_dynamic(inputs, 1)
    assert checked(model, of(s2ft.analyze(model, (x(),))), lambda m: m(inputs)) == [set()]


def test_attached_deltas_and_aten_graphs():
    from torch.fx.experimental.proxy_tensor import make_fx

    from s2ft_compile.passes.backward.attach import attach

    model = Feed()
    permuted = of(s2ft.analyze(model, (x(),)))
    weights = dict(model.named_parameters())

    def run(x, delta, *held):
        up, bias, down, last = held
        return F.linear(F.gelu(F.linear(x, up, bias)), attach(down, delta, 1, [0], [2]), last)

    def crossed(x, delta, *held):
        up, bias, down, last = held
        return F.linear(F.gelu(F.linear(x, up, bias)).flip(-1), attach(down, delta, 1, [0], [2]), last)

    for call, fine in ((run, True), (crossed, False)):
        gm = make_fx(call, tracing_mode="fake")(x(), torch.zeros(6, 2), *weights.values())
        places = [n for n in gm.graph.nodes if n.op == "placeholder"][2:]
        given = {n: (name, permuted) for n, name in zip(places, weights)}
        if fine:
            assert recheck(gm, given) == set()
        else:
            with pytest.raises(s2ft.errors.CompileError, match="flip"):
                recheck(gm, given)
