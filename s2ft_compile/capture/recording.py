"""Recording: the graph of a forward, made of the operators that it calls, in one run with values that have shapes only.

`torch.export` makes the same graph (functional, of the operators as they are before autograd and decompositions take
them apart) in five runs, each of which writes code: 8 times as long. What this cannot record raises, and is exported.
"""

import logging
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._traceback import CapturedTraceback

from .models import holdings, holds_still
from .repeats import Layers, copies_of, now, repeated

SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.Size)


@contextmanager
def unlogged() -> Iterator[None]:
    """Without the traceback that torch logs of an operator that takes no such sizes: whoever tries raises, or goes on
    in another way."""

    def is_no_attempt(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("failed while attempting to run meta for")

    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addFilter(is_no_attempt)
    try:
        yield
    finally:
        logger.removeFilter(is_no_attempt)


class NotRecorded(Exception):
    """A forward that does what a graph of operators does not say."""


class Recording:
    """A graph in the making, each node with its value. constants: other tensors that its operators are given, by the
    names that the graph has for them."""

    def __init__(self, names: Mapping[int, str] | None = None) -> None:
        self.graph = fx.Graph()
        self.names = names or {}  # id of a tensor -> what it is known by
        self.constants: dict[str, torch.Tensor] = {}
        self._nodes: dict[int, fx.Node] = {}
        self._values: list[Any] = []  # kept, so that none of them is at another's address

    def placeholder(self, value: torch.Tensor, name: str = "") -> fx.Node:
        return self._hold(value, self.graph.placeholder(name or f"arg{len(self._nodes)}"))

    def node_of(self, value: torch.Tensor) -> fx.Node:
        if id(value) in self._nodes:
            return self._nodes[id(value)]
        if not isinstance(value, torch.Tensor) or isinstance(value, (FakeTensor, FunctionalTensor)):
            raise NotRecorded(f"{value} comes from where nothing is recorded")
        name = f"c_{self.names.get(id(value), f'tensor_{len(self.constants)}')}".replace(".", "_")
        self.constants[name] = value
        return self._hold(value, self.graph.get_attr(name))

    def arguments(self, given: Any) -> Any:
        """The same with nodes in place of tensors."""
        return pytree.tree_map_only((torch.Tensor, *SYMBOLS), self.node_of, given)

    def add(self, func: Callable, args: Any, kwargs: Any, result: Any) -> None:
        """A call that returned `result`. One that returned no tensor was a question about sizes or types."""
        parts = result if isinstance(result, (list, tuple)) else [result]
        if not any(isinstance(part, torch.Tensor) for part in parts):
            return
        node = self.graph.call_function(func, self.arguments(args), self.arguments(kwargs))
        node.meta["traceback"] = CapturedTraceback.extract()
        node.meta["val"] = result
        if parts is not result:
            self._hold(result, node)
            return
        for i, part in enumerate(parts):
            if isinstance(part, torch.Tensor):
                self._hold(part, self.graph.call_function(operator.getitem, (node, i)))

    def _hold(self, value: torch.Tensor, node: fx.Node) -> fx.Node:
        node.meta["val"] = value
        self._nodes[id(value)] = node
        self._values.append(value)
        return node


class Functional(FunctionalTensorMode):
    """Without `linalg`'s checks of values, which order a graph's operators by tokens that it would take and return."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._linalg_check_errors.default:
            return None
        return super().__torch_dispatch__(func, types, args, kwargs)


class Recorder(Recording, ProxyTorchDispatchMode):
    """Records the operators that are called while it is `on`, in a functional form: nothing is written to.

    names: of tensors that a model holds besides, by id. decompositions: None records operators as they are before
    autograd; a table those that autograd calls and makes, taken apart by the table. The dispatcher lets proxy modes
    alone be where this is.
    """

    def __init__(self, names: Mapping[int, str] | None = None, decompositions: Mapping[Any, Callable] | None = None):
        Recording.__init__(self, names)
        self.pre_dispatch, self.decompositions = decompositions is None, decompositions or {}
        TorchDispatchMode.__init__(self, torch._C.DispatchKey.PreDispatch if self.pre_dispatch else None)
        self._mode_key = torch._C._TorchDispatchModeKey.PROXY
        self.enter_stack: list = []
        self.tracer = SimpleNamespace(tensor_tracker={})  # where proxies would be
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.functional = Functional(pre_dispatch=self.pre_dispatch, export=self.pre_dispatch)
        self.given: dict[int, tuple[FunctionalTensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (parts := self._parts(func)) is not None:
            with self:
                result = parts(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        if func._schema.is_mutable:
            raise NotRecorded(f"{func} writes to a tensor that is no buffer")
        result = func(*args, **(kwargs or {}))
        self.add(func, args, kwargs or {}, result)
        return result

    def _parts(self, func: Any) -> Callable | None:
        """What takes an operator apart."""
        if self.pre_dispatch or func in self.decompositions:
            return self.decompositions.get(func)
        known = isinstance(func, torch._ops.OpOverload) and func.namespace != "prim"
        return func.decompose if known and func._can_decompose() else None

    @contextmanager
    def on(self) -> Iterator[None]:
        with self.fake, exporting(), enable_python_dispatcher(), self, self.functional:
            yield

    def input(self, t: torch.Tensor, name: str = "", requires_grad: bool = False) -> tuple[FunctionalTensor, str]:
        """What stands for a tensor while this is on, and the name of its placeholder."""
        shaped = self.fake.from_tensor(t.detach(), static_shapes=True)
        place = self.placeholder(shaped, name.replace(".", "_")).name
        with self.functional:
            result = FunctionalTensor.to_functional(shaped).requires_grad_(requires_grad)
        self.given[id(result)] = result, shaped
        return result, place

    def again(self, node: fx.Node) -> FunctionalTensor:
        """A tensor like a node's, which that node now stands for."""
        val = node.meta["val"]
        with _disable_current_modes(), self.fake:
            value = torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=val.device)
        self._hold(value, node)
        with _disable_current_modes(), self.functional:
            return FunctionalTensor.to_functional(value)

    def is_written(self, t: torch.Tensor) -> bool:
        """Whether it is an input that was written to, or none."""
        return id(t) not in self.given or now(t) is not self.given[id(t)][1]

    def returns(self, tree: Any) -> fx.Graph:
        """The graph, which returns these."""
        self.graph.output(self.arguments(pytree.tree_map(now, tree)))
        return self.graph


