"""What each operator says about the axes of its operands: one table, keyed by operator.

A rule gets (cx, node, *args) with every tensor argument as a `Value`, states what must be equal (`unify`) or in order
(`pin`), and returns the result's dimensions (a list of axes), a `Value`, or a list of those for several results. An
operator without a rule pins whatever it touches: unknown is refused, never guessed.
"""

from collections.abc import Callable
from typing import Any

import torch

from s2ft_compile.passes.couple.rules.context import axes_unknown
from s2ft_compile.passes.couple.rules.contraction import (
    axes_addmm,
    axes_attention,
    axes_baddbmm,
    axes_bmm,
    axes_conv_transpose,
    axes_convolution,
    axes_einsum,
    axes_grouped_mm,
    axes_linear,
    axes_matmul,
    axes_mm,
)
from s2ft_compile.passes.couple.rules.elementwise import (
    axes_argmax,
    axes_as_complex,
    axes_as_real,
    axes_fresh,
    axes_glu,
    axes_ordered,
    axes_pinned_dim,
    axes_pointwise,
    axes_same,
    axes_triangle,
    axes_view_dtype,
)
from s2ft_compile.passes.couple.rules.indexing import (
    axes_embedding,
    axes_gather,
    axes_index,
    axes_index_add,
    axes_index_put,
    axes_index_select,
    axes_scatter,
)
from s2ft_compile.passes.couple.rules.reduction import (
    axes_batch_norm,
    axes_group_norm,
    axes_layer_norm,
    axes_reduce,
    axes_spatial,
    axes_weight_norm,
)
from s2ft_compile.passes.couple.rules.shape import (
    axes_cat,
    axes_expand,
    axes_narrow,
    axes_pad,
    axes_permute,
    axes_repeat,
    axes_repeat_interleave,
    axes_reshape,
    axes_select,
    axes_select_scatter,
    axes_slice_scatter,
    axes_split,
    axes_stack,
    axes_transpose,
    axes_unbind,
    axes_unfold,
    slice_rule,
)

aten = torch.ops.aten


def family(rule: Callable, *names: str) -> dict:
    """All overloads of the named aten operators, where this torch has them."""
    packets = [getattr(aten, n) for n in names if hasattr(aten, n)]
    return {getattr(p, o): rule for p in packets for o in p.overloads()}


