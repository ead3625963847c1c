"""Stage 6, lower: on a GPU the gradients of deltas become kernels of their own.

After slice pushdown a delta's gradient is `cast(mm(dYᵀ, X))`, or a sum of such products where a weight is used several
times: every product is rounded to bf16, and then cast. Since casts and sums move up through each other,

    cast(Σ mm(aᵢ, bᵢ)) = Σ slice_grad(aᵢᵀ, bᵢ)        transposed:  cast(mm(a, b))ᵀ = slice_grad(b, aᵀ)

a gradient is one launch for each use of its weight: float32 from the first addition on, operands with the strides they
have, no cast and no sum after it. What is as large as a full gradient stays a cuBLAS product, with a float32 result. A
slice of what the backward itself makes is read in place; one that the forward saves is a copy, and stays one.

Ensures: the same gradients, up to the rounding that is left out. Without a capability (see `kernels.support`), nothing
changes and aten runs.
"""

import logging

import torch
from torch import fx
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from s2ft_compile.kernels import slice_grad as _  # noqa: F401  (defines the operator)
from s2ft_compile.kernels.support import capability
from s2ft_compile.passes.editor import Editor

from .pushdown import hoist

log = logging.getLogger(__name__)
aten = torch.ops.aten
SLICE_GRAD = torch.ops.s2ft.slice_grad.default
HALF = (torch.bfloat16, torch.float16)
# From here cuBLAS has its tiles: 512 of 128 × 128 are four rounds on 132 processors. Reasoned, not measured.
LARGE = 512 * 128 * 128

Term = tuple[fx.Node, fx.Node, bool]  # of mm(a, b), and whether it is transposed

CASTS = (aten._to_copy.default, torch.ops.prims.convert_element_type.default)
SAME = (aten.alias.default, aten.detach.default)
TURNS = (aten.t.default, aten.transpose.int, aten.permute.default)
VIEWS = (*TURNS, *SAME, aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.slice.Tensor)


def lower_where_possible(graph: fx.Graph) -> int:
    """`lower` for the devices that a joint graph's gradients are on."""
    return lower(graph, graph_capability(graph))


def graph_capability(graph: fx.Graph) -> tuple[int, int] | None:
    """The least capability of the devices of a joint graph's gradients, None if one of them has none."""
    capabilities = [capability(device) for device in {root.meta["val"].device for root in _gradients(graph)}]
    return min(capabilities) if capabilities and None not in capabilities else None


def lower(graph: fx.Graph, capability: tuple[int, int] | None) -> int:
    """Rewrites a joint graph in place after slice pushdown; returns how many gradients have become kernels."""
    if capability is None:
        return 0
    editor, lowered = Editor(graph), 0
    for root in _gradients(graph):
        terms = _terms(root, False)
        if terms:
            editor.at = root
            root.replace_all_uses_with(_sum(editor, terms, root))
            lowered += 1
    hoist(editor)
    graph.eliminate_dead_code()
    log.info("lower: %d gradients to kernels", lowered)
    return lowered


def rounded(graph: fx.Graph) -> str | None:
    """What is wrong where kernels run, and a gradient is a product that is rounded before its cast all the same."""
    if graph_capability(graph) is not None and (left := [g.name for g in _gradients(graph) if _terms(g, False)]):
        return f"the gradient {left[0]} is a sum of rounded products, and no kernel"
    return None


def _gradients(graph: fx.Graph) -> list[fx.Node]:
    """The float32 matrices that the backward returns."""

    def is_gradient(node) -> bool:
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        return (
            isinstance(value, torch.Tensor)
            and value.dtype == torch.float32
            and value.ndim == 2
            and node.op == "call_function"
            and node.meta.get("partitioner_tag") != "is_forward"
        )

    returned = pytree.tree_leaves(graph.find_nodes(op="output")[0].args)
    return list(dict.fromkeys(filter(is_gradient, returned)))


