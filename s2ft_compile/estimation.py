"""`estimate`: the memory that a training step will take, before any weight is loaded.

The model is prepared without storage (`meta`), then compiled with fake tensors as a real one is: the same capture,
selection, slice pushdown and partition into forward and backward. What the forward saves and what is alive at once is
read from those two graphs; nothing runs.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from .backend import s2ft
from .capture.examples import Inputs, arguments
from .config import OPTIMIZERS, CompileOptions, S2FTConfig, check_choice
from .errors import ConfigError
from .preparation import prepare
from .quantized import Values
from .slices.blocks import Beside, InPlace
from .slices.optimizers import state_bytes
from .slices.state import Left, parameters, state_of

aten = torch.ops.aten
# Beside the elementwise operators: what Inductor computes where it is read, and what reads its operands that way.
INLINED = (
    torch.ops.prims.convert_element_type.default,
    torch.ops.prims.iota.default,
    aten.full.default,
    aten.scalar_tensor.default,
    aten.clone.default,
    aten.gather.default,
    aten.index.Tensor,
    aten.constant_pad_nd.default,
)
REDUCTIONS = (aten.amax.default, aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.var_mean.correction)


@dataclass(frozen=True)
class Estimate:
    """Bytes of one training step, at its peak.

    weights: parameters and buffers. slices: the deltas and the backups of their blocks, and where gradients accumulate
    those that wait. optimizer: what it keeps of each delta, in float32. activations: what the forward saves for the
    backward. working: what is alive besides at the moment of the peak, gradients of deltas too. trainable: how many
    numbers train. batch: sequences, images or other rows per step. tokens: per step, 0 for a model that reads none.
    """

    weights: int
    slices: int
    optimizer: int
    activations: int
    working: int
    trainable: int
    batch: int
    tokens: int

    @property
    def total(self) -> int:
        """Bytes at the peak of a step."""
        return self.weights + self.slices + self.optimizer + self.activations + self.working


def estimate(
    model: nn.Module,
    example_inputs: Any,
    config: S2FTConfig | None = None,
    options: CompileOptions | None = None,
    optimizer: str = "adamw",
    accumulates: bool = False,
    selections: int = 1,
) -> Estimate:
    """What training `model` on `example_inputs` takes; `model` lies on the `meta` device, and is prepared by this.

    example_inputs: a tuple or a dict of the forward's arguments of one step, with labels if the model computes its loss
    (else the loss is the sum of its outputs). config: its selection is replaced by `random`: which units train makes no
    difference here. optimizer: "adamw" or "muon". accumulates: whether gradients of forwards before this one wait in
    `delta.grad`. selections: how often units are chosen up to the step: what trained earlier lies beside quantized
    weights. Layers that the model checkpoints are computed again, as they are in training. Raises `ConfigError` for a
    model with storage, and what `prepare` and the backend raise.
    """
    check_choice("optimizer", optimizer, OPTIMIZERS)
    if not all(p.is_meta for p in model.parameters()):
        raise ConfigError("estimate takes a model without storage, made inside torch.device('meta')")
    config, options = config or S2FTConfig(), options or CompileOptions()
    args, kwargs = arguments(example_inputs)
    unlabelled = {k: v for k, v in kwargs.items() if "label" not in k}
    plain = S2FTConfig(config.targets, budget=_plain(config.budget), top_layers=config.top_layers)
    prepare(model, Inputs(args, unlabelled), plain)
    if selections > 1:
        _select_again(model, selections - 1)
    fake, graphs = graphs_of_step(model, args, kwargs, options)
    return _summed(fake, graphs, (args, kwargs), optimizer, accumulates)


def _select_again(model: nn.Module, times: int) -> None:
    """As if all units beside quantized weights had been others before, so many times."""
    values = Values(model)
    for block in state_of(model).blocks:
        if isinstance(block, Beside):
            indices = torch.arange(min(times * len(block.index), block.size - len(block.index)))
            shape = [*block.delta.shape]
            shape[block.dim] = len(indices)
            delta = torch.empty(shape, device="meta")
            backup = delta.to(values.dtype(block.name))
            block.keep(Left(block.name, block.dim, indices, delta, backup, beside=True), times)


def _plain(budget: str) -> str:
    return "model" if budget == "score" else budget


def _with_fake_storage(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    held = [*model.parameters(), *model.buffers(), *_backups(model)]
    return copy.deepcopy(model, {id(t): _fake(mode, t) for t in held})


def _backups(model: nn.Module) -> list[Tensor]:
    return [block.backup for block in state_of(model).blocks if isinstance(block, InPlace)]


def _fake(mode: FakeTensorMode, t: Tensor) -> Tensor:
    """A fake on the CPU, whose operators save what those of a GPU do."""
    with mode:
        empty = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")
    return nn.Parameter(empty, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else empty


def graphs_of_step(
    model: nn.Module, args: Any, kwargs: Any, options: CompileOptions
) -> tuple[nn.Module, list[fx.GraphModule]]:
    """A prepared model with fake storage, and what Inductor would be given of one training step of it: a forward and a
    backward, or more of each after graph breaks. Nothing runs."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    model = _with_fake_storage(model.train(), mode)
    args, kwargs = pytree.tree_map_only(Tensor, partial(_fake, mode), (args, kwargs))
    from functorch.compile import make_boxed_func

    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: Any, **_: Any) -> Callable[..., Any]:
        graphs.append(gm)
        boxed: Callable[..., Any] = make_boxed_func(partial(_returned, gm.graph, mode))
        return boxed

    how = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in ("inner", "mode")}
    net = torch.compile(model, backend=partial(s2ft, inner_compile=keep), options=how)
    with mode:
        output = net(*args, **kwargs)
        loss: Any = output["loss"] if isinstance(output, Mapping) and "loss" in output else None
        if loss is None:
            loss = sum(t.float().sum() for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad)
        loss.backward()
    return model, graphs


