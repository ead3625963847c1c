"""What users test their models and operators with: it passes where rules are right, and notices where not."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import QUICK, assert_unchanged, cases, hf, snapshot, tokens

import s2ft_compile as s2ft
from s2ft_compile.errors import ConfigError, StateError
from s2ft_compile.passes.backward import slice_rules
from s2ft_compile.passes.couple import rules
from s2ft_compile.rules import Pin, Value, axis_rule, pin
from s2ft_compile.testing import assert_equivalent, assert_gradients, configurations, permutations, reorder, rulecheck
from s2ft_compile.testing.models import Drawn, Spec

CUMSUM = torch.ops.aten.cumsum.default


@given(cases(dtype=torch.float64))
@settings(max_examples=4, phases=QUICK)
def test_drawn_models_are_equivalent(case):
    before = {name: p.clone() for name, p in case.model.named_parameters()}
    assert assert_equivalent(case.model, case.inputs).couplings
    assert all(torch.equal(p, before[name]) for name, p in case.model.named_parameters())


def test_a_model_of_transformers_in_float32_is_equivalent():
    assert len(assert_equivalent(hf("llama"), {"input_ids": tokens()}).couplings) > 4


def test_the_smallest_wrong_coupling_is_named_with_two_units(monkeypatch):
    """A rule that forgets that a cumulative sum has an order."""
    case = Drawn(Spec(decoy="cumsum", ffn=8, hidden=4))
    assert_equivalent(case.model, case.inputs)
    monkeypatch.setitem(rules.AXIS_RULES, CUMSUM, rules.axes_same)
    with pytest.raises(AssertionError, match=r"swapping units 0 and 1 changes the outputs by .*, in ffn × 8: blocks.0"):
        assert_equivalent(case.model, case.inputs)


def test_a_member_that_is_left_out_is_wrong():
    """An analysis that somebody worked out by hand, and forgot a bias in."""
    case = Drawn(Spec(ffn=8, hidden=4))
    analysis = s2ft.analyze(case.model, case.inputs)
    layouts = {place: v for place, v in analysis.layouts.items() if place != ("blocks.0.ffn.up.bias", 0)}
    with pytest.raises(AssertionError, match="ffn × 8"):
        assert_equivalent(case.model, case.inputs, replace(analysis, layouts=layouts))


class Deaf(torch.nn.Module):
    """Its output does not depend on the hidden units at all."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(4, 6), torch.nn.Linear(6, 4)

    def forward(self, x):
        return x + 0 * self.down(torch.relu(self.up(x)))


def test_a_coupling_that_no_output_shows_is_not_taken_for_tested():
    with pytest.raises(AssertionError, match="no output depends on the order of"):
        assert_equivalent(Deaf(), (torch.randn(3, 4),))


CASE = Drawn(Spec(ffn=5, hidden=4))
ANALYSIS = s2ft.analyze(CASE.model, CASE.inputs)


@given(permutations(ANALYSIS))
@settings(max_examples=10)
def test_permutations_are_orders_of_the_models_couplings(orders):
    units = {c.axis: c.units for c in ANALYSIS.couplings}
    assert all(torch.equal(order.sort().values, torch.arange(units[axis])) for axis, order in orders.items())
    model = CASE.make()
    reorder(model, ANALYSIS, orders)
    torch.testing.assert_close(model(*CASE.inputs), CASE.model(*CASE.inputs), rtol=1e-9, atol=1e-9)


@torch.library.custom_op("testing::reversed", mutates_args=())
def backwards(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1)


backwards.register_fake(torch.empty_like)
SAMPLES = [(torch.randn(3, 4, dtype=torch.float64),), (torch.randn(2, 5, dtype=torch.float64),)]


def test_rulecheck_tells_a_right_rule_from_a_wrong_one(monkeypatch):
    monkeypatch.setattr(rules, "NAMED_AXIS_RULES", dict(rules.NAMED_AXIS_RULES))
    assert rulecheck("testing::reversed", SAMPLES) == 0, "without a rule everything is pinned"

    @axis_rule("testing::reversed")
    def wrong(cx, node, x):
        return Value(x.dims)

    with pytest.raises(AssertionError):
        rulecheck("testing::reversed", SAMPLES)

    @axis_rule("testing::reversed")
    def right(cx, node, x):
        pin(x.dims[-1], Pin("it is read backwards", node))
        return Value(x.dims)

    assert rulecheck("testing::reversed", SAMPLES) == 2, "the rows of both samples"
    assert rulecheck("aten::mm", [(torch.randn(2, 3).double(), torch.randn(3, 4).double())]) == 4


def test_what_rulecheck_cannot_check_is_refused():
    with pytest.raises(ConfigError, match="no operator"):
        rulecheck("testing::absent", SAMPLES)
    with pytest.raises(ConfigError, match="needs samples"):
        rulecheck("testing::reversed", [])


# --- gradients and configurations ------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=1, phases=QUICK)
def test_gradients_of_any_configuration_are_slices_of_the_full_ones(data):
    config = data.draw(configurations(ANALYSIS))
    model = CASE.make()
    plan = s2ft.prepare(model, CASE.inputs, config)
    before = snapshot(model)
    assert_gradients(model, plan, CASE.inputs)
    assert_unchanged(model, before)


def test_a_wrong_slice_rule_is_noticed_by_its_gradient(monkeypatch):
    """Rows in place of columns, where sizes allow it: a product of other operands."""
    case = Drawn(Spec(ffn=5, hidden=4))
    model = case.make()
    plan = s2ft.prepare(model, case.inputs, s2ft.S2FTConfig({"ffn.in": 2}))

    def shifted(slicer, node, x, dim):
        pushed = slice_rules.push_mm(slicer, node, x, dim)
        return slicer.call(torch.ops.aten.mul.Tensor, pushed, 1.01, like=x)

    monkeypatch.setitem(slice_rules.SLICE_RULES, torch.ops.aten.mm.default, shifted)
    with pytest.raises(
        AssertionError, match=r"gradient of blocks.0.ffn.up.weight\[0\] \(ffn.in\) is off by .* at index"
    ):
        assert_gradients(model, plan, case.inputs)


def test_what_gradients_cannot_be_asserted_of_is_refused():
    model = CASE.make()
    plan = s2ft.prepare(model, CASE.inputs, s2ft.S2FTConfig({"ffn.out": 2}))
    with pytest.raises(AssertionError, match="no gradient reaches blocks.0.ffn.down.weight"):
        assert_gradients(model, plan, CASE.inputs, loss=lambda output: 0 * output.sum())
    with pytest.raises(AssertionError, match="nothing was tested"):
        assert_gradients(
            model,
            plan,
            CASE.inputs,
            options=s2ft.CompileOptions(inner="aot_eager", off=("slice_pushdown", "keep_saved", "lower")),
        )
    s2ft.release(model)
    with pytest.raises(StateError, match="the plan that prepare returned"):
        assert_gradients(model, plan, CASE.inputs)
