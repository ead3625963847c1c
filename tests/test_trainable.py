"""`prepare` knows which gradients have no slice rule before it changes anything."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small import full_gradients
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import s2ft_compile as s2ft
from s2ft_compile.cli.inspect import describe
from s2ft_compile.errors import ConfigError
from s2ft_compile.passes.backward import eager, trainable
from s2ft_compile.passes.backward.slice_rules import SLICE_RULES
from s2ft_compile.passes.backward.trainable import Taken, refused_gradients, sliced_gradients, trained_bands
from s2ft_compile.passes.editor import Mismatch
from s2ft_compile.passes.select.select import offered
from s2ft_compile.testing import assert_gradients, assert_sliced, assert_trains


class Accumulated(nn.Module):
    """A hidden layer whose weight is accumulated along its rows, for whose gradient there is no rule; and another."""

    def __init__(self):
        super().__init__()
        self.u, self.d = nn.Parameter(torch.randn(16, 8)), nn.Linear(16, 8)
        self.l, self.m = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = x + self.d(F.linear(x, self.u.logcumsumexp(1).tanh()).relu())
        return x + self.m(self.l(x).relu())


X = torch.randn(2, 4, 8)


def test_a_weight_without_a_slice_rule_is_left_out_of_a_role(caplog):
    plan = s2ft.prepare(Accumulated(), (X,), s2ft.S2FTConfig({"ffn.in": 2}))
    assert [s.parameter_name for s in plan.slices] == ["l.weight"]
    assert any("u is left out of ffn.in" in record.getMessage() for record in caplog.records)


def test_a_weight_without_a_slice_rule_is_refused_by_name_and_nothing_changes():
    model = Accumulated()
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ConfigError, match="u cannot train along dim 0"):
        s2ft.prepare(model, (X,), s2ft.S2FTConfig({"u": 2}))
    assert all(p.requires_grad and torch.equal(p, before[n]) for n, p in model.named_parameters())


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.u, self.d = nn.Parameter(torch.randn(3, 8, 16)), nn.Parameter(torch.randn(3, 16, 8))

    def forward(self, x):
        return x + sum((x @ self.u[e]).relu() @ self.d[e] for e in range(3))


def convolutional():
    return nn.Sequential(
        nn.Conv1d(4, 12, 1), nn.Conv1d(12, 12, 3, padding=1, groups=12), nn.ReLU(), nn.Conv1d(12, 4, 3)
    )


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("make, x, target", [(Experts, X, "d"), (convolutional, torch.randn(2, 4, 8), "3.weight")])
def test_what_is_offered_trains(make, x, target, inner):
    torch.manual_seed(0)
    model = make()
    full = full_gradients(model, lambda base: base(x).sin().sum())
    plan = s2ft.prepare(model, (x,), s2ft.S2FTConfig({target: 5}))
    torch.compile(model, backend="s2ft", options={"inner": inner})(x).sin().sum().backward()
    for s in plan.slices:
        expected = full[s.parameter_name].index_select(s.dim, s.indices)
        torch.testing.assert_close(s.delta.grad, expected, rtol=1e-4, atol=1e-4)


def test_a_gradient_at_full_size_says_once_which_functions_it_is_for(monkeypatch):
    monkeypatch.setattr(eager, "_warned", set())
    W, D = torch.randn(6, 5), torch.zeros(2, 5, requires_grad=True)
    read = eager.attached(W, D, 0, ((1, 2),), "W")
    loss = F.linear(X[..., :5], read).sum() + read.t().cumsum(0).sum() + read.norm()
    with pytest.warns(UserWarning, match="gradient of W .* for torch.Tensor.cumsum and torch.Tensor.norm: ") as said:
        loss.backward()
    assert len(said) == 1 and D.grad.shape == (2, 5)


def test_every_role_that_is_offered_trains(monkeypatch):
    assert assert_trains(Experts(), (X,), inner=None) == {"ffn.out": 1, "ffn.in": 1}
    monkeypatch.setattr("s2ft_compile.preparation.trainable", lambda model, config, selections, _: selections)
    with pytest.raises(AssertionError, match="(?s)ffn.in is offered and does not train.*logcumsumexp"):
        assert_trains(Accumulated(), (X,))


def test_slices_by_their_rules_are_those_of_all_gradients(monkeypatch):
    assert assert_sliced(Experts(), (X,)) == {"ffn.out": (1, 0), "ffn.in": (1, 0)}
    assert assert_sliced(Accumulated(), (X,)) == {"ffn.out": (2, 0), "ffn.in": (1, 1)}
    monkeypatch.setitem(
        SLICE_RULES, torch.ops.aten.mm.default, lambda slicer, node, x, dim: slicer.take(x.args[dim], dim, node)
    )
    with pytest.raises((AssertionError, RuntimeError)):
        assert_sliced(Accumulated(), (X,))


def test_what_is_offered_and_has_no_slice_rule_after_all_is_found(monkeypatch):
    monkeypatch.setattr("s2ft_compile.testing.gradients.trained_bands", lambda model, inputs, analysis: ({}, {}))
    with pytest.raises(AssertionError, match="ffn.in is offered, and .*'u'.* does not train"):
        assert_sliced(Accumulated(), (X,))


class Timed(nn.Module):
    """Adds what it makes of integers; recomputed in the backward."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = x + (torch.arange(x.shape[1])[:, None] / 3 * 1e3).sin()
        return x + checkpoint(lambda x: self.down(self.up(x).relu()), x, use_reentrant=False)


