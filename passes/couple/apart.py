"""Operators without a rule, taken apart: torch defines most of its operators by others.

What comes out is a graph like any other, which is inferred in place of the operator.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._decomp import decomposition_table
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.utils._python_dispatch import _disable_current_modes

from s2ft_compile.capture.recording import Recorder

from .normalize import normalize

log = logging.getLogger(__name__)


def taken_apart(node: fx.Node) -> fx.GraphModule | None:
    """What an operator is made of, as a graph of the node's operands (`all_input_nodes`, in their order), normalized.

    None where torch does not define it by other operators, or where which ones depends on values.
    """
    definition = _definition(node.target)
    if definition is None or not all(isinstance(n.meta.get("val"), torch.Tensor) for n in node.all_input_nodes):
        return None
    recorder = Recorder(decompositions={})
    try:
        with _disable_current_modes():
            given = {n: recorder.input(_shaped(n.meta["val"]))[0] for n in node.all_input_nodes}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), given.__getitem__)
        with torch.no_grad(), recorder.on():
            result = definition(*args, **kwargs)
        graph = recorder.returns(result)
    except Exception as error:  # it asks for values, or is not defined for values that have shapes only
        log.debug("%s was not taken apart (%s: %s)", node.target, type(error).__name__, error)
        return None
    if any(made.target is node.target for made in graph.nodes):
        return None
    for made in graph.nodes:
        made.meta |= {key: node.meta[key] for key in ("stack_trace", "traceback") if key in node.meta}
    normalize(graph, {})
    return _LazyGraphModule(recorder.constants, graph)


def _definition(op: Any) -> Callable | None:
    if not isinstance(op, torch._ops.OpOverload) or op._schema.is_mutable:
        return None
    return op.decompose if op._can_decompose() else decomposition_table.get(op)


def _shaped(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
