"""Pieces: models that branch on data keep the couplings inside of what traces, and no coupling of what else is read."""

import pytest
import torch
from torch import nn

import s2ft_compile as s2ft


class FFN(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(8, 3), nn.ModuleList(FFN() for _ in range(3))

    def forward(self, x):
        chosen, out = self.router(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = chosen == i
            if rows.any():
                out[rows] = expert(x[rows])
        return out


def by_helper(module):
    return module.up.bias


class Branching(nn.Module):
    """A residual stream through an FFN, experts that a loop runs, and an FFN `last` that a branch may read, too."""

    def __init__(self, untaken=lambda self, x: x):
        super().__init__()
        self.embed, self.first, self.moe, self.last = nn.Embedding(11, 8), FFN(), Experts(), FFN(8)
        self.untaken, self.head = untaken, nn.Linear(8, 11)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.first(x)
        x = x + self.moe(x)
        if x.sum() > 1e9:
            x = self.untaken(self, x)
        return self.head(x + self.last(x))


class Typed(Branching):
    """One whose code asks of which type its weights are."""

    @property
    def dtype(self):
        return next(self.parameters()).dtype

    def forward(self, ids):
        return super().forward(ids).to(self.dtype)


READ = {
    "its bias": lambda self, x: x + self.last.up.bias,
    "by another name": lambda self, x: (lambda other: x + other.up.bias)(self.last),
    "a layer of it": lambda self, x: x + self.last.up(x),
    "all weights": lambda self, x: x + next(self.last.parameters())[0],
    "in a function": lambda self, x: x + by_helper(self.last),
}
INPUTS = (torch.arange(14).reshape(2, 7) % 11,)
PIECES = {"first", "moe.experts.0", "moe.experts.1", "moe.experts.2", "last"}


def coupled(analysis):
    return {m.parameter_name.rpartition(".")[0].rpartition(".")[0] for c in analysis.couplings for m in c.members}


def test_what_traces_is_found():
    torch.manual_seed(0)
    model = Branching()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    analysis = s2ft.analyze(model, INPUTS, verify=True)
    assert coupled(analysis) == PIECES and all(c.role == "ffn" for c in analysis.couplings)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    refused = {m.parameter_name for r in analysis.refusals for m in r.members}
    assert {"embed.weight", "moe.router.weight", "head.weight"} <= refused
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_property_that_says_a_type_reads_no_weight():
    assert coupled(s2ft.analyze(Typed(), INPUTS)) == PIECES


@pytest.mark.parametrize("how", READ)
def test_a_branch_not_taken_that_reads_a_piece(how: str):
    torch.manual_seed(0)
    couplings = coupled(s2ft.analyze(Branching(READ[how]), INPUTS))
    assert "last" not in couplings
    assert couplings == PIECES - {"last"} or how not in ("its bias", "a layer of it")  # or it may be of any piece


def test_a_weight_that_other_code_holds():
    torch.manual_seed(0)
    model = Branching()
    model.alias = model.last.up  # under two names, one of them in no piece
    assert "last" not in coupled(s2ft.analyze(model, INPUTS))
    model = Branching()
    model.moe.router = nn.Linear(8, 8)
    model.last.up.weight = model.moe.router.weight
    assert "last" not in coupled(s2ft.analyze(model, INPUTS))


def test_nothing_that_traces_says_why():
    model = nn.Sequential(nn.Linear(8, 8), Experts())
    model[1].experts = nn.ModuleList([nn.Linear(8, 8)])
    with pytest.raises(s2ft.CaptureError, match="could not be traced"):
        s2ft.analyze(model, (torch.randn(4, 8),))


def test_it_trains():
    torch.manual_seed(0)
    model = Branching()
    before = model(*INPUTS)
    s2ft.prepare(model, INPUTS, s2ft.S2FTConfig(targets={"ffn.out": 2}))
    torch.testing.assert_close(model(*INPUTS), before)
    model(*INPUTS).square().mean().backward()
    trained = [p.grad for p in s2ft.parameters(model)]
    assert trained and all(g is None or g.isfinite().all() for g in trained) and any(g is not None for g in trained)
