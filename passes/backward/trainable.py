"""Which weights' gradients can be sliced, found before anything is changed.

One joint graph of the model with fake tensors, each candidate `attach`ed to a delta of one row; slice pushdown runs on
each gradient by itself, and where it does not match is the answer. A model that cannot be traced so says nothing: the
first step then refuses what this would have.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.utils import _pytree as pytree

from s2ft_compile.capture.examples import arguments, several
from s2ft_compile.capture.models import held_again, inference_mode_of, tensors_of, tied_names
from s2ft_compile.capture.recording import Recorder, exporting, recording, unlogged
from s2ft_compile.config import CHANNELS, S2FTConfig
from s2ft_compile.errors import ConfigError
from s2ft_compile.passes.editor import Mismatch
from s2ft_compile.passes.select.ranking import WHOLE, Band
from s2ft_compile.passes.select.select import Selection, offered
from s2ft_compile.quantized import stand_ins
from s2ft_compile.structure import Analysis

from .attach import ATTACH, TAKE, attach, runs
from .pushdown import Slicer

log = logging.getLogger(__name__)
Place = tuple[str, int]
Refused = Mapping[Place, Mapping[str, Mismatch]]  # where no gradient can be sliced: place -> role -> why


def trainable(
    model: nn.Module, config: S2FTConfig, selections: Sequence[Selection], refused: Refused
) -> tuple[Selection, ...]:
    """The selections whose gradients have slice rules. refused: of `trained_bands`. A weight that is targeted by its
    name, or all of which a target consists, raises `ConfigError`; others of a role are left out, with a line in the
    log."""
    tensors = tensors_of(model)
    left: list[Selection] = []
    whys: list[tuple[Selection, Mismatch]] = []
    for s in selections:
        of_roles = refused.get((s.parameter_name, s.dim), {})
        why = next((of_roles[role] for role in s.roles if role in of_roles), None)
        if why is None or len(s.indices) == tensors[s.parameter_name].shape[s.dim]:  # all of it needs no rule
            left.append(s)
        else:
            whys.append((s, why))
    for s, why in whys:
        if not left or not any(role in config.targets for role in s.roles):
            raise ConfigError(f"{s.parameter_name} cannot train along dim {s.dim}: its gradient would be {why}")
        log.warning("%s is left out of %s: its gradient would be %s", s.parameter_name, ", ".join(s.roles), why)
    return tuple(left)


def _stands_for(band: Band) -> "Taken":
    """Any one of a band's units, but of channels of heads what each of the heads has."""
    if not band.role.endswith(CHANNELS):
        return Taken(band.parameter_name, band.dim)
    starts, lengths = runs(band.positions[0].sort().values.tolist())
    return Taken(band.parameter_name, band.dim, tuple(starts), tuple(lengths))


def trained_bands(
    model: nn.Module, example_inputs: Any, analysis: Analysis, bands: Mapping[str, Sequence[Band]] | None = None
) -> tuple[dict[str, list[Band]], Refused]:
    """What trains of these bands, by target, and what does not, since its gradient has no slice rule. Whole heads of a
    place may train where their channels do not. bands: by default all that is `offered`."""
    bands = offered(analysis) if bands is None else bands
    with stand_ins(model) as quantized:  # the slices of quantized weights lie beside them, and need no rule
        parts = [b for of in bands.values() for b in of if b.role != WHOLE and b.parameter_name not in quantized]
        taken = {id(b): _stands_for(b) for b in parts}
        slices = list(dict.fromkeys(taken.values()))
        whys = refused_gradients(model, several(example_inputs)[0], slices, analysis.copies)
    elsewhere = held_again(model)  # what reads that does not read the delta
    kept: dict[str, list[Band]] = {}
    refused: dict[Place, dict[str, Mismatch]] = {}
    for target, of in bands.items():
        for b in of:
            why = whys.get(taken.get(id(b)))
            if b.parameter_name in elsewhere and b.role != WHOLE:
                why = Mismatch(f"lost where {elsewhere[b.parameter_name]} is read in its place")
            if why is None:
                kept.setdefault(target, []).append(b)
            else:
                refused.setdefault((b.parameter_name, b.dim), {})[b.role] = why
    return kept, refused


def refused_gradients(
    model: nn.Module, example_inputs: Any, slices: Sequence["Taken"], copies: Mapping[str, str] = MappingProxyType({})
) -> dict["Taken", Mismatch]:
    """The slices whose gradient has no slice rule -> why. copies: weight -> that of an equal layer (`Analysis.copies`);
    of equal layers the last two are looked at, and the others are as the former of those."""
    like = _last_two(model, copies)
    stands_for = {t: t._replace(parameter_name=like.get(t.parameter_name, t.parameter_name)) for t in slices}
    asked = list(dict.fromkeys(stands_for.values()))
    if not asked:
        return {}
    try:
        joint = sliced_gradients(model, example_inputs, asked)
    except Exception as error:  # tracing raises many unrelated types
        log.info("gradients could not be looked at before the first step: %s: %s", type(error).__name__, error)
        return {}
    return {taken: joint.refused[seen] for taken, seen in stands_for.items() if seen in joint.refused}


def _last_two(model: nn.Module, copies: Mapping[str, str]) -> dict[str, str]:
    """Weight -> that of the last layer but one of those that are equal to its own, of all weights before that one."""
    alike: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        first = name
        while first in copies:
            first = copies[first]
        alike.setdefault(first, []).append(name)
    return {name: names[-2] for names in alike.values() for name in names[:-2]}