def test_slices_are_compared_in_float64_throughout():
    assert assert_sliced(Timed(), (X,)) == {"ffn.out": (1, 0), "ffn.in": (1, 0)}


class Whitened(nn.Module):
    """Divides by a product of its keys, by an operator of linear algebra that checks values."""

    def __init__(self, how):
        super().__init__()
        self.how, self.up, self.down, self.key = how, nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x):
        k = self.key(x)
        return x + self.down(self.up(x).relu()) + k @ self.how(k.mT @ k + torch.eye(4)).mT @ k.mT @ x


@pytest.mark.parametrize("how", [torch.linalg.inv, torch.linalg.cholesky, lambda a: torch.linalg.solve(a, a.tanh())])
def test_slices_pass_an_operator_that_checks_values(how):
    counts = assert_sliced(Whitened(how), (X,))
    assert counts["ffn.in"] == counts["ffn.out"] == (1, 0)


class Weighed(nn.Module):
    """Norms, and weighs with a single number, whose weight the norm's gradient is a multiple of."""

    def __init__(self):
        super().__init__()
        self.norm, self.gate, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 1), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        h = self.norm(x)
        return x + self.gate(h).sigmoid() * self.down(self.up(h).relu())


def test_a_weight_that_a_gradient_is_a_multiple_of_is_no_gradient(caplog):
    assert assert_sliced(Weighed(), (X,)) == {"ffn.out": (1, 0), "ffn.in": (1, 0), "norm": (2, 0)}
    assert "full size" not in caplog.text


def test_slices_pass_a_pooling():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3))
    assert assert_sliced(model, (torch.randn(2, 3, 10, 10),)) == {"conv.out": (1, 0), "conv.in": (1, 0)}


class Sloped(nn.Module):
    """Attention whose heads have a slope each, so that their order is fixed (ALiBi)."""

    def __init__(self, heads=4):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        slopes = torch.arange(1, self.heads + 1, dtype=x.dtype).view(-1, 1, 1)
        scores = q @ k.transpose(-2, -1) + slopes * torch.arange(x.shape[1]).to(x)
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_heads_in_a_fixed_order_train_where_they_lie():
    torch.manual_seed(0)
    model = Sloped()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    plan = s2ft.prepare(model, (X,), s2ft.S2FTConfig({"attention.out": 2, "attention.query": 1}))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items() if name in before)
    indices = {s.parameter_name: s.indices.view(-1, 2) for s in plan.slices}
    assert {name: len(heads) for name, heads in indices.items()} == {"qkv.weight": 1, "out.weight": 2}
    assert all((heads[:, 0] % 2 == 0).all() and (heads[:, 1] == heads[:, 0] + 1).all() for heads in indices.values())
    assert_gradients(model, plan, (X,))
    s2ft.release(model)
    refused = Sloped()
    refused.kept = refused.qkv.weight[:3].detach()  # shares its memory: nothing of it may train
    with pytest.raises(ConfigError, match="shares memory"):
        s2ft.prepare(refused, (X,), s2ft.S2FTConfig({"attention.query": 1}))


