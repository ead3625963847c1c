"""Lowering: the same gradients, one kernel for each use of a slice, no cast and no sum after it; forced on the CPU,
where the operator runs its reference."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import interpreted
from small import QUICK, cases, compiled, hf, tokens
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional
from torch._subclasses import fake_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import s2ft_compile as s2ft
from s2ft_compile.kernels import slice_grad, support
from s2ft_compile.passes.backward import lower as lower_pass
from s2ft_compile.passes.backward.lower import SLICE_GRAD, lower, see_through

pytestmark = pytest.mark.interpreted

aten = torch.ops.aten
HOPPER = (9, 0)
T, M, N = 6, 5, 3


def graph_of(function, *inputs):
    return make_fx(function, tracing_mode="fake")(*inputs)


def count(graph, target) -> int:
    return len(graph.find_nodes(op="call_function", target=target))


def float32(x):
    return aten._to_copy(x, dtype=torch.float32)


def bf16(*shape):
    return torch.randn(*shape).bfloat16()


# what slice pushdown leaves of a gradient, of dY (6 × 5), X (6 × 3) and others of their shapes -> how many products
GRADIENTS = {
    "linear": (lambda y, x, *_: float32(aten.mm(aten.t(y), x)), 1),
    "transposed": (lambda y, x, *_: float32(aten.t(aten.mm(aten.t(y), x))), 1),
    "turned twice": (lambda y, x, *_: float32(aten.transpose(aten.permute(aten.mm(aten.t(y), x), [1, 0]), -2, -1)), 1),
    "turned by nothing": (lambda y, x, *_: float32(aten.permute(aten.mm(aten.t(y), x), [0, -1])), 1),
    "turned from behind": (lambda y, x, *_: float32(aten.permute(aten.mm(aten.t(y), x), [-1, -2])), 1),
    "operands as they lie": (lambda y, x, u, v, z: float32(aten.mm(z, x)), 1),
    "cast before": (lambda y, x, *_: aten.t(float32(aten.mm(aten.t(y), x))), 1),
    "two uses": (lambda y, x, u, v, z: float32(aten.add(aten.mm(aten.t(y), x), aten.mm(aten.t(u), v))), 2),
    "two uses, one transposed": (
        lambda y, x, u, v, z: float32(aten.add(aten.t(aten.mm(aten.t(y), x)), aten.mm(aten.t(v), u))),
        2,
    ),
    "three uses, cast one by one": (
        lambda y, x, u, v, z: aten.add(
            aten.add(float32(aten.mm(aten.t(y), x)), float32(aten.mm(aten.t(u), v))), float32(aten.mm(z, x))
        ),
        3,
    ),
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_a_gradient_becomes_a_kernel_for_each_product(case):
    function, uses = GRADIENTS[case]
    inputs = bf16(T, M), bf16(T, N), bf16(T, M), bf16(T, N), bf16(M, T)
    gm = graph_of(function, *inputs)
    assert lower(gm.graph, None) == 0 and not count(gm.graph, SLICE_GRAD), "no capability: aten runs"
    assert lower(gm.graph, HOPPER) == 1
    gm.recompile()
    assert count(gm.graph, SLICE_GRAD) == uses
    left = {n.target for n in gm.graph.nodes if n.op == "call_function"}
    assert left <= {SLICE_GRAD, aten.t.default, aten.permute.default}, left
    exact = function(*[x.double() for x in inputs])  # the cast is the only thing that this rounds: to float32
    sizes = function(*[x.double().abs() for x in inputs])
    outputs = gm(*inputs)
    assert outputs.dtype == torch.float32 and outputs.shape == exact.shape
    assert ((outputs - exact).abs() <= (3 * T + 1) * 2.0**-24 * sizes).all()


LEFT_ALONE = {
    "float32 operands": (lambda y, x: float32(aten.mm(aten.t(y.float()), x.float())) * 1.0),
    "a product that is used again": lambda y, x: (float32(m := aten.mm(aten.t(y), x)), m * 2),
    "something scaled": lambda y, x: float32(aten.mm(aten.t(y), x) * 0.5),
    "a sum with a row": lambda y, x: float32(aten.add(aten.mm(aten.t(y), x), x[0])),
    "a scaled sum": lambda y, x: float32(aten.add(aten.mm(aten.t(y), x), aten.mm(aten.t(y), x), alpha=2)),
    "a bf16 result": lambda y, x: aten.mm(aten.t(y), x),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_is_something_else_stays(case):
    gm = graph_of(LEFT_ALONE[case], bf16(T, M), bf16(T, N))
    before = [n.target for n in gm.graph.nodes]
    assert lower(gm.graph, HOPPER) == 0 and [n.target for n in gm.graph.nodes] == before


def test_the_forward_stays():
    gm = graph_of(lambda y, x: float32(aten.mm(aten.t(y), x)), bf16(T, M), bf16(T, N))
    for node in gm.graph.nodes:
        node.meta["partitioner_tag"] = "is_forward"
    assert lower(gm.graph, HOPPER) == 0


def test_large_gradients_are_products_of_cublas_with_a_float32_result(monkeypatch):
    monkeypatch.setattr(lower_pass, "LARGE", M * N)
    for case, (function, uses) in GRADIENTS.items():
        gm = graph_of(function, bf16(T, M), bf16(T, N), bf16(T, M), bf16(T, N), bf16(M, T))
        shape = gm.graph.find_nodes(op="output")[0].args[0].meta["val"].shape
        assert lower(gm.graph, HOPPER) == 1
        result = gm.graph.find_nodes(op="output")[0].args[0].meta["val"]
        assert count(gm.graph, aten.mm.dtype) == uses and not count(gm.graph, SLICE_GRAD), case
        assert result.shape == shape and result.dtype == torch.float32 and not count(gm.graph, aten._to_copy.default)


def test_a_slice_of_what_the_backward_makes_is_read_in_place():
    def function(y, x):
        dY, X = aten.mul(y, 2.0), aten.relu(x)
        return float32(aten.mm(aten.clone(aten.slice(aten.t(dY), 0, 1, 4)), aten.clone(aten.slice(X, 1, 0, 2))))

    gm = graph_of(function, bf16(T, M), bf16(T, N))
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.meta["partitioner_tag"] = "is_forward" if node.target is aten.relu.default else "is_backward"
    lower(gm.graph, HOPPER)
    (kernel,) = gm.graph.find_nodes(op="call_function", target=SLICE_GRAD)
    assert kernel.args[0].meta["val"].stride() == (M, 1)
    assert count(gm.graph, aten.clone.default) == 1, "what the forward saves is still a copy"


# --- models ---------------------------------------------------------------------------------------------------


def gradients(model, loss, autocast: bool = False, inner: str = "aot_eager"):
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = loss(compiled(model, inner))
    value.backward()
    gradients_of_deltas = [p.grad.clone() for p in s2ft.parameters(model)]
    for p in s2ft.parameters(model):
        p.grad = None
    return gradients_of_deltas


def test_a_gradient_is_made_as_soon_as_its_operands_are(monkeypatch):
    """At the end of the backward, where autograd has it, every layer's dY would be alive at once."""
    waits = []

    def lowered(graph, capability):
        lower(graph, HOPPER)
        nodes = list(graph.nodes)
        for i, node in enumerate(nodes):
            if node.target is SLICE_GRAD:
                between = nodes[max(map(nodes.index, node.all_input_nodes)) + 1 : i]
                waits.append([n for n in between if n.target is not SLICE_GRAD])

    monkeypatch.setattr(lower_pass, "lower", lowered)
    model, ids = hf("llama").bfloat16(), tokens()
    s2ft.prepare(model, {"input_ids": ids}, s2ft.S2FTConfig(targets={"attention.out": 1, "ffn.out": 5}))
    compiled(model)(input_ids=ids, labels=ids).loss.backward()
    assert len(waits) == 4 and not any(waits)


