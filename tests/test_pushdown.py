"""Slice pushdown: each rule keeps its graph's value, no full-size gradient stays, and the FLOPs are dX + sliced dW."""

import operator

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  its operators
from hypothesis import given, settings
from hypothesis import strategies as st
from small import LLAMA, QUICK, U32, assert_gradients, compiled, full_gradients, hf, prepared, tokens
from test_trainable import Accumulated
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import s2ft_compile as s2ft
from s2ft_compile.errors import CompileError
from s2ft_compile.passes.backward.attach import ATTACH, TAKE, attach
from s2ft_compile.passes.backward.pushdown import slice_pushdown
from s2ft_compile.passes.backward.slice_rules import SLICE_RULES
from s2ft_compile.slices.state import state_of

aten, prims = torch.ops.aten, torch.ops.prims

# A gradient of 8 × 6 everywhere, and no other tensor of 48 elements in the graph.
ROWS, COLUMNS = 8, 6


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def graph_of(function, *inputs):
    return make_fx(function, tracing_mode="fake")(*inputs)


def sizes(gm) -> list[int]:
    """The number of elements of every tensor the graph makes."""
    return [
        n.meta["val"].numel()
        for n in gm.graph.nodes
        if n.op == "call_function" and isinstance(n.meta.get("val"), torch.Tensor)
    ]


def pushed(function, inputs, full=ROWS * COLUMNS):
    """Runs the pass on function's graph; asserts the value, and that nothing of the gradient's full size is left."""
    gm = graph_of(function, *inputs)
    expected = gm(*inputs)
    assert full in sizes(gm), "the case makes a full-size gradient to begin with"
    slice_pushdown(gm.graph)
    gm.recompile()
    outputs = gm(*inputs)
    assert outputs.shape == expected.shape and outputs.dtype == expected.dtype
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)  # sums of at most 8 terms, float64
    assert full not in sizes(gm), gm.graph
    assert not gm.graph.find_nodes(op="call_function", target=TAKE)
    return gm


RANGES = [((0, 3),), ((2, 1),), ((0, 2), (4, 1)), ((0, 1), (2, 1), (5, 1))]


def take(x, dim, ranges):
    return torch.ops.s2ft.take(x, dim, [s for s, _ in ranges], [n for _, n in ranges])


