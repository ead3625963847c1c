"""Batch norms' running statistics are permuted with their channels, and go on being updated in that order."""

import copy

import pytest
import torch
from small import compiled
from torch import nn

import s2ft_compile as s2ft
from s2ft_compile.testing import assert_equivalent


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(4, 12, 3, padding=1), nn.Conv1d(12, 4, 3, padding=1)
        self.first, self.last = nn.BatchNorm1d(12), nn.BatchNorm1d(4)
        self.register_buffer("scale", torch.rand(12) + 0.5)  # a constant that varies: its channels keep their order
        self.c, self.d = nn.Linear(4, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = x + self.last(self.b(self.first(self.a(x)).relu()))
        return x + self.d(self.c(x.mT).relu() * self.scale).mT


def x(batch=3):
    return torch.randn(batch, 4, 5, dtype=torch.float64)


def test_channels_of_a_batch_norm_may_be_permuted():
    torch.manual_seed(0)
    analysis = assert_equivalent(Normed().double(), (x(),))
    (conv,) = [c for c in analysis.couplings if c.role == "conv"]
    assert {"first.running_mean", "first.running_var", "first.weight"} <= {m.parameter_name for m in conv.members}
    assert analysis.statistics == {f"{n}.running_{k}" for n in ("first", "last") for k in ("mean", "var")}
    assert any("it meets scale, which varies" in r.reason for r in analysis.refusals)


@pytest.mark.parametrize("inner", ["aot_eager", None])
def test_statistics_follow_their_channels(inner):
    torch.manual_seed(0)
    model = Normed().double()
    for module in (model.first, model.last):
        nn.init.uniform_(module.running_mean), nn.init.uniform_(module.running_var, 0.5, 2)
    base = copy.deepcopy(model)
    plan = s2ft.prepare(model, (x(),), s2ft.S2FTConfig({"conv.out": 3}))
    assert [s.parameter_name for s in plan.slices] == ["b.weight"]
    assert not torch.equal(model.first.running_var, base.first.running_var)
    net = compiled(model, inner) if inner else model
    for training in (False, True, True, False):
        model.train(training), base.train(training)
        batch = x()
        torch.testing.assert_close(net(batch), base(batch), rtol=1e-10, atol=1e-10)
    with s2ft.disabled(model):
        torch.testing.assert_close(model(batch), base(batch), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model.first.running_var, base.first.running_var, rtol=1e-10, atol=1e-10)
    s2ft.release(model)
    for (name, buffer), expected in zip(model.named_buffers(), base.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, rtol=1e-10, atol=1e-10, msg=name)


def test_statistics_are_no_targets():
    with pytest.raises(s2ft.ConfigError, match="neither a role"):
        s2ft.prepare(Normed(), (torch.randn(2, 4, 5),), s2ft.S2FTConfig({"first.running_*": 1}))


def test_statistics_that_something_else_holds_keep_their_order():
    model = Normed()
    model.seen = model.first.running_mean
    assert "first.running_mean" not in s2ft.analyze(model, (torch.randn(2, 4, 5),)).statistics
