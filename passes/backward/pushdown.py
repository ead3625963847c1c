"""Stage 5, slice pushdown: a joint graph that computes only the trained blocks' gradients.

In the joint graph the gradient of a delta is `take` (a slice) of a full gradient dW. The slice rules move the `take` up
until no full dW is left. Then `attach(W, D)` is replaced by W, which already holds its value, and what nothing reads
any more is removed.
Ensures: every gradient of a delta is computed at the delta's own size.
"""

import logging
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import fx

from s2ft_compile.errors import CompileError
from s2ft_compile.passes.editor import Editor, Mismatch
from s2ft_compile.passes.ranges import spaced

from . import convolution, grouped
from .attach import ATTACH, TAKE
from .slice_rules import rule_for

log = logging.getLogger(__name__)
aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.bmm.default, aten._grouped_mm.default, operator.getitem)  # of dY and X


class Slicer(Editor):
    """What slice rules work with. In place of a slice there may be the `Mismatch` that says why there is none."""

    def __init__(self, graph: fx.Graph):
        super().__init__(graph)
        self.needed = _behind([graph.output_node()], lambda node: node.target is TAKE)
        self._sliced: set[fx.Node] = set()  # the products of weight gradients that were sliced
        self._summed = False  # whether the slice in hand was pushed through a sum: of an activation's gradient

    def take(self, x: fx.Node, dim: int, like: fx.Node) -> fx.Node:
        """The ranges of the take `like`, of x along dim: of an activation, a weight or what else there is anyway."""
        return self.take_ranges(x, dim, *like.args[2:])

    def take_ranges(self, x: fx.Node, dim: int, starts: Sequence[int], lengths: Sequence[int]) -> fx.Node:
        """`take` of other ranges."""
        return self.call(TAKE, x, dim % x.meta["val"].ndim, list(starts), list(lengths))

    def push(self, x: fx.Node, dim: int, like: fx.Node) -> fx.Node | Mismatch:
        """The same of an x that only the gradient needs, and that must not be computed in full: by its own rule."""
        return self.push_ranges(x, dim, *like.args[2:])

    def sliced(self, x: fx.Node, dim: int, like: fx.Node) -> fx.Node | Mismatch:
        """A slice of an operand: of what is there anyway (an input, an activation, a weight's computed scale), or else
        by its own rule."""
        there = x.op != "call_function" or x in self.needed
        return self.take(x, dim, like) if there else self.push(x, dim, like)

    def push_ranges(self, x: fx.Node, dim: int, starts: Sequence[int], lengths: Sequence[int]) -> fx.Node | Mismatch:
        """`push` of other ranges."""
        here = self.at
        sliced = self.pushed(self.take_ranges(x, dim, starts, lengths))
        self.at = here
        return sliced

    def pushed(self, node: fx.Node) -> fx.Node | Mismatch:
        """What computes `node` (a take of a gradient) without its full-size input."""
        self.at = node
        x, dim = node.args[:2]
        if x.op == "placeholder":
            if (
                x not in self.needed
            ):  # of a piece of the model that returned its weight: the gradient comes from outside
                size = list(x.meta["val"].shape)
                log.warning("the gradient of a frozen weight is computed at its full size %s", size)
            return node
        rule = rule_for(x.target) if x.op == "call_function" else None
        summed, self._summed = self._summed, self._summed or x.target is aten.sum.dim_IntList
        sliced = self._by_rule(rule, node, x, dim) if rule else Mismatch("it has no slice rule")
        self._summed = summed
        if isinstance(sliced, Mismatch) and sum(node.args[3]) == x.meta["val"].shape[dim]:  # all of it is wanted
            return x
        if isinstance(sliced, Mismatch) and not sliced.operator:
            maker = x.args[0] if x.target is operator.getitem else x
            return replace(sliced, operator=f"{maker.target} ({maker.name})", size=tuple(x.meta["val"].shape))
        if x.target in PRODUCTS and not summed:
            self._sliced.add(x)
        return sliced

    def whole(self, sliced: fx.Node) -> Mismatch | None:
        """What of a weight's gradient its slice needs in full besides, if anything: where the weight is normalized."""
        read = self._sliced & _behind([sliced], self.needed.__contains__)
        if not read:
            return None
        x = min(read)
        maker = x.args[0] if x.target is operator.getitem else x
        why = "all of it is summed along the slice's dimension"
        return Mismatch(why, f"{maker.target} ({maker.name})", tuple(x.meta["val"].shape))

    def _by_rule(self, rule: Callable, node: fx.Node, x: fx.Node, dim: int) -> fx.Node | Mismatch:
        """What a rule gives, or why it gives no slice: rules of others may be wrong."""
        try:
            sliced = rule(self, node, x, dim)
        except Exception as error:
            log.warning("the slice rule of %s failed", x.target, exc_info=True)
            return Mismatch(f"its slice rule failed ({type(error).__name__}: {error})")
        if sliced is None:
            return Mismatch(f"it has no slice rule for dimension {dim}")
        if not isinstance(sliced, fx.Node | Mismatch):
            return Mismatch(f"its slice rule gave {sliced!r}, which is neither a node of the graph nor a Mismatch")
        if isinstance(sliced, fx.Node) and "val" in sliced.meta:
            sizes, wanted = list(sliced.meta["val"].shape), sum(node.args[3])
            if len(sizes) != x.meta["val"].ndim or sizes[dim] != wanted:
                return Mismatch(f"its slice rule gave {sizes}, where dimension {dim} of the slice has {wanted}")
        return sliced


