"""Every rule, alone: permuting an operator's inputs along what the rule left free permutes its outputs as promised.

One node is built by hand, its operands' axes start free, the rule speaks, and every atom that it did not pin gets a
random order. The operator itself is the oracle: op(permuted inputs) == permuted op(inputs).
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from s2ft_compile.passes.couple import rules
from s2ft_compile.passes.couple.axes import find
from s2ft_compile.passes.couple.rules import AXIS_RULES, rule_for
from s2ft_compile.passes.couple.rules.context import Context
from s2ft_compile.testing import assert_equivalent, check_function, check_rule, infer

aten = torch.ops.aten
MANY = settings(max_examples=3 * settings.default.max_examples)


class Random:
    """Shapes, dims and values for one case, drawn by hypothesis (sizes) and a generator (values)."""

    def __init__(self, data=None, seed: int = 0):
        self.data, self.random = data, torch.Generator().manual_seed(seed)
        self.fixed = iter([3, 4, 5, 2] * 9)

    def n(self, low: int = 1, high: int = 5) -> int:
        return self.data.draw(st.integers(low, high)) if self.data else min(high, max(low, next(self.fixed)))

    def shape(self, rank: int, low: int = 1) -> list[int]:
        return [self.n(low) for _ in range(rank)]

    def of(self, *options):
        return self.data.draw(st.sampled_from(options)) if self.data else options[0]

    def t(self, *shape: int) -> Tensor:
        """Values in (0.1, 0.9), all different."""
        return 0.1 + 0.8 * torch.rand(shape, generator=self.random, dtype=torch.float64)

    def i(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.random)

    def x(self, low: int = 1) -> Tensor:
        return self.t(*self.shape(self.of(3, 2, 1, 4), low))

    def dim(self, x: Tensor) -> int:
        return self.of(-1, *range(-x.dim(), x.dim()))


class Shuffled(Random):
    """Choices by a generator, for loops outside hypothesis."""

    def __init__(self, seed: int):
        super().__init__(None, seed)

    def n(self, low: int = 1, high: int = 5) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.random))

    def of(self, *options):
        return options[self.n(0, len(options) - 1)]


# --- the cases: operator -> (r -> (overload, args, kwargs)); several operators may share one ----------------------


def pair(r):
    """Two shapes that broadcast."""
    shape = r.shape(r.of(3, 2))
    other = [n if r.of(True, False) else 1 for n in shape][r.of(0, 1) :]
    return (r.t(*shape), r.t(*other)) if r.of(True, False) else (r.t(*other), r.t(*shape))


def of_pair(case):
    return lambda r: case(*pair(r))


def with_dim(op, *extra, **kwargs):
    def case(r):
        x = r.x()
        return op, (x, r.dim(x), *extra), kwargs

    return case


def plain(op, *extra, low=1, **kwargs):
    return lambda r: (op, (r.x(low), *extra), kwargs)


def binary(op, *extra, **kwargs):
    return lambda r: (op, (*pair(r), *extra), kwargs)


def reduced(op, *before, **kwargs):
    def case(r):
        x = r.x(2)
        dims = sorted({r.dim(x) % x.dim() for _ in range(r.n(1, 2))})
        return op, (x, *before, dims, r.of(False, True)), kwargs

    return case


def factored(r, total):
    first = r.of(*[n for n in range(1, total + 1) if total % n == 0])
    return [first, total // first]


def reshape_case(op):
    def case(r):
        x = r.t(*[r.of(2, 3, 4, 6, 1) for _ in range(r.n(1, 3))])
        sizes = factored(r, x.numel())
        return op, (x, [*factored(r, sizes[0]), sizes[1]]), {}

    return case


def slice_case(r):
    x = r.x(2)
    d = r.dim(x)
    start = r.n(-x.shape[d], x.shape[d])
    return aten.slice.Tensor, (x, d, start, r.of(x.shape[d], 2**63 - 1, -1, 1), r.of(1, 1, 2)), {}


def gather_case(r):
    x = r.x(2)
    d = r.dim(x)
    shape = [r.n(1, 4) if i == d % x.dim() else n if r.of(True, False) else r.n(1, n) for i, n in enumerate(x.shape)]
    return aten.gather.default, (x, d, r.i(x.shape[d], *shape)), {}


def index_case(r):
    x = r.t(*r.shape(3, 2))
    shape = [r.n(), r.n()]
    chosen = r.of((1,), (0,), (2,), (0, 1), (1, 2), (0, 2))
    shapes = {d: shape if r.of(True, False) else [shape[-1]] for d in chosen}
    return aten.index.Tensor, (x, [r.i(x.shape[d], *shapes[d]) if d in chosen else None for d in range(3)]), {}


def linear_case(r):
    n, m = r.n(), r.n()
    bias = r.of(True, False)
    return aten.linear.default, (r.t(*r.shape(r.of(3, 2, 1)), n), r.t(m, n), *([r.t(m)] if bias else [])), {}


def addmm_case(r):
    a, b, c = r.n(), r.n(), r.n()
    bias = r.t(*r.of([c], [a, c], [1, c], [a, 1], [1]))
    return aten.addmm.default, (bias, r.t(a, b), r.t(b, c)), r.of({}, {"beta": 0.5, "alpha": 2.0})


def matmul_case(r):
    n = r.n()
    batch = r.shape(2)
    return (
        aten.matmul.default,
        r.of(
            (r.t(*batch, 3, n), r.t(*[b if r.of(True, False) else 1 for b in batch], n, 2)),
            (r.t(n), r.t(n)),
            (r.t(3, n), r.t(n)),
            (r.t(n), r.t(n, 2)),
            (r.t(n), r.t(*batch, n, 2)),
            (r.t(*batch, 2, n), r.t(n, 3)),
            (r.t(2, n), r.t(batch[0], n, 3)),
            (r.t(*batch, 2, n), r.t(n)),
            (r.t(*batch, 2, n), r.t(batch[1], n, 3)),
        ),
        {},
    )


def baddbmm_case(r):
    b, n, m, k = r.n(), r.n(), r.n(), r.n()
    bias = r.t(*r.of([b, n, k], [1, n, k], [k], [n, 1]))
    return aten.baddbmm.default, (bias, r.t(b, n, m), r.t(b, m, k)), {}


def einsum_case(r):
    size = {c: r.n() for c in "abcd"}
    equation = r.of(
        "abc,adc->abd", "ab,bc->ac", "ab,ab->ab", "abc,bd->dac", "ab,cd->abcd", "abc,abd->bcd", "a,b->ab", "ab,ac->cb"
    )
    a, b = equation.split("->")[0].split(",")
    shapes = [[1 if r.of(False, False, True) else size[c] for c in letters] for letters in (a, b)]
    return aten.einsum.default, (equation, [r.t(*shape) for shape in shapes]), {}


def attention_case(r):
    batch, kv, groups, length, other, width, value = r.n(1, 3), r.n(1, 3), r.n(1, 3), r.n(2), r.n(2), r.n(2), r.n(1)
    causal = r.of(False, True)
    other = length if causal else other
    gqa = r.of(True, False)
    heads_kv = kv if gqa else r.of(kv * groups, 1)
    mask = (
        None
        if causal or r.of(True, False)
        else r.t(
            *r.of([length, other], [batch, kv * groups, length, other], [batch, 1, 1, other], [1, kv * groups, 1, 1])
        )
    )
    q, k, v = (
        r.t(batch, kv * groups, length, width),
        r.t(batch, heads_kv, other, width),
        r.t(batch, heads_kv, other, value),
    )
    return (
        aten.scaled_dot_product_attention.default,
        (q, k, v, mask, 0.0, causal),
        {"enable_gqa": gqa, "scale": r.of(None, 0.3)},
    )


def convolution_arguments(r):
    groups, spatial = r.of(1, 2, 3), r.of(1, 2)
    c_in, c_out, kernel = groups * r.n(1, 3), groups * r.n(1, 3), [r.n(1, 2) for _ in range(spatial)]
    x = r.t(r.n(), c_in, *[4] * spatial)
    return x, r.t(c_out, c_in // groups, *kernel), r.of(r.t(c_out), None), groups, spatial


def conv_case(r):
    x, w, b, groups, spatial = convolution_arguments(r)
    op = {1: aten.conv1d.default, 2: aten.conv2d.default}[spatial]
    return op, (x, w, b, [1] * spatial, [r.of(0, 1)] * spatial, [1] * spatial, groups), {}


def convolution_case(r):
    x, w, b, groups, spatial = convolution_arguments(r)
    return (
        aten.convolution.default,
        (x, w, b, [1] * spatial, [0] * spatial, [1] * spatial, False, [0] * spatial, groups),
        {},
    )


def conv3d_case(r):
    return aten.conv3d.default, (r.t(2, 2, 3, 3, 3), r.t(r.n(), 2, 2, 2, 2)), {}


def layer_norm_case(op, eps=(1e-5,), bias=True):
    def case(r):
        shape, keep = r.shape(3), r.of(1, 2)
        weight, shift = r.of((r.t(*shape[-keep:]), r.t(*shape[-keep:])), (None, None), (r.t(*shape[-keep:]), None))
        return op, (r.t(*shape), shape[-keep:], weight, *([shift] if bias else []), *eps), {}

    return case


def group_norm_case(r):
    groups, each = r.n(), r.n()
    weight = r.of((r.t(groups * each), r.t(groups * each)), (None, None))
    return aten.group_norm.default, (r.t(r.n(), groups * each, *r.shape(r.of(1, 2))), groups, *weight), {}


def split_case(r):
    x = r.x(2)
    d = r.dim(x)
    return r.of(
        (aten.split.Tensor, (x, r.n(1, 3), d), {}),
        (aten.split_with_sizes.default, (x, [1, 0, x.shape[d] - 1], d), {}),
        (aten.chunk.default, (x, r.n(1, 3), d), {}),
    )


def cat_case(r):
    x = r.x()
    d = r.dim(x)
    shapes = [[r.n(0, 3) if i == d % x.dim() else n for i, n in enumerate(x.shape)] for _ in range(r.n(1, 2))]
    return aten.cat.default, ([x, *[r.t(*s) for s in shapes], *([r.t(0)] if r.of(False, True) else [])], d), {}


def stack_case(r):
    x = r.x()
    return aten.stack.default, ([x, r.t(*x.shape)], r.of(-1, 0, 1)), {}


def expand_case(r):
    shape = r.shape(r.of(2, 3))
    x = r.t(*[n if r.of(True, False) else 1 for n in shape])
    return (
        aten.expand.default,
        (x, [*r.shape(r.of(0, 1)), *[n if r.of(True, True) else -1 if m != 1 else n for n, m in zip(shape, x.shape)]]),
        {},
    )


def pad_case(op):
    def case(r):
        x = r.x(2)
        return op, (x, [r.of(0, 1, 2, -1), r.of(1, 0, -1)][: 2 * x.dim()]), {}

    return case


def only(name: str):
    """An operator's one usual overload."""
    packet = getattr(aten, name)
    return getattr(packet, next(o for o in ("Tensor", "default", "self") if o in packet.overloads()))


