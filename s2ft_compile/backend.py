"""`torch.compile(model, backend="s2ft")`.

Prepares a model at its first call, runs the passes of `pipeline` on its graphs, and hands them to AOTAutograd.
"""

import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import tracing

from s2ft_compile.passes.backward.attach import ATTACH
from s2ft_compile.passes.backward.fp8 import E4M3

from .capture.examples import Inputs
from .capture.models import unwrap
from .config import CompileOptions, S2FTConfig, looks_at_data
from .errors import ConfigError, StateError
from .pipeline import DYNAMO, JOINT, Pipeline
from .preparation import prepare
from .quantized import parts_of
from .slices.blocks import Beside, block_of, blocks_in, refresh, trains_slices
from .slices.state import live_states

log = logging.getLogger(__name__)
_numbers = count()


def s2ft(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    inner_compile: Callable | None = None,
    **unknown: Any,
) -> Callable:
    """The backend. options: the fields of `S2FTConfig` and of `CompileOptions`. inner_compile: in place of Inductor's
    own compilation of a graph, for tools that look at what it is given.

    Raises `ConfigError` for an unknown option, `StateError` where there is no model to prepare.
    """
    if unknown:
        raise ConfigError(f"unknown argument {', '.join(map(repr, unknown))} to backend 's2ft'; use options={{...}}")
    how, config = _parse({**(options or {}), **({"mode": mode} if mode else {})})
    pairs = attached_inputs(gm.graph)
    if torch.is_grad_enabled() and not pairs:
        _prepare_or_check(example_inputs, config)
    weights = [i for i, x in enumerate(example_inputs) if isinstance(x, nn.Parameter) and block_of(x) is not None]
    _check_config(example_inputs, weights, config)
    log.info("%d of a graph's %d inputs are weights with a delta", len(pairs), len(example_inputs))
    trains = bool(pairs) or trains_slices(example_inputs)
    if how.fp8 and trains:
        _check_fp8(example_inputs)
    pipeline = Pipeline(how, next(_numbers), trains)
    graph = _copy(gm) if trains and not how.logits else gm  # what leaves logits out is the one pass that changes it
    pipeline.run(DYNAMO, graph.graph, example_inputs)
    if graph is not gm:
        graph.recompile()
    compiled = _compile(graph, example_inputs, pipeline, inner_compile)
    return _refreshed(compiled, pairs, weights, _replays(how)) if pairs or weights else compiled


def attached_inputs(graph: fx.Graph) -> list[tuple[int, int]]:
    """The positions of each weight and delta that a dynamo graph attaches, also in what it checkpoints."""
    positions = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    return list(dict.fromkeys(_attached(graph, positions)))


def _attached(graph: fx.Graph, positions: Mapping[fx.Node, int]) -> Iterator[tuple[int, int]]:
    for node in (n for n in graph.nodes if n.op == "call_function"):
        given = [positions.get(a) if isinstance(a, fx.Node) else None for a in node.args]
        if node.target in ATTACHES and None not in given[:2]:
            yield given[0], given[1]
        elif (body := _body(node)) is not None:
            inner = zip(body.find_nodes(op="placeholder"), given[1:])
            yield from _attached(body, {p: position for p, position in inner if position is not None})


