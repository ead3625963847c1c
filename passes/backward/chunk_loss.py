"""A frozen head and its cross-entropy, a few tokens at a time, so that the full logits never exist.

    logits = h Wᵀ + b;  loss = cross_entropy(f(logits), labels)          h: (tokens, d), W: (vocabulary, d)

The head does not train, so all that its backward makes is dh, which is as small as h: each chunk's dh is computed right
after its loss, and its logits are gone. Between head and loss may stand what keeps a token's logits together (views,
slices of tokens) and the elementwise steps f that language models have: casts, scaling, soft capping. Works on a dynamo
graph, before autograd.
"""

import inspect
import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from s2ft_compile.passes.editor import Editor, Mismatch

log = logging.getLogger(__name__)

# Tokens in a chunk. Its product reads W once for this many FLOPs per byte, enough to be bound by arithmetic on a GPU,
# and at a vocabulary of 128k its logits take 0.25 GiB in bf16.
TOKENS = 1024
AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)


# --- the operators -----------------------------------------------------------------------------------------------


@torch.library.custom_op("s2ft::keep", mutates_args=())
def _keep(total: Tensor, dh: Tensor) -> Tensor:
    """total. As an operator that reads dh it makes dh a part of the forward: a partitioner puts what only the backward
    uses wherever less is saved, and the head would be computed a second time."""
    return total.clone()


@_keep.register_fake
def _(total, dh):
    return torch.empty_like(total)


KEEP = torch.ops.s2ft.keep.default


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The sum or the mean of all tokens' losses, itself summed in float32; its gradient is made with it."""

    @staticmethod
    def forward(ctx, h, W, b, labels, ignore_index, mean, steps, chunks):
        tokens, losses, parts = h.shape[0], [], []
        for k in range(chunks):
            chosen = slice(tokens * k // chunks, tokens * (k + 1) // chunks)
            with torch.enable_grad():
                part = h[chosen].detach().requires_grad_()
                logits = _stepped(F.linear(part, W.detach(), b if b is None else b.detach()), steps)
                loss = F.cross_entropy(logits, labels[chosen], ignore_index=ignore_index, reduction="sum")
            parts.append(torch.autograd.grad(loss, part)[0])
            losses.append(loss.detach())
        dh, dtype = torch.cat(parts), losses[0].dtype
        total = torch.stack(losses).sum(dtype=torch.promote_types(dtype, torch.float32))
        share = 1 / (labels != ignore_index).sum(dtype=total.dtype) if mean else torch.ones_like(total)
        ctx.save_for_backward(dh, share)
        return KEEP((total * share).to(dtype), dh)

    @staticmethod
    def backward(ctx, grad):
        dh, share = ctx.saved_tensors
        return (dh.to(share.dtype) * (grad * share)).to(dh.dtype), None, None, None, None, None, None, None


def _stepped(logits: Tensor, steps: Sequence[tuple[str, float]]) -> Tensor:
    for step, value in steps:
        logits = STEPS[step](logits, value)
    return logits


STEPS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "float32": lambda x, _: x.float(),
    "mul": lambda x, value: x * value,
    "div": lambda x, value: x / value,
    "tanh": lambda x, _: torch.tanh(x),
}


def chunked_cross_entropy(
    h: Tensor,
    W: Tensor,
    b: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    mean: bool,
    steps: Sequence[str],
    values: Sequence[float],
    chunks: int,
) -> Tensor:
    """cross_entropy(f(h Wᵀ + b), labels) in chunks of equal numbers of tokens; W and b get no gradient.

    h: (tokens, d). W: (vocabulary, d). labels: int64 (tokens,). steps, values: f, of `STEPS`.
    """
    return _ChunkedCrossEntropy.apply(h, W, b, labels, ignore_index, mean, tuple(zip(steps, values)), chunks)


_library = torch.library.Library("s2ft", "FRAGMENT")  # an operator that is seen through, and that caches know by name
_library.define(
    "chunked_cross_entropy(Tensor h, Tensor W, Tensor? b, Tensor labels, int ignore_index, bool mean, "
    "str[] steps, float[] values, int chunks) -> Tensor"
)
_library.impl("chunked_cross_entropy", chunked_cross_entropy, "CompositeImplicitAutograd")
CHUNKED = torch.ops.s2ft.chunked_cross_entropy.default


# --- the pass ----------------------------------------------------------------------------------------------------