CASES = {}
for _name in ("maximum", "minimum", "eq", "ne", "rsub", "logical_and", "logical_or"):
    CASES[_name] = [binary(only(_name))]
CASES["copy"] = [lambda r: (aten.copy.default, (x := r.x(), r.t(*[r.of(n, 1) for n in x.shape][r.of(0, 1) :])), {})]
for _name in ("multiply", "polar", "complex", "arctan2"):
    CASES[_name] = [binary(only(_name))]
for _name in ("special_expit", "special_logit"):
    CASES[_name] = [plain(only(_name))]
for _name in ("real", "imag", "conj", "_conj", "resolve_conj", "resolve_neg"):
    CASES[_name] = [lambda r, op=only(_name): (op, (torch.complex(*[r.t(3, 4) for _ in "ri"]),), {})]
CASES["log_sigmoid"] = [plain(aten.log_sigmoid.default)]
CASES["pow"] = [
    binary(aten.pow.Tensor_Tensor),
    plain(aten.pow.Tensor_Scalar, 2),
    lambda r: (aten.pow.Scalar, (2, r.x()), {}),
]
CASES["clamp"] = [plain(aten.clamp.default, 0.3, 0.6), lambda r: (aten.clamp.Tensor, pair(r), {})]
for _name in ("bitwise_and", "bitwise_or"):
    CASES[_name] = [lambda r, op=only(_name): (op, tuple((t > 0.5) for t in pair(r)), {})]
CASES["where"] = [
    of_pair(lambda a, b: (aten.where.self, (a > 0.5, a, b), {})),
    of_pair(lambda a, b: (aten.where.ScalarOther, (a > b, b, 0.0), {})),
]
CASES["masked_fill"] = [of_pair(lambda a, b: (aten.masked_fill.Scalar, (a, b > 0.5, -1.0), {}))]
CASES["lerp"] = [binary(aten.lerp.Scalar, 0.3), of_pair(lambda a, b: (aten.lerp.Tensor, (a, b, a), {}))]
for _name in ("addcmul", "addcdiv"):
    CASES[_name] = [of_pair(lambda a, b, op=only(_name): (op, (a, b, b), {}))]
for _name in (
    "clone",
    "alias",
    "detach",
    "contiguous",
    "lift_fresh_copy",
    "lift_fresh",
    "nan_to_num",
    "logical_not",
    "empty_like",
):
    CASES[_name] = [plain(only(_name))]