def _body(node: fx.Node) -> fx.Graph | None:
    """The graph that a higher-order operator runs on the rest of its arguments."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node) or first.op != "get_attr":
        return None
    body = getattr(node.graph.owning_module, str(first.target), None)
    return body.graph if isinstance(body, fx.GraphModule) else None


ATTACHES = (torch.ops.s2ft.attach, ATTACH)


def _refreshed(compiled: Callable, pairs: Sequence[tuple[int, int]], weights: Sequence[int], replays: bool) -> Callable:
    """Writes the deltas into the weights first, in one launch on a GPU.

    The blocks are those of the tensors at hand: dynamo runs one graph for all modules that its guards cannot tell
    apart, such as the layers of a model that it compiles piece by piece. Tensors that belong to no block are unsharded
    by FSDP, which gathers what the optimizer's step has written. replays: whether CUDA graphs write every micro-batch's
    gradients to the same memory, so that none may stay there.
    """

    def run(*args):
        for weight, delta in pairs:
            block = block_of(args[delta])
            if block is not block_of(args[weight]):
                raise StateError(
                    f"{(block or block_of(args[weight])).name} was called with another weight or delta than the "
                    f"model's own (torch.func.functional_call); that works without torch.compile"
                )
            if block is not None:
                block.attached = True
                if replays:
                    block.own_gradient()
        blocks = [block for i in weights if (block := block_of(args[i])) is not None]
        for block in blocks:
            if isinstance(block, Beside):
                block.attached = True
                if replays:
                    block.own_gradient()
        refresh(blocks)
        return compiled(*args)

    return run


def _parse(options: Mapping[str, Any]) -> tuple[CompileOptions, S2FTConfig | None]:
    """How to compile, and what to train, if the options say so."""
    known = [f.name for f in fields(CompileOptions)]
    how = CompileOptions(**{name: options[name] for name in known if name in options})
    what = {name: value for name, value in options.items() if name not in known}
    try:
        return how, S2FTConfig.from_dict(what) if what else None
    except ConfigError as error:
        raise ConfigError(f"{error}, {', '.join(known)}") from None if "unknown option" in str(error) else error


def _check_config(inputs: Sequence[Any], weights: Sequence[int], config: S2FTConfig | None) -> None:
    blocks = {id(block_of(inputs[i])) for i in weights}
    for state in live_states() if config is not None else ():
        if not config.is_that_of(state.plan.config) and any(id(b) in blocks for b in state.blocks):
            raise ConfigError(
                f"options {config} differ from those the model was prepared with: {state.plan.config}; "
                f"leave them out, or call s2ft.release(model) first"
            )


def _check_fp8(inputs: Sequence[Any]) -> None:
    if not any(part.dtype == E4M3 for x in inputs if isinstance(x, torch.Tensor) for _, part in parts_of([("", x)])):
        raise ConfigError(
            "the option fp8 is for weights that are stored in fp8 (float8_e4m3fn), and this graph has none; quantize "
            "the base first, by torchao's Float8WeightOnlyConfig or `s2ft train --quantize fp8`"
        )


# --- preparing at the first call -------------------------------------------------------------------------------


class _Prepared(TensorifyScalarRestartAnalysis):
    """Has dynamo trace the frame again: its weights are frozen and permuted now."""


def _prepare_or_check(example_inputs: Sequence[Any], config: S2FTConfig | None) -> None:
    """A graph without trained weights belongs to a prepared model (a piece between graph breaks), or its model is
    prepared now, from the frame that dynamo is tracing."""
    weights = [x for x in example_inputs if isinstance(x, nn.Parameter)]
    if any(state.holds(weights) for state in live_states()):
        return
    model, inputs = _module_being_called()
    if model is None:
        model, inputs = _frame_being_traced()
    if model is not None and blocks_in(model):
        return
    if model is None:
        if not weights:
            return
        raise StateError(
            "backend 's2ft' found no module to prepare in what is compiled; call "
            "s2ft.prepare(model, example_inputs) before torch.compile"
        )
    with tracing(None), torch.no_grad():
        prepare(model, inputs, config, calibration=[inputs] if config and looks_at_data(config.selection) else None)
    InstructionTranslator.current_tx().speculation_log.clear()  # a model with hooks may be traced another way
    raise _Prepared(restart_reason="the model was prepared")


def _module_being_called() -> tuple[nn.Module | None, Inputs | None]:
    """The compiled module that was called, and with what. After a graph break the frame that dynamo traces may be a
    submodule's, so this looks for the call on the Python stack."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module._wrapped_call_impl.__code__:
            module = frame.f_locals["self"]
            if unwrap(module) is not module or module._compiled_call_impl is not None:
                return unwrap(module), Inputs(tuple(frame.f_locals["args"]), dict(frame.f_locals["kwargs"]))
        frame = frame.f_back
    return None, None


