"""The list of passes: what each ensures is asked, errors name their place, passes go off by name, traces and keys."""

from dataclasses import replace

import pytest
import torch
from small import U32, assert_gradients, assert_unchanged, compiled, drawn, full_gradients, prepared, snapshot
from torch.fx.experimental.proxy_tensor import make_fx

import s2ft_compile as s2ft
from s2ft_compile import pipeline, rules
from s2ft_compile.config import CompileOptions
from s2ft_compile.errors import CompileError, ConfigError, StateError
from s2ft_compile.passes import tracing
from s2ft_compile.passes.backward.attach import attach
from s2ft_compile.pipeline import JOINT, PASSES, Pipeline
from s2ft_compile.slices.state import state_of

W, X = torch.randn(8, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
DELTA = torch.zeros(2, 6, requires_grad=True)


def joint_graph():
    """(output, gradient of a delta) of a linear, before any pass; and the gradient."""

    def joint(W, D, x):
        y = torch.nn.functional.linear(x, attach(W, D, 0, [1], [2]))
        return y, *torch.autograd.grad(y.sin().sum(), D)

    graph = make_fx(joint, tracing_mode="fake")(W, DELTA, X)
    return graph, graph(W, DELTA, X)[1]


def changed(monkeypatch, name: str, **fields) -> None:
    """Puts another function in the place of a pass's own."""
    monkeypatch.setattr(pipeline, "PASSES", tuple(replace(p, **fields) if p.name == name else p for p in PASSES))


def test_passes_are_in_the_order_of_their_levels_and_have_names_of_their_own():
    assert [p.level for p in PASSES] == sorted((p.level for p in PASSES), key=["dynamo", "joint", "Inductor"].index)
    assert len({p.name for p in PASSES}) == len(PASSES)


# --- what is ensured, and errors --------------------------------------------------------------------------------------


def test_what_a_pass_leaves_is_checked(monkeypatch):
    """The control of `ensures`: pushdown that does nothing, which would leave gradients at full size."""
    changed(monkeypatch, "slice_pushdown", run=lambda graph, inputs: None)
    with pytest.raises(CompileError, match=r"s2ft.attach.* is left .*pass slice_pushdown of graph 7, after recheck"):
        Pipeline(CompileOptions(), 7).rewrite(joint_graph()[0].graph, JOINT)


def without_an_output(graph, inputs):
    graph.output_node().args = (graph.output_node().args[0][:1],)


def with_another_shape(graph, inputs):
    y, grad = graph.output_node().args[0]
    graph.output_node().args = ([y, y],)


@pytest.mark.parametrize("wrong", [without_an_output, with_another_shape])
def test_a_pass_keeps_what_a_graph_gives(monkeypatch, wrong):
    changed(monkeypatch, "lower", run=wrong)
    with pytest.raises(CompileError, match=r"keeps what a graph takes and gives.*pass lower"):
        Pipeline(CompileOptions()).rewrite(joint_graph()[0].graph, JOINT)


@pytest.mark.parametrize("error", [CompileError("it broke"), KeyError("it broke")])
def test_an_error_names_its_pass_and_those_before(monkeypatch, error):
    def fails(graph, inputs):
        raise error

    changed(monkeypatch, "lower", run=fails)
    with pytest.raises(CompileError) as raised:
        Pipeline(CompileOptions()).rewrite(joint_graph()[0].graph, JOINT)
    assert "it broke" in str(raised.value)
    assert "pass lower of graph 0, after recheck, slice_pushdown, keep_saved" in str(raised.value)


@pytest.mark.parametrize("error", [MemoryError(), OSError(28, "No space left on device")])
def test_an_error_of_the_system_stays_what_it_is(monkeypatch, error):
    def fails(graph, inputs):
        raise error

    changed(monkeypatch, "lower", run=fails)
    with pytest.raises(type(error)) as raised:
        Pipeline(CompileOptions()).rewrite(joint_graph()[0].graph, JOINT)
    assert raised.value is error


# --- off --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [p.name for p in PASSES])
def test_without_any_one_pass_the_gradient_is_the_same(name):
    graph, expected = joint_graph()
    done = Pipeline(CompileOptions(off=[name], logits=False))
    assert [p.name for p in done.passes] == [p.name for p in PASSES if p.name not in (name, "fp8")]
    done.rewrite(graph.graph, JOINT)
    graph.recompile()
    torch.testing.assert_close(graph(W, DELTA, X)[1], expected, rtol=4 * U32, atol=0)


def test_a_pass_is_switched_off_from_the_backends_options():
    case, model = prepared({"ffn.out": 2})
    loss = case.loss(compiled(model, off=("slice_pushdown", "recheck")))
    loss.backward()
    assert_gradients(state_of(model).plan, full_gradients(case.make(), case.loss), 1e-10)


def test_existing_options_switch_passes_off():
    names = lambda **how: {p.name for p in Pipeline(CompileOptions(**how)).passes}  # noqa: E731
    assert names(logits=False) - names() == {"chunk_loss"} and names(fp8=True) - names() == {"fp8"}
    assert names() - names(kernels=False) == {"lower", "see_through"}


@pytest.mark.parametrize(
    "how", [{"off": ["pushdown"]}, {"off": "lower"}, {"off": [3]}, {"trace": 3}, {"trace": __file__}]
)
def test_what_cannot_be_off_or_traced_is_refused(how):
    with pytest.raises(ConfigError, match="recheck, chunk_loss, slice_pushdown|is a list of names|is a folder"):
        Pipeline(CompileOptions(**how))


# --- traces -----------------------------------------------------------------------------------------------------------


def test_a_trace_holds_every_graph_before_and_after_with_what_changed(tmp_path):
    folder = tmp_path / "new" / "trace"
    with tracing.recorded() as steps:
        Pipeline(CompileOptions(trace=folder, off=["keep_saved"]), 3).rewrite(joint_graph()[0].graph, JOINT)
    assert sorted(f.name for f in folder.iterdir()) == [
        f"003-joint-{name}.{when}.txt" for name in ("lower", "slice_pushdown") for when in ("after", "before")
    ]
    title, *lines = (folder / "003-joint-slice_pushdown.after.txt").read_text().splitlines()
    assert title.startswith("# graph 3, joint, slice_pushdown: ") and "-1 s2ft.attach.default" in title
    assert any(line.endswith(": float64[8, 6] = input") for line in lines), "the weight"
    assert not any("float64[8, 6]" in line for line in lines if "= aten." in line), "no gradient at full size"
    assert [s.name for s in steps] == ["slice_pushdown", "lower"] and steps[1].changed == {}
    assert steps[0].after == steps[1].before == "\n".join(lines)


# --- the key of compile caches ----------------------------------------------------------------------------------------


def key(**how):
    return Pipeline(CompileOptions(**how)).uuid()


def test_the_key_is_of_all_that_a_compiled_graph_depends_on(monkeypatch):
    monkeypatch.setattr(rules.slices, "NAMED_SLICE_RULES", dict(rules.slices.NAMED_SLICE_RULES))
    assert key() == key() != key(off=["lower"])
    assert key(kernels=False) == key(off=["lower", "see_through"])
    before, captured = key(), [1]
    rules.slice_rule("other::op")(lambda slicer, node, x, dim: captured[0])
    one = key()
    rules.slice_rule("other::op")(lambda slicer, node, x, dim: captured[0] + 1)
    two = key()
    captured[0] = 2
    assert len({before, one, two, key()}) == 4, "a rule, its code, and what it captures"
    assert key(trace="anywhere") is None, "what came from a cache would leave no trace"


def test_the_key_reads_modules_that_give_constants_only(monkeypatch, tmp_path):
    """Every module of the passes' folders that theirs import, found without a list."""
    files = pipeline.sources(tuple(m.__name__ for p in PASSES for m in p.modules))
    read = {file.split("s2ft_compile/")[-1] for file in files}
    assert {"kernels/support.py", "kernels/slice_grad.py", "passes/editor.py"} <= read
    assert {f"passes/backward/{name}.py" for name in ("attach", "convolution", "grouped", "slice_rules")} <= read
    assert not any("cli/" in file or "exporters/" in file for file in read)


# --- explain ----------------------------------------------------------------------------------------------------------


def test_explain_says_what_changed_and_what_did_not_and_leaves_the_model_alone():
    case = drawn(blocks=1, decoy="cumsum")
    model = case.make()
    before = snapshot(model)
    explanation = s2ft.explain(model, case.inputs, s2ft.S2FTConfig({"attention.out": 1}))
    assert_unchanged(model, before)
    assert {s.name for s in explanation.steps} == {p.name for p in PASSES} - {"chunk_loss", "fp8"}
    assert any("cumsum" in r.reason for r in explanation.axes) and "cumsum" in str(explanation)
    none = s2ft.explain(model, case.inputs, s2ft.S2FTConfig({"moe.out": 1}))
    assert none.steps == () and "roles found" in none.refused and none.refused in str(none)
    s2ft.prepare(model, case.inputs, s2ft.S2FTConfig({"attention.out": 1}))
    with pytest.raises(StateError, match="release"):
        s2ft.explain(model, case.inputs)
