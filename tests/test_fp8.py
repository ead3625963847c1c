"""fp8 products: what runs is the algebra of `passes/backward/fp8.py` in float64, and no weight is dequantized."""

import json
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import base, invoke, text  # noqa: F401  (fixtures)
from test_quantized import DEEPER, IDS, LLAMA, STEP, TARGETS, dense, oracle, prepared, quantized
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import s2ft_compile as s2ft
from s2ft_compile.backend import boxed
from s2ft_compile.backend import s2ft as backend
from s2ft_compile.cli.data import checkpoint_layers
from s2ft_compile.config import CompileOptions
from s2ft_compile.errors import CompileError, ConfigError
from s2ft_compile.estimation import _root
from s2ft_compile.passes.backward.fp8 import E4M3, check_device, fp8_products
from s2ft_compile.quantized import quantized_in
from s2ft_compile.slices.state import state_of

SCALED = torch.ops.aten._scaled_mm.default
FP8 = {"fp8": True, "inner": "aot_eager"}

# --- the emulation ---------------------------------------------------------------------------------------------------


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """float64 numbers rounded to four bits of precision, half to even, down to 2^-9 and up to 448."""
    step = 2.0 ** (x.abs().log2().floor().clamp(min=-6) - 3)
    return ((x / step).round() * step).clamp(-448, 448)


def rows(A: torch.Tensor) -> torch.Tensor:
    """What fp8 keeps of float64 A (rows, n), with scales and quotients in float32, as they are made."""
    a = (A.abs().amax(1, keepdim=True).float() / 448).clamp(min=2.0**-100 / 448)
    return e4m3((A.float() / a).double()) * a.double()


class Product(torch.autograd.Function):
    """x (Q s)ᵀ in float64, x and the gradient that comes in rounded by rows."""

    @staticmethod
    def forward(ctx, x, Q, s):
        ctx.save_for_backward(Q, s)
        return (rows(x.flatten(0, -2)) @ (Q * s).T).view(*x.shape[:-1], len(Q))

    @staticmethod
    def backward(ctx, dY):
        Q, s = ctx.saved_tensors
        return (rows(dY.flatten(0, -2) * s.T) @ Q).view(*dY.shape[:-1], Q.shape[1]), None, None


class Emulated(nn.Module):
    """A linear layer of a base in fp8 with what trains beside it, D (out, in), which is exact."""

    def __init__(self, weight):
        super().__init__()
        self.Q, self.s = weight.qdata.double(), weight.scale.double()
        self.D = nn.Parameter(torch.zeros_like(self.Q))

    def forward(self, x):
        return Product.apply(x, self.Q, self.s) + nn.functional.linear(x, self.D)


def emulated(model: nn.Module, config) -> dict[str, torch.Tensor]:
    """The gradients of a prepared model's slices, and its loss, in float64."""
    whole = dense(config).double()
    for name, weight in quantized_in(model).items():
        path, _, key = name.removesuffix(".weight").rpartition(".")
        setattr(whole.get_submodule(path), key, Emulated(weight.held))
    slices = state_of(model).plan.slices
    for s in slices:
        layer = whole.get_submodule(s.parameter_name.removesuffix(".weight"))
        layer.D.data.index_add_(s.dim, s.indices, s.delta.detach().double())
    loss = whole(**STEP).loss
    loss.backward()
    layers = {s: whole.get_submodule(s.parameter_name.removesuffix(".weight")) for s in slices}
    return {"loss": loss.detach()} | {
        s.parameter_name: layer.D.grad.index_select(s.dim, s.indices) for s, layer in layers.items()
    }


# --- one product -----------------------------------------------------------------------------------------------------


def graph_of(X, dY, Q, s):
    """Y = X Wᵀ and dX = dY W, W dequantized to X's type, as autograd and torchao write them."""

    def both(X, dY, Q, s):
        turned = (Q.t().to(torch.float32) * (s if s.numel() == 1 else s.t())).to(X.dtype)
        return X @ turned, dY @ turned.t()

    mode = FakeTensorMode()
    fakes = [mode.from_tensor(t) for t in (X, dY, Q, s)]
    return make_fx(both, decomposition_table=select_decomp_table())(*fakes)