def _frame_being_traced() -> tuple[nn.Module | None, Inputs | None]:
    """The module whose forward is being compiled, and the arguments it was called with."""
    frame = InstructionTranslator.current_tx()
    while getattr(frame, "parent", None) is not None:
        frame = frame.parent
    code, values = frame.f_code, frame.f_locals
    names = code.co_varnames
    if not code.co_argcount or not isinstance(values.get(names[0]), nn.Module):
        return None, None
    after = code.co_argcount + code.co_kwonlyargcount
    args = [values[n] for n in names[1 : code.co_argcount]]
    kwargs = {n: values[n] for n in names[code.co_argcount : after]}
    if code.co_flags & inspect.CO_VARARGS:
        args += values[names[after]]
        after += 1
    if code.co_flags & inspect.CO_VARKEYWORDS:
        kwargs.update(values[names[after]])
    return values[names[0]], Inputs(tuple(args), kwargs)


# --- graphs ----------------------------------------------------------------------------------------------------


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    graph, mapping = fx.Graph(), {}
    output = graph.graph_copy(gm.graph, mapping)
    graph.output(output)
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    copy._param_name_to_source = gm._param_name_to_source
    for old, new in mapping.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    return copy


def _compile(gm: fx.GraphModule, inputs: Sequence[Any], pipeline: Pipeline, inner_compile: Callable | None) -> Callable:
    how = pipeline.how
    if how.inner == "eager":
        return gm
    functorch = torch._functorch.config.patch(
        activation_memory_budget=max(how.activation_budget, 1e-6),  # 0 would not even save what has to be
        # Keys and values expanded to all query heads are copied again in the backward rather than saved: 11.6 instead
        # of 13.1 units of the hidden size per token and layer of a bf16 Llama block with 4 queries per kv head.
        ban_recompute_materialized_backward=False,
    )
    with functorch:
        if how.inner == "aot_eager":
            return _aot_eager(gm, inputs, pipeline)
        return _inductor(gm, inputs, pipeline, inner_compile)


def _replays(how: CompileOptions) -> bool:
    """Whether the graphs become CUDA graphs where there is a GPU."""
    from torch._inductor import config

    return how.inner == "inductor" and _mode_options(how).get("triton.cudagraphs", config.triton.cudagraphs)


def _mode_options(how: CompileOptions) -> dict[str, Any]:
    from torch._inductor import list_mode_options

    return list_mode_options(how.mode) if how.mode else {}


def _inductor(
    gm: fx.GraphModule, inputs: Sequence[Any], pipeline: Pipeline, inner_compile: Callable | None
) -> Callable:
    from torch._inductor.compile_fx import compile_fx

    patches = {**_mode_options(pipeline.how), "joint_custom_pre_pass": pipeline}
    if pipeline.how.activation_budget < 1 or any(_body(node) is not None for node in gm.graph.nodes):
        # Where memory counts more: a buffer that waits for its next use is not free meanwhile. On a CPU a checkpointed
        # step took 2 to 7% less without that, and no longer. Loops over the same rows as one kernel have all their
        # operands and results at once, as nothing that is gathered from is overwritten: one or two activations of a
        # feed-forward layer more. Without them a step took as long (int8, three layers: 0.367 for 0.368 s).
        patches |= {"allow_buffer_reuse": False, "cpp.max_horizontal_fusion_size": 1}
    replaced = {"inner_compile": inner_compile} if inner_compile else {}
    return compile_fx(gm, list(inputs), config_patches=patches, **replaced)


def _aot_eager(gm: fx.GraphModule, inputs: Sequence[Any], pipeline: Pipeline) -> Callable:
    from torch._inductor.decomposition import select_decomp_table

    return aot_autograd(
        decompositions=select_decomp_table(),  # as Inductor's, and as `prepare` looked at gradients
        fw_compiler=boxed,
        bw_compiler=boxed,
        inference_compiler=partial(_inference, pipeline),
        partition_fn=partial(_partition, pipeline),
    )(gm, list(inputs))


def boxed(gm: fx.GraphModule, inputs) -> Callable:
    from functorch.compile import make_boxed_func

    return make_boxed_func(gm.forward)


def _inference(pipeline: Pipeline, gm: fx.GraphModule, inputs) -> Callable:
    pipeline.rewrite(gm.graph, JOINT)
    gm.recompile()
    return boxed(gm, inputs)


def _partition(pipeline: Pipeline, joint: fx.GraphModule, inputs, **kwargs):
    pipeline.rewrite(joint.graph, JOINT)
    joint.recompile()
    return min_cut_rematerialization_partition(joint, inputs, **kwargs)
