"""What passes change graphs with: new nodes beside old ones, each with its value; and why a rule does not match."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

ORIGIN = ("stack_trace", "nn_module_stack", "seq_nr", "partitioner_tag", "recompute", "ac_graph_id")


@dataclass(frozen=True)
class Mismatch:
    """Why a rule does not match. operator, size: where it was asked, what makes a tensor of which full size."""

    reason: str
    operator: str = ""
    size: tuple[int, ...] = ()

    def __str__(self) -> str:
        where = f"computed at its full size {list(self.size)} by {self.operator}: " if self.operator else ""
        return where + self.reason


class Editor:
    """Adds nodes before the node `at`, with their fake values in `meta["val"]` where their operands have one."""

    def __init__(self, graph: fx.Graph, mode: AbstractContextManager | None = None):
        """mode: what values are made in; by default the fake mode of the graph's inputs."""
        self.graph = graph
        values = [n.meta.get("val") for n in graph.find_nodes(op="placeholder")] if mode is None else []
        modes = [v.fake_mode for v in values if isinstance(v, torch.Tensor) and hasattr(v, "fake_mode")]
        self.mode = mode or (modes[0] if modes else nullcontext())
        self.at: fx.Node | None = None
        self.created: set[fx.Node] = set()

    def call(self, target: Callable, *args: Any, like: fx.Node | None = None, **kwargs: Any) -> Any:
        """Inserts target(*args, **kwargs); like: the node that it stands for. Of a `Mismatch` among the arguments
        nothing can be made: that is the result then."""
        leaves = pytree.tree_leaves((args, kwargs))
        if mismatch := next((leaf for leaf in leaves if isinstance(leaf, Mismatch)), None):
            return mismatch
        with self.graph.inserting_before(self.at):
            node = self.graph.call_function(target, args, kwargs)
        self._comes_from(node, like)
        if all("val" in leaf.meta for leaf in leaves if isinstance(leaf, fx.Node)):
            fake_args, fake_kwargs = pytree.tree_map_only(fx.Node, lambda n: n.meta["val"], (args, kwargs))
            with self.mode:
                node.meta["val"] = target(*fake_args, **fake_kwargs)
        return node

    def again(self, node: fx.Node, *args: Any) -> fx.Node:
        """Inserts the call that a node is, of a function or a method, on other arguments; without a value."""
        with self.graph.inserting_before(self.at):
            copy = self.graph.create_node(node.op, node.target, args, dict(node.kwargs))
        self._comes_from(copy, node)
        return copy

    def inline(self, graph: fx.Graph, operands: Sequence[fx.Node], like: fx.Node) -> fx.Node:
        """Inserts the calls of another graph on these operands; its one output."""
        copies = dict(zip(graph.find_nodes(op="placeholder"), operands, strict=True))
        with self.graph.inserting_before(self.at):
            for node in graph.nodes:
                if node.op == "call_function":
                    copies[node] = self.graph.node_copy(node, copies.__getitem__)
                    self._comes_from(copies[node], like)
        return copies[graph.output_node().args[0]]

    def _comes_from(self, node: fx.Node, like: fx.Node | None) -> None:
        self.created.add(node)
        if like is not None:
            node.meta.update({k: v for k, v in like.meta.items() if k in ORIGIN})
