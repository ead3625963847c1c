"""`analyze`: looks and does not touch, prints readably, and says why where it cannot."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn

import s2ft_compile as s2ft
from s2ft_compile.testing.models import Drawn, Spec, models

FEW = settings(max_examples=max(3, settings.default.max_examples // 6))


def observed(model) -> list:
    """All that a caller could see of a model: bits, versions, flags, gradients."""
    return [
        [(n, p._version, p.requires_grad, p.grad, p.data_ptr()) for n, p in model.named_parameters()],
        [(n, m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in model.named_modules()],
        sorted(model.state_dict()),
        torch.get_rng_state().tolist()[:8],
        torch.is_grad_enabled(),
    ]


@given(models(dropout=True))
@FEW
def test_nothing_changes(drawn: Drawn):
    model = drawn.model.train()
    model.blocks[0].eval()  # flags of their own
    next(model.parameters()).requires_grad_(False)
    kept, before = {k: v.clone() for k, v in model.state_dict().items()}, observed(model)
    s2ft.analyze(model, drawn.inputs)
    assert observed(model) == before
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = dict(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes}))


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_cache_is_put_back(use_cache: bool):
    model = llama(use_cache=use_cache)
    analysis = s2ft.analyze(model, {"input_ids": torch.arange(6)[None]})
    assert model.config.use_cache is use_cache and len(analysis.couplings) == 5


def test_flags_and_cache_are_put_back_after_a_failure():
    model = llama().train()
    with pytest.raises(s2ft.CaptureError):
        s2ft.analyze(model, {"no_such_argument": torch.arange(6)[None]})
    assert model.config.use_cache and all(m.training for m in model.modules())


def test_inputs_as_a_tuple_a_dict_or_a_tensor():
    drawn = Drawn(Spec(batch=2, length=3))
    analyses = [
        s2ft.analyze(drawn.model, given) for given in (drawn.inputs, {"inputs": drawn.inputs[0]}, drawn.inputs[0])
    ]
    assert analyses[0].couplings == analyses[1].couplings == analyses[2].couplings


@pytest.mark.parametrize("inputs", [None, 3, "text"])
def test_other_inputs_are_refused(inputs):
    with pytest.raises(s2ft.ConfigError, match="tuple or a dict.*got (NoneType|int|str)"):
        s2ft.analyze(Drawn(Spec()).model, inputs)


def test_the_same_twice():
    drawn = Drawn(Spec(blocks=2))
    assert s2ft.analyze(drawn.model, drawn.inputs) == s2ft.analyze(drawn.model, drawn.inputs)


def test_a_wrapped_model_is_the_model():
    drawn = Drawn(Spec())
    assert (
        s2ft.analyze(torch.compile(drawn.model), drawn.inputs).couplings
        == s2ft.analyze(drawn.model, drawn.inputs).couplings
    )


def test_tied_parameters_count_once():
    drawn = Drawn(Spec(tied=True))
    analysis = s2ft.analyze(drawn.model, drawn.inputs)
    listed = [m.parameter_name for c in analysis.couplings for m in c.members] + [
        m.parameter_name for r in analysis.refusals for m in r.members
    ]
    assert "head.weight" not in listed and analysis.tied == {"head.weight": "embed.weight"}
    residual = next(c for c in analysis.couplings if c.role == "residual")
    assert [m.dim for m in residual.members if m.parameter_name == "embed.weight"] == [1]


def test_parameters_that_share_memory():
    """Not tied by identity, and yet permuting one permutes the other: refused, with the name of the other."""
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)
    )
    model[4].weight.data = model[2].weight.data
    x = torch.randn(2, 4)
    analysis = s2ft.analyze(model, (x,))
    before = model(x)
    for coupling in analysis.couplings:
        s2ft.permute(model, coupling, list(range(coupling.units))[::-1])
    torch.testing.assert_close(model(x), before)
    reasons = {m.parameter_name: r.reason for r in analysis.refusals for m in r.members}
    assert "memory with 2.weight" in reasons["4.weight"]


class Tables(nn.Module):
    """Rows of two tables beyond the example's length: nothing in the trace reads them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(9, 4)) for _ in range(2))

    def forward(self, x):
        return x + (self.a * self.b)[: x.shape[1]]


def test_rows_that_the_example_does_not_reach():
    """Permuting a table's unread rows is harmless at the example's length only."""
    for coupling in s2ft.analyze(Tables(), (torch.randn(2, 5, 4),)).couplings:
        assert not any(m.dim == 0 for m in coupling.members), str(coupling)


def test_roles_of_members():
    """`out` is what a weight contracts, `query`, `key`, `value` and `in` what it produces, also inside a fused one."""
    spec = Spec(qkv="thirds", kv_heads=2, groups=2, gate="fused", positions="rope")
    drawn = Drawn(spec)
    analysis = s2ft.analyze(drawn.model, drawn.inputs)
    roles = {(m.parameter_name, m.dim, m.role, c.units) for c in analysis.couplings for m in c.members}
    fused = {
        role for name, _, role, _ in roles if name == "blocks.0.attention.qkv.weight" and role.startswith("attention")
    }
    assert fused == {"attention.query", "attention.key", "attention.value"}
    assert {r for n, d, r, _ in roles if n == "blocks.0.attention.o.weight" and d == 1} == {"attention.out"}
    assert {r for n, d, r, _ in roles if n == "blocks.0.ffn.up.weight" and d == 0} == {"ffn.in"}
    assert {r for n, d, r, _ in roles if n == "blocks.0.ffn.down.weight" and d == 1} == {"ffn.out"}
    assert analysis.roles()["ffn.out"] == 1


def test_it_prints_readably():
    drawn = Drawn(Spec(positions="rope", decoy="cumsum", ffn=7))
    text = str(s2ft.analyze(drawn.model, drawn.inputs))
    lines = text.splitlines()
    assert lines[0].startswith("4 couplings (") and "1 residual" in lines[0] and "3 attention" in lines[0]
    assert any("attention × 2:" in line and "blocks.0.attention.o.weight[1] (attention.out)" in line for line in lines)
    refused = next(line for line in lines if "blocks.0.ffn.down.weight[1]" in line and "refused" in line)
    assert "refused × 7" in refused and "cumsum depends on the order" in refused and "models.py:" in refused
    assert "<" not in text and "object at 0x" not in text


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        h = self.up(x)
        if h.sum() > 0:  # a branch on data
            h = F.relu(h)
        return self.down(h)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 6)

    def forward(self, x):
        return self.up(x) * len(x.nonzero().tolist())


@pytest.mark.parametrize("model", [Branching(), Counting()])
def test_a_model_that_cannot_be_traced(model):
    """The message names the class and the line."""
    with pytest.raises(s2ft.CaptureError) as caught:
        s2ft.analyze(model.train(), (torch.randn(2, 4),))
    message = str(caught.value)
    assert type(model).__name__ in message, message
    assert 'test_analyze.py", line' in message, message
    assert model.training


def test_a_forward_that_fails_by_itself():
    with pytest.raises(s2ft.CaptureError, match="Linear"):
        s2ft.analyze(nn.Linear(4, 2), (torch.randn(3, 5),))


def test_a_model_without_couplings():
    analysis = s2ft.analyze(nn.Linear(4, 2), (torch.randn(3, 4),))
    assert not analysis.couplings and {r.members[0].dim for r in analysis.refusals} == {0, 1}
    assert "0 couplings" in str(analysis)