class Head(NamedTuple):
    """loss = cross_entropy(chain(linear), **options); the chain from the head down. late: a bias added by the chain."""

    linear: fx.Node
    late: fx.Node | None
    chain: tuple[fx.Node, ...]
    loss: fx.Node
    options: Mapping[str, Any]

    @property
    def logits(self) -> tuple[fx.Node, ...]:
        """The head's result, and what is computed from it element by element, for the loss or to be returned."""
        nodes = {self.linear: None, **dict.fromkeys(self.chain)}
        pending = list(nodes)
        while pending:
            more = [u for u in pending.pop().users if u not in nodes and _step(u)]
            nodes |= dict.fromkeys(more)
            pending += more
        return tuple(nodes)


def chunk_loss(graph: fx.Graph, trains: bool = False) -> int:
    """Rewrites a dynamo graph in place; returns how many losses are chunked. Outputs that were their logits are None.

    trains: whether slices do that are not attached here, but beside their weights or in what is checkpointed. Where
    nothing trains, nothing matches or something else reads the logits, nothing changes; a warning says why.
    """
    if not trains and not any(str(n.target).startswith("s2ft.attach") for n in graph.nodes):
        return 0
    output = graph.output_node()
    chunked, dropped = 0, set()
    losses = graph.find_nodes(op="call_function", target=F.cross_entropy)
    if not losses:
        log.warning(
            "logits=False changes nothing here: the graph has no cross-entropy; is the loss computed "
            "outside of the forward, or behind a graph break (TORCH_LOGS=graph_breaks says where)?"
        )
    for loss in losses:
        head = _head(loss)
        if isinstance(head, Mismatch):
            log.warning("cross-entropy %s stays whole: %s", loss.name, head)
        elif readers := [u for n in head.logits for u in n.users if u not in (*head.logits, loss, output)]:
            log.warning("cross-entropy %s stays whole: %s reads the logits", loss.name, readers[0].name)
        else:
            _replace(graph, head)
            dropped |= set(head.logits)
            chunked += 1
    output.args = (tuple(None if node in dropped else node for node in output.args[0]),)
    graph.eliminate_dead_code()
    return chunked


def whole_logits(graph: fx.Graph) -> str | None:
    """What is wrong where the logits of a loss in chunks are computed nevertheless."""
    heads = {loss.args[1] for loss in graph.find_nodes(op="call_function", target=CHUNKED)}
    for node in graph.find_nodes(op="call_function", target=F.linear):
        if _operands(node)[1] in heads:
            return f"{node.name} computes all logits of a loss that is computed in chunks"
    return None


def keep_saved(graph: fx.Graph) -> None:
    """In a joint graph, has the partitioner save every dh rather than compute it again."""
    for node in graph.find_nodes(op="call_function", target=KEEP):
        node.args[1].meta["recompute"] = CheckpointPolicy.MUST_SAVE


def unsaved(graph: fx.Graph) -> str | None:
    """What is wrong where a dh may be computed again."""
    for node in graph.find_nodes(op="call_function", target=KEEP):
        if node.args[1].meta.get("recompute") is not CheckpointPolicy.MUST_SAVE:
            return f"{node.args[1].name}, the gradient of a loss in chunks, is not marked as saved"
    return None


def _frozen(node: fx.Node) -> bool:
    """Whether a node needs no gradient; what attach makes has one."""
    value = node.meta.get("example_value")
    return value is not None and not value.requires_grad


def _head(loss: fx.Node) -> Head | Mismatch:
    """The head of a cross-entropy, or why it cannot be computed token by token."""
    options = inspect.signature(F.cross_entropy).bind(*loss.args, **loss.kwargs)
    options.apply_defaults()
    options = options.arguments
    logits, labels = options["input"], options["target"]
    others = [name for name in ("weight", "size_average", "reduce", "label_smoothing") if options[name]]
    if others:
        return Mismatch(f"it has {', '.join(others)}")
    if options["reduction"] == "none" or _value(logits).ndim != 2 or _value(labels).is_floating_point():
        return Mismatch("it is not one number for rows of logits and their labels")
    node, chain = logits, []
    while _rows(node, 1) is not None or _step(node):
        chain.insert(0, node)
        node = node.args[0]
    late = _late_bias(node)
    if late is not None:
        chain.insert(0, node)
        node = node.args[0]
    if node.target is not F.linear:
        return Mismatch(f"between head and loss stands {node.name} ({node.target})")
    if not all(p is None or _frozen(p) for p in (*_operands(node)[1:], late)):
        return Mismatch("its head trains")
    if any(n.target in AUTOCAST for n in _between(node, loss)):
        return Mismatch("head and loss differ in autocast")
    return Head(node, late, tuple(chain), loss, options)