def test_heads_train_where_their_channels_do_not_and_inspect_says_so(monkeypatch):
    model, parts = Sloped(), lambda asked: [t for t in asked if len(t.starts) > 1]  # a channel of each of the heads
    no = Mismatch("it has no slice rule")
    monkeypatch.setattr(trainable, "refused_gradients", lambda m, x, asked, _: dict.fromkeys(parts(asked), no))
    facts = describe(model, (X,), s2ft.analyze(model, (X,)))
    whole = {role for role, target in facts["targets"].items() if target["weights"] and role.startswith("attention.")}
    assert whole == {"attention.out", "attention.value", "attention.query", "attention.key"}
    said = {m["parameter_name"]: row["reason"] for row in facts["untrained"] for m in row["members"]}
    assert said["out.weight"] == "as attention.out.channels its gradient would be it has no slice rule"
    assert said.keys() == {"out.weight", "qkv.weight"}
    monkeypatch.setattr(trainable, "refused_gradients", lambda m, x, asked, _: dict.fromkeys(asked, no))
    reasons = [row["reason"] for row in describe(model, (X,), s2ft.analyze(model, (X,)))["untrained"]]
    assert set(reasons) == {"its gradient would be it has no slice rule"}


class Hidden(nn.Module):
    """Like another, unless its second weight is accumulated along its columns, for whose gradient there is no rule."""

    def __init__(self, accumulated: bool):
        super().__init__()
        self.accumulated, self.l, self.m = accumulated, nn.Linear(8, 16), nn.Linear(16, 8, bias=False)

    def forward(self, x):
        weight = self.m.weight.logcumsumexp(0) if self.accumulated else self.m.weight
        return x + F.linear(self.l(x).relu(), weight)


class Layers(nn.Module):
    def __init__(self, accumulated):
        super().__init__()
        self.layers = nn.ModuleList(map(Hidden, accumulated))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@given(st.lists(st.booleans(), min_size=1, max_size=6))
@settings(max_examples=5)
def test_of_equal_layers_two_are_looked_at_and_the_same_is_refused(accumulated):
    model = Layers(accumulated)
    analysis = s2ft.analyze(model, (X,))
    places = [Taken(b.parameter_name, b.dim) for bands in offered(analysis).values() for b in bands]
    with pytest.MonkeyPatch.context() as patch:
        asked = []
        patch.setattr(trainable, "sliced_gradients", lambda *given: asked.extend(given[2]) or sliced_gradients(*given))
        refused = refused_gradients(model, (X,), places, analysis.copies)
    layers = {int(taken.parameter_name.split(".")[1]) for taken in refused}
    assert layers == {i for i, is_so in enumerate(accumulated) if is_so}
    assert refused.keys() == refused_gradients(model, (X,), places).keys()
    looked_at = {s.parameter_name.split(".")[1] for s in asked}
    assert len(looked_at) == sum(min(accumulated.count(kind), 2) for kind in (True, False))


def weight_normed(dim):
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), weight_norm(nn.Linear(16, 8), dim=dim))


