"""fp8 products: what is stored in fp8 is multiplied in fp8, forward and for dX, and never dequantized.

    W = s · Q                 Q: (out, in) float8_e4m3fn, s: (out, 1) float32, one scale for a row or for all
    rows(A) = (Â, a)          a: (rows, 1) = max|A| / 448 of a row, Â = fp8(A / a): a scale for each row, at each use

    Y  = X Wᵀ = a · (X̂ Qᵀ) · sᵀ             X̂, a = rows(X)
    dX = dY W = b · (Ŷ Q)                    Ŷ, b = rows(dY · sᵀ): the scale of the contracted side goes into dY

Products in a joint graph that have a dequantized weight as their second operand become these; the dequantization, which
nothing reads any more, goes. The rest stays as it is: slices and their gradients, which read X and dY themselves,
norms, attention, the head. A result differs from the product with the dequantized weight by the rounding of X or dY,
by 2^-4 of each number at most, and by W's own rounding to the model's type, which there is none of here.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from s2ft_compile.errors import CompileError, ConfigError
from s2ft_compile.passes.editor import Editor

from .lower import CASTS, SAME, TURNS, turns

log = logging.getLogger(__name__)
aten = torch.ops.aten
E4M3, LARGEST = torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max
SMALLEST = 2.0**-100  # a row's scale is that of at least such a number: none is 0, and no quotient too large
ADA = (8, 9)  # the first capability with fp8 in its matrix units
MULTIPLE = 16  # of both sizes of a weight, which the matrix units take


# --- the products ------------------------------------------------------------------------------------------------


def rows(A: Tensor) -> tuple[Tensor, Tensor]:
    """(Â, a) of float32 A (rows, n). Of a row that is not finite all results are NaN."""
    a = A.abs().amax(1, keepdim=True).clamp(min=SMALLEST) / LARGEST
    return (A / a).clamp(-LARGEST, LARGEST).to(E4M3).contiguous(), a


def forward_product(X: Tensor, Q: Tensor, s: Tensor) -> Tensor:
    """X Wᵀ: (rows, out). X: (rows, in)."""
    X8, a = rows(X.float())
    return torch._scaled_mm(X8, Q.t(), a, s.float().t().contiguous(), out_dtype=X.dtype, use_fast_accum=True)


def backward_product(dY: Tensor, Q: Tensor, s: Tensor) -> Tensor:
    """dY W: (rows, in). dY: (rows, out)."""
    Y8, b = rows(dY.float() * s.t())
    by_columns = Q.t().contiguous().t()  # Hopper's matrix units take both operands along what they contract
    return torch._scaled_mm(Y8, by_columns, b, b.new_ones(1, Q.shape[1]), out_dtype=dY.dtype)


# --- the pass ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A dequantized weight. Q, s: nodes; s None as long as none was seen. turned: whether it is Wᵀ; s_turned: whether s
    is (1, out)."""

    Q: fx.Node
    s: fx.Node | None = None
    turned: bool = False
    s_turned: bool = False


@dataclass(frozen=True)
class Product:
    """A node that is A W or A Wᵀ, plus a bias where it has one."""

    node: fx.Node
    A: fx.Node
    weight: Stored
    bias: fx.Node | None = None


