"""Couplings hold for every trace: eval and train mode, another batch size and length, several examples.

Each model below has a coupling in the trace of its example that is none elsewhere.
"""

import copy
import logging
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import s2ft_compile as s2ft
from s2ft_compile.capture.capture import capture
from s2ft_compile.capture.examples import arguments, resized, several
from s2ft_compile.capture.traces import captures
from s2ft_compile.passes.couple.couple import couple
from s2ft_compile.testing import outputs_of


class Feed(nn.Module):
    def __init__(self, hidden: int = 6, inner: int = 10):
        super().__init__()
        self.up, self.down = nn.Linear(hidden, inner), nn.Linear(inner, hidden)

    def hidden(self, x):
        return F.gelu(self.up(x))

    def forward(self, x):
        return x + self.down(self.hidden(x))


class Auxiliary(Feed):
    """In train mode a head reads the order of the hidden units."""

    def forward(self, x):
        h = self.hidden(x)
        y = x + self.down(h)
        return (y, h.cumsum(-1).sum(-1)) if self.training else y


class Conditional(Feed):
    """An argument that is added to the hidden units through a weight of its own."""

    def __init__(self):
        super().__init__()
        self.cond = nn.Linear(3, 10)

    def forward(self, x, c=None):
        h = self.hidden(x)
        return x + self.down(h if c is None else h + self.cond(c))


class Task(Feed):
    """A branch on an argument reads the same hidden units in their order."""

    def forward(self, x, task="a"):
        h = self.hidden(x)
        return x + self.down(h) if task == "a" else h.cumsum(-1)


class Mask(nn.Module):
    """Attention with an additive number per head, which the example leaves out."""

    def __init__(self, heads=4, size=2):
        super().__init__()
        n = heads * size
        self.q, self.k, self.v, self.o = (nn.Linear(n, n) for _ in range(4))
        self.heads = heads

    def forward(self, x, bias=None):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        if bias is not None:
            y = y * bias[:, None, None]
        return self.o(y.transpose(1, 2).flatten(2))


class Untransposed(nn.Module):
    """Heads viewed without a transpose: where the length equals their number, positions and heads seem apart."""

    def __init__(self, heads=4, size=2):
        super().__init__()
        n = heads * size
        self.heads, self.up, self.down = heads, nn.Linear(n, n), nn.Linear(n, n)

    def forward(self, x):
        b, t, n = x.shape
        h = self.up(x).view(b, self.heads, t, -1).softmax(1)
        return self.down(h.reshape(b, t, n))


class Memory(nn.Module):
    """Attends to as many rows of a memory as the input is long."""

    def __init__(self, rows=9, n=6):
        super().__init__()
        self.keys, self.values = (nn.Parameter(torch.randn(rows, n)) for _ in range(2))

    def forward(self, x):
        rows = x.shape[1]
        return x + (x @ self.keys[:rows].T).softmax(-1) @ self.values[:rows]


def x(batch=2, length=5, n=6):
    return torch.randn(batch, length, n)


def modes(model, mode):
    return copy.deepcopy(model).train(mode)


