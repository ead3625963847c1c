"""Where in the model a parameter is first used: how many uses of parameters lie one after another before it.

Structures side by side (the experts of one layer, query and key) have the same depth, those of later layers a greater
one. A backward that stops at a layer stops at the first use of its weights.
"""

from collections.abc import Mapping

from torch import fx


def depths(graph: fx.Graph, parameters: Mapping[str, str]) -> dict[str, int]:
    """Parameter name -> depth, from 1. parameters: placeholder name -> parameter name. Linear in the graph's size."""
    first: dict[str, int] = {}
    held: dict[fx.Node, tuple[str, ...]] = {}  # the parameters that a node is computed from, without any input
    depth: dict[fx.Node, int] = {}  # of everything else
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in parameters:
            held[node] = (parameters[node.name],)
            continue
        inputs = node.all_input_nodes
        above = max((depth[n] for n in inputs if n in depth), default=0)
        names = tuple(dict.fromkeys(name for n in inputs for name in held.get(n, ())))
        if node.op != "placeholder" and all(n in held for n in inputs):
            held[node] = names  # a constant, a view of a weight, a table of positions
            continue
        for name in names:
            first.setdefault(name, above + 1)
        depth[node] = above + bool(names)
    return first