def stored(node: fx.Node) -> Stored | None:
    """What a node is dequantized from, None where it is no weight of one scale for a row."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim != 2:
        return None
    if node.op == "placeholder":
        return Stored(node) if _in_fp8(node) else None
    if node.target in CASTS + SAME and value.dtype != E4M3:
        return stored(node.args[0])
    if node.target in TURNS:
        inner = stored(node.args[0])
        return inner and Stored(inner.Q, inner.s, inner.turned != turns(node), inner.s_turned)
    if node.target is aten.mul.Tensor and all(isinstance(a, fx.Node) for a in node.args):
        for inner, scale in ((stored(a), b) for a, b in (node.args, node.args[::-1])):
            if inner is not None and inner.s is None and _of_rows(scale, inner):
                return Stored(inner.Q, scale, inner.turned, inner.turned)
    return None


def _in_fp8(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim == 2 and value.dtype == E4M3


def _of_rows(scale: fx.Node, weight: Stored) -> bool:
    """Whether there is one scale for each row of Q, or for all of it."""
    shape, out = tuple(scale.meta["val"].shape), weight.Q.meta["val"].shape[0]
    return all(size == 1 for size in shape) or shape == ((1, out) if weight.turned else (out, 1))


def products(graph: fx.Graph) -> Iterator[Product]:
    """The products of a graph whose second operand is a dequantized weight."""
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            continue
        *bias, A, W = node.args
        weight = stored(W)
        if weight is not None and weight.s is not None:
            yield Product(node, A, weight, *bias)


def fp8_products(graph: fx.Graph) -> int:
    """Rewrites a joint graph, or a forward alone, in place; returns how many products are in fp8 from now on.

    Raises `ConfigError` for a device without them, `CompileError` where no product can be one.
    """
    editor, replaced, left = Editor(graph), 0, []
    for product in list(products(graph)):
        value = product.node.meta["val"]
        check_device(value.device)
        if (why := why_not(product.weight.Q.meta["val"].shape, value)) is not None:
            left.append(f"{product.node.name} {why}")
            continue
        editor.at = product.node
        product.node.replace_all_uses_with(_replacement(editor, product))
        graph.erase_node(product.node)
        replaced += 1
    graph.eliminate_dead_code()
    if not replaced and (left or any(_in_fp8(node) for node in graph.find_nodes(op="placeholder"))):
        why = left[0] if left else "no weight has one scale for a row, or one for all"
        raise CompileError(f"no product of this graph can be in fp8: {why}; leave the option fp8 out")
    log.info("fp8: %d products%s", replaced, f", left as they were: {'; '.join(left)}" if left else "")
    return replaced


def left_over(graph: fx.Graph) -> str | None:
    """What is wrong where a weight is dequantized for a product that takes fp8."""
    for product in products(graph):
        if why_not(product.weight.Q.meta["val"].shape, product.node.meta["val"]) is None:
            return f"{product.node.name} multiplies by a weight that is dequantized for it"
    return None


def why_not(shape: tuple[int, ...], result: Tensor) -> str | None:
    """Why a product with a weight of this shape is none in fp8, None where it is one."""
    if any(size % MULTIPLE for size in shape):
        return f"has a weight of shape {list(shape)}, and its sizes have to be multiples of {MULTIPLE}"
    if result.is_cuda and result.dtype != torch.bfloat16:
        return f"gives {result.dtype}, and scales of rows give torch.bfloat16"
    return None


def check_device(device: torch.device) -> None:
    """Raises `ConfigError` for a device without fp8 products. A CPU has them, in an order that is exact and slow."""
    if device.type == "cpu":
        return
    if device.type != "cuda" or torch.version.cuda is None:
        raise ConfigError(f"fp8 products are for CUDA GPUs (and slowly a CPU), and the weights are on {device}")
    version = torch.cuda.get_device_capability(device)
    if version < ADA:
        raise ConfigError(
            f"fp8 products need a GPU of compute capability 8.9 or more, and {device} has {version[0]}.{version[1]}; "
            f"leave the option fp8 out"
        )


def _replacement(editor: Editor, product: Product) -> fx.Node:
    weight, node = product.weight, product.node
    Q, s = weight.Q, weight.s
    if s.meta["val"].numel() == 1:
        s = editor.call(aten.expand.default, s, [Q.meta["val"].shape[0], 1], like=node)
    elif weight.s_turned:
        s = editor.call(aten.permute.default, s, [1, 0], like=node)
    compute = forward_product if weight.turned else backward_product
    result = editor.inline(_traced(editor, compute, product.A, Q, s), (product.A, Q, s), like=node)
    if not weight.turned and node.meta.get("partitioner_tag") == "is_backward":
        _keep_in_backward(result)
    if product.bias is not None:
        result = editor.call(aten.add.Tensor, result, product.bias, like=node)
    return result


def _traced(editor: Editor, compute: Callable, *operands: fx.Node) -> fx.Graph:
    """The calls that `compute` makes, in what Inductor decomposes operators to."""
    values = [x.meta["val"] for x in operands]
    with torch.no_grad(), editor.mode:
        graph = make_fx(compute, decomposition_table=select_decomp_table())(*values).graph
    graph.eliminate_dead_code()
    return graph


def _keep_in_backward(product: fx.Node) -> None:
    """Q by columns is made anew in the backward, never saved for it: it is as large as the weight."""
    node = product.args[1]
    while node.op == "call_function":
        node.meta["partitioner_tag"] = "must_be_in_backward"
        node = node.args[0]
