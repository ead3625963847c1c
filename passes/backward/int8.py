"""int8 products on a CPU: weights whose sizes are not of whole blocks stay away from a kernel that reads past them.

Inductor makes `mm(X, bf16(Q).T) * s` one call of `_weight_int8pack_mm`, which reads rows of Q sixteen at a time: of
a row of another length (torch 2.13) it gives numbers of any size, or the process ends. Such a Q is cast by way of
int16, which is exact, costs nothing in a fused loop, and is not what Inductor looks for.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from s2ft_compile.passes.editor import Editor

from .lower import CASTS

BLOCK = 16


def of_parts(graph: fx.Graph) -> Iterator[fx.Node]:
    """The casts of int8 matrices on a CPU that have a size of no whole blocks."""
    for node in graph.nodes:
        Q = node.args[0].meta.get("val") if node.target in CASTS and isinstance(node.args[0], fx.Node) else None
        if isinstance(Q, Tensor) and Q.dtype == torch.int8 and Q.ndim == 2 and Q.device.type == "cpu":
            if node.meta["val"].is_floating_point() and any(size % BLOCK != 0 for size in Q.shape):
                yield node


def by_int16(graph: fx.Graph) -> None:
    """Casts them by way of int16."""
    editor = Editor(graph)
    for node in list(of_parts(graph)):
        editor.at = node
        wide = editor.call(torch.ops.prims.convert_element_type.default, node.args[0], torch.int16, like=node)
        node.update_arg(0, wide)


def left_over(graph: fx.Graph) -> str | None:
    """What is wrong where a weight is cast in one step."""
    left = next(of_parts(graph), None)
    return f"{left.name} is for a kernel that cannot take its sizes" if left is not None else None