# operator -> (function of inputs whose result is 8 × 6, or has 48 elements; inputs; the dimensions that can be sliced)
MM = (ROWS, 5), (5, COLUMNS)
CASES = {
    "mm": (lambda a, b: aten.mm(a, b), MM, (0, 1)),
    "t": (lambda a, b: aten.t(aten.mm(b.t(), a.t())), MM, (0, 1)),
    "permute": (lambda a, b: aten.permute(aten.mm(b.t(), a.t()), [1, 0]), MM, (0, 1)),
    "permute negative": (lambda a, b: aten.permute(aten.mm(b.t(), a.t()), [-1, -2]), MM, (0, 1)),
    "transpose": (lambda a, b: aten.transpose(aten.mm(b.t(), a.t()), 0, 1), MM, (0, 1)),
    "transpose negative": (lambda a, b: aten.transpose(aten.mm(b.t(), a.t()), -2, -1), MM, (0, 1)),
    "t of a vector": (lambda a: aten.t(aten.sum(a, [0])), ((3, 48),), (0,)),
    "view": (lambda a, b: aten.view(aten.mm(a, b), [1, ROWS, COLUMNS]), MM, (1, 2)),
    "view that joins others": (lambda a, b: aten.view(aten.bmm(a, b), [4, 2 * 6]), ((4, 2, 5), (4, 5, 6)), (0,)),
    "_unsafe_view": (lambda a, b: aten._unsafe_view(aten.mm(a, b), [1, ROWS, COLUMNS]), MM, (1, 2)),
    "reshape": (lambda a, b: aten.reshape(aten.mm(a, b), [1, ROWS, COLUMNS]), MM, (1, 2)),
    "unsqueeze": (lambda a, b: aten.unsqueeze(aten.mm(a, b), 0), MM, (1, 2)),
    "squeeze": (lambda a, b: aten.squeeze(aten.bmm(a, b), 0), ((1, ROWS, 5), (1, 5, COLUMNS)), (0, 1)),
    "squeeze dims": (lambda a, b: aten.squeeze(aten.bmm(a, b), [0]), ((1, ROWS, 5), (1, 5, COLUMNS)), (0, 1)),
    "bmm": (lambda a, b: aten.bmm(a, b), ((2, 4, 5), (2, 5, 6)), (0, 1, 2)),
    "addmm": (lambda c, a, b: aten.addmm(c, a, b), ((COLUMNS,), *MM), (0, 1)),
    "addmm scaled": (lambda c, a, b: aten.addmm(c, a, b, beta=0.5, alpha=2.0), ((1, COLUMNS), *MM), (0, 1)),
    "sum": (lambda a: aten.sum(a, [0]), ((7, ROWS, COLUMNS),), (0, 1)),
    "sum keepdim": (lambda a: aten.sum(a, [0], True), ((7, ROWS, COLUMNS),), (1, 2)),
    "sum of several": (lambda a: aten.sum(a, [0, -2]), ((7, ROWS, 5, COLUMNS),), (0, 1)),
    "to_copy": (lambda a, b: aten._to_copy(aten.mm(a, b), dtype=torch.float32), MM, (0, 1)),
    "convert": (lambda a, b: prims.convert_element_type(aten.mm(a, b), torch.float32), MM, (0, 1)),
    "clone": (lambda a, b: aten.clone(aten.mm(a, b)), MM, (0, 1)),
    "alias": (lambda a, b: aten.alias(aten.mm(a, b)), MM, (0, 1)),
    "detach": (lambda a, b: aten.detach(aten.mm(a, b)), MM, (0, 1)),
    "add of two uses": (lambda a, b, c, d: aten.add(aten.mm(a, b), aten.mm(c, d)), MM + MM, (0, 1)),
    "add of a row": (lambda a, b, c: aten.add(aten.mm(a, b), c), (*MM, (COLUMNS,)), (0, 1)),
    "scaled": (lambda a, b: aten.mul(aten.mm(a, b), 0.25), MM, (0, 1)),
    "plus a weight": (lambda a, b, c: aten.add(aten.mm(a, b), aten.sign(c)), (*MM, (ROWS, COLUMNS)), (0, 1)),
    "expand": (lambda a, b: aten.expand(aten.mm(a, b), [5, ROWS, COLUMNS]), MM, (1, 2)),
    "expand of a row": (lambda a, b: aten.expand(aten.mm(a, b), [ROWS, COLUMNS]), ((1, 5), (5, COLUMNS)), (0, 1)),
    "divided": (lambda a, b: aten.div(aten.neg(aten.mm(a, b)), 3.0), MM, (0, 1)),
    "view that joins it": (lambda a, b: aten.view(aten.mm(a, b), [48]), MM, (0,)),
    "view that splits it": (lambda a, b: aten.view(aten.mm(a, b), [2, 4, COLUMNS]), MM, (0, 1, 2)),
    "cat": (lambda a, b, c: aten.cat([aten.mm(a, b), aten.mm(c, b)], 0), ((3, 5), (5, COLUMNS), (5, 5)), (0, 1)),
    "select_backward": (
        lambda a, b: aten.select_backward(aten.mm(a, b), [2, 4, COLUMNS], 0, 1),
        ((4, 5), (5, COLUMNS)),
        (1, 2),
    ),
    "select_scatter": (
        lambda a, b: aten.select_scatter(aten.full([2, 4, COLUMNS], 1, dtype=a.dtype), aten.mm(a, b), 0, 1),
        ((4, 5), (5, COLUMNS)),
        (1, 2),
    ),
    "slice_backward along it": (
        lambda a, b: aten.slice_backward(aten.mm(a, b), [ROWS, COLUMNS], 0, 2, 6, 1),
        ((4, 5), (5, COLUMNS)),
        (0, 1),
    ),
    "cumsum": (lambda a, b: aten.cumsum(aten.mm(a, b), 1), MM, (0,)),
    "var_mean": (lambda a, b: aten.add(*aten.var_mean.correction(aten.bmm(a, b), [0])), ((3, 8, 5), (3, 5, 6)), (0, 1)),
    "cumprod": (lambda a, b: aten.cumprod(aten.mm(a, b), 0), MM, (1,)),
    "flip": (lambda a, b: aten.flip(aten.mm(a, b), [-1]), MM, (0,)),
    "rev": (lambda a, b: prims.rev(aten.mm(a, b), [0]), MM, (1,)),
    "roll": (lambda a, b: aten.roll(aten.mm(a, b), [2], [1]), MM, (0,)),
    "tril": (lambda a, b: aten.tril(aten.bmm(a, b)), ((4, 3, 5), (4, 5, 4)), (0,)),
    "triu": (lambda a, b: aten.triu(aten.bmm(a, b)), ((4, 3, 5), (4, 5, 4)), (0,)),
    "mean": (lambda a, b: aten.mean(aten.mm(a, b), [1], True), MM, (0,)),
    "mean of the other": (lambda a, b: aten.mean(aten.mm(a, b), [0]), MM, (0,)),
    "amax": (lambda a, b: aten.amax(aten.mm(a, b), [-1]), MM, (0,)),
    "amin": (lambda a, b: aten.amin(aten.mm(a, b), [0], True), MM, (1,)),
    "sum of what nothing else reads": (lambda a, b: aten.sum(aten.mm(a, b), [0]), MM, (0,)),
    "slice": (lambda a, b: aten.slice(aten.mm(a, b), 0, -7, 6), MM, (0, 1)),
    "slice with a step": (lambda a, b: aten.slice(aten.mm(a, b), 0, 1, 8, 2), MM, (1,)),
    "select": (lambda a, b: aten.select(aten.bmm(a, b), 1, 1), ((4, 2, 5), (4, 5, 6)), (0, 1)),
    "index": (lambda a, b: aten.index(aten.mm(a, b), [None, torch.tensor([3, 0, 3])]), MM, (0,)),
    "pad": (lambda a, b: aten.constant_pad_nd(aten.mm(a, b), [0, 0, 2, 1], 3.0), ((5, 5), (5, COLUMNS)), (0, 1)),
    "pad that crops": (lambda a, b: aten.constant_pad_nd(aten.mm(a, b), [1, -2, -1, -3]), MM, (0,)),
    "scatter_add": (
        lambda a, b: aten.scatter_add(aten.mm(a, b), 1, torch.tensor([[0, 2]] * ROWS), aten.mm(a, b[:, :2])),
        MM,
        (0,),
    ),
    "complex": (
        lambda a, b: aten.view_as_real(
            aten.mul(aten._conj(aten.view_as_complex(aten.view(aten.mm(a, b), [ROWS, 3, 2]))), 2.0)
        ),
        MM,
        (0, 1),
    ),
    "complex of two": (lambda a, b: aten.abs(aten.complex(aten.mm(a, b), aten.mul(aten.mm(a, b), 2.0))), MM, (0, 1)),
    "complex by its type": (
        lambda a, b: aten.view(aten.mul(aten.view(aten.mm(a, b), a.dtype.to_complex()), 1j), a.dtype),
        MM,
        (0,),
    ),
    "a long way": (
        lambda a, b: aten._to_copy(
            aten.view(aten.permute(aten.mm(b.t(), a.t()), [1, 0]), [ROWS, 1, COLUMNS]) * 2.0, dtype=torch.float32
        ),
        MM,
        (0, 2),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_rule_keeps_the_value_of_its_graph(case):
    function, shapes, dims = CASES[case]
    inputs = [randn(*shape) for shape in shapes]
    for dim in dims:
        result = function(*inputs)
        for ranges in RANGES:
            ranges = [r for r in ranges if sum(r) <= result.shape[dim]][: result.shape[dim] - 1]
            if 0 < sum(n for _, n in ranges) < result.shape[dim]:
                pushed(lambda *args: take(function(*args), dim, ranges), inputs)


ROWS_ADDED = {
    "embedding": lambda g, i: aten.embedding_dense_backward(g, i, ROWS, -1, False),
    "index_put": lambda g, i: aten.index_put(aten.new_zeros(g, [ROWS, COLUMNS]), [i], g, True),
    "masked index_put": lambda g, i: aten._unsafe_masked_index_put_accumulate(
        aten.full([ROWS, COLUMNS], 0, dtype=g.dtype), (i > 0)[..., None], [i], g
    ),
    "slice_scatter": lambda g, i: aten.slice_scatter(aten.full([ROWS, COLUMNS], 2, dtype=g.dtype), g[0], 0, 2, 5),
    "slice_backward": lambda g, i: aten.slice_backward(g[1], [ROWS, COLUMNS], 0, 1, 4, 1),
}


@pytest.mark.parametrize("case", ROWS_ADDED)
def test_gradients_of_looked_up_rows_are_sliced_along_the_channels(case):
    grad, ids = randn(2, 3, COLUMNS), torch.randint(ROWS, (2, 3))
    for ranges in RANGES:
        pushed(lambda g, i: take(ROWS_ADDED[case](g, i), 1, ranges), (grad, ids))
        if case == "slice_backward":  # its rows are a window of rows that are there
            pushed(lambda g, i: take(ROWS_ADDED[case](g, i), 0, ranges), (grad, ids))
            continue
        with pytest.raises(CompileError, match="computed at its full size"):
            pushed(lambda g, i: take(ROWS_ADDED[case](g, i), 0, ranges), (grad, ids))


@given(st.integers(0, 2), st.integers(1, 2), st.integers(0, 2))
@settings(max_examples=10)
def test_gradients_of_what_was_looked_up_beside_other_dimensions_are_sliced_along_those(before, used, after):
    shape = [2, 3, 4, 5, 6, 7][: before + used + after]
    left, looked_up, right = shape[:before], shape[before : before + used], shape[before + used :]
    indices = [torch.randint(n, (11, 13)) for n in looked_up]
    values = randn(*left, 11, 13, *right)

    def gradient(g, *indices):
        return aten.index_put(aten.new_zeros(g, shape), [*[None] * before, *indices], g, True)

    for dim in range(len(shape)):
        gm = graph_of(lambda g, *i: take(gradient(g, *i), dim, [(0, 1)]), values, *indices)
        if before <= dim < before + used:
            with pytest.raises(CompileError, match="computed at its full size"):
                slice_pushdown(gm.graph)
            continue
        slice_pushdown(gm.graph)
        gm.recompile()
        assert torch.equal(gm(values, *indices), take(gradient(values, *indices), dim, [(0, 1)]))
        assert torch.Size(shape).numel() not in sizes(gm)


@pytest.mark.parametrize("at", (0, 1))
def test_gradients_behind_a_weight_norm_are_sliced_along_what_has_a_norm_of_its_own(at):
    size = [1, 1]
    size[at] = (ROWS, COLUMNS)[at]
    v, g, (a, b) = randn(ROWS, COLUMNS), randn(*size), (randn(*shape) for shape in MM)

    def gradients(v, g, a, b):
        norms = v.norm(dim=1 - at, keepdim=True)
        return aten._weight_norm_interface_backward(aten.mm(a, b), v, g, norms, at)

    for index in (0, 1):
        gm = graph_of(lambda *args: take(gradients(*args)[index], at, [(1, 3)]), v, g, a, b)
        expected = gm(v, g, a, b)
        slice_pushdown(gm.graph)
        gm.recompile()
        torch.testing.assert_close(gm(v, g, a, b), expected, rtol=1e-12, atol=1e-12)
        assert not [
            n for n in gm.graph.find_nodes(op="call_function", target=aten.mm.default) if n.meta["val"].numel() == 48
        ]
        with pytest.raises(CompileError, match="computed at its full size"):
            pushed(lambda *args: take(gradients(*args)[0], 1 - at, [(1, 3)]), (v, g, a, b))


def test_a_gradient_that_its_slice_needs_all_of_is_said(caplog):
    gm = graph_of(
        lambda a, b: take((dW := aten.mm(a, b)) - aten.sum(dW, [1], True), 1, [(1, 3)]), randn(8, 5), randn(5, 6)
    )
    slice_pushdown(gm.graph)
    assert "the gradient of a frozen weight is computed at its full size [8, 6] by aten.mm.default" in caplog.text


GEOMETRIES = {  # (dY, X, W), stride, padding, dilation, transposed, groups
    "1x1": (((2, 8, 3, 3), (2, 6, 3, 3), (8, 6, 1, 1)), 1, 0, 1, False, 1),
    "3x3": (((2, 8, 3, 2), (2, 6, 5, 4), (8, 6, 3, 3)), 2, 1, 1, False, 1),
    "1d": (((2, 8, 5), (2, 6, 9), (8, 6, 3)), 1, 0, 2, False, 1),
    "groups": (((2, 8, 4), (2, 12, 4), (8, 6, 3)), 1, 1, 1, False, 2),
    "depthwise": (((2, 8, 4), (2, 8, 4), (8, 1, 3)), 1, 1, 1, False, 8),
    "a multiple of depthwise": (((2, 8, 4), (2, 4, 4), (8, 1, 3)), 1, 1, 1, False, 4),
    "groups, one row each": (((2, 8, 4), (2, 24, 4), (8, 3, 3)), 1, 1, 1, False, 8),
    "transposed": (((2, 6, 7), (2, 8, 4), (8, 6, 1)), 2, 0, 1, True, 1),
}


@pytest.mark.parametrize("case", GEOMETRIES)
@pytest.mark.parametrize("dim", (0, 1))
def test_gradients_of_convolutions_are_sliced_along_their_channels(case, dim):
    shapes, *where, transposed, groups = GEOMETRIES[case]
    spatial = len(shapes[0]) - 2
    if shapes[2][dim] == 1:
        return
    stride, padding, dilation = ([n] * spatial for n in where)

    def gradients(dy, x, w):
        bias, rest = [dy.shape[1]], (stride, padding, dilation, transposed, [0] * spatial, groups)
        return aten.convolution_backward(dy, x, w, bias, *rest, [True, True, True])

    inputs = [randn(*shape) for shape in shapes]
    for ranges in RANGES:
        ranges = [r for r in ranges if sum(r) <= shapes[2][dim]]
        full = gradients(*inputs)[1]
        gm = graph_of(lambda *args: (gradients(*args)[0], take(gradients(*args)[1], dim, ranges)), *inputs)
        slice_pushdown(gm.graph)
        gm.recompile()
        dX, dW = gm(*inputs)
        torch.testing.assert_close(dX, gradients(*inputs)[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dW, take(full, dim, ranges), rtol=1e-12, atol=1e-12)
        result = gm.graph.find_nodes(op="call_function", target=aten.convolution_backward.default)
        sizes = [n.meta["val"][1].shape[dim] for n in result if n.meta["val"][1] is not None]
        assert sizes == [sum(n for _, n in ranges)], "one gradient of W, and that of the slice"


def test_the_gradient_of_a_convolution_s_bias_is_sliced():
    rest = ([1], [0], [1], False, [0], 1, [False, False, True])
    inputs = randn(2, 8, 4), randn(2, 6, 4), randn(8, 6, 1)
    pushed(lambda dy, x, w: take(aten.convolution_backward(dy, x, w, [8], *rest)[2], 0, [(1, 3)]), inputs, full=8)


def fallback(x, dy, ends, weight):
    """(dX, dW) of transformers' grouped product."""
    return torch.ops.transformers.grouped_mm_fallback_backward(x, weight, ends, dy)


# Before it was an operator, this backward read the groups' sizes in Python: no graph of such experts can be compiled.
FALLBACK = hasattr(torch.ops.transformers, "grouped_mm_fallback_backward")
GROUPED = {  # dW[g] = X_gᵀ dY_g, of X (rows, 16) and dY (rows, 24): rows 0 to 2 and 3 to 6 of 7
    "grouped_mm": (lambda x, dy, ends, weight: aten._grouped_mm(aten.t(x), dy, ends), torch.bfloat16),
    **({"fallback": (lambda *args: fallback(*args)[1], torch.float64)} if FALLBACK else {}),
}


def grouped_inputs(dtype):
    """Small integers, whose products and sums bfloat16 holds exactly."""
    x, dy, weight = (torch.randint(-3, 4, shape).to(dtype) for shape in ((7, 16), (7, 24), (2, 16, 24)))
    return x, dy, torch.tensor([3, 7], dtype=torch.int32), weight


@pytest.mark.parametrize("case", GROUPED)
@pytest.mark.parametrize("dim", (1, 2))
def test_gradients_of_experts_are_sliced_along_their_channels(case, dim):
    function, dtype = GROUPED[case]
    inputs = grouped_inputs(dtype)
    for ranges in RANGES:
        pushed(lambda *args: take(function(*args), dim, ranges), inputs, full=2 * 16 * 24)
    with pytest.raises(CompileError, match="computed at its full size"):
        pushed(lambda *args: take(function(*args), 0, [(1, 1)]), inputs, full=2 * 16 * 24)


@pytest.mark.parametrize("function", [fallback] * FALLBACK)
def test_experts_that_do_not_train_have_no_gradient_of_their_weights(function):
    inputs = *grouped_inputs(torch.float64), randn(*MM[0]), randn(*MM[1])
    gm = graph_of(lambda *args: (function(*args[:4])[0], take(aten.mm(*args[4:]), 0, [(0, 3)])), *inputs)
    expected = gm(*inputs)
    slice_pushdown(gm.graph)
    gm.recompile()
    assert torch.equal(gm(*inputs)[0], expected[0])
    assert not any("backward" in str(node.target) for node in gm.graph.nodes)


@pytest.mark.parametrize(
    "inner, dtype, tolerance",
    [*[("aot_eager", torch.float32, 512 * U32)] * FALLBACK, ("inductor", torch.bfloat16, 0.1)],
)
def test_experts_of_a_mixture_train_without_full_gradients(inner, dtype, tolerance):
    """float32 (transformers' fallback): sums of at most 50 products in another order, through some ten operators.
    bfloat16 (aten._grouped_mm): Inductor rounds a fused operator once, eager some ten times, to 2^-9 each."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(**{**LLAMA, "num_hidden_layers": 1}, num_local_experts=2)
    model, ids = MixtralForCausalLM(config).to(dtype), tokens()
    loss = lambda mixture: mixture(input_ids=ids, labels=ids).loss  # noqa: E731
    full = full_gradients(model, loss)
    plan = s2ft.prepare(model, {"input_ids": ids}, s2ft.S2FTConfig({"moe.out": 5, "moe.in": 3}))
    loss(compiled(model, inner)).backward()
    assert_gradients(plan, full, tolerance)


def test_a_take_of_a_take_commutes():
    a, b = randn(*MM[0]), randn(*MM[1])
    gm = graph_of(lambda a, b: take(take(aten.mm(a, b), 0, [(0, 5)]), 1, [(1, 2), (5, 1)]), a, b)
    expected = gm(a, b)
    slice_pushdown(gm.graph)
    gm.recompile()
    torch.testing.assert_close(gm(a, b), expected, rtol=1e-12, atol=1e-12)
    assert not {48, 30} & set(sizes(gm)), "neither the whole gradient nor its rows"


def test_every_rule_has_a_case():
    """A rule that is added without a case above fails here."""
    called = {TAKE, operator.getitem} | (set() if FALLBACK else {operator.getitem})
    graphs = [graph_of(function, *[randn(*shape) for shape in shapes]) for function, shapes, dims in CASES.values()]
    graphs += [graph_of(function, *grouped_inputs(dtype)) for function, dtype in GROUPED.values()]
    graphs += [graph_of(f, randn(2, 3, COLUMNS), torch.randint(ROWS, (2, 3))) for f in ROWS_ADDED.values()]
    for gm in graphs:
        called |= {n.target for n in gm.graph.nodes if n.op == "call_function"}
    composite = {aten.reshape.default}  # make_fx shows it as a view
    assert set(SLICE_RULES) - composite <= called, set(SLICE_RULES) - called


def test_a_slice_of_an_activation_is_a_copy_that_does_not_keep_it_alive():
    gm = pushed(lambda a, b: take(aten.mm(a, b), 0, [(0, 3)]), [randn(*s) for s in MM])
    copies = gm.graph.find_nodes(op="call_function", target=aten.clone.default)
    assert [tuple(n.meta["val"].shape) for n in copies] == [(3, 5)]


def test_a_graph_without_deltas_is_left_alone():
    gm = graph_of(lambda a, b: aten.mm(a, b), *[randn(*s) for s in MM])
    before = gm.code
    assert slice_pushdown(gm.graph) == 0
    gm.recompile()
    assert gm.code == before


# --- joint graphs: attach and autograd ------------------------------------------------------------------------------

JOINT = {
    "linear": (lambda W, x: torch.nn.functional.linear(x, W), (4, 3, COLUMNS)),
    "transposed": (lambda W, x: x @ W, (4, 3, ROWS)),
    "addmm": (lambda W, x: torch.addmm(torch.ones(COLUMNS, dtype=W.dtype), x, W), (4, ROWS)),
    "einsum": (lambda W, x: torch.einsum("bsi,oi->bso", x, W), (4, 3, COLUMNS)),
    "twice": (lambda W, x: torch.tanh(x @ W.t()) @ W, (4, COLUMNS)),
    "scaled": (lambda W, x: x @ (0.5 * W).t(), (4, COLUMNS)),
    "plus another": (lambda W, x: x @ (W + 1.0).t(), (4, COLUMNS)),
}


@pytest.mark.parametrize("case", JOINT)
@pytest.mark.parametrize("dim", (0, 1))
@given(st.sampled_from(RANGES))
@settings(max_examples=2, phases=QUICK)
def test_a_joint_graph_keeps_output_and_gradient(case, dim, ranges):
    function, shape = JOINT[case]
    W, x = randn(ROWS, COLUMNS), randn(*shape)
    size = [ROWS, COLUMNS]
    size[dim] = sum(n for _, n in ranges)
    D = torch.zeros(size, dtype=torch.float32, requires_grad=True)

    def joint(W, D, x):
        out = function(attach(W, D, dim, [s for s, _ in ranges], [n for _, n in ranges]), x)
        return out, *torch.autograd.grad(out.sin().sum(), D)

    gm = graph_of(joint, W, D, x)
    expected = gm(W, D, x)
    assert slice_pushdown(gm.graph) == 1
    gm.recompile()
    out, grad = gm(W, D, x)
    torch.testing.assert_close(out, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, expected[1], rtol=4 * 2**-23, atol=1e-12)  # both rounded to float32 once
    full = W.clone().requires_grad_()
    oracle = torch.autograd.grad(function(full, x).sin().sum(), full)[0]
    oracle = torch.cat([oracle.narrow(dim, s, n) for s, n in ranges], dim)
    torch.testing.assert_close(grad, oracle.float(), rtol=4 * 2**-23, atol=1e-12)
    assert not gm.graph.find_nodes(op="call_function", target=ATTACH)
    assert not any(n.meta["val"].numel() == ROWS * COLUMNS for n in _not_from(gm, 0)), "a full-size gradient is left"


def _not_from(gm, position):
    """The tensors of a graph that depend on more than one of its inputs."""
    only = {gm.graph.find_nodes(op="placeholder")[position]}
    for n in gm.graph.nodes:
        if n.op == "call_function" and all(a in only for a in n.all_input_nodes):
            only.add(n)
        elif n.op == "call_function" and isinstance(n.meta.get("val"), torch.Tensor):
            yield n


# --- what cannot be sliced --------------------------------------------------------------------------------------------

REFUSED = {
    "cumsum": (lambda a: aten.cumsum(a, 0), ((ROWS, COLUMNS),), 0, "aten.cumsum"),
    "one of two uses": (
        lambda a, b, c: aten.add(aten.mm(a, b), aten.cumsum(c, 0)),
        (*MM, (ROWS, COLUMNS)),
        0,
        "aten.cumsum",
    ),
    "a tuple": (lambda a: aten.max(a, 0)[0].expand(ROWS, -1), ((3, COLUMNS),), 1, "aten.max"),
    "layer norm": (
        lambda a: operator.getitem(aten.native_layer_norm(a, [COLUMNS], None, None, 1e-5), 0),
        ((ROWS, COLUMNS),),
        1,
        "aten.native_layer_norm",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_gradient_without_a_rule_names_its_operator(case):
    function, shapes, dim, name = REFUSED[case]
    gm = graph_of(lambda *args: take(function(*args), dim, [(0, 2)]), *[randn(*s) for s in shapes])
    with pytest.raises(CompileError, match="computed at its full size") as error:
        slice_pushdown(gm.graph)
    assert name in str(error.value) and "choose other targets" in str(error.value)


def test_a_weight_whose_gradient_has_no_rule_is_refused_at_compile_time(monkeypatch):
    """Where `prepare` could not look at gradients."""
    monkeypatch.setattr("s2ft_compile.preparation.trainable", lambda model, config, selections, refused: selections)
    model, x = Accumulated(), torch.randn(2, 4, 8)
    s2ft.prepare(model, (x,), s2ft.S2FTConfig({"u": 2}))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="logcumsumexp") as error:
        compiled(model)(x)
    assert isinstance(error.value.inner_exception, CompileError)


def test_norms_train():
    case, model = prepared({"blocks.0.norm1.weight": 2, "ffn.out": 2})
    full = full_gradients(case.make(), case.loss)
    case.loss(compiled(model)).backward()
    assert_gradients(state_of(model).plan, full, 1e-10)


# --- FLOPs ------------------------------------------------------------------------------------------------------------

D, F, H, KV, HD, V, LAYERS = 16, 24, 4, 2, 4, 50, 2  # small.LLAMA
B, L = 2, 8
T = B * L


def backward_flops(layer: int, parts: dict[str, int]) -> int:
    """dX of a Llama above the lowest trained weight, plus dW of the slices.

    layer: the lowest one that trains. parts: the roles that train in it and above -> how many rows or columns.
    Of a linear (in, out), dX is 2 T in out, and dW of n rows 2 T n in. The products of attention (eager): dV, dA and
    dQ, dK each 2 B H L² hd.
    """
    linear = {
        "q": (D, H * HD),
        "k": (D, KV * HD),
        "v": (D, KV * HD),
        "o": (H * HD, D),
        "gate": (D, F),
        "up": (D, F),
        "down": (F, D),
    }
    dX = {n: 2 * T * i * o for n, (i, o) in linear.items()}
    product = 2 * B * H * L * L * HD
    whole = sum(dX.values()) + 4 * product
    below = {  # dX in the lowest layer, from its output down to the slice
        "ffn.out": 0,
        "ffn.in": dX["down"],
        "attention.out": dX["down"] + dX["gate"] + dX["up"],
        "attention.value": dX["down"] + dX["gate"] + dX["up"] + dX["o"] + product,
        "attention.query": dX["down"] + dX["gate"] + dX["up"] + dX["o"] + 2 * product,
        "attention.key": dX["down"] + dX["gate"] + dX["up"] + dX["o"] + 2 * product,
    }
    dW = {
        "ffn.out": D,
        "ffn.in": 2 * D,
        "attention.out": D,
        "attention.value": D,
        "attention.query": D,
        "attention.key": D,
    }
    trained = LAYERS - layer
    slices = sum(2 * T * n * dW[role] for role, n in parts.items()) * trained
    lowest = max(below[role] for role in parts)
    if {"attention.value", "attention.query"} <= parts.keys():
        lowest += product  # dA serves query and key, dV is one more
    return 2 * T * D * V + (trained - 1) * whole + lowest + slices


def count_backward(model, ids) -> int:
    loss = model(input_ids=ids, labels=ids).loss
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "targets, parts",
    [
        ({"ffn.out": 3}, {"ffn.out": 3}),
        ({"ffn.in": 5}, {"ffn.in": 5}),
        ({"ffn.out": 3, "attention.out": 1}, {"ffn.out": 3, "attention.out": 4}),
        ({"attention.value": 1, "ffn.out": 0.5}, {"attention.value": 4, "ffn.out": 12}),
        ({"attention.query": 2, "attention.value": 1}, {"attention.query": 8, "attention.value": 4}),
    ],
    ids=str,
)
def test_backward_flops_are_dx_and_sliced_dw(targets, parts):
    model, ids = hf("llama", attn_implementation="eager"), tokens(B, L)
    s2ft.prepare(model, {"input_ids": ids}, s2ft.S2FTConfig(targets=targets))
    assert count_backward(compiled(model), ids) == backward_flops(0, parts)


def test_nothing_runs_backward_below_the_lowest_layer_that_trains():
    model, ids = hf("llama", attn_implementation="eager"), tokens(B, L)
    s2ft.prepare(model, {"input_ids": ids}, s2ft.S2FTConfig(targets={"model.layers.1.mlp.down_proj.weight": 3}))
    assert count_backward(compiled(model), ids) == backward_flops(1, {"ffn.out": 3}) == 2 * T * D * V + 2 * T * D * 3


def test_the_top_layers_cost_their_own_backward_only():
    """Half of the layers: the backward runs through the head and the upper half, and nothing below."""
    flops, ids = {}, tokens(B, L)
    for top in (None, 1):
        model = hf("llama", attn_implementation="eager")
        config = s2ft.S2FTConfig(targets={"ffn.out": 3, "attention.out": 1}, top_layers=top)
        s2ft.prepare(model, {"input_ids": ids}, config)
        flops[top] = count_backward(compiled(model), ids)
        torch._dynamo.reset()
    parts = {"ffn.out": 3, "attention.out": 4}
    assert flops == {None: backward_flops(0, parts), 1: backward_flops(1, parts)}


def test_more_units_cost_exactly_their_columns():
    flops = {}
    for n in (2, 7):
        case, model = prepared({"ffn.out": n})
        loss = case.loss(compiled(model))
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        flops[n] = counter.get_total_flops()
        torch._dynamo.reset()
    tokens_, blocks, hidden = case.spec.batch * case.spec.length, case.spec.blocks, case.spec.hidden
    assert flops[7] - flops[2] == blocks * 2 * tokens_ * hidden * (7 - 2)