CASES["to"] = [plain(aten.to.dtype, torch.float32)]
CASES["_to_copy"] = [plain(aten._to_copy.default, dtype=torch.float32)]
CASES["type_as"] = [lambda r: (aten.type_as.default, (r.x(), r.t(2).float()), {})]
for _name in ("softmax", "log_softmax"):
    CASES[_name] = [with_dim(getattr(aten, _name).int)]
for _name in ("_softmax", "_log_softmax"):
    CASES[_name] = [with_dim(only(_name), False)]
CASES["_safe_softmax"] = [with_dim(only("_safe_softmax"))]
CASES["dropout"] = [plain(aten.dropout.default, 0.5, False)]
CASES["native_dropout"] = [plain(aten.native_dropout.default, 0.5, False)]
for _name in ("feature_dropout", "alpha_dropout", "feature_alpha_dropout"):
    CASES[_name] = [plain(only(_name), 0.5, False)]
for _name in ("zeros_like", "ones_like"):
    CASES[_name] = [plain(only(_name))]
CASES["full_like"] = [plain(aten.full_like.default, 2.0)]
CASES["new_full"] = [lambda r: (aten.new_full.default, (r.x(), r.shape(2), 0.5), {})]
for _name in ("new_zeros", "new_ones"):
    CASES[_name] = [lambda r, op=only(_name): (op, (r.x(), r.shape(2)), {})]
CASES["full"] = [lambda r: (aten.full.default, (r.shape(2), 0.5), {})]
for _name in ("zeros", "ones"):
    CASES[_name] = [lambda r, op=only(_name): (op, (r.shape(2),), {})]
CASES["scalar_tensor"] = [lambda r: (aten.scalar_tensor.default, (0.5,), {})]
CASES["arange"] = [lambda r: (aten.arange.default, (r.n(),), {})]
CASES["linspace"] = [lambda r: (aten.linspace.default, (0.0, 1.0, r.n()), {})]
CASES["eye"] = [lambda r: (aten.eye.default, (r.n(),), {})]
for _name in ("tril_indices", "triu_indices"):
    CASES[_name] = [lambda r, op=only(_name): (op, (r.n(), r.n()), {})]
for _name in ("cumsum", "cumprod", "logcumsumexp"):
    CASES[_name] = [with_dim(only(_name))]
CASES["flip"] = [lambda r: (aten.flip.default, (x := r.x(), [r.dim(x)]), {})]
CASES["roll"] = [lambda r: (aten.roll.default, (x := r.x(), [1], [r.dim(x)]), {}), plain(aten.roll.default, [1])]
CASES["sort"] = [
    with_dim(aten.sort.default),
    lambda r: (aten.sort.stable, (x := r.x(),), {"stable": True, "dim": r.dim(x)}),
]
CASES["topk"] = [lambda r: (aten.topk.default, (x := r.x(2), r.n(1, x.shape[d := r.dim(x)]), d), {})]
for _name in ("argmax", "argmin"):
    CASES[_name] = [with_dim(only(_name)), with_dim(only(_name), True), plain(only(_name))]
for _name in ("max", "min"):
    _packet = getattr(aten, _name)
    CASES[_name] = [plain(_packet.default), binary(_packet.other), with_dim(_packet.dim), with_dim(_packet.dim, True)]
for _name in ("tril", "triu"):
    CASES[_name] = [lambda r, op=only(_name): (op, (r.t(*r.shape(r.of(2, 3))), r.of(0, 1, -1)), {})]
for _name in ("view", "_unsafe_view", "reshape"):
    CASES[_name] = [reshape_case(only(_name))]
CASES["view"] += [plain(aten.view.dtype, torch.int64), plain(aten.view.dtype, torch.int32)]
CASES["flatten"] = [lambda r: (aten.flatten.using_ints, (r.t(*r.shape(3)), r.of(0, 1), r.of(-1, 1)), {})]
CASES["unflatten"] = [
    lambda r: (aten.unflatten.int, (r.t(r.n(), (sizes := r.shape(2))[0] * sizes[1], r.n()), 1, sizes), {})
]
CASES["unsqueeze"] = [with_dim(aten.unsqueeze.default)]
CASES["squeeze"] = [plain(aten.squeeze.default), with_dim(aten.squeeze.dim)]
CASES["view_as"] = [lambda r: (aten.view_as.default, (x := r.x(), r.t(x.numel())), {})]
CASES["permute"] = [lambda r: (aten.permute.default, (r.t(*r.shape(3)), r.of([2, 0, 1], [1, 0, 2], [0, -1, 1])), {})]
for _name in ("transpose", "swapaxes"):
    CASES[_name] = [
        lambda r, op=getattr(aten, _name): (
            op.int if "int" in op.overloads() else op.default,
            (x := r.x(), r.dim(x), r.dim(x)),
            {},
        )
    ]
CASES["t"] = [lambda r: (aten.t.default, (r.t(*r.shape(r.of(2, 1))),), {})]
CASES["mT"] = [lambda r: (aten.mT.default, (r.t(*r.shape(r.of(2, 3))),), {})]
CASES["expand"] = [expand_case]
CASES["expand_as"] = [lambda r: (aten.expand_as.default, (r.t(1, (n := r.n())), r.t(r.n(), n)), {})]
CASES["broadcast_to"] = [lambda r: (aten.broadcast_to.default, (r.t(n := r.n(), 1), [n, r.n()]), {})]
CASES["repeat"] = [lambda r: (aten.repeat.default, (r.t(*r.shape(2)), r.shape(r.of(2, 3))), {})]
CASES["tile"] = [lambda r: (aten.tile.default, (r.t(*r.shape(2)), r.shape(r.of(2, 3, 1))), {})]
CASES["repeat_interleave"] = [
    lambda r: (aten.repeat_interleave.self_int, (x := r.x(), r.n(), r.of(r.dim(x), None)), {})
]
CASES["slice"] = [slice_case]
CASES["narrow"] = [lambda r: (aten.narrow.default, (x := r.x(), r.dim(x), 0, 1), {})]
CASES["select"] = [
    lambda r: (aten.select.int, (x := r.x(2), r.dim(x), r.of(-1, 0)), {}),
    lambda r: (aten.select.int, (r.t(r.n(), 5), 1, r.of(2, 1, -2)), {}),
]
CASES["unbind"] = [with_dim(aten.unbind.int)]
for _name in ("split", "split_with_sizes", "chunk"):
    CASES[_name] = [split_case]
