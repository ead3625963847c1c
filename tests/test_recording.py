"""Recording: the same couplings, refusals and depths as `torch.export` gives; what is not recorded is exported."""

import contextlib
import dataclasses
import random
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import s2ft_compile as s2ft
from s2ft_compile.capture import capture, examples, recording, repeats
from s2ft_compile.capture.recording import NotRecorded, record
from s2ft_compile.passes import tracing
from s2ft_compile.testing.models import DECOYS, Drawn, models


def exported(monkeypatch, model, inputs):
    """The analysis by `torch.export` alone."""

    def nothing(*_):
        raise NotRecorded("not this time")

    with monkeypatch.context() as patch:
        patch.setattr(capture, "record", nothing)
        return s2ft.analyze(model, inputs)


def assert_equal(a, b):
    for kind in ("couplings", "refusals"):
        left, right = (Counter(_plain(item) for item in getattr(x, kind)) for x in (a, b))
        assert left == right, f"{kind}: recorded {left - right}, exported {right - left}"
    assert (a.depths, a.unread, a.statistics, a.tied) == (b.depths, b.unread, b.statistics, b.tied)


def _plain(item):
    what = item.role if isinstance(item, s2ft.Coupling) else (item.reason.split(" meets ")[0], item.operator)
    return what, item.units, tuple(sorted(item.members))