@pytest.mark.parametrize("make", [lambda: Layers([True, False]), lambda: weight_normed(0), lambda: weight_normed(1)])
def test_what_trains_is_what_prepare_takes(make):
    model = make()
    analysis = s2ft.analyze(model, (X,))
    trained, _ = trained_bands(model, (X,), analysis)
    for role in offered(analysis):
        config = s2ft.S2FTConfig({role: 2})
        if role in trained:
            taken = {s.parameter_name for s in s2ft.prepare(make(), (X,), config).slices}
            assert taken == {b.parameter_name for b in trained[role]}
        else:
            with pytest.raises(ConfigError, match="cannot train"):
                s2ft.prepare(make(), (X,), config)
    sliced = assert_sliced(model, (X,), analysis=analysis)
    assert {role: n for role, (n, _) in sliced.items() if n} == {
        role: len({b.parameter_name for b in bands}) for role, bands in trained.items()
    }


NORMED = {  # along a dimension, each of which needs sums along that for its gradient; and one that does not
    "norm": lambda v, dim: v / v.norm(dim=dim, keepdim=True),
    "normalize": lambda v, dim: F.normalize(v, dim=dim),
    "root mean square": lambda v, dim: v * (v.square().mean(dim, keepdim=True) + 1e-5).rsqrt(),
    "centred": lambda v, dim: v - v.mean(dim, keepdim=True),
    "softmax": lambda v, dim: v.softmax(dim),
    "tanh": lambda v, dim: v.tanh(),
}


class Normed(nn.Module):
    def __init__(self, how: str, dim: int):
        super().__init__()
        self.how, self.dim = how, dim
        self.u, self.v, self.g = nn.Linear(8, 16), nn.Parameter(torch.randn(9, 16)), nn.Parameter(torch.randn(9, 1))
        self.o = nn.Linear(9, 8)

    def forward(self, x):
        weight = NORMED[self.how](self.v, self.dim) * self.g
        return x + self.o(F.linear(self.u(x).relu(), weight).relu())


@given(st.sampled_from(list(NORMED)), st.integers(0, 1))
@settings(max_examples=12)
def test_a_weight_normalized_along_its_slice_needs_its_whole_gradient_and_is_refused(how, dim):
    model, (rows, columns) = Normed(how, dim), (9, 16)
    joint = sliced_gradients(model, (X,), [Taken("v", d, (1,), (3,)) for d in (0, 1)])
    assert {taken.dim for taken in joint.refused} == ({dim} if how != "tanh" else set())
    alone = sliced_gradients(model, (X,), [Taken("v", 1 - dim, (1,), (3,))])
    products = alone.graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    assert rows * columns not in [n.meta["val"].numel() for n in products]
    assert all("summed along the slice's dimension" in why.reason for why in joint.refused.values())


class Convolved(nn.Module):
    """Three convolutions, the one in the middle normalized along a dimension of its weight: the longer one, or not."""

    def __init__(self, dim: int, channels: tuple[int, int]):
        super().__init__()
        self.dim, (n, m) = dim, channels
        self.u, self.v, self.o = nn.Conv1d(4, n, 3), nn.Parameter(torch.randn(m, n, 3)), nn.Conv1d(m, 4, 3)

    def forward(self, x):
        return self.o(F.conv1d(self.u(x).relu(), NORMED["norm"](self.v, self.dim)).relu())


@pytest.mark.parametrize("channels", [(8, 12), (12, 8)])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_weight_in_the_middle_of_a_chain_trains_along_the_dimension_that_can(dim, channels):
    x, model = torch.randn(2, 4, 9), Convolved(dim, channels)
    plan = s2ft.prepare(model, (x,), s2ft.S2FTConfig({"conv.in": 3, "conv.out": 3}))
    places = {(s.parameter_name, s.dim) for s in plan.slices}
    assert places == {("u.weight", 0), ("v", 1 - dim), ("o.weight", 1)}
    assert {(s.parameter_name, s.dim) for s in s2ft.reselect(model).slices} == places
    s2ft.release(model)
    again = s2ft.prepare(model, (x,), s2ft.Plan.from_json(plan.to_json()))
    assert_gradients(model, again, (x,))
    assert {(s.parameter_name, s.dim) for s in s2ft.reselect(model).slices} == places