def _replace(graph: fx.Graph, head: Head) -> None:
    editor = Editor(graph)
    editor.at = head.loss
    h, W, b = _operands(head.linear)
    tokens, chunks = _chunks(_value(head.options["input"]).shape[0])
    steps = [step for node in head.chain if (step := _step(node))]
    if head.late is not None:
        late = editor.call(torch.flatten, head.late)
        b = late if b is None else editor.call(operator.add, b, late)
    for node in head.chain:
        if (args := _rows(node, _value(W).shape[1])) is not None:
            h = editor.again(node, h, *args)
    labels, ignored, mean = (head.options[name] for name in ("target", "ignore_index", "reduction"))
    names, values = [step for step, _ in steps], [value for _, value in steps]
    chunked = editor.call(CHUNKED, h, W, b, labels, ignored, mean == "mean", names, values, chunks)
    head.loss.replace_all_uses_with(chunked)
    log.info("cross-entropy %s of %d tokens in %d chunks", head.loss.name, tokens, chunks)


def _chunks(tokens: int | torch.SymInt) -> tuple[int, int]:
    """How many tokens there are, and chunks for them. With any number of tokens a graph is made again from twice as
    many on (the comparison leaves a guard), so that chunks stay small."""
    if not isinstance(tokens, torch.SymInt):
        return tokens, max(1, -(-tokens // TOKENS))
    hint = tokens.node.hint
    chunks = max(1, -(-hint // TOKENS))
    torch._check(tokens <= 2 * chunks * TOKENS)
    return hint, chunks


# --- what may stand between head and loss ------------------------------------------------------------------------


def _rows(node: fx.Node, width: int) -> tuple | None:
    """The arguments after the first, for rows of another width, of a node that moves, keeps or drops whole rows of
    logits; None for any other."""
    if node.target in ("contiguous", torch.clone, "clone"):
        return node.args[1:]
    if node.target in ("view", "reshape", torch.reshape) and not node.kwargs:
        shape = tuple(node.args[1]) if isinstance(node.args[1], (tuple, list)) else tuple(node.args[1:])
        before, after = _value(node.args[0]).shape[-1], _value(node).shape[-1]
        if isinstance(shape[-1], fx.Node) or before != after:
            return None
        return ((*shape[:-1], -1 if shape[-1] == -1 else width),)
    if node.target is operator.getitem:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        whole = len(index) < _value(node.args[0]).ndim and Ellipsis not in index or index[-1] in (slice(None), Ellipsis)
        return node.args[1:] if whole and all(i is Ellipsis or isinstance(i, (int, slice)) for i in index) else None
    return None


def _late_bias(node: fx.Node) -> fx.Node | None:
    """What a node adds to a head's result as its bias would."""
    if node.target not in ("add", torch.add, operator.add) or node.kwargs or len(node.args) != 2:
        return None
    logits, bias = (n.meta.get("example_value") if isinstance(n, fx.Node) else None for n in node.args)
    fits = (
        isinstance(logits, Tensor)
        and isinstance(bias, Tensor)
        and bias.dtype == logits.dtype
        and bias.numel() == bias.shape[-1:].numel() == logits.shape[-1]
        and bias.ndim <= logits.ndim
    )
    return node.args[1] if fits else None


def _step(node: fx.Node) -> tuple[str, float] | None:
    """An elementwise node as a step of `STEPS`."""
    value = node.args[1] if len(node.args) == 2 else None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if node.kwargs or len(node.args) > 2:
        return None
    if node.target in ("mul", torch.mul, operator.mul) and number:
        return "mul", float(value)
    if node.target in ("div", torch.div, operator.truediv) and number:
        return "div", float(value)
    if node.target in ("tanh", torch.tanh):
        return "tanh", 0.0
    if node.target == "float" or node.target == "to" and value is torch.float32:
        return "float32", 0.0
    return None


# --- small things ------------------------------------------------------------------------------------------------


def _operands(linear: fx.Node) -> list[fx.Node | None]:
    """input, weight and bias, by position or name."""
    names = ("input", "weight", "bias")
    return [linear.args[i] if i < len(linear.args) else linear.kwargs.get(name) for i, name in enumerate(names)]


def _value(node: fx.Node) -> Tensor:
    return node.meta["example_value"]


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    nodes = list(first.graph.nodes)
    return nodes[nodes.index(first) : nodes.index(last)]