class Forced:
    """Lowers as if there were a GPU, and keeps what it made of each graph."""

    def __init__(self, monkeypatch):
        self.graphs = []
        monkeypatch.setattr(lower_pass, "graph_capability", lambda graph: HOPPER)
        monkeypatch.setattr(lower_pass, "lower", self)

    def __call__(self, graph, capability):
        lowered = lower(graph, capability)
        self.graphs.append(
            (
                lowered,
                count(graph, SLICE_GRAD),
                [
                    n.target
                    for n in graph.find_nodes(op="output")[0].all_input_nodes
                    if n.meta.get("partitioner_tag") != "is_forward" and n.op == "call_function"
                ],
            )
        )
        return lowered


def assert_rounded_alike(lowered, plain):
    """The two differ in the rounding to bf16 of a product, and in the order of float32 sums."""
    for a, b in zip(lowered, plain, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert ((a - b).abs() <= 2.0**-8 * b.abs() + 2.0**-16 * b.abs().max()).all()
        assert not torch.equal(a, b), "nothing was lowered"


TARGETS = {"attention.out": 1, "attention.value": 1, "ffn.in": 3, "ffn.out": 5}


@pytest.mark.parametrize("family, autocast", [("llama", False), ("llama", True), ("gpt2", False), ("bert", False)])
def test_a_model_has_one_kernel_for_each_slice(family, autocast, monkeypatch):
    model, ids = hf(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 1}), tokens()
    model = model if autocast else model.bfloat16()
    s2ft.prepare(model, {"input_ids": ids}, s2ft.S2FTConfig(targets=TARGETS))

    def loss(net):
        return net(input_ids=ids, labels=ids).loss

    plain = gradients(model, loss, autocast)
    forced = Forced(monkeypatch)
    lowered = gradients(model, loss, autocast)
    n = len(s2ft.parameters(model))
    assert forced.graphs == [(n, n, [SLICE_GRAD] * n)]
    assert_rounded_alike(lowered, plain)