CASES["cat"] = [cat_case]
CASES["concat"] = [lambda r: (aten.concat.default, cat_case(r)[1], {})]
CASES["concatenate"] = [lambda r: (aten.concatenate.default, cat_case(r)[1], {})]
CASES["stack"] = [stack_case]
CASES["constant_pad_nd"] = [pad_case(aten.constant_pad_nd.default)]
CASES["pad"] = [
    pad_case(aten.pad.default),
    lambda r: (
        aten.pad.default,
        (r.t(r.n(), r.n(), 5), [r.of(0, 2), r.n(0, 3)], r.of("reflect", "replicate", "circular")),
        {},
    ),
]
for _name in ("sum", "mean", "any", "all"):
    _packet = getattr(aten, _name)
    CASES[_name] = [
        plain(_packet.default),
        reduced(getattr(_packet, next(o for o in ("dim_IntList", "dims", "dim") if o in _packet.overloads()))),
    ]
for _name in ("amax", "amin", "logsumexp"):
    CASES[_name] = [reduced(only(_name))]
for _name in ("var", "std", "var_mean", "std_mean"):
    _packet = getattr(aten, _name)
    CASES[_name] = [
        plain(_packet.default, low=2),
        lambda r, op=_packet.correction: (
            op,
            (x := r.x(2), [r.dim(x)]),
            {"correction": 0, "keepdim": r.of(False, True)},
        ),
    ]
CASES["prod"] = [plain(aten.prod.default), with_dim(aten.prod.dim_int, True)]
CASES["linalg_vector_norm"] = [reduced(aten.linalg_vector_norm.default, 2), plain(aten.linalg_vector_norm.default)]
CASES["layer_norm"] = [layer_norm_case(aten.layer_norm.default)]
CASES["native_layer_norm"] = [layer_norm_case(aten.native_layer_norm.default)]
CASES["rms_norm"] = [
    layer_norm_case(aten.rms_norm.default, bias=False),
    layer_norm_case(aten.rms_norm.default, (), bias=False),
]
CASES["_fused_rms_norm"] = [layer_norm_case(aten._fused_rms_norm.default, bias=False)]
CASES["group_norm"] = [group_norm_case]
CASES["linear"] = [linear_case, lambda r: (aten.linear.default, (r.t(r.n(), (n := r.n())), r.t(n)), {})]
CASES["mm"] = [lambda r: (aten.mm.default, (r.t(r.n(), (n := r.n())), r.t(n, r.n())), {})]
CASES["bmm"] = [lambda r: (aten.bmm.default, (r.t(b := r.n(), r.n(), (n := r.n())), r.t(b, n, r.n())), {})]
CASES["addmm"] = [addmm_case]
CASES["baddbmm"] = [baddbmm_case]
CASES["matmul"] = [matmul_case]
CASES["einsum"] = [einsum_case]
CASES["scaled_dot_product_attention"] = [attention_case]
CASES["conv1d"] = CASES["conv2d"] = [conv_case]
CASES["conv3d"] = [conv3d_case]
CASES["convolution"] = [convolution_case]
CASES["embedding"] = [lambda r: (aten.embedding.default, (r.t(n := r.n(), r.n()), r.i(n, *r.shape(2))), {})]
CASES["index"] = [index_case, lambda r: (aten.index.Tensor, ((x := r.t(*r.shape(2))), [x[:, 0] > 0.5]), {})]
CASES["index_select"] = [lambda r: (aten.index_select.default, (x := r.x(), d := r.dim(x), r.i(x.shape[d], r.n())), {})]
CASES["gather"] = [gather_case]


def take_along_case(r):
    x = r.x(2)
    d = r.dim(x)
    shape = [r.n(1, 4) if i == d % x.dim() else r.of(n, 1) for i, n in enumerate(x.shape)]
    return aten.take_along_dim.default, (x, r.i(x.shape[d], *shape), d), {}


CASES["one_hot"] = [lambda r: (aten.one_hot.default, (r.i(4, *r.shape(r.of(2, 1))), 5), {})]
CASES["take_along_dim"] = [
    take_along_case,
    lambda r: (aten.take_along_dim.default, (x := r.x(2), r.i(x.numel(), 3)), {}),
]