@given(st.one_of(models(max_blocks=2), st.sampled_from(DECOYS).flatmap(lambda d: models(max_blocks=2, decoys=(d,)))))
@settings(max_examples=max(3, settings.default.max_examples // 12), suppress_health_check=list(HealthCheck))
def test_drawn_models(drawn: Drawn):
    record(drawn.model.eval(), *examples.arguments(drawn.inputs), {})
    with pytest.MonkeyPatch.context() as patch:
        assert_equal(s2ft.analyze(drawn.model, drawn.inputs), exported(patch, drawn.model, drawn.inputs))


class Layer(nn.Module):
    """One residual FFN; its switches make it unlike the others of a stack."""

    def __init__(self, width=8, act=torch.relu, cut=False, skip=None, down=None):
        super().__init__()
        self.up, self.down = nn.Linear(6, width), down or nn.Linear(width, 6)
        self.act, self.cut, self.skip = act, cut, skip

    def forward(self, x, before):
        h = self.act(self.up(x))
        if self.cut:
            h = torch.cat([h[..., :3].cumsum(-1), h[..., 3:]], -1)
        if self.skip is not None:
            h = h + before[self.skip].up(x)
        return x + self.down(h)


class Stack(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, self.layers)
        return x


def shared_weight():
    first = Layer()
    return Stack(first, Layer(), Layer(down=first.down))


class Written(nn.Module):
    """Buffers, views and attributes that a forward writes to."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 6)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.table, self.seen = torch.arange(8.0), {}

    def forward(self, x):
        h = self.norm(self.up(x)).relu_()
        self.mean = 0.9 * self.mean + 0.1 * h.mean(0)
        self.calls += 1
        self.seen["last"] = self.last = h
        out = torch.zeros_like(h)
        out[:, 4:] = h[:, 4:] + self.mean[4:]
        out[:, :4].copy_(h[:, :4]).mul_(self.table[:4])
        return self.down(out)


class Mapped(nn.Module):
    """`torch.vmap`, autocast, no_grad and an index that the code spells out."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 6)), nn.Parameter(torch.randn(3, 6, 8))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x):
        with torch.no_grad():
            scale = self.bias.exp()
        with torch.autocast("cpu", torch.bfloat16):
            result = torch.vmap(lambda up, down: (torch.tanh(x @ up.T) * scale) @ down.T)(self.up, self.down)
        return result[[2, 0]].float().sum(0)


STACKS = {
    "equal": lambda: Stack(*(Layer() for _ in range(4))),
    "one of another width": lambda: Stack(Layer(), Layer(12), Layer()),
    "one of other code": lambda: Stack(Layer(), Layer(), Layer(act=lambda h: h * torch.arange(1.0, 9.0))),
    "one with a flag": lambda: Stack(Layer(), Layer(cut=True), Layer()),
    "one that skips": lambda: Stack(Layer(), Layer(), Layer(skip=0)),
    "a shared weight": shared_weight,
    "a layer twice": lambda: (lambda one: Stack(one, Layer(), one))(Layer()),
    "written": Written,
    "mapped": Mapped,
    "recurrent": lambda: nn.Sequential(nn.Linear(6, 8), nn.GRU(8, 4, batch_first=True)),
}


@pytest.mark.parametrize("case", STACKS)
def test_found_as_by_export(case: str, monkeypatch):
    torch.manual_seed(0)
    model, inputs = STACKS[case](), (torch.randn(4, 6),)
    if case != "mapped":  # torch.vmap is exported
        record(model, inputs, {}, {})
    assert_equal(s2ft.analyze(model, inputs), exported(monkeypatch, model, inputs))


class Block(nn.Module):
    """One residual FFN that is given nothing but its input. how: what makes it unlike the others of a list."""

    def __init__(self, how="", number=0):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6)
        self.how, self.number, self.kept = how, number, {}
        self.table = torch.arange(8.0) + number

    def forward(self, x, cache=None):
        if cache is not None:  # nothing else asks for its number
            cache[self.number] = x
        h = self.up(x).relu_()
        h[..., :2].mul_(0.5)
        if self.how == "its number":
            h = h * self.number
        if self.how == "a tensor of its own":
            h = h * self.table
        if self.how == "what it keeps":
            self.kept["h"] = h
        if self.how == "a draw":
            h = h * random.random()
        if self.how == "the input is written to":
            x.add_(1.0)
        h = self.norm(h)
        return x if self.how == "its input comes back" else x + self.down(h) if self.how != "a view of it" else x[:]


class Blocks(nn.Module):
    def __init__(self, *hows):
        super().__init__()
        self.blocks = nn.ModuleList(Block(how, i) for i, how in enumerate(hows))

    def forward(self, x):
        x = x.clone()
        for i, block in enumerate(self.blocks):
            x = block(x, {} if self.blocks[0].how == "another argument" and i == 2 else None) * (i + 1)
        return x


UNLIKE = ["its number", "a tensor of its own", "what it keeps", "a draw", "the input is written to", "a view of it"]


@pytest.mark.parametrize("how", ["", "its input comes back", "another argument", "one other", *UNLIKE])
def test_a_copy_of_an_equal_layer_is_what_recording_it_gives(how, monkeypatch):
    """Node by node; what cannot be known to be equal is recorded."""
    torch.manual_seed(0)
    model, copied = Blocks(*(["", "", "its number", ""] if how == "one other" else [how] * 4)), []
    made = repeats.Layers._copied
    monkeypatch.setattr(repeats.Layers, "_copied", lambda *given: copied.append(0) or made(*given))
    random.seed(0)
    with_copies = record(model, (torch.randn(3, 6),), {}, {})
    monkeypatch.setattr(recording, "repeated", lambda *_: contextlib.nullcontext())
    random.seed(0)
    without = record(model, (torch.randn(3, 6),), {}, {})
    assert tracing.text(with_copies.graph_module.graph) == tracing.text(without.graph_module.graph)
    assert len(copied) == {"": 3, "its input comes back": 3, "another argument": 2, "one other": 2}.get(how, 0)


def test_a_model_is_as_before():
    model = Written()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    attributes = {name: dict(vars(m)) for name, m in model.named_modules()}
    s2ft.analyze(model, (torch.randn(4, 6),))
    assert {name: dict(vars(m)) for name, m in model.named_modules()} == attributes and model.seen == {}
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


@dataclasses.dataclass
class Result:
    value: torch.Tensor


class Odd(nn.Module):
    """A forward that no recording holds; `how` says why."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.up, self.down = how, nn.Linear(6, 8), nn.Linear(8, 6)
        self.count = torch.zeros(8)

    def forward(self, x):
        h = self.up(x)
        if self.how == "sizes of data":
            h = h[torch.nonzero(x[:, 0] > 0)[:, 0]]
        if self.how == "a constant that is written to":
            self.count += 1
            h = h + self.count
        if self.how == "an input that is written to":
            x.zero_()
        if self.how == "a branch as an operator":
            h = torch.cond(x.sum() > 0, lambda h: h.relu(), lambda h: h.tanh(), (h,))
        result = self.down(h)
        return Result(result) if self.how == "another class" else result


ODD = ["sizes of data", "a constant that is written to", "an input that is written to", "a branch as an operator"]


@pytest.mark.parametrize("how", [*ODD, "another class"])
def test_what_is_not_recorded_is_exported(how: str, monkeypatch):
    model, inputs = Odd(how), (torch.randn(4, 6),)
    with pytest.raises(Exception):  # noqa: B017, whatever torch raises
        record(model, (inputs[0].clone(),), {}, {})
    assert torch.equal(model.count, torch.zeros(8))
    try:
        expected = exported(monkeypatch, model, inputs)
    except s2ft.CaptureError:
        with pytest.raises(s2ft.CaptureError):
            s2ft.analyze(model, inputs)
    else:
        assert_equal(s2ft.analyze(model, inputs), expected)