@pytest.mark.slow
def test_inductor_runs_the_reference_on_the_cpu(monkeypatch):
    """The whole way with Inductor, where the operator is a call; a cached graph would not be lowered."""
    monkeypatch.setattr(torch._functorch.config, "enable_autograd_cache", False)
    model, ids = hf("gpt2", n_layer=1).bfloat16(), tokens()
    s2ft.prepare(model, {"input_ids": ids}, s2ft.S2FTConfig(targets={"ffn.out": 3, "attention.value": 1}))
    forced = Forced(monkeypatch)
    lowered = gradients(model, lambda net: net(input_ids=ids, labels=ids).loss, inner="inductor")
    assert [g[:2] for g in forced.graphs] == [(2, 2)]
    monkeypatch.setattr(lower_pass, "graph_capability", lambda graph: None)
    assert_inductor_close(lowered, gradients(model, lambda net: net(input_ids=ids, labels=ids).loss, inner="inductor"))


def assert_inductor_close(lowered, plain):
    for a, b in zip(lowered, plain, strict=True):  # Inductor also rounds less on the way, by how it fuses
        assert (a - b).norm() <= 2.0**-6 * b.norm()


@settings(max_examples=3, phases=QUICK)
@given(cases(max_blocks=1), st.sampled_from([{"ffn.out": 2}, {"ffn.in": 2, "attention.value": 1}]))
def test_drawn_models(case, targets):
    """Drawn models in bf16: with biases (never lowered), fused and transposed projections."""
    model = case.make().bfloat16()
    inputs = [x.bfloat16() if x.is_floating_point() else x for x in case.inputs]
    s2ft.prepare(model, tuple(inputs), s2ft.S2FTConfig(targets=targets))

    def loss(net):
        output = net(*inputs)
        return sum((o.float() ** 2).mean() for o in (output if isinstance(output, tuple) else (output,)))

    plain = gradients(model, loss)
    with pytest.MonkeyPatch.context() as patch:
        forced = Forced(patch)
        lowered = gradients(model, loss)
    matrices = sum(p.ndim == 2 for p in s2ft.parameters(model))
    assert [g[:2] for g in forced.graphs] == [(matrices, matrices)]
    for a, b in zip(lowered, plain, strict=True):
        assert ((a - b).abs() <= 2.0**-8 * b.abs() + 2.0**-12 * b.abs().max()).all()