def _behind(nodes: Sequence[fx.Node], stop: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """These and what they are computed from, without what is computed before a node to stop at."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found and not stop(node):
            found.add(node)
            stack += node.all_input_nodes
    return found


def slice_pushdown(graph: fx.Graph) -> int:
    """Rewrites a joint graph in place; returns how many weights were attached in it.

    Raises `CompileError` if a gradient of a frozen weight would have to be computed at full size.
    """
    attached = graph.find_nodes(op="call_function", target=ATTACH)
    taken = graph.find_nodes(op="call_function", target=TAKE)
    if not attached and not taken:
        return 0
    slicer = Slicer(graph)
    for node in attached:
        node.replace_all_uses_with(node.args[0])
    for node in taken:
        sliced = slicer.pushed(node)
        if isinstance(sliced, Mismatch):
            raise CompileError(
                f"the gradient of a frozen weight would be {sliced}; choose other targets than this weight"
            )
        if why := slicer.whole(sliced):
            log.warning("the gradient of a frozen weight is %s", why)
        node.replace_all_uses_with(sliced)
    graph.eliminate_dead_code()
    grouped.without_weight_gradients(slicer, graph)
    convolution.without_weight_gradients(graph)
    for node in graph.find_nodes(op="call_function", target=TAKE):
        _lower(slicer, node)
    hoist(slicer)
    graph.eliminate_dead_code()
    log.info("slice pushdown: %d weights, %d gradients sliced", len(attached), len(taken))
    return len(attached)


def attached(graph: fx.Graph) -> str | None:
    """What is wrong where a weight is attached, or a slice not pushed, in a graph. By the operators' names: a second
    import of `attach` would register them anew."""
    for node in graph.nodes:
        if node.op == "call_function" and str(node.target).startswith(("s2ft.attach", "s2ft.take")):
            return (
                f"{node.target} ({node.name}) is left in the graph, so a gradient of a frozen weight would be computed "
                f"at its full size; was a module of s2ft_compile imported under a second name?"
            )
    return None


# --- what is left of the takes: slices of activations ----------------------------------------------------------


def _lower(slicer: Slicer, node: fx.Node) -> None:
    """A copy of the slice, so that saving it for the backward does not keep the whole activation alive."""
    slicer.at = node
    x, dim, starts, lengths = node.args
    shape = list(x.meta["val"].shape)
    if part := spaced(list(zip(starts, lengths)), shape[dim]):
        split = slicer.call(aten.reshape.default, x, [*shape[:dim], len(starts), part, *shape[dim + 1 :]])
        each = slicer.call(aten.slice.Tensor, split, dim + 1, starts[0], starts[0] + lengths[0])
        shape[dim] = sum(lengths)
        pieces = [slicer.call(aten.reshape.default, each, shape)]
    else:
        pieces = [slicer.call(aten.slice.Tensor, x, dim, s, s + n) for s, n in zip(starts, lengths)]
    if len(pieces) == 1:
        sliced = slicer.call(aten.clone.default, pieces[0], memory_format=torch.contiguous_format)
    else:
        sliced = slicer.call(aten.cat.default, pieces, dim)
    node.replace_all_uses_with(sliced)
    slicer.graph.erase_node(node)


def hoist(editor: Editor) -> None:
    """Computes slices and their gradients as soon as they can be. Autograd gets to the weights last of all, which would
    keep the dY of every layer alive until the end of the backward."""
    for node in list(editor.graph.nodes):
        latest = max(node.all_input_nodes, default=None) if node in editor.created else None
        if latest is not None and latest.op != "placeholder":
            latest.append(node)
