"""The backend as people call it: found by name, options, first call, graph breaks, lengths, inference."""

import copy
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func
from small import NOISE64, assert_gradients, compiled, drawn, full_gradients, prepared
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import s2ft_compile as s2ft
from s2ft_compile.backend import s2ft as backend
from s2ft_compile.errors import ConfigError
from s2ft_compile.slices.state import state_of

TARGETS = {"ffn.out": 0.5, "attention.out": 1}


def graphs_and_breaks() -> tuple[int, int]:
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


# --- found by name, options -----------------------------------------------------------------------------------------


FIRST_CALL = """
import sys, torch
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
imported = "s2ft_compile" in sys.modules
net = torch.compile(model, backend="s2ft", options={"inner": "eager", "targets": {"0.weight": 2}})
net(torch.randn(3, 4)).sum().backward()
print(imported, sorted(n for n, p in model.named_parameters() if p.grad is not None))
"""


def in_a_new_process(**environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", FIRST_CALL],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


def test_the_backend_is_found_without_an_import():
    done = in_a_new_process()
    assert done.stdout.strip() == "False ['0.weight_delta']", done.stderr[-2000:]


def test_torch_logs_show_what_each_stage_did():
    log = in_a_new_process(TORCH_LOGS="s2ft_compile").stderr
    for line in (
        "captured Sequential",
        "found 1 couplings",
        "prepared Sequential: 1 slices, 8 parameters train",
        "1 of a graph's 6 inputs are weights with a delta",
    ):
        assert line in log, log[-2000:]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"iner": "eager"}, "unknown option 'iner'; valid options: targets, selection, .*inner"),
        ({"inner": "onnx"}, "unknown inner backend 'onnx'; valid: inductor, aot_eager, eager"),
        ({"targets": {"ffn.aut": 1}}, "'ffn.aut' is neither a role"),
        ({"targets": {"ffn.out": 9}}, "asks for 9 units, but there are 8"),
    ],
)
def test_options_that_are_wrong_are_refused_and_the_model_is_unchanged(options, message):
    case = drawn()
    model = case.make()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(BackendCompilerFailed, match=message) as error:
        torch.compile(model, backend="s2ft", options=options)(*case.inputs)
    assert isinstance(error.value.inner_exception, ConfigError)
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in model.named_parameters())
    assert not s2ft.is_prepared(model)


def test_options_must_be_those_of_the_plan():
    case, model = prepared(TARGETS)
    with pytest.raises(BackendCompilerFailed, match="differ from those the model was prepared with"):
        compiled(model, targets={"ffn.out": 2})(*case.inputs)
    assert compiled(model, targets=TARGETS)(*case.inputs) is not None


# --- the first call -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True])
def test_the_first_call_prepares(in_place):
    case = drawn()
    model = case.make()
    options = {"inner": "aot_eager", "targets": TARGETS, "seed": 3}
    net = model if in_place else torch.compile(model, backend="s2ft", options=options)
    if in_place:
        model.compile(backend="s2ft", options=options)
    case.loss(net).backward()
    twin = case.make()
    expected = s2ft.prepare(twin, case.inputs, s2ft.S2FTConfig(TARGETS, seed=3))
    plan = state_of(net).plan
    assert plan.to_dict() == expected.to_dict()
    assert_gradients(plan, full_gradients(case.make(), case.loss), NOISE64)
    assert graphs_and_breaks() == (1, 0)


def test_inference_does_not_prepare():
    case = drawn()
    model = case.make()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    net = compiled(model)
    with torch.no_grad():
        output = net(*case.inputs)
    torch.testing.assert_close(output, model(*case.inputs), rtol=NOISE64, atol=NOISE64)
    assert not s2ft.is_prepared(model) and all(torch.equal(p, before[n]) for n, p in model.named_parameters())


# --- graph breaks ---------------------------------------------------------------------------------------------------