AXIS_RULES: dict[Any, Callable] = {
    **family(
        axes_pointwise,
        "where",
        "masked_fill",
        "lerp",
        "addcmul",
        "addcdiv",
        "clamp",
        "maximum",
        "minimum",
        "rsub",
        "pow",
        "bitwise_and",
        "bitwise_or",
        "logical_and",
        "logical_or",
        "logical_not",
        "eq",
        "ne",
        "copy",
        "multiply",
        "polar",
        "log_sigmoid",
    ),
    **family(
        axes_same,
        "clone",
        "alias",
        "detach",
        "contiguous",
        "to",
        "_to_copy",
        "type_as",
        "lift_fresh_copy",
        "lift_fresh",
        "dropout",
        "native_dropout",
        "feature_dropout",
        "alpha_dropout",
        "softmax",
        "_softmax",
        "log_softmax",
        "_log_softmax",
        "_safe_softmax",
        "bernoulli",
        "nan_to_num",
    ),
    **family(
        axes_fresh,
        "full",
        "zeros",
        "ones",
        "empty",
        "new_full",
        "new_zeros",
        "new_ones",
        "new_empty",
        "full_like",
        "zeros_like",
        "ones_like",
        "empty_like",
        "scalar_tensor",
    ),
    **family(axes_ordered, "arange", "linspace", "eye", "tril_indices", "triu_indices", "rand", "randn", "randint"),
    **family(axes_pinned_dim, "cumsum", "cumprod", "logcumsumexp", "flip", "roll", "sort", "topk"),
    **family(axes_argmax, "argmax", "argmin"),
    **family(axes_triangle, "tril", "triu"),
    **family(
        axes_reshape, "view", "_unsafe_view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as"
    ),
    aten.view.dtype: axes_view_dtype,
    **family(axes_permute, "permute"),
    **family(axes_transpose, "transpose", "t", "swapaxes", "mT"),
    **family(axes_expand, "expand", "expand_as", "broadcast_to"),
    **family(axes_repeat, "repeat"),
    aten.repeat_interleave.self_int: axes_repeat_interleave,
    **family(slice_rule, "slice"),
    **family(axes_slice_scatter, "slice_scatter"),
    **family(axes_select_scatter, "select_scatter"),
    **family(axes_narrow, "narrow"),
    aten.select.int: axes_select,
    **family(axes_unbind, "unbind"),
    **family(axes_split, "split", "split_with_sizes", "chunk"),
    **family(axes_cat, "cat", "concat", "concatenate"),
    **family(axes_stack, "stack"),
    **family(axes_pad, "constant_pad_nd"),
    aten.pad.default: axes_pad,
    aten.max.other: axes_pointwise,
    aten.min.other: axes_pointwise,
    aten.max.default: axes_reduce,
    aten.min.default: axes_reduce,
    aten.max.dim: axes_argmax,
    aten.min.dim: axes_argmax,
    **family(
        axes_reduce,
        "sum",
        "mean",
        "amax",
        "amin",
        "var",
        "std",
        "var_mean",
        "std_mean",
        "logsumexp",
        "any",
        "all",
        "linalg_vector_norm",
        "prod",
    ),
    **family(axes_layer_norm, "layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"),
    **family(axes_group_norm, "group_norm"),
    aten.linear.default: axes_linear,
    aten.mm.default: axes_mm,
    aten.addmm.default: axes_addmm,
    aten.bmm.default: axes_bmm,
    aten.baddbmm.default: axes_baddbmm,
    **family(axes_grouped_mm, "_grouped_mm"),
    aten.matmul.default: axes_matmul,
    aten.einsum.default: axes_einsum,
    **family(axes_attention, "scaled_dot_product_attention"),
    **family(axes_convolution, "conv1d", "conv2d", "conv3d", "convolution"),
    **family(axes_embedding, "embedding"),
    **family(axes_index, "index"),
    **family(axes_index_select, "index_select"),
    **family(axes_gather, "gather"),
    **family(axes_index_put, "index_put", "_unsafe_index_put"),
    **family(axes_index_add, "index_add"),
    **family(axes_scatter, "scatter", "scatter_add", "scatter_reduce"),
    **family(axes_as_complex, "view_as_complex"),
    **family(axes_as_real, "view_as_real"),
    **family(axes_unfold, "unfold"),
    **family(axes_glu, "glu"),
    **family(
        axes_spatial(1), "avg_pool1d", "max_pool1d", "adaptive_avg_pool1d", "upsample_linear1d", "upsample_nearest1d"
    ),
    **family(
        axes_spatial(2),
        "avg_pool2d",
        "max_pool2d",
        "max_pool2d_with_indices",
        "adaptive_avg_pool2d",
        "_adaptive_avg_pool2d",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
        "upsample_nearest2d",
    ),
    **family(axes_batch_norm, "batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_no_update"),
    **family(axes_weight_norm, "_weight_norm_interface"),
    **family(axes_conv_transpose, "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
}


# operators of other libraries, which exist only once those are imported
NAMED_AXIS_RULES: dict[str, Callable] = {"transformers::grouped_mm_fallback": axes_grouped_mm}


def rule_for(target: Any) -> Callable:
    """The rule of an operator: its own, the shared one of elementwise operators, or refusal."""
    if target in AXIS_RULES:
        return AXIS_RULES[target]
    if isinstance(target, torch._ops.OpOverload) and target._schema.name in NAMED_AXIS_RULES:
        return NAMED_AXIS_RULES[target._schema.name]
    pointwise = torch.Tag.pointwise in getattr(target, "tags", ())
    return axes_pointwise if pointwise else axes_unknown