# name -> (model, example, other calls and modes under which the function has to stay)
ELSEWHERE = {
    "train mode": (Auxiliary, lambda: (x(),), lambda: [((x(),), {}, True)]),
    "length equal to heads": (Untransposed, lambda: (x(2, 4, 8),), lambda: [((x(2, 6, 8),), {}, False)]),
    "a memory cut at the length": (Memory, lambda: (x(),), lambda: [((x(2, n),), {}, False) for n in (2, 3, 6, 8)]),
    "a memory shorter than the example": (Memory, lambda: (x(2, 12),), lambda: [((x(2, 3),), {}, False)]),
    "an argument": (Task, lambda: [(x(),), {"x": x(), "task": "b"}], lambda: [((x(), "b"), {}, False)]),
    "an optional weight": (Conditional, lambda: [(x(),), (x(), x(n=3))], lambda: [((x(), x(n=3)), {}, False)]),
    "a number per head": (
        Mask,
        lambda: [(x(n=8),), (x(n=8), torch.randn(4))],
        lambda: [((x(n=8), torch.randn(4)), {}, False)],
    ),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_couplings_hold_elsewhere(case):
    make, example, calls = ELSEWHERE[case]
    model = make().double()
    given = example()
    given = [tuple_or_dict(g) for g in given] if isinstance(given, list) else tuple_or_dict(given)
    analysis = s2ft.analyze(model, given)
    for args, kwargs, training in calls():
        args = tuple(a.double() if isinstance(a, torch.Tensor) else a for a in args)
        model.train(training)
        with torch.no_grad():
            before = outputs_of(model(*args, **kwargs))
            for coupling in analysis.couplings:
                moved = copy.deepcopy(model)
                s2ft.permute(moved, coupling, torch.arange(coupling.units).roll(1))
                for a, b in zip(before, outputs_of(moved(*args, **kwargs)), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=f"{case}: {coupling}")


def tuple_or_dict(call):
    cast = lambda v: v.double() if isinstance(v, torch.Tensor) else v  # noqa: E731
    return {k: cast(v) for k, v in call.items()} if isinstance(call, dict) else tuple(map(cast, call))


@pytest.mark.parametrize(
    "make, example, said",
    [
        (Auxiliary, (x(),), "cumsum.*in train mode"),
        (Untransposed, (x(2, 4, 8),), "with a batch of .* and a length of "),
        (Memory, (x(),), "depends on the inputs' sizes.*length of"),
        (Task, [(x(),), (x(), "b")], "cumsum.*with example 2"),
    ],
)
def test_a_refusal_says_which_trace_pinned_it(make, example, said):
    refusals = [str(r) for r in s2ft.analyze(make(), example).refusals]
    assert any(re.search(said, r) for r in refusals), refusals
    assert not any("train mode" in r for r in refusals if "it is an output of the model" in r)


def test_what_holds_everywhere_is_found():
    """The second example adds a weight to the coupling instead of taking it away."""
    model = Conditional()
    for example in ((x(),), [(x(),), (x(), x(n=3))]):
        (coupling,) = [c for c in s2ft.analyze(model, example).couplings if c.role == "ffn"]
        members = {(m.parameter_name, m.dim) for m in coupling.members}
        assert {("up.weight", 0), ("down.weight", 1)} <= members
        assert (("cond.weight", 0) in members) is isinstance(example, list)
    assert s2ft.analyze(model, (x(),)).unread == {"cond.weight", "cond.bias"}
    assert not s2ft.analyze(model, [(x(),), (x(), x(n=3))]).unread


def test_prepare_keeps_train_mode():
    model = Auxiliary()
    inputs = x()
    before = model.train()(inputs)
    with pytest.raises(s2ft.ConfigError, match="cumsum.*in train mode"):
        s2ft.prepare(model, (inputs,), s2ft.S2FTConfig(targets={"ffn.out": 0.5}))
    assert all(torch.equal(a, b) for a, b in zip(before, model(inputs)))


def test_two_traces_see_both_modes_and_sizes():
    class Dropped(Feed):
        def forward(self, ids):
            return F.dropout(super().forward(F.one_hot(ids, 6).float()), 0.1, self.training)

    captured = captures(Dropped(), (torch.zeros(2, 5, dtype=torch.int64),))
    assert [c.trace for c in captured] == ["", "with a batch of 11 and a length of 7"]
    captured = captures(Auxiliary(), (x(),))
    assert [c.trace.replace("with a batch of 11 and a length of 7", "elsewhere") for c in captured] == [
        "",
        "elsewhere",
        "in train mode",
        "in train mode elsewhere",
    ]


class Fixed(Feed):
    def forward(self, x):
        return super().forward(x.view(2, 5, 6))


class FixedLength(Feed):
    def forward(self, x):
        return super().forward(x + torch.zeros(5, 6))


def test_sizes_that_the_code_fixes(caplog):
    with caplog.at_level("DEBUG", logger="s2ft_compile"):
        captured = captures(Fixed(), (x(),))
    assert [c.trace for c in captured] == ["", "in train mode"] and "a size is fixed" in caplog.text
    assert [c.trace for c in captures(FixedLength(), (x(),))] == ["", "with a batch of 11"]


class Branch(Feed):
    def forward(self, x):
        y = super().forward(x)
        if self.training and y.sum() > 0:
            y = -y
        return y


def test_a_train_mode_that_does_not_trace():
    model = Branch()
    with pytest.raises(s2ft.CaptureError, match="in train mode.*test_traces.py.*train=False"):
        s2ft.analyze(model, (x(),))
    with pytest.raises(s2ft.CaptureError, match="in train mode"):
        s2ft.prepare(model, (x(),))
    assert [c.role for c in s2ft.analyze(model, (x(),), train=False).couplings] == ["ffn"]
    assert s2ft.prepare(model, (x(),), s2ft.S2FTConfig(targets={"ffn.out": 2}), train=False).slices


class LayerDrop(Feed):
    def forward(self, x):
        import random

        if self.training and (torch.rand([]) < 0.1 or random.random() < 0.1):
            return x
        return super().forward(x)


def test_layers_that_are_dropped_at_random_trace():
    import random

    random.seed(3)
    state = random.getstate()
    assert [c.role for c in s2ft.analyze(LayerDrop(), (x(),)).couplings] == ["ffn"]
    assert random.getstate() == state


def test_verify_compares_at_other_sizes_and_all_examples():
    """What one trace finds wrongly is wrong elsewhere, and verify says where."""
    for make, example, said in (
        (Untransposed, (x(2, 4, 8),), "differ with a batch of .* and a length of"),
        (Task, [(x(),), (x(), "b")], "differ with example 2"),
    ):
        model = make()
        first = example[0] if isinstance(example, list) else example
        one = couple(capture(model, first))
        assert one.couplings
        verification = s2ft.verify(model, example, one)
        assert not verification.ok and verification.wrong and re.search(said, str(verification)), str(verification)
        assert s2ft.verify(model, example, s2ft.analyze(model, example)).ok
    verification = s2ft.verify(FixedLength(), (x(),), s2ft.analyze(FixedLength(), (x(),)))
    assert verification.ok and verification.sharp and verification.calls == 2


# --- examples ----------------------------------------------------------------------------------------------------


def test_a_list_of_calls_and_a_list_of_tensors():
    a = x()
    assert several([a, a]) == [arguments((a, a))]
    assert [len(i.args) for i in several([(a,), {"x": a}])] == [1, 0]
    assert several((({"a": 1},), a)) == [arguments((({"a": 1},), a))]


def test_other_sizes_divide_no_size_of_the_model():
    ids, mask = torch.ones(2, 5, dtype=torch.int64), torch.zeros(2, 1, 5, 5)
    given = {"ids": ids, "mask": mask, "positions": torch.arange(5), "pixels": torch.randn(2, 3, 8, 8), "flag": True}
    whole, batch, length = resized(nn.Linear(9, 49), arguments(given))
    sizes = {k: tuple(v.shape) for k, v in whole.inputs.kwargs.items() if k != "flag"}
    b, t = sizes["ids"]
    assert (b, t) == (13, 11) and sizes["mask"] == (b, 1, t, t) and sizes["positions"] == (t,)
    assert sizes["pixels"] == (b, 3, 8, 8) and whole.inputs.kwargs["flag"] is True
    assert batch.inputs.kwargs["ids"].shape == (b, 5) and length.inputs.kwargs["ids"].shape == (2, t)
    assert whole.inputs.kwargs["positions"].max() == 4


# --- memory shared with a weight ------------------------------------------------------------------------------------


class Shared(Feed):
    def __init__(self, how):
        super().__init__()
        self.how = how
        weight = self.up.weight
        if how == "buffer":
            self.register_buffer("other", weight.data)
        elif how == "attribute":
            self.other = weight.detach()
        elif how == "part":
            self.other = weight.data[2:5]
        elif how == "list":
            self.others = [weight.data]
        elif how == "dict":
            self.others = {"a": (weight.data)}
        elif how == "closure":
            other = weight.detach()
            self.read = lambda: other
        elif how == "nested":
            self.others = [[weight.data]]

    def shared(self):
        if self.how in ("list", "dict", "nested"):
            return next(iter(self.others.values() if isinstance(self.others, dict) else self.others))
        return self.read() if self.how == "closure" else self.other

    def forward(self, x):
        other = self.shared()
        return super().forward(x) + (other[0] if isinstance(other, list) else other).cumsum(0).sum(0)


@pytest.mark.parametrize("how", ["buffer", "attribute", "part", "list", "dict", "closure", "nested"])
def test_what_shares_memory_with_a_weight_refuses_its_axes(how):
    model, inputs = Shared(how), x()
    before = model(inputs)
    analysis = s2ft.analyze(model, (inputs,))
    reasons = {m.parameter_name: str(r) for r in analysis.refusals for m in r.members}
    assert "shares memory with" in reasons["up.weight"], reasons
    for coupling in analysis.couplings:
        s2ft.permute(model, coupling, torch.arange(coupling.units).flip(0))
    torch.testing.assert_close(model(inputs), before)


def test_an_unread_view_of_a_weight_refuses_its_axes():
    model = Feed()
    model.seen = {"w": model.up.weight.detach()}
    assert not s2ft.analyze(model, (x(),)).couplings
    model.seen = {"w": model.up.weight.detach().clone()}
    assert s2ft.analyze(model, (x(),)).couplings


class Placed(Feed):
    """Takes sequences of one length."""

    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.randn(5, 6))

    def forward(self, x):
        return super().forward(x + self.places)


def test_a_size_that_does_not_run_is_not_logged_as_an_error(caplog):
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(caplog.handler)
    try:
        assert s2ft.analyze(Placed(), (torch.randn(2, 5, 6),)).roles()
        assert not [record for record in caplog.records if record.name == logger.name]
        logger.error("failed while attempting to run meta for another, elsewhere")
    finally:
        logger.removeHandler(caplog.handler)
    assert [record for record in caplog.records if record.name == logger.name]