def broken_up(model: nn.Module) -> nn.Module:
    """The same computation, with a graph break in front of every FFN and one inside the last block."""
    for block in model.blocks:

        def forward(x, run=block.ffn.forward):
            torch._dynamo.graph_break()
            return run(x)

        block.ffn.forward = forward
    return model


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
@pytest.mark.parametrize("first_call", [False, True])
def test_training_through_graph_breaks(inner, first_call):
    case = drawn()
    model = case.make()
    if not first_call:
        s2ft.prepare(model, case.inputs, s2ft.S2FTConfig(TARGETS))
    net = compiled(broken_up(model), inner, targets=TARGETS)
    optimizer = None
    for _ in range(2):
        case.loss(net).backward()
        optimizer = optimizer or torch.optim.SGD(s2ft.parameters(net), lr=0.0)
        plan = state_of(net).plan
        assert len(plan.slices) == 4, "both structures of both blocks"
        assert_gradients(plan, full_gradients(case.make(), case.loss), NOISE64)
        optimizer.step()
        optimizer.zero_grad()
    assert graphs_and_breaks()[0] > 2


# --- lengths, accumulation, inference ---------------------------------------------------------------------------------


def test_lengths_and_accumulation_recompile_once():
    """A second length makes the sizes dynamic; after that nothing compiles again."""
    case, model = prepared(TARGETS)
    net, full = compiled(model), case.make()
    random = torch.Generator().manual_seed(0)
    optimizer, seen = torch.optim.SGD(s2ft.parameters(model), lr=0.0), []
    for batch, length in [(2, 5), (2, 7), (2, 9), (3, 4), (3, 11), (2, 6)]:
        x = torch.randint(case.spec.vocab, (batch, length), generator=random)
        loss = lambda m: m(x).square().mean()  # noqa: B023, E731
        optimizer.zero_grad()
        loss(net).backward()
        assert_gradients(state_of(model).plan, full_gradients(full, loss), NOISE64)
        loss(net).backward()  # accumulates
        optimizer.step()
        seen.append(counters["stats"]["unique_graphs"])
    assert seen[-1] == seen[3] <= 3, seen


def test_inference_follows_training():
    """Under no_grad, in eval mode and in a plain call of the model, the weights are the trained ones."""
    case, model = prepared(TARGETS)
    net, optimizer = compiled(model), torch.optim.SGD(s2ft.parameters(model), lr=0.5)
    with torch.no_grad():
        first = net(*case.inputs)
    for _ in range(2):
        case.loss(net).backward()
        optimizer.step()
        with torch.no_grad():
            after = net(*case.inputs)
        torch.testing.assert_close(after, model(*case.inputs), rtol=NOISE64, atol=NOISE64)
        assert not torch.equal(first, after)
    with torch.inference_mode():
        torch.testing.assert_close(model(*case.inputs), after, rtol=NOISE64, atol=NOISE64)


# --- CUDA graphs ----------------------------------------------------------------------------------------------------


def replayed(gm, inputs, **_):
    """A graph whose results lie in the same memory in every run, as those of a CUDA graph do."""
    memory: dict[int, torch.Tensor] = {}

    def run(*args):
        results = gm.forward(*args)
        for i, value in enumerate(results):
            if isinstance(value, torch.Tensor):
                memory.setdefault(i, torch.empty_like(value)).copy_(value)
        return [memory[i].detach() if i in memory else value for i, value in enumerate(results)]

    return make_boxed_func(run)


@pytest.mark.parametrize("copied", [False, True])
def test_micro_batches_add_up_where_a_graph_writes_to_the_same_memory(copied):
    case, model = prepared(TARGETS)
    compiler = partial(torch.compile, backend=partial(backend, inner_compile=replayed, mode="reduce-overhead"))
    net = compiler(model)
    batches, expected = [case.inputs, tuple(x.flip(0) * 2 for x in case.inputs)], []
    for inputs in batches:
        model.zero_grad()
        net(*inputs).sum().backward()
        expected.append([delta.grad.clone() for delta in s2ft.parameters(model)])
    if copied:  # parameters lose their hooks
        net = compiler(model := copy.deepcopy(model))
    model.zero_grad()
    for inputs in batches:
        net(*inputs).sum().backward()
    for delta, *parts in zip(s2ft.parameters(model), *expected):
        torch.testing.assert_close(delta.grad, sum(parts), rtol=0, atol=NOISE64 * sum(parts).abs().max())