@dataclass(frozen=True)
class Recorded:
    """graph_module: aten. parameters, buffers: placeholder name -> name. constants: the values of other tensors, by the
    name of the node. written: output name -> the buffer that it is the next value of; such outputs come first.
    copies: weight -> that of the layer which its own is a copy of."""

    graph_module: fx.GraphModule
    parameters: Mapping[str, str]
    buffers: Mapping[str, str]
    constants: Mapping[str, torch.Tensor]
    written: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)


def record(model: nn.Module, args: tuple, kwargs: Mapping[str, Any], names: Mapping[int, str]) -> Recorded:
    """Records one call of a model. names: of the tensors that its modules hold besides, by id. Raises `NotRecorded`, or
    whatever its code raises on values without numbers."""
    given, spec = pytree.tree_flatten((args, dict(kwargs)))
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    for t in (*held.values(), *given):
        if isinstance(t, torch.Tensor) and type(t) not in (torch.Tensor, nn.Parameter, nn.Buffer):
            raise NotRecorded(f"a {type(t).__name__} is not a plain tensor")
    recorder, state = Recorder(names), {}
    places: dict[str, dict[str, str]] = {"p": {}, "b": {}}
    for kind, tensors in (("p", model.named_parameters()), ("b", model.named_buffers())):
        for name, t in tensors:
            state[name], place = recorder.input(t, f"{kind}_{name}")
            places[kind][place] = name
    given = [recorder.input(t, f"input_{i}")[0] if isinstance(t, torch.Tensor) else t for i, t in enumerate(given)]
    args, kwargs = pytree.tree_unflatten(given, spec)
    with recording(model, recorder) as lists:
        result = torch.func.functional_call(model, state, args, kwargs)
    outputs = pytree.tree_leaves(result)
    if odd := [o for o in outputs if not isinstance(o, (torch.Tensor, *PLAIN))]:
        raise NotRecorded(f"it returns a {type(odd[0]).__name__}, in which there may be tensors")
    buffers = {name: state[name] for name in places["b"].values()}  # functional_call puts new ones there
    written = {name: t for name, t in buffers.items() if recorder.is_written(t)}
    if any(recorder.is_written(t) for t, _ in recorder.given.values() if id(t) not in map(id, buffers.values())):
        raise NotRecorded("it writes to a parameter or an input")
    graph = recorder.returns((*written.values(), *outputs))
    module = _LazyGraphModule(dict(recorder.constants), graph)
    returned: Any = graph.output_node().args[0]
    nexts = {node.name: name for node, name in zip(returned, written)}
    copies = copies_of(lists, {id(p): name for name, p in model.named_parameters()}) if lists else {}
    return Recorded(module, places["p"], places["b"], recorder.constants, nexts, copies)


@contextmanager
def exporting() -> Iterator[None]:
    """Code that looks at values unless it is traced (transformers' masks) asks these."""
    flags = ("_is_compiling_flag", "_is_exporting_flag")
    before = {flag: getattr(torch.compiler, flag) for flag in flags}
    for flag in flags:
        setattr(torch.compiler, flag, True)
    try:
        yield
    finally:
        for flag, was in before.items():
            setattr(torch.compiler, flag, was)


@contextmanager
def recording(model: nn.Module, recorder: Recorder) -> Iterator[list[Layers]]:
    """What the model's own code does is recorded, of equal layers once; the model is as before afterwards."""
    with as_before(model), recorder.on(), repeated(model, recorder) as lists:
        for module in model.modules():
            vars(module).pop("_compiled_call_impl", None)  # of `model.compile`
        yield lists


@contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Every module has the attributes of before afterwards, and every list or dict among them its items: a forward may
    keep what it computed."""
    before = holdings(model)
    try:
        yield
    finally:
        for held, was in before:
            if not holds_still(held, was):
                held.clear()
                held.update(was) if isinstance(held, dict) else held.extend(was)
