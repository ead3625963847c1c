"""`verify`: it passes what is right, names what is wrong, says when it cannot tell, and leaves the model alone."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from small import LLAMA, QUICK, hf, tokens
from torch import nn
from typer.testing import CliRunner

import s2ft_compile as s2ft
from s2ft_compile.cli.app import app
from s2ft_compile.passes.couple import couple, rules
from s2ft_compile.passes.couple.axes import Axis
from s2ft_compile.passes.couple.rules.context import Value
from s2ft_compile.testing.models import Drawn, Spec, models
from s2ft_compile.verification import random_orders

FEW = settings(max_examples=max(2, settings.default.max_examples // 8), phases=QUICK)


def bits(model: nn.Module) -> list:
    held = [*model.named_parameters(), *model.named_buffers()]
    return [(n, t._version, t.data_ptr(), t.dtype, t.clone()) for n, t in held]


def assert_untouched(before: list, model: nn.Module) -> None:
    for old, new in zip(before, bits(model), strict=True):
        assert old[:-1] == new[:-1] and torch.equal(old[-1], new[-1])


@given(models())
@FEW
def test_what_analysis_finds_is_right_and_the_model_stays(drawn: Drawn):
    analysis, before = s2ft.analyze(drawn.model, drawn.inputs), bits(drawn.model)
    verification = s2ft.verify(drawn.model, drawn.inputs, analysis, drawn.seed)
    assert verification.ok and verification.sharp and not verification.wrong and verification.dtype == "float64", str(
        verification
    )
    assert verification.control > 1e6 * verification.tolerance  # right and wrong lie far apart
    members = {m.parameter_name for c in analysis.couplings for m in c.members}
    assert verification.parameters == len(members) and verification.couplings == len(analysis.couplings)
    assert_untouched(before, drawn.model)


def test_orders_are_permutations_and_never_the_identity():
    analysis = s2ft.analyze(Drawn(Spec(kv_heads=2, groups=2)).model, Drawn(Spec(kv_heads=2, groups=2)).inputs)
    for seed in range(20):
        orders = random_orders(analysis.couplings, seed)
        for c in analysis.couplings:
            assert sorted(orders[c.axis].tolist()) == list(range(c.units)) != orders[c.axis].tolist()


@pytest.mark.parametrize(
    "place", [("blocks.0.ffn.down.weight", 1), ("blocks.1.attention.o.weight", 1), ("norm.weight", 0)]
)
def test_a_member_left_out_is_found_and_its_coupling_named(place):
    drawn = Drawn(Spec(blocks=2, ffn=8, hidden=8))
    analysis = s2ft.analyze(drawn.model, drawn.inputs)
    short = replace(analysis, layouts={k: v for k, v in analysis.layouts.items() if k != place})
    verification = s2ft.verify(drawn.model, drawn.inputs, short)
    guilty = [c for c in analysis.couplings if place in {(m.parameter_name, m.dim) for m in c.members}]
    assert (
        not verification.ok
        and list(verification.wrong) == guilty
        and "CHANGED" in str(verification)
        and "wrong: " in str(verification)
    )


def test_analyze_verify_raises_where_a_rule_is_wrong(monkeypatch):
    drawn = Drawn(Spec(decoy="cumsum", ffn=8))
    assert s2ft.analyze(drawn.model, drawn.inputs, verify=True).couplings
    cumsum = torch.ops.aten.cumsum.default
    monkeypatch.setitem(rules.AXIS_RULES, cumsum, rules.axes_same)
    assert rules.rule_for(cumsum) is rules.axes_same
    with pytest.raises(s2ft.VerificationError, match="wrong: ffn × 8"):
        s2ft.analyze(drawn.model, drawn.inputs, verify=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_models_are_compared_in_float64(dtype):
    """Llama's norms, softmax and rotary positions cast to float32; promoted, the difference is float64's."""
    model, inputs = hf("llama").to(dtype), {"input_ids": tokens()}
    before = bits(model)
    verification = s2ft.verify(model, inputs, s2ft.analyze(model, inputs))
    assert (
        verification.ok and verification.sharp and verification.dtype == "float64" and verification.difference < 1e-9
    ), str(verification)
    assert_untouched(before, model)
    assert torch.get_default_dtype() == torch.float32


class Single(nn.Module):
    """Multiplies by a constant that no promotion reaches, so that it runs in float32 only."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 40), nn.Linear(40, 4)
        self.fixed = torch.eye(40)

    def forward(self, x):
        return self.down(self.up(x).relu() @ self.fixed.mul(0).add(1))


def test_a_model_that_runs_in_float32_only():
    model, inputs = Single(), (torch.randn(2, 4),)
    verification = s2ft.verify(model, inputs, s2ft.analyze(model, inputs))
    assert verification.ok and verification.dtype == "float32" and verification.tolerance < 0.1, str(verification)