@pytest.mark.gpu
@pytest.mark.parametrize("inner", ["inductor", "aot_eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_on_a_gpu_every_slice_has_its_kernel(family, inner, monkeypatch):
    """Without forcing anything: the same numbers as on the CPU's way, which casts a rounded product."""
    monkeypatch.setattr(torch._functorch.config, "enable_autograd_cache", False)
    model, ids = hf(family).to("cuda", torch.bfloat16), tokens().cuda()
    s2ft.prepare(model, {"input_ids": ids}, s2ft.S2FTConfig(targets=TARGETS))
    counted = []
    monkeypatch.setattr(lower_pass, "lower", lambda graph, capability: counted.append(lower(graph, capability)))
    lowered = gradients(model, lambda net: net(input_ids=ids, labels=ids).loss, inner=inner)
    assert counted == [len(s2ft.parameters(model))]
    monkeypatch.setattr(lower_pass, "graph_capability", lambda graph: None)
    assert_inductor_close(lowered, gradients(model, lambda net: net(input_ids=ids, labels=ids).loss, inner=inner))


# --- devices --------------------------------------------------------------------------------------------------


@pytest.fixture
def new_devices():
    support._capability.cache_clear()
    yield
    support._capability.cache_clear()


@pytest.mark.parametrize("device, why", [("cpu", "CUDA GPUs"), ("cuda:0", "7.5, under 8.0")])
def test_one_line_where_aten_runs(device, why, monkeypatch, caplog, new_devices):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with caplog.at_level(logging.INFO, support.log.name):
        assert [support.capability(torch.device(device)) for _ in range(3)] == [None] * 3
    assert len(caplog.records) == 1 and why in caplog.text and device in caplog.text


def test_a_gpu_without_triton_with_it_and_one_that_it_fails_on(monkeypatch, caplog, new_devices):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    with monkeypatch.context() as patched:
        patched.setattr(support, "_failure", lambda device: None)
        assert support.capability(torch.device("cuda:0")) == HOPPER and not caplog.records
    assert support.capability(torch.device("cuda:2")) is None and "a first kernel fails with" in caplog.text
    monkeypatch.setattr(support, "triton", None)
    assert support.capability(torch.device("cuda:1")) is None and "not installed" in caplog.text


def test_the_first_kernel_tells_right_from_wrong(monkeypatch):
    """In the interpreter on the CPU."""
    right = interpreted(support._probe)
    monkeypatch.setattr(support, "_probe", right)
    assert support._failure(torch.device("cpu")) is None
    monkeypatch.setattr(support, "_probe", {(1,): lambda x, out: out.zero_()})
    assert "wrong results" in support._failure(torch.device("cpu"))


def test_a_launch_is_on_the_gpu_of_its_tensors(monkeypatch):
    """Which is not the current one where a model lies on several; and no GPU is touched while a graph is traced."""

    class OnGpu(torch.Tensor):
        is_cuda, device = True, torch.device("cuda:1")

    taken = []
    monkeypatch.setattr(support, "nullcontext", lambda: "none")
    monkeypatch.setattr(torch.cuda, "device", taken.append)
    assert support.placed(torch.ones(1)) == "none" and support.placed(OnGpu(1)) == "none" and not taken
    monkeypatch.setattr(torch, "Tensor", OnGpu)
    support.placed(OnGpu(1))
    assert taken == [torch.device("cuda:1")]


class NoGpu:
    """Enough of a driver for torch to find out which arguments a kernel writes."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0


@pytest.mark.parametrize("columns, splits", [(512, 1), (200, 2)])
def test_inductor_sees_the_kernel(columns, splits, monkeypatch):
    """A graph for a GPU that is not there: the operator becomes the launch, which writes its result only."""
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)
    monkeypatch.setattr(slice_grad, "processors", lambda index: 128)
    monkeypatch.setattr(driver, "_active", NoGpu())
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        A, B = (torch.empty(100, n, dtype=torch.bfloat16, device="cuda:0") for n in (4096, columns))
        graph = make_fx(lambda A, B: SLICE_GRAD(A, B, SLICE_GRAD(A, B)))(A, B).graph
    expected = graph.find_nodes(op="output")[0].args[0].meta["val"]
    see_through(graph)
    assert not count(graph, SLICE_GRAD)
    launches = graph.find_nodes(op="call_function", target=triton_kernel_wrapper_functional)
    assert [n.kwargs["tensors_to_clone"] for n in launches] == [["out"]] * 2
    assert [n.kwargs["grid"][0][1] for n in launches] == [splits] * 2
    result = graph.find_nodes(op="output")[0].args[0].meta["val"]
    assert (result.shape, result.dtype, result.stride()) == (expected.shape, expected.dtype, expected.stride())
    assert mode is result.fake_mode