def _terms(node: fx.Node, turned: bool) -> list[Term] | None:
    """The products that a gradient is the sum of, or None where it is something else."""
    if node.op != "call_function" or len(node.users) > 1:
        return None
    x = node.args[0] if node.args else None
    if node.target is aten.mm.default:
        return [(*node.args, turned)] if x.meta["val"].dtype in HALF else None
    if node.target in CASTS + SAME:
        return _terms(x, turned)
    if node.target in TURNS:
        return _terms(x, turned != turns(node))
    if node.target is aten.add.Tensor and not node.kwargs and isinstance(node.args[1], fx.Node):
        terms = [_terms(a, turned) for a in node.args if a.meta["val"].shape == node.meta["val"].shape]
        return sum(terms, []) if len(terms) == 2 and None not in terms else None
    return None


def turns(node: fx.Node) -> bool:
    """Whether a permutation of two dimensions exchanges them."""
    if node.target is aten.permute.default:
        return node.args[1][0] % 2 == 1
    return node.target is aten.t.default or (node.args[1] - node.args[2]) % 2 == 1


def _sum(editor: Editor, terms: list[Term], root: fx.Node) -> fx.Node:
    large = root.meta["val"].numel() >= LARGE
    total = None
    for a, b, turned in terms:
        if large:
            a, b = (_turned(editor, b, root), _turned(editor, a, root)) if turned else (a, b)
            product = editor.call(aten.mm.dtype, a, b, torch.float32, like=root)
            total = product if total is None else editor.call(aten.add.Tensor, total, product, like=root)
        else:
            a, b = _in_place(editor, _turned(editor, a, root)), _in_place(editor, b)
            operands = (b, a) if turned else (a, b)
            total = editor.call(SLICE_GRAD, *operands, *([] if total is None else [total]), like=root)
    return total


def _turned(editor: Editor, x: fx.Node, like: fx.Node) -> fx.Node:
    if x.target in TURNS and turns(x):
        return x.args[0]
    return editor.call(aten.permute.default, x, [1, 0], like=like)


def _in_place(editor: Editor, x: fx.Node) -> fx.Node:
    """x, or the view that x is a copy of if the backward makes what it views."""
    if x.target is aten.permute.default and x.args[0].target is aten.clone.default:
        inner = _in_place(editor, x.args[0])
        return x if inner is x.args[0] else editor.call(aten.permute.default, inner, x.args[1], like=x)
    if x.target is not aten.clone.default:
        return x
    source = x.args[0]
    while source.target in VIEWS:
        source = source.args[0]
    made_here = source.op == "call_function" and source.meta.get("partitioner_tag") == "is_backward"
    return x.args[0] if made_here else x


# --- for Inductor ------------------------------------------------------------------------------------------------


def see_through(graph: fx.Graph) -> None:
    """Replaces each slice_grad on a GPU with what it launches, as tracing would have done: Inductor then calls the
    kernel itself, without the operator's Python, and fuses the sum of its parts with what comes next."""
    editor = Editor(graph)
    for node in graph.find_nodes(op="call_function", target=SLICE_GRAD):
        if node.meta["val"].is_cuda:
            editor.at = node
            node.replace_all_uses_with(editor.inline(_launch(node), node.args, like=node))
            graph.erase_node(node)


def _launch(node: fx.Node) -> fx.Graph:
    values = [x.meta["val"] for x in node.args]
    with torch.no_grad(), values[0].fake_mode:
        graph = make_fx(dispatch_functionalize(node.target))(*values).graph
    graph.eliminate_dead_code()
    return graph


def opaque(graph: fx.Graph) -> str | None:
    """What is wrong where Inductor would call the operator of a kernel, and not the kernel."""
    left = [n.name for n in graph.find_nodes(op="call_function", target=SLICE_GRAD) if n.meta["val"].is_cuda]
    return f"the kernel of {left[0]} is left behind its operator" if left else None