class Taken(NamedTuple):
    """A slice of a parameter: ranges along one dimension."""

    parameter_name: str
    dim: int
    starts: tuple[int, ...] = (0,)
    lengths: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Joint:
    """graph_module: (parameters and buffers, inputs, deltas) -> (loss, ..., the gradient of each delta). refused: slice
    -> why its gradient has no slice rule; that one is taken of the full gradient."""

    graph_module: fx.GraphModule
    refused: Mapping[Taken, Mismatch]


def _sum(output: Any) -> Tensor:
    return sum(t.float().sum() for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad)


def sliced_gradients(
    model: nn.Module, example_inputs: Any, slices: Sequence[Taken], loss: Callable[[Any], Tensor] = _sum
) -> Joint:
    """One joint graph in eval mode, in which each gradient is pushed down by itself. Raises what tracing raises."""
    module = _joint_graph(model, example_inputs, slices, loss)
    gradients = module.graph.output_node().args[0][-len(slices) :]
    slicer, refused = Slicer(module.graph), {}
    for node in module.graph.find_nodes(op="call_function", target=ATTACH):
        node.replace_all_uses_with(node.args[0])
    for taken, gradient in zip(slices, gradients):
        for node in _takes(gradient):
            sliced = slicer.pushed(node)
            why = sliced if isinstance(sliced, Mismatch) else slicer.whole(sliced)
            if why is None:
                node.replace_all_uses_with(sliced)
            else:
                refused[taken] = why
    module.graph.eliminate_dead_code()
    module.recompile()
    return Joint(module, refused)


def _takes(gradient: Any) -> list[fx.Node]:
    """The slices that a delta's gradient is made of: casts and sums of takes."""
    takes, stack, seen = [], [gradient], set()
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.target is TAKE:
            takes.append(node)
        else:
            stack += node.all_input_nodes
    return takes


def _joint_graph(
    model: nn.Module, example_inputs: Any, slices: Sequence[Taken], loss: Callable[[Any], Tensor]
) -> fx.GraphModule:
    """Of a loss and its gradients by deltas, which come last; recorded, or else traced."""
    from torch._functorch.aot_autograd import aot_export_joint_simple

    tied, tensors = tied_names(model), tensors_of(model)
    inputs, spec = pytree.tree_flatten(tuple(arguments(example_inputs)))
    given = [t for t in inputs if isinstance(t, Tensor)]

    def run(*flat):
        values = dict(zip(tensors, flat))
        buffers = {n: values[n].clone() for n, _ in model.named_buffers()}  # a forward may write to them
        values.update(buffers)
        passed = iter(flat[len(tensors) : len(tensors) + len(given)])
        for (name, dim, *ranges), delta in zip(slices, flat[len(tensors) + len(given) :]):
            values[name] = attach(values[name], delta, dim, *map(list, ranges))
        values.update({other: values[first] for other, first in tied.items()})
        args, kwargs = pytree.tree_unflatten([next(passed) if isinstance(t, Tensor) else t for t in inputs], spec)
        return (loss(torch.func.functional_call(model, values, args, kwargs, tie_weights=False)),)

    deltas = [tensors[s.parameter_name].detach().narrow(s.dim, 0, sum(s.lengths)) for s in slices]
    with inference_mode_of(model), torch.enable_grad(), unlogged():
        try:
            return _recorded(model, run, [*tensors.values(), *given], deltas)
        except Exception as error:
            log.debug("gradients were not recorded (%s: %s)", type(error).__name__, error)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fakes = [mode.from_tensor(t.detach(), static_shapes=True) for t in (*tensors.values(), *given, *deltas)]
        for delta in fakes[len(fakes) - len(slices) :]:
            delta.requires_grad_()
        with mode, exporting():
            joint = aot_export_joint_simple(run, fakes, trace_joint=True, decompositions=_decompositions())
    return _taking_all(joint if isinstance(joint, fx.GraphModule) else joint[0])


def _taking_all(joint: fx.GraphModule) -> fx.GraphModule:
    """An exported joint graph of a loss with its inputs as plain arguments and, for the loss's own gradient, 1."""
    graph = joint.graph
    graph.set_codegen(fx.CodeGen())
    tangent = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(tangent):
        one = graph.call_function(torch.ops.aten.ones.default, ([],), {"dtype": tangent.meta["val"].dtype})
    one.meta = dict(tangent.meta)
    tangent.replace_all_uses_with(one)
    graph.erase_node(tangent)
    return joint


def _recorded(model: nn.Module, run: Callable, fixed: Sequence[Tensor], deltas: Sequence[Tensor]) -> fx.GraphModule:
    recorder = Recorder(decompositions=_decompositions())
    fakes = [recorder.input(t)[0] for t in fixed]
    leaves = [recorder.input(t, requires_grad=True)[0] for t in deltas]
    with recording(model, recorder):
        outputs = run(*fakes, *leaves)
        graph = recorder.returns((*outputs, *torch.autograd.grad(outputs, leaves, allow_unused=True)))
    return _LazyGraphModule(dict(recorder.constants), graph)


def _decompositions() -> Mapping[Any, Callable]:
    """Inductor's, without those of pooling, which ask its lowerings: two seconds to import."""
    from torch._inductor.decomposition import select_decomp_table

    return {op: parts for op, parts in select_decomp_table().items() if "max_pool" not in str(op)}
