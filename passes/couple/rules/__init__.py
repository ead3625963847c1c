"""What each operator says about the axes of its operands: one table, keyed by operator.

A rule gets (cx, node, *args) with every tensor argument as a `Value`, states what must be equal (`unify`) or in order
(`pin`), and returns the result's dimensions (a list of axes), a `Value`, or a list of those for several results. An
operator without a rule pins whatever it touches: unknown is refused, never guessed.
"""

from collections.abc import Callable
from typing import Any

import torch

from s2ft_compile.passes.couple.rules.context import unknown_rule
from s2ft_compile.passes.couple.rules.contraction import (
    addmm_rule,
    attention_rule,
    baddbmm_rule,
    bmm_rule,
    conv_transpose_rule,
    convolution_rule,
    einsum_rule,
    grouped_mm_rule,
    linear_rule,
    matmul_rule,
    mm_rule,
)
from s2ft_compile.passes.couple.rules.elementwise import (
    argmax_rule,
    as_complex_rule,
    as_real_rule,
    fresh_rule,
    glu_rule,
    ordered_rule,
    pinned_dim_rule,
    pointwise_rule,
    same_rule,
    triangle_rule,
    view_dtype_rule,
)
from s2ft_compile.passes.couple.rules.indexing import (
    embedding_rule,
    gather_rule,
    index_add_rule,
    index_put_rule,
    index_rule,
    index_select_rule,
    scatter_rule,
)
from s2ft_compile.passes.couple.rules.reduction import (
    batch_norm_rule,
    group_norm_rule,
    layer_norm_rule,
    reduce_rule,
    spatial_rule,
    weight_norm_rule,
)
from s2ft_compile.passes.couple.rules.shape import (
    cat_rule,
    expand_rule,
    narrow_rule,
    pad_rule,
    permute_rule,
    repeat_interleave_rule,
    repeat_rule,
    reshape_rule,
    select_rule,
    select_scatter_rule,
    slice_rule,
    slice_scatter_rule,
    split_rule,
    stack_rule,
    transpose_rule,
    unbind_rule,
    unfold_rule,
)

aten = torch.ops.aten


def family(rule: Callable, *names: str) -> dict:
    """All overloads of the named aten operators, where this torch has them."""
    packets = [getattr(aten, n) for n in names if hasattr(aten, n)]
    return {getattr(p, o): rule for p in packets for o in p.overloads()}


RULES: dict[Any, Callable] = {
    **family(
        pointwise_rule,
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
        same_rule,
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
        fresh_rule,
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
    **family(ordered_rule, "arange", "linspace", "eye", "tril_indices", "triu_indices", "rand", "randn", "randint"),
    **family(pinned_dim_rule, "cumsum", "cumprod", "logcumsumexp", "flip", "roll", "sort", "topk"),
    **family(argmax_rule, "argmax", "argmin"),
    **family(triangle_rule, "tril", "triu"),
    **family(
        reshape_rule, "view", "_unsafe_view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as"
    ),
    aten.view.dtype: view_dtype_rule,
    **family(permute_rule, "permute"),
    **family(transpose_rule, "transpose", "t", "swapaxes", "mT"),
    **family(expand_rule, "expand", "expand_as", "broadcast_to"),
    **family(repeat_rule, "repeat"),
    aten.repeat_interleave.self_int: repeat_interleave_rule,
    **family(slice_rule, "slice"),
    **family(slice_scatter_rule, "slice_scatter"),
    **family(select_scatter_rule, "select_scatter"),
    **family(narrow_rule, "narrow"),
    aten.select.int: select_rule,
    **family(unbind_rule, "unbind"),
    **family(split_rule, "split", "split_with_sizes", "chunk"),
    **family(cat_rule, "cat", "concat", "concatenate"),
    **family(stack_rule, "stack"),
    **family(pad_rule, "constant_pad_nd"),
    aten.pad.default: pad_rule,
    aten.max.other: pointwise_rule,
    aten.min.other: pointwise_rule,
    aten.max.default: reduce_rule,
    aten.min.default: reduce_rule,
    aten.max.dim: argmax_rule,
    aten.min.dim: argmax_rule,
    **family(
        reduce_rule,
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
    **family(layer_norm_rule, "layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"),
    **family(group_norm_rule, "group_norm"),
    aten.linear.default: linear_rule,
    aten.mm.default: mm_rule,
    aten.addmm.default: addmm_rule,
    aten.bmm.default: bmm_rule,
    aten.baddbmm.default: baddbmm_rule,
    **family(grouped_mm_rule, "_grouped_mm"),
    aten.matmul.default: matmul_rule,
    aten.einsum.default: einsum_rule,
    **family(attention_rule, "scaled_dot_product_attention"),
    **family(convolution_rule, "conv1d", "conv2d", "conv3d", "convolution"),
    **family(embedding_rule, "embedding"),
    **family(index_rule, "index"),
    **family(index_select_rule, "index_select"),
    **family(gather_rule, "gather"),
    **family(index_put_rule, "index_put", "_unsafe_index_put"),
    **family(index_add_rule, "index_add"),
    **family(scatter_rule, "scatter", "scatter_add", "scatter_reduce"),
    **family(as_complex_rule, "view_as_complex"),
    **family(as_real_rule, "view_as_real"),
    **family(unfold_rule, "unfold"),
    **family(glu_rule, "glu"),
    **family(
        spatial_rule(1), "avg_pool1d", "max_pool1d", "adaptive_avg_pool1d", "upsample_linear1d", "upsample_nearest1d"
    ),
    **family(
        spatial_rule(2),
        "avg_pool2d",
        "max_pool2d",
        "max_pool2d_with_indices",
        "adaptive_avg_pool2d",
        "_adaptive_avg_pool2d",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
        "upsample_nearest2d",
    ),
    **family(
        batch_norm_rule,
        "batch_norm",
        "_native_batch_norm_legit_no_training",
        "_native_batch_norm_legit_functional",
        "_batch_norm_no_update",
    ),
    **family(weight_norm_rule, "_weight_norm_interface"),
    **family(conv_transpose_rule, "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
}


# operators of other libraries, which exist only once those are imported
NAMED_RULES: dict[str, Callable] = {
    "transformers::grouped_mm_fallback": grouped_mm_rule,
    "s2ft::attach": lambda cx, node, weight, *delta: weight,
}


def rule_for(target: Any) -> Callable:
    """The rule of an operator: its own, the shared one of elementwise operators, or refusal."""
    if target in RULES:
        return RULES[target]
    if isinstance(target, torch._ops.OpOverload) and target._schema.name in NAMED_RULES:
        return NAMED_RULES[target._schema.name]
    pointwise = torch.Tag.pointwise in getattr(target, "tags", ())
    return pointwise_rule if pointwise else unknown_rule
