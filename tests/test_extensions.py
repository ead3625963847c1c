"""What users add: rules for operators of another library, selections, exporters."""

import sys
from pathlib import Path

import pytest
import torch

import s2ft_compile as s2ft
from s2ft_compile.config import SELECTIONS
from s2ft_compile.errors import ConfigError
from s2ft_compile.exporters import registration
from s2ft_compile.passes.backward import slice_rules
from s2ft_compile.passes.couple import rules as axes
from s2ft_compile.passes.couple.rules.contraction import axes_mm
from s2ft_compile.passes.select.selections import SCORES
from s2ft_compile.rules import Value, axis_rule, pin, slice_rule, unify
from s2ft_compile.selections import selection
from s2ft_compile.slices.state import state_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import custom_operator  # noqa: E402

NAME, INPUTS = "example::product", (torch.randn(8, 16, dtype=torch.float64),)


@pytest.fixture
def tables(fresh_compiler):
    """Both tables; what a test puts there is gone after it."""
    return axes.NAMED_AXIS_RULES, slice_rules.NAMED_SLICE_RULES


def gradients(model) -> dict:
    """The gradient of each slice, through the backend."""
    net = torch.compile(model, backend="s2ft", options={"inner": "aot_eager"})
    net(*INPUTS).square().sum().backward()
    return {s.parameter_name: s for s in state_of(model).plan.slices}


def full(model) -> dict:
    model(*INPUTS).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("role, name", [("ffn.out", "down"), ("ffn.in", "up")])
def test_the_example_trains_slices_of_a_custom_operators_weight(role, name):
    model = custom_operator.FeedForward().double()
    twin = custom_operator.FeedForward().double()
    twin.load_state_dict(model.state_dict())
    expected = full(twin)[name]
    s2ft.prepare(model, INPUTS, s2ft.S2FTConfig(targets={role: 4}))
    (s,) = gradients(model).values()
    assert s.parameter_name == name and s.delta.shape[s.dim] == 4
    torch.testing.assert_close(s.delta.grad.double(), expected.index_select(s.dim, s.indices), rtol=1e-6, atol=1e-6)


def test_the_example_runs(capsys):
    model = custom_operator.main()
    assert "1 slices" in capsys.readouterr().out
    assert all(p.grad is not None for p in s2ft.parameters(model))


def test_without_rules_nothing_is_coupled_and_no_gradient_sliced(tables):
    named_axes, named_slices = tables
    del named_axes[NAME]
    assert not any(c.role == "ffn" for c in s2ft.analyze(custom_operator.FeedForward().double(), INPUTS).couplings)
    axis_rule(NAME, like="aten.mm")
    del named_slices[NAME]
    model = custom_operator.FeedForward().double()
    with pytest.raises(ConfigError, match="down cannot train .* by example.product"):
        s2ft.prepare(model, INPUTS, s2ft.S2FTConfig(targets={"ffn.out": 4}))
    explained = s2ft.explain(model, INPUTS, s2ft.S2FTConfig(targets={"ffn.out": 4}))
    why = explained.gradients["down", 0]
    assert why.operator.startswith("example.product") and why.reason in explained.refused and not explained.steps


def test_rules_of_ones_own(tables):
    """A rule that pins is obeyed; a rule of slices is called, and what it gives is the gradient."""
    calls = []

    @axis_rule(NAME)
    def axes_product(cx, node, a, b):
        calls.append("axes")
        return axes_mm(cx, node, a, b)

    @slice_rule(NAME)
    def push_product(editor, node, x, dim):
        calls.append("push")
        a, b = x.args
        a, b = (editor.take(a, 0, node), b) if dim == 0 else (a, editor.take(b, 1, node))
        return editor.call(x.target, a, b, like=x)

    model = custom_operator.FeedForward().double()
    s2ft.prepare(model, INPUTS, s2ft.S2FTConfig(targets={"ffn.in": 4}))
    gradients(model)
    assert {"axes", "push"} <= set(calls)

    @axis_rule(NAME)
    def careful(cx, node, a, b):
        why = s2ft.rules.Pin("its columns are in order", node)
        unify(a.dims[1], b.dims[0], why)
        pin(b.dims[1], why)
        return Value([a.dims[0], b.dims[1]])

    refusals = s2ft.analyze(custom_operator.FeedForward().double(), INPUTS).refusals
    assert any(r.reason == "its columns are in order" and r.operator == "example.product.default" for r in refusals)


@pytest.mark.parametrize(
    "operator, like",
    [
        ("product", None),
        ("example::product.default", None),
        ("::product", None),
        (3, None),
        ("aten::mm", None),
        ("s2ft::attach", None),
        ("other::op", "aten.no_such_thing"),
        ("other::op", "aten"),
        ("other::op", "aten.histc"),
    ],
)
def test_what_cannot_be_a_rule_is_refused(tables, operator, like):
    for door, table in zip((axis_rule, slice_rule), tables):
        before = dict(table)
        with pytest.raises(ConfigError):
            door(operator, like=like)
        assert table == before
    with pytest.raises(ConfigError, match="is a function"):
        axis_rule("other::op")("not a function")


def raises(*args):
    raise KeyError("surprise")


def everything(slicer, node, x, dim):
    return slicer.call(x.target, *x.args, like=x)