class Keeping(nn.Module):
    """In eval mode it keeps what it made of a weight."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.scale, self.kept = nn.Linear(4, 6), nn.Linear(6, 4), nn.Parameter(torch.randn(6)), {}

    def forward(self, x):
        if "scale" not in self.kept:
            self.kept["scale"] = self.scale.exp()
        return self.down(self.up(x).relu() * self.kept["scale"])


def test_what_a_model_keeps_of_a_forward_is_not_in_the_next():
    model, inputs = Keeping(), (torch.randn(2, 4),)
    analysis = s2ft.analyze(model, inputs)
    verification = s2ft.verify(model, inputs, analysis)
    assert [c.units for c in analysis.couplings] == [6] and verification.ok and not model.kept, str(verification)


def test_weights_that_cannot_tell():
    model, inputs = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), (torch.randn(2, 4),)
    with torch.no_grad():
        model[2].weight.zero_()
    verification = s2ft.verify(model, inputs, s2ft.analyze(model, inputs))
    assert (
        verification.ok
        and not verification.sharp
        and "2.weight" in verification.alike
        and "cannot show a mistake" in str(verification)
    )


class Scaled(nn.Module):
    """Every other one of its parameters is constant, by their names."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.randn(6, 4))
        self.c, self.d = nn.Parameter(torch.ones(6)), nn.Parameter(torch.randn(3, 6))

    def forward(self, x):
        return ((x @ self.b.T + self.a).relu() * self.c) @ self.d.T


def test_a_control_leaves_weights_behind_and_no_constants():
    model, inputs = Scaled(), (torch.randn(2, 4),)
    verification = s2ft.verify(model, inputs, s2ft.analyze(model, inputs))
    assert verification.alike == ("a", "c") and verification.ok and verification.sharp, str(verification)


def test_no_couplings_is_fine():
    model, inputs = nn.Linear(4, 2), (torch.randn(3, 4),)
    verification = s2ft.verify(model, inputs, s2ft.analyze(model, inputs))
    assert verification.ok and verification.sharp and verification.couplings == verification.parameters == 0


def test_refusals():
    drawn = Drawn(Spec(ffn=8))
    model = drawn.make()
    analysis = s2ft.analyze(model, drawn.inputs)
    s2ft.prepare(model, drawn.inputs, s2ft.S2FTConfig(targets={"ffn.out": 0.5}))
    with pytest.raises(s2ft.StateError, match="release"):
        s2ft.verify(model, drawn.inputs, analysis)
    with pytest.raises(s2ft.ConfigError, match="meta"):
        s2ft.verify(drawn.model.to("meta"), drawn.inputs, analysis)


def test_a_decoder_with_a_configuration_of_its_own():
    """An encoder-decoder's decoder may hold a copy of the configuration, with a cache of its own to switch off."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_ff=24, d_kv=4, num_layers=2, num_heads=4))
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(seed=1)}
    analysis = s2ft.analyze(model, inputs, verify=True)
    assert sum(c.role == "ffn" and c.units == 24 for c in analysis.couplings) == 4, "two layers of each stack"
    held = {m.parameter_name for c in analysis.couplings for m in c.members if m.role == "attention.out"}
    assert sum("EncDecAttention" in name for name in held) == 2 and sum("SelfAttention" in name for name in held) == 4
    assert model.decoder.config.use_cache and model.config.use_cache


# --- structure only --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["meta", "cpu"])
def test_a_model_on_the_meta_device_has_the_same_structure(where):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**LLAMA)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    on_device = s2ft.analyze(model, {"input_ids": tokens().to(where)})
    assert all(p.is_meta for p in model.parameters())
    real = s2ft.analyze(LlamaForCausalLM(config), {"input_ids": tokens()})
    assert [str(c) for c in on_device.couplings] == [str(c) for c in real.couplings] and len(on_device.couplings) == 9


# --- the command line --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    hf("llama").save_pretrained(path)
    return path


def test_command_line(folder, monkeypatch):
    result = CliRunner().invoke(app, ["verify", str(folder), "--seed", "3"])
    assert (
        result.exit_code == 0
        and "9 couplings permuted at once in 21 parameters (float64): outputs unchanged" in result.output
    )
    linear = torch.ops.aten.linear.default
    monkeypatch.setitem(
        rules.AXIS_RULES, linear, lambda cx, node, x, w, b=None: Value([*x.dims[:-1], Axis(w.dims[0].size)])
    )
    monkeypatch.setattr(couple, "_pin_unread", lambda inference: None)
    result = CliRunner().invoke(app, ["verify", str(folder)])
    assert result.exit_code == 1, result.output


def test_command_line_without_a_model(tmp_path):
    result = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert result.exit_code == 1 and "no model folder" in result.output