@settings(max_examples=12)
@given(
    st.integers(1, 20),
    st.sampled_from([16, 48, 80]),
    st.sampled_from([16, 32, 96]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_products_are_those_of_the_emulation(tokens, out, width, dtype, one_scale, seed):
    """Sums of n products in float32, and one rounding to the result's type. Rows differ by many powers of two; one is
    zero."""
    generator = torch.Generator().manual_seed(seed)
    random = partial(torch.randn, generator=generator)
    spread = lambda n: 2.0 ** torch.randint(-30, 20, (n, 1), generator=generator)  # noqa: E731
    X, dY = random(tokens, width) * spread(tokens), random(tokens, out) * spread(tokens)
    X[0] = 0
    X, dY = X.to(dtype), dY.to(dtype)
    Q, s = random(out, width).to(E4M3), 0.01 + torch.rand(1 if one_scale else out, 1, generator=generator)
    graph = graph_of(X, dY, Q, s)
    assert fp8_products(graph.graph) == 2
    graph.recompile()
    W, u = Q.double() * s.double(), torch.finfo(dtype).eps
    expected = (rows(X.double()), W.T), (rows(dY.double() * s.double().T), Q.double())
    for found, (A, B) in zip(graph(X, dY, Q, s), expected, strict=True):
        bound = len(B) * 2.0**-23 * (A.abs() @ B.abs()) + u * (A @ B).abs()
        assert found.dtype == dtype and bool(((found.double() - A @ B).abs() <= bound).all())


def test_a_row_that_is_not_finite_gives_none():
    """Gradient scaling looks for them."""
    X, Q, s = torch.ones(3, 16), torch.ones(16, 16).to(E4M3), torch.ones(16, 1)
    X[0, 3], X[1, 2] = torch.inf, torch.nan
    graph = graph_of(X, X, Q, s)
    fp8_products(graph.graph)
    graph.recompile()
    for found in graph(X, X, Q, s):
        assert found[:2].isnan().all() and torch.equal(found[2], torch.full((16,), 16.0))


@pytest.mark.parametrize(
    "shape, scales, message",
    [((24, 16), (24, 1), r"shape \[24, 16\], and its sizes have to be multiples of 16"), ((16, 16), (16, 16), "a row")],
)
def test_what_takes_no_fp8_is_refused(shape, scales, message):
    Q, s = torch.ones(shape).to(E4M3), torch.ones(scales)
    graph = graph_of(torch.ones(3, shape[1]), torch.ones(3, shape[0]), Q, s)
    with pytest.raises(CompileError, match=message):
        fp8_products(graph.graph)


# --- a model ---------------------------------------------------------------------------------------------------------


def graphs_of(model: nn.Module, options, modules=()) -> list[torch.fx.GraphModule]:
    """Those of a step, as Inductor is given them; the step is run."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph, inputs, **_):
        graphs.append(graph)
        return boxed(graph, inputs)

    kept = partial(backend, inner_compile=keep, options=options)
    for module in modules or [model]:
        module.compile(backend=kept)
    model.train()(**STEP).loss.backward()
    return graphs


def own(nodes) -> list[torch.fx.Node]:
    """The tensors among a graph's nodes, without views of what it is given."""
    return [n for n in nodes if isinstance(n.meta.get("val"), torch.Tensor) and _root(n).op == "call_function"]


def shape_of(node: torch.fx.Node) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else -1 for size in node.meta["val"].shape)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [s.delta.grad.clone() for s in state_of(model).plan.slices]


@pytest.mark.parametrize("config, by_layer", [(LLAMA, False), (DEEPER, True)])
def test_gradients_are_those_of_the_emulation(config, by_layer):
    """In float32. What is rounded to fp8 differs from the emulation's by 2^-24 and more, so that a few numbers in a
    million fall to the other side; what fp8 itself changes is more than ten times that."""
    model = prepared("fp8", config)
    expected, exact = emulated(model, config), dict(oracle(model, config).named_parameters())
    s2ft.compile_layers(model, **FP8) if by_layer else model.compile(backend="s2ft", options=FP8)
    loss = model.train()(**STEP).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"].item(), rel=1e-4)
    for s in state_of(model).plan.slices:
        slices, plain = expected[s.parameter_name], exact[s.parameter_name].grad.index_select(s.dim, s.indices)
        rounding = (slices - plain).norm()
        assert 1e-3 * plain.norm() < rounding < 0.2 * plain.norm()
        assert (s.delta.grad - slices).norm() <= 0.1 * rounding


@pytest.mark.parametrize("by_layer, checkpointing", [(False, True), (True, False)])
def test_nothing_of_full_size_is_made(by_layer, checkpointing):
    """Whatever has a weight's shape is in fp8, and only the stored one outlives the forward. Checkpointed
    layers have the same gradients to the last bit."""
    plain, model = prepared("fp8", DEEPER, torch.bfloat16), prepared("fp8", DEEPER, torch.bfloat16)
    if checkpointing:
        checkpoint_layers(model)
    graphs = graphs_of(model, {"fp8": True}, model.model.layers if by_layer else ())
    kept = own(n for g in graphs[: len(graphs) // 2] for n in g.graph.output_node().all_input_nodes)
    nodes, shapes = own(n for g in graphs for n in g.graph.nodes), {w.shape for w in quantized_in(model).values()}
    full = [n for n in nodes if {shape_of(n), shape_of(n)[::-1]} & shapes]
    assert full and not [n for n in full if n.meta["val"].dtype != E4M3]
    assert not [n for n in kept if n.meta["val"].dtype == E4M3]
    layer, lowest = (14, 7 + 4)  # products; nobody wants the lowest one's dX of queries, keys and values
    counts = [sum(n.target == SCALED for n in graph.graph.nodes) for graph in graphs]
    if by_layer:  # one graph for the lowest, and one that the others share
        assert sum(counts) == layer + lowest
    else:  # forward, then backward with what is made again
        assert counts[0] == 21 and 18 < counts[1] <= 18 + 21
    if checkpointing:
        graphs_of(plain, {"fp8": True})
        assert all(map(torch.equal, gradients(model), gradients(plain)))


def test_forwards_without_gradients_are_in_fp8_too():
    model = prepared("fp8", dtype=torch.bfloat16)
    exact = model(input_ids=IDS).logits.detach()
    net = torch.compile(model, backend="s2ft", options=FP8)
    trained = net(input_ids=IDS).logits
    with torch.no_grad():
        assert torch.equal(net(input_ids=IDS).logits, trained)
    assert not torch.equal(exact, trained) and (exact - trained).norm() <= 0.1 * exact.norm()


@pytest.mark.slow
def test_the_loss_goes_down_as_in_bf16():
    """The same steps with and without: curves apart by a twentieth of the way down at most. Rows differ in size, so
    that it counts which scale is whose."""
    losses = {}
    for fp8 in (False, True):
        torch._dynamo.reset()
        model, random = quantized("fp8", DEEPER, torch.bfloat16), torch.Generator().manual_seed(0)
        for weight in quantized_in(model).values():
            weight.held.scale.mul_(torch.randn(weight.held.scale.shape, generator=random).mul(0.5).exp())
        s2ft.prepare(model, {"input_ids": IDS}, s2ft.S2FTConfig(dict(TARGETS)))
        optimizer = torch.optim.AdamW(s2ft.parameters(model), lr=1e-2)
        model.train().compile(backend="s2ft", options={**FP8, "fp8": fp8})
        losses[fp8] = []
        for _ in range(30):
            loss = model(**STEP).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[fp8].append(loss.item())
    exact, rounded = (torch.tensor(losses[fp8]) for fp8 in (False, True))
    way = exact[0] - exact[-1]
    assert way > 1 and (exact - rounded).abs().max() <= way / 20


@pytest.mark.slow
def test_inductor_compiles_it():
    """On a CPU, in float32: it fuses the rounding, and a few numbers fall to the other side."""
    losses, grads = [], []
    for inner in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        model = prepared("fp8")
        model.compile(backend="s2ft", options={"fp8": True, "inner": inner})
        loss = model.train()(**STEP).loss
        loss.backward()
        losses.append(loss.item())
        grads.append(gradients(model))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for a, b in zip(*grads):
        assert (a - b).norm() <= 0.02 * a.norm()


@pytest.mark.slow
def test_the_command_trains_in_fp8_and_says_what_that_takes(base, text, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    how = {"model": base, "data": text, "output": run, "targets": "ffn.out=3,ffn.in=3", "steps": 2, "batch-size": 2}
    how |= {"seq-len": 16, "inner": "aot_eager", "quantize": "fp8"}
    result = invoke("train", *(piece for name, value in how.items() for piece in (f"--{name}", value)), "--fp8")
    assert result.exit_code == 0, result.output
    assert json.loads((run / "metrics.json").read_text())["options"]["fp8"] is True
    taken = []
    for more in ([], ["--fp8"]):
        size = ["--batch", 1, "--seq", 64, "--quantize", "fp8", "--targets", "ffn.out=3"]
        result = invoke("estimate", base, *size, "--json", *more)
        assert result.exit_code == 0, result.output
        taken.append(json.loads(result.stdout))
    assert taken[1]["weights"] == taken[0]["weights"] and taken[1]["working"] < taken[0]["working"]
    for command in (["estimate", base], ["train", *(x for n in ("model", "data") for x in (f"--{n}", how[n]))]):
        more = ["--output", tmp_path / "other"] * (command[0] == "train")
        result = invoke(*command, *more, "--quantize", "nf4", "--fp8")
        assert result.exit_code == 1 and "needs --quantize fp8, got nf4" in " ".join(result.output.split())


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_base_without_fp8_is_refused(kind):
    model = prepared(kind)
    model.compile(backend="s2ft", options=FP8)
    with pytest.raises(BackendCompilerFailed, match="stored in fp8 .float8_e4m3fn., and this graph has none; quantize"):
        model(**STEP)


def test_devices_without_fp8_are_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match="capability 8.9 or more, and cuda:0 has 8.0"):
        check_device(torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    check_device(torch.device("cuda:0"))
    check_device(torch.device("cpu"))
    with pytest.raises(ConfigError, match="for CUDA GPUs"):
        check_device(torch.device("mps"))


@pytest.mark.parametrize("how", [{"fp8": 1}, {"fp8": True, "inner": "eager"}])
def test_options(how):
    with pytest.raises(ConfigError, match="fp8 must be True or False|inner is 'inductor' or 'aot_eager', not 'eager'"):
        CompileOptions(**how)