def slice_scatter_case(r):
    x = r.x(2)
    d = r.dim(x)
    start = r.n(0, x.shape[d] - 1)
    size = r.n(1, x.shape[d] - start)
    step = r.of(1, 1, 2)
    source = r.t(*[-(-size // step) if i == d % x.dim() else n for i, n in enumerate(x.shape)])
    return aten.slice_scatter.default, (x, source, d, start, start + size, step), {}


def select_scatter_case(r):
    x = r.x(2)
    d = r.dim(x)
    return aten.select_scatter.default, (x, x.select(d, 0) + 1, d, r.n(-1, 1)), {}


def grouped_mm_case(r):
    groups, rows, n, m = r.n(), r.n(1, 4), 8, 16  # rows of 16 bytes
    offsets = torch.arange(1, groups + 1, dtype=torch.int32) * rows
    return aten._grouped_mm.default, (r.t(groups * rows, n).bfloat16(), r.t(groups, n, m).bfloat16(), offsets), {}


def index_put_case(r):
    x = r.t(*r.shape(3, 2))
    chosen, length = r.of((1,), (0,), (0, 1), (0, 2)), r.n()
    indices = [r.i(x.shape[d], length) if d in chosen else None for d in range(3)]
    values = r.of(r.t(1), r.t(*x[tuple(slice(None) if i is None else i for i in indices)].shape))
    return aten.index_put.default, (x, indices, values, r.of(False, True)), {}


def index_add_case(r):
    x = r.x(2)
    d, length = r.dim(x), r.n()
    source = r.t(*[length if i == d % x.dim() else n for i, n in enumerate(x.shape)])
    return aten.index_add.default, (x, d, r.i(x.shape[d], length), source), {}


def scatter_case(op, *rest, value=False):
    def case(r):
        x = r.x(2)
        d = r.dim(x)
        shape = [
            r.n(1, 4) if i == d % x.dim() else n if r.of(True, True, False) else r.n(1, n)
            for i, n in enumerate(x.shape)
        ]
        source = 0.5 if value else r.t(*[n + r.of(0, 0, 1) for n in shape])
        return op, (x, d, r.i(x.shape[d], *shape), source, *rest), {}

    return case


def spatial_case(spatial: int, op, *arguments, **kwargs):
    return lambda r: (op, (r.t(r.n(), r.n(), *[4] * spatial), *arguments), kwargs)


def batch_norm_case(op, *training):
    def case(r):
        n = r.n()
        weight = r.of((r.t(n), r.t(n)), (None, None))
        return (
            op,
            (
                r.t(r.n(), n, *r.shape(r.of(2, 1))),
                *weight,
                r.t(n),
                r.t(n),
                *training,
                0.1,
                1e-5,
                *([False] if training else []),
            ),
            {},
        )

    return case


def conv_transpose_case(r):
    spatial = r.of(1, 2, 3)
    op = getattr(aten, f"conv_transpose{spatial}d")
    n, m = r.n(), r.n()
    bias = r.of(r.t(m), None)
    return getattr(op, op.overloads()[0]), (r.t(r.n(), n, *[3] * spatial), r.t(n, m, *[2] * spatial), bias), {}


def transposed_convolution_case(r):
    n, m = r.n(), r.n()
    return aten.convolution.default, (r.t(2, n, 4), r.t(n, m, 2), r.of(r.t(m), None), [1], [0], [1], True, [0], 1), {}


CASES["slice_scatter"] = [slice_scatter_case]
CASES["select_scatter"] = [select_scatter_case]
CASES["_grouped_mm"] = [grouped_mm_case]
CASES["index_put"] = [index_put_case]
CASES["_unsafe_index_put"] = [lambda r: (aten._unsafe_index_put.default, *index_put_case(r)[1:])]
CASES["index_add"] = [index_add_case]
CASES["scatter"] = [scatter_case(aten.scatter.src), scatter_case(aten.scatter.value, value=True)]
CASES["scatter_add"] = [scatter_case(aten.scatter_add.default)]
CASES["scatter_reduce"] = [scatter_case(aten.scatter_reduce.two, "sum"), scatter_case(aten.scatter_reduce.two, "amax")]
CASES["view_as_complex"] = [lambda r: (aten.view_as_complex.default, (r.t(*r.shape(2), 2),), {})]
CASES["view_as_real"] = [lambda r: (aten.view_as_real.default, (torch.complex(*[r.t(3, 4) for _ in "ri"]),), {})]
CASES["as_strided"] = [
    lambda r: (aten.as_strided.default, (r.t(n := r.n(), 6, m := r.n()), [n, 2, 4, m], [6 * m, 2 * m, m, 1]), {}),
    lambda r: (aten.as_strided.default, (r.t(n := r.n(), m := r.n()), [m, n], [1, m]), {}),
    lambda r: (aten.as_strided.default, (r.t(n := r.n(), m := r.n(2)), [n * m - 1, 2], [1, 1]), {}),
]
CASES["unfold"] = [lambda r: (aten.unfold.default, (r.t(r.n(), 5, r.n()), r.of(1, -2), 2, r.of(1, 2)), {})]
CASES["glu"] = [lambda r: (aten.glu.default, (r.t(r.n(), 2 * r.n(), 4), r.of(1, -2, 2)), {})]
for _spatial in (1, 2, 3):
    for _name in ("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool"):
        CASES[f"{_name}{_spatial}d"] = [spatial_case(_spatial, only(f"{_name}{_spatial}d"), [2] * _spatial)]
for _name in ("max_pool2d_with_indices", "_adaptive_avg_pool2d"):
    CASES[_name] = [spatial_case(2, only(_name), [2, 2])]
CASES["upsample_linear1d"] = [spatial_case(1, aten.upsample_linear1d.default, [7], False)]
CASES["upsample_nearest1d"] = [spatial_case(1, aten.upsample_nearest1d.default, [7])]
CASES["upsample_nearest2d"] = [spatial_case(2, aten.upsample_nearest2d.default, [7, 5])]
for _name in ("upsample_bilinear2d", "upsample_bicubic2d"):
    CASES[_name] = [spatial_case(2, getattr(aten, _name).default, [7, 5], False)]
CASES["batch_norm"] = [batch_norm_case(aten.batch_norm.default, False)]
for _name in ("_native_batch_norm_legit_no_training", "_batch_norm_no_update"):
    CASES[_name] = [batch_norm_case(only(_name))]
CASES["_native_batch_norm_legit_functional"] = [
    lambda r, training=training: (
        aten._native_batch_norm_legit_functional.default,
        (r.t(3, (n := r.n()), 4), r.t(n), r.t(n), r.t(n), r.t(n), training, 0.1, 1e-05),
        {},
    )
    for training in (True, False)
]
CASES["_weight_norm_interface"] = [
    lambda r: (aten._weight_norm_interface.default, (r.t(n := r.n(), 3, 2), r.t(n, 1, 1), 0), {}),
    lambda r: (aten._weight_norm_interface.default, (r.t(3, 2, (n := r.n())), r.t(1, 1, n), 2), {}),
]
for _spatial in "123":
    CASES[f"conv_transpose{_spatial}d"] = [conv_transpose_case]
CASES["convolution"].append(transposed_convolution_case)


def general_einsum_case(r):
    size = {c: r.n() for c in "abcdxy"}
    equation, letters = r.of(
        ("ab,bc,cd->ad", "ab,bc,cd"),
        ("abc->ca", "abc"),
        ("abc->ac", "abc"),
        ("...ab,...bc->...ac", "xyab,xybc"),
        ("...ab,bc->...ac", "xyab,bc"),
        ("...ab,...bc", "xyab,ybc"),
        ("ab,bc", "ab,bc"),
        ("a...,b...->ab", "axy,bxy"),
        ("ab,ac,ad->bcd", "ab,ac,ad"),
        ("abc,bd->ad", "abc,bd"),
        ("aab->b", "aab"),
    )
    shapes = [[size[c] for c in letters] for letters in letters.split(",")]
    return aten.einsum.default, (equation, [r.t(*shape) for shape in shapes]), {}


def recurrent_case(op, gates: int, states: int):
    def case(r):
        T, B, I, H, layers = r.n(1, 3), r.n(1, 3), r.n(), r.n(), r.n(1, 2)
        both, first, biased = r.of(False, True), r.of(False, True), r.of(True, False)
        ways, weights = 2 if both else 1, []
        for layer in range(layers):
            for _ in range(ways):
                weights += [r.t(gates * H, I if layer == 0 else ways * H) - 0.5, r.t(gates * H, H) - 0.5]
                weights += [r.t(gates * H), r.t(gates * H)] if biased else []
        held = [r.t(layers * ways, B, H) for _ in range(states)]
        x = r.t(B, T, I) if first else r.t(T, B, I)
        return op, (x, held if states > 1 else held[0], weights, biased, layers, 0.0, False, both, first), {}

    return case


def cell_case(op, gates: int, states: int):
    def case(r):
        B, I, H = r.n(), r.n(), r.n()
        held = [r.t(B, H) for _ in range(states)]
        biases = r.of((r.t(gates * H), r.t(gates * H)), ())
        weights = (r.t(gates * H, I) - 0.5, r.t(gates * H, H) - 0.5, *biases)
        return op, (r.t(B, I), held if states > 1 else held[0], *weights), {}

    return case


def tensordot_case(r):
    size = [r.n() for _ in range(4)]
    dims = r.of(([1], [0]), ([1, 2], [0, 2]), ([0, -1], [1, 0]), ([], []))
    left, right = r.t(*size[:3]), [r.n(), r.n(), r.n()]
    for a, b in zip(*dims):
        right[b] = left.shape[a]
    return aten.tensordot.default, (left, r.t(*right), *dims), {}


CASES["einsum"].append(general_einsum_case)
for _name, _gates, _states in (("lstm", 4, 2), ("gru", 3, 1), ("rnn_tanh", 1, 1), ("rnn_relu", 1, 1)):
    CASES[_name] = [recurrent_case(getattr(aten, _name).input, _gates, _states)]
    CASES[f"{_name}_cell"] = [cell_case(only(f"{_name}_cell"), _gates, _states)]
CASES["tensordot"] = [tensordot_case]
CASES["mv"] = [lambda r: (aten.mv.default, (r.t(r.n(), (n := r.n())), r.t(n)), {})]
CASES["dot"] = [lambda r: (aten.dot.default, (r.t(n := r.n()), r.t(n)), {})]
CASES["vdot"] = [lambda r: (aten.vdot.default, (r.t(n := r.n()), r.t(n)), {})]
CASES["inner"] = [
    lambda r: (aten.inner.default, (r.t(r.n(), (n := r.n())), r.t(*r.shape(r.of(0, 2)), n)), {}),
    lambda r: (aten.inner.default, (r.t(), r.t(r.n(), r.n())), {}),
]
for _name in ("outer", "ger"):
    CASES[_name] = [lambda r, op=only(_name): (op, (r.t(r.n()), r.t(r.n())), {})]
CASES["bilinear"] = [
    lambda r: (
        aten.bilinear.default,
        (r.t(b := r.n(), (n := r.n())), r.t(b, (m := r.n())), r.t(o := r.n(), n, m), r.t(o)),
        {},
    )
]
CASES["cdist"] = [
    lambda r: (
        aten.cdist.default,
        (r.t(b := r.n(), r.n(), (n := r.n())), r.t(r.of(b, 1), r.n(), n), r.of(2.0, 1.0)),
        {},
    )
]
CASES["linalg_vecdot"] = [
    lambda r: (lambda x, y: (aten.linalg_vecdot.default, (x, y), {"dim": -1}))(*[r.t(3, 4), r.t(r.of(2, 1), 3, 4)])
]
CASES["cosine_similarity"] = [
    lambda r: (aten.cosine_similarity.default, ((x := r.t(*r.shape(3))), r.t(*x.shape), r.of(0, 1, -1)), {})
]
CASES["linalg_solve_triangular"] = [
    lambda r: (
        aten.linalg_solve_triangular.default,
        (
            torch.eye(n := r.n(), dtype=torch.float64) + r.t(2, n, n),
            r.t(r.of(2, 1), *((n, 3) if (left := r.of(True, False)) else (3, n))),
        ),
        {"upper": r.of(True, False), "left": left},
    )
]
CASES["zero"] = [plain(aten.zero.default)]
for _name in ("median", "nanmedian"):
    CASES[_name] = [plain(getattr(aten, _name).default), with_dim(getattr(aten, _name).dim)]
CASES["kthvalue"] = [lambda r: (aten.kthvalue.default, (x := r.x(), 1, r.dim(x), r.of(False, True)), {})]
CASES["linalg_norm"] = [
    plain(aten.linalg_norm.default),
    lambda r: (aten.linalg_norm.default, (r.t(*r.shape(3)), r.of(None, 2, 1), [r.of(0, 1, 2)], r.of(False, True)), {}),
    lambda r: (aten.linalg_norm.ord_str, (r.t(*r.shape(3)), r.of("fro", "nuc"), [0, 2]), {}),
]
CASES["norm"] = [plain(aten.norm.Scalar), lambda r: (aten.norm.ScalarOpt_dim, (r.t(*r.shape(3)), 2, [r.of(0, -1)]), {})]
CASES["prelu"] = [
    lambda r: (aten.prelu.default, (r.t(r.n(), (n := r.n()), r.n()) - 0.5, r.t(r.of(n, 1))), {}),
    lambda r: (aten.prelu.default, (r.t(r.n()) - 0.5, r.t(1)), {}),
]
CASES["instance_norm"] = [
    lambda r: (
        aten.instance_norm.default,
        (r.t(r.n(), (n := r.n()), r.n(2)), r.t(n), r.t(n), None, None, True, 0.1, 1e-05, False),
        {},
    )
]
CASES["pixel_shuffle"] = [lambda r: (aten.pixel_shuffle.default, (r.t(r.n(), 4 * r.n(), r.n(), r.n()), 2), {})]
CASES["pixel_unshuffle"] = [lambda r: (aten.pixel_unshuffle.default, (r.t(r.n(), r.n(), 2 * r.n(), 2 * r.n()), 2), {})]
CASES["channel_shuffle"] = [lambda r: (aten.channel_shuffle.default, (r.t(r.n(), 6, r.n()), r.of(1, 2, 3)), {})]
CASES["im2col"] = [
    lambda r: (aten.im2col.default, (r.t(2, r.n(), 2 + r.n(), 3), [2, r.of(1, 2)], [1, 1], [r.of(0, 1), 0], [1, 1]), {})
]
CASES["col2im"] = [lambda r: (aten.col2im.default, (r.t(2, 4 * r.n(), 6), [3, 4], [2, 2], [1, 1], [0, 0], [1, 1]), {})]
CASES["_native_batch_norm_legit"] = [
    lambda r: (
        aten._native_batch_norm_legit.no_stats,
        (r.t(r.of(1, 3), n := r.n(), 4), *r.of((r.t(n), r.t(n)), (None, None)), True, 0.1, 1e-05),
        {},
    )
]
for _name in ("__and__", "__or__", "__xor__"):
    CASES[_name] = [of_pair(lambda a, b, op=only(_name): (op, (a > 0.5, b > 0.5), {}))]
CASES["_weight_norm"] = [
    lambda r: (aten._weight_norm.default, (r.t(n := r.n(), 3, 2), r.t(n, 1, 1), 0), {}),
    lambda r: (aten._weight_norm.default, (r.t(r.n(), 3), r.t(), -1), {}),
]
CASES["upsample_nearest3d"] = [spatial_case(3, aten.upsample_nearest3d.default, [5, 3, 7])]
CASES["upsample_trilinear3d"] = [spatial_case(3, aten.upsample_trilinear3d.default, [5, 3, 7], False)]
for _spatial in (1, 2, 3):
    CASES[f"_upsample_nearest_exact{_spatial}d"] = [
        spatial_case(_spatial, only(f"_upsample_nearest_exact{_spatial}d"), [7] * _spatial)
    ]
for _name in ("_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa"):
    CASES[_name] = [spatial_case(2, getattr(aten, _name).default, [7, 5], False)]
for _name in (
    "hardswish", "hardsigmoid", "hardtanh", "relu6", "selu", "celu", "softshrink", "hardshrink", "logit", "square",
    "absolute", "negative", "isfinite",
):  # fmt: skip
    CASES[_name] = [plain(only(_name))]
CASES["threshold"] = [plain(aten.threshold.default, 0.5, 0.0)]
CASES["clip"] = [plain(aten.clip.default, 0.3, 0.6)]
for _name in (
    "subtract", "divide", "true_divide", "floor_divide", "greater", "greater_equal", "less", "less_equal", "not_equal",
    "logaddexp", "logaddexp2", "logical_xor", "isclose",
):  # fmt: skip
    CASES[_name] = [binary(only(_name))]
CASES["float_power"] = [binary(aten.float_power.Tensor_Tensor)]
CASES["xlogy"] = [binary(aten.xlogy.Tensor)]


def fourier_case(op, rank: str):
    def case(r):
        x = r.t(*r.shape(r.of(2, 3), 2))
        dim = r.dim(x) if not rank else sorted({r.dim(x) % x.dim(), 0}) if rank == "n" else [-1, -2]
        return op, (x, None, dim), {}

    return case


for _name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft"):
    for _rank in ("", "2", "n"):
        if hasattr(aten, f"fft_{_name}{_rank}"):
            CASES[f"fft_{_name}{_rank}"] = [fourier_case(only(f"fft_{_name}{_rank}"), _rank)]


def one_sided(op, last):
    """A Fourier transform of one dimension, which these take from 0 on. last: their last argument, by its size."""

    def case(r):
        x = r.x(2)
        d = r.dim(x) % x.ndim
        return op, (x if op is aten._fft_r2c.default else x + 1j * x, [d], 0, last(x.shape[d])), {}

    return [case]


CASES["_fft_r2c"] = one_sided(aten._fft_r2c.default, lambda size: True)
CASES["_fft_c2c"] = one_sided(aten._fft_c2c.default, lambda size: True)
CASES["_fft_c2r"] = one_sided(aten._fft_c2r.default, lambda size: 2 * (size - 1) or 1)

CASES["cummax"] = [with_dim(aten.cummax.default)]
CASES["cummin"] = [with_dim(aten.cummin.default)]
CASES["mode"] = [with_dim(aten.mode.default)]
CASES["diagonal"] = [
    lambda r: (aten.diagonal.default, (r.t(*r.shape(r.of(2, 3))), r.of(0, 1, -1), *r.of((0, 1), (-1, 0))), {})
]


def matrices(r, square: bool = True) -> Tensor:
    """A batch of matrices; square ones are symmetric and positive definite."""
    x = r.t(r.n(2), r.n(), n := r.n(2, 4), n if square else r.n(2, 4))
    return x @ x.mT + 3 * torch.eye(n, dtype=torch.float64) if square else x


for _name in (
    "linalg_inv_ex", "linalg_pinv", "linalg_matrix_exp", "linalg_cholesky_ex", "cholesky", "linalg_lu", "linalg_qr",
    "linalg_lu_factor_ex", "linalg_eig", "_linalg_eigh", "_linalg_svd", "_linalg_det", "_linalg_slogdet",
):  # fmt: skip
    CASES[_name] = [lambda r, op=getattr(aten, _name).default: (op, (matrices(r),), {})]
CASES["linalg_qr"] += [lambda r: (aten.linalg_qr.default, (matrices(r, False), r.of("reduced", "complete", "r")), {})]
CASES["_linalg_svd"] += [lambda r: (aten._linalg_svd.default, (matrices(r, False), False, r.of(True, False)), {})]
CASES["linalg_pinv"] = [
    lambda r: (aten.linalg_pinv.atol_rtol_tensor, (x := matrices(r, False),), {"rtol": 1e-9 * r.t(*x.shape[:2])})
]


def solve_case(r):
    left, matrix = r.of(True, False), matrices(r)
    batch, n = r.of(matrix.shape[:2], matrix.shape[1:2]), matrix.shape[-1]
    right = r.of(r.t(*batch, *((n, 5) if left else (5, n))), r.t(*matrix.shape[:-1]))
    return aten._linalg_solve_ex.default, (matrix, right), {"left": left or right.shape == matrix.shape[:-1]}


CASES["_linalg_solve_ex"] = [solve_case]
CASES["grid_sampler_2d"] = [
    lambda r: (aten.grid_sampler_2d.default, (r.t(b := r.n(), r.n(), 3, 4), r.t(b, r.n(), r.n(), 2), 0, 0, False), {})
]
CASES["grid_sampler_3d"] = [
    lambda r: (
        aten.grid_sampler_3d.default,
        (r.t(b := r.n(), r.n(), 3, 4, 2), r.t(b, r.n(), r.n(), r.n(), 3), 0, 0, False),
        {},
    )
]

# operators whose values are drawn anew at each call, so that nothing can be compared
RANDOM = {"rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "random", "bernoulli", "exponential"}
RANDOM |= {"uniform", "normal_functional", "log_normal", "cauchy", "geometric"}
# memory that nobody has written: only its shape is promised
UNDEFINED = {"empty", "new_empty", "empty_like"}


@pytest.mark.parametrize("name", [n for n in CASES if n not in UNDEFINED])
@given(data=st.data())
@MANY
def test_rule(name: str, data):
    r = Random(data, data.draw(st.integers(0, 99)))
    case = r.of(*CASES[name])
    check_rule(*case(r))


def test_every_rule_has_a_case():
    named = {str(op._overloadpacket).removeprefix("aten.") for op in AXIS_RULES}
    assert named - RANDOM - UNDEFINED == {n for n in CASES if n not in UNDEFINED} & named, "a rule without a case"
    assert not set(CASES) - named, "a case without a rule"


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_random_values_are_pinned_or_alike(name: str):
    """Fresh noise is alike in distribution along every dimension, and differs there where a seed has to give the same;
    bernoulli(p) follows p."""
    rule = rule_for(getattr(aten, name).default if hasattr(getattr(aten, name), "default") else only(name))
    assert rule is (rules.axes_same if name == "bernoulli" else rules.axes_random)
    if name == "bernoulli":
        return
    node = fx.Graph().call_function(aten.rand_like.default, ())
    node.meta["val"] = torch.rand(3, 4)
    assert [a.pin for a in rule(Context(training=True), node)] == [None, None]
    assert all(a.pin for a in rule(Context(training=False), node))


POINTWISE = sorted(
    {
        str(op._overloadpacket).removeprefix("aten.")
        for n in dir(aten)
        if hasattr(packet := getattr(aten, n), "overloads")
        for op in (getattr(packet, o) for o in packet.overloads())
        if torch.Tag.pointwise in op.tags and op not in AXIS_RULES and not n.endswith("_")
    }
)


@pytest.mark.parametrize("arity", [1, 2])
def test_operators_tagged_pointwise(arity: int):
    """They share one rule; all that take one or two tensors are called and compared."""
    checked = []
    for name in POINTWISE:
        op, r = only_or_none(name), Random()
        args = (r.t(3, 4),) if arity == 1 else (r.t(3, 4), r.t(2, 1, 4))
        if op is None or sum("Tensor" in str(a.type) for a in op._schema.arguments) != arity:
            continue
        for extra in ((), (0.5,)):
            try:
                if not torch.is_tensor(op(*args, *extra)) and name != "frexp":
                    continue
            except (RuntimeError, TypeError):  # needs integers, or further arguments
                continue
            assert check_rule(op, (*args, *extra), {}) == (2 if arity == 1 else 4), name
            checked.append(name)
            break
    assert len(checked) > (50 if arity == 1 else 15), checked


def only_or_none(name: str):
    packet = getattr(aten, name)
    names = [o for o in ("Tensor", "default", "self") if o in packet.overloads()]
    return getattr(packet, names[0]) if names else None


# --- the tests can fail: without its pins a rule is caught ----------------------------------------------------------

PINNING = (
    "cumsum",
    "cumprod",
    "logcumsumexp",
    "cummax",
    "linalg_inv_ex",
    "_linalg_solve_ex",
    "grid_sampler_2d",
    "diagonal",
    "flip",
    "roll",
    "sort",
    "topk",
    "argmax",
    "argmin",
    "max",
    "min",
    "tril",
    "triu",
    "unbind",
    "embedding",
    "index",
    "index_select",
    "gather",
    "take_along_dim",
    "index_put",
    "index_add",
    "scatter",
    "slice_scatter",
    "unfold",
    "as_strided",
    "view_as_complex",
    "avg_pool2d",
    "_grouped_mm",
    "conv1d",
    "convolution",
    "scaled_dot_product_attention",
    "slice",
    "pad",
    "constant_pad_nd",
)


@pytest.mark.parametrize("name", PINNING)
def test_a_rule_without_its_pins_is_caught(name: str, monkeypatch):
    for family in (rules.contraction, rules.elementwise, rules.indexing, rules.reduction, rules.shape):
        monkeypatch.setattr(family, "pin", lambda axis, why: None, raising=False)
    caught = 0
    for seed in range(40):
        for case in CASES[name]:
            try:
                check_rule(*case(Shuffled(seed)), seed=seed)
            except AssertionError:
                caught += 1
    assert caught, f"{name} passes without its pins"


def test_an_operator_without_a_rule_pins_all_it_touches():
    inputs, axes, results, _ = infer(aten.histc.default, (torch.rand(3, 3),), {})
    assert all(find(a).pin and "no rule for histc" in find(a).pin.reason for dims in [*axes, *results] for a in dims)


@pytest.mark.parametrize(
    "op, args",
    [
        (aten.cumsum.default, (0.5, 1)),
        (aten.flip.default, (0.5, [1])),
        (aten.sort.default, (0.5, 1)),
        (aten.unbind.int, (0.5, 1)),
    ],
)
def test_a_pin_names_its_node_and_spares_the_other_dims(op, args):
    _, axes, _, _ = infer(op, (torch.rand(3, 4), *args[1:]), {})
    assert find(axes[0][0]).pin is None
    reason = find(axes[0][1]).pin
    assert reason.node.target is op and reason.reason


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64)


@pytest.mark.parametrize("name, free", [("softmax", 2), ("linear", 4), ("matmul", 5), ("layer_norm", 3), ("bmm", 6)])
def test_what_is_symmetric_stays_free(name: str, free: int):
    """Sound is not enough: the rules below must not pin at all."""
    case = {
        "softmax": (aten.softmax.int, (rand(3, 4), -1)),
        "linear": (aten.linear.default, (rand(2, 3), rand(4, 3))),
        "matmul": (aten.matmul.default, (rand(2, 3, 4), rand(4, 5))),
        "layer_norm": (aten.layer_norm.default, (rand(3, 4), [4], rand(4))),
        "bmm": (aten.bmm.default, (rand(2, 3, 4), rand(2, 4, 5))),
    }[name]
    assert check_rule(*case, {}) == free


@pytest.mark.parametrize(
    "name, function, free",
    [
        ("diff", lambda x: torch.diff(x, dim=1), 2),
        ("hstack", lambda x: torch.hstack([x, 2 * x]), 3),
        ("nansum", lambda x: torch.nansum(x, -1), 3),
        ("quantile", lambda x: torch.quantile(x, 0.3, dim=1, keepdim=True), 2),
        ("renorm", lambda x: torch.renorm(x, 2, 0, 1.0), 3),
        ("mse_loss", lambda x: nn.functional.mse_loss(x, torch.zeros_like(x)), 3),
        ("movedim", lambda x: torch.movedim(x, 0, 2), 3),
        ("gradient", lambda x: torch.gradient(x, dim=1)[0], 2),
        ("tensor_split", lambda x: torch.cat([2 * t for t in torch.tensor_split(x, 2, dim=1)], 1), 2),
        ("matrix_norm", lambda x: torch.linalg.matrix_norm(x), 3),
        ("svdvals", lambda x: torch.linalg.svdvals(x), 1),
        ("histc", lambda x: torch.histc(x), 0),
    ],
)
def test_an_operator_without_a_rule_is_taken_apart(name: str, function, free: int, caplog):
    """What torch makes of others: as much of it may move as of those."""
    assert check_function(function, [rand(2, 6, 5)]) >= free, name
    assert not caplog.records, "a rule failed"


class Flex(nn.Module):
    """Attention whose scores and mask are functions: of positions, or of which head it is."""

    def __init__(self, score: str, masked: bool):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16, bias=False) for _ in range(4))
        self.register_buffer("slopes", 2.0 ** -torch.arange(4.0))
        self.score = {
            "no": None,
            "distance": lambda s, b, h, q, k: s - 0.1 * (q - k).abs(),
            "soft cap": lambda s, b, h, q, k: 5 * torch.tanh(s / 5),
            "slope": lambda s, b, h, q, k: s - self.slopes[h] * (q - k).abs(),
            "head": lambda s, b, h, q, k: torch.where(h < 2, s, -s),
        }[score]
        self.mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 6, 6, "cpu") if masked else None

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (4, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return x + self.o(flex_attention(q, k, v, self.score, self.mask).transpose(1, 2).flatten(2))


@pytest.mark.filterwarnings("ignore:.*without torch.compile")
@pytest.mark.parametrize("masked", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("score", ["no", "distance", "soft cap", "slope", "head"])
def test_heads_of_flex_attention_are_free_unless_its_functions_look_at_them(score: str, masked: bool):
    torch.manual_seed(0)
    analysis = assert_equivalent(Flex(score, masked).requires_grad_(False), (torch.randn(2, 6, 16),))
    heads = {m.parameter_name for c in analysis.couplings if c.axis in analysis.heads for m in c.members}
    assert heads == (set() if score in ("slope", "head") else {"q.weight", "k.weight", "v.weight", "o.weight"})
    assert any(c.role == "attention" for c in analysis.couplings)  # channels of a head