def _returned(graph: fx.Graph, mode: FakeTensorMode, *_: Any) -> list[Any]:
    """What a graph returns, without running it: recomputation in a backward sets the state of a random generator, which
    no fake tensor has."""
    values = pytree.tree_map_only(fx.Node, lambda node: node.meta["val"], graph.output_node().args[0])
    return [_fake(mode, value) if isinstance(value, Tensor) else value for value in values]


# --- from graphs to bytes ----------------------------------------------------------------------------------------


def _summed(model: nn.Module, graphs: list[fx.GraphModule], inputs: Any, optimizer: str, accumulates: bool) -> Estimate:
    deltas = parameters(model)
    numbers = sum(d.numel() for d in deltas)
    fixed = [t for t in (*model.parameters(), *model.buffers()) if not any(t is d for d in deltas)]
    saved, peak = _peak([g.graph for g in graphs])
    given = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    tokens = next((t.numel() for t in given if t.ndim == 2 and not t.is_floating_point()), 0)
    slices = (8 if accumulates else 4) * numbers + sum(map(_bytes, _backups(model)))
    weights, kept = sum(map(_bytes, fixed)), state_bytes(model, optimizer)
    working = max(peak, 4 * numbers) - saved  # the optimizer's step has all gradients at once
    return Estimate(weights, slices, kept, saved, working, numbers, len(given[0]), tokens)


def _peak(graphs: list[fx.Graph]) -> tuple[int, int]:
    """(bytes that all forwards save, bytes alive at the worst moment of the step); weights and inputs apart.

    graphs: forwards in their order, then the backwards. What a forward returns stays alive until a backward has used it
    for the last time; a tangent arrives with the backward.
    """
    forwards, backwards = graphs[: len(graphs) // 2], graphs[len(graphs) // 2 :]
    alive: dict[str, int] = {}  # what outlives its graph: name in its graph -> bytes
    peak = 0
    for graph in forwards:
        most, own = _run(graph, {})
        peak = max(peak, sum(alive.values()) + most)
        alive |= own
    saved = sum(alive.values())
    for graph in backwards:
        given = {n.name: alive.get(n.name, _bytes(n.meta["val"])) for n in graph.find_nodes(op="placeholder")}
        given = {name: size for name, size in given.items() if not name.startswith("primals")}
        most, _ = _run(graph, given)
        alive = {name: size for name, size in alive.items() if name not in given}
        peak = max(peak, sum(alive.values()) + most)
    return saved, peak


def _run(graph: fx.Graph, given: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """The most bytes alive while a graph runs, and what it returns: name -> bytes, a storage once, the rest 0.

    given: bytes of the placeholders that are freed after their last use.
    """
    nodes = list(graph.nodes)
    roots = {node: _root(node) for node in nodes}
    size = {
        node: given.get(node.name, 0) if node.op == "placeholder" else _bytes(node.meta.get("val"))
        for node in nodes
        if roots[node] is node and (node.op != "call_function" or _is_stored(node))
    }
    last: dict[fx.Node, int] = {}
    for i, node in reversed(list(enumerate(nodes))):
        when = i if roots[node] in size else last.get(roots[node], i)  # a fused operator reads when its result is made
        for source in node.all_input_nodes:
            last[roots[source]] = max(when, last.get(roots[source], 0))
    ends: dict[int, list[fx.Node]] = {}
    for node in size:
        ends.setdefault(last.get(node, len(nodes)), []).append(node)
    alive = most = sum(size[n] for n in nodes if n.op == "placeholder" and n in size)
    for i, node in enumerate(nodes):
        ending = ends.get(i, ())
        if node.op != "placeholder" and node in size:
            made_here = sum(size[n] for n in ending if n.op != "placeholder")
            in_place = min(size[node], made_here) if _is_fused(node) else 0  # over what it reads for the last time
            most = max(most, alive + size[node] - in_place)
            alive += size[node]
        alive -= sum(size[n] for n in ending)
    returned: dict[str, int] = {}
    for node in graph.output_node().all_input_nodes:
        root = roots[node]
        returned[node.name] = 0 if root.op == "placeholder" else size[root]
        size[root] = 0
    return most, returned


def _root(node: fx.Node) -> fx.Node:
    """The node whose memory this one is a view of."""
    while node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        returns = node.target._schema.returns
        if len(returns) != 1 or returns[0].alias_info is None or returns[0].alias_info.is_write:
            break
        node = node.all_input_nodes[0]
    return node


def _is_stored(node: fx.Node) -> bool:
    """Whether Inductor gives a node memory of its own: unless it is computed where fused operators read it."""
    return not _is_inlined(node) or any(not _is_fused(user) for user in _readers(node))


def _is_inlined(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in INLINED


def _is_fused(node: fx.Node) -> bool:
    return _is_inlined(node) or node.target in REDUCTIONS


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that read a node's memory, itself or through views."""
    for user in node.users:
        if _root(user) is user:
            yield user
        else:
            yield from _readers(user)


def _bytes(value: Any) -> int:
    if not isinstance(value, Tensor):
        return 0
    numel = value.numel()  # that of a random generator's state has no value while a graph is traced
    known = numel if isinstance(numel, int) else numel.node.hint if numel.node.has_hint() else 0
    return known * value.itemsize