@pytest.mark.parametrize("rule", [raises, everything, lambda *args: "no", lambda *args: None])
def test_a_wrong_slice_rule_refuses_its_operator_before_anything_trains(tables, rule):
    """Whether it fails, computes all of the gradient, gives no node, or nothing."""
    slice_rule(NAME)(rule)
    model = custom_operator.FeedForward().double()
    with pytest.raises(ConfigError) as refused:
        s2ft.prepare(model, INPUTS, s2ft.S2FTConfig(targets={"ffn.out": 4}))
    assert NAME.replace("::", ".") in str(refused.value) and not s2ft.is_prepared(model)
    reasons = [why.reason for why in s2ft.explain(model, INPUTS).gradients.values()]
    assert reasons and all("slice rule" in why and ("surprise" in why) == (rule is raises) for why in reasons)


@pytest.mark.parametrize("rule", [raises, lambda cx, node, a, b: a.dims[:1], lambda cx, node, a: a, lambda *args: None])
def test_a_wrong_axis_rule_refuses_its_axes_and_is_named(tables, rule):
    axis_rule(NAME)(rule)
    analysis = s2ft.analyze(custom_operator.FeedForward().double(), INPUTS)
    assert not any(c.role == "ffn" for c in analysis.couplings)
    assert all(r.reason.startswith("the rule for example.product failed") for r in analysis.refusals)
    assert analysis.refusals


# --- selections and exporters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("needs", ["weight", "gradients"])
def test_a_registered_selection_chooses_and_its_plan_is_read_without_it(needs):
    @selection("mine::last", needs=needs)
    def last(x, dim):
        return torch.arange(x.shape[dim], dtype=torch.float64)

    model = custom_operator.FeedForward().double()
    config = s2ft.S2FTConfig(targets={"ffn.out": 4}, selection="mine::last")
    batches = [INPUTS] if needs == "gradients" else None
    plan = s2ft.prepare(model, INPUTS, config, batches, loss=lambda output, batch: output.square().sum())
    hidden = plan.slices[0].shape[plan.slices[0].dim]
    assert plan.slices[0].indices.tolist() == [*range(hidden - 4, hidden)] and config.scored
    del SELECTIONS["mine::last"], SCORES["mine::last"]
    read = s2ft.S2FTConfig.from_dict(config.to_dict())
    with pytest.raises(ConfigError, match="register it"):
        s2ft.prepare(custom_operator.FeedForward().double(), INPUTS, read)


@pytest.mark.parametrize(
    "name, needs",
    [("last", "weight"), ("::last", "weight"), ("mine::a:b", "weight"), (3, "weight"), ("mine::last", "?")],
)
def test_what_cannot_be_a_selection_is_refused(name, needs):
    before = dict(SELECTIONS)
    with pytest.raises(ConfigError, match="namespace::name|unknown needs"):
        selection(name, needs=needs)
    with pytest.raises(ConfigError, match="function of scores"):
        selection("mine::last", needs="weight")("no function")
    assert before == SELECTIONS


@pytest.mark.parametrize(
    "score",
    [lambda x, dim: None, lambda x, dim: x.new_zeros(3), lambda x, dim: x.new_full((x.shape[dim],), float("nan"))],
    ids=["none", "three", "nan"],
)
@pytest.mark.parametrize("needs", ["weight", "gradients"])
def test_what_are_no_scores_selects_nothing(fresh_compiler, needs, score):
    selection("mine::wrong", needs=needs)(score)
    model = custom_operator.FeedForward().double()
    config = s2ft.S2FTConfig(targets={"ffn.out": 4}, selection="mine::wrong")
    batches = [INPUTS] if needs == "gradients" else None
    with pytest.raises(ConfigError, match="it has to return 64 scores|not finite"):
        s2ft.prepare(model, INPUTS, config, batches, loss=lambda output, batch: output.square().sum())
    assert not s2ft.is_prepared(model)


@pytest.fixture
def exporters(monkeypatch):
    monkeypatch.setattr(registration, "REGISTERED", {})
    yield s2ft.exporters
    for name in registration.REGISTERED:
        delattr(s2ft.exporters, name)


def test_a_registered_exporter_gets_a_plain_model_and_leaves_all_or_nothing(exporters, tmp_path):
    @exporters.exporter
    def save_twice(model, folder, broken=False):
        torch.save(model.state_dict(), folder / "weights.pt")
        if broken:
            raise ValueError("a full disk")
        return "its result is not used"

    model = custom_operator.FeedForward().double()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    s2ft.prepare(model, INPUTS, s2ft.S2FTConfig(targets={"ffn.out": 4}))
    assert exporters.save_twice(model, tmp_path / "out") == tmp_path / "out"
    held = torch.load(tmp_path / "out" / "weights.pt")
    assert held.keys() == base.keys() and all(torch.equal(held[name], base[name]) for name in base)
    assert s2ft.is_prepared(model)
    with pytest.raises(ValueError, match="a full disk"):
        exporters.save_twice(model, tmp_path / "other", broken=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(s2ft.ExportError, match="exists"):
        exporters.save_twice(model, tmp_path / "out")


def test_what_cannot_be_an_exporter_is_refused(exporters):
    def save_merged(model, folder):
        pass

    for wrong in (save_merged, lambda model, folder: None, "save"):
        with pytest.raises(ConfigError, match="already|a function with a name"):
            exporters.exporter(wrong)
    assert registration.REGISTERED == {}
