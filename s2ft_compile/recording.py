"""Recording: the graph of a forward, made of the operators that it calls, in one run with values that have shapes only.

`torch.export` makes the same graph (functional, of the operators as they are before autograd and decompositions take
them apart) in five runs, each of which writes code: 8 times as long. What this cannot record raises, and is exported.
"""

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._traceback import CapturedTraceback

SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.Size)


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

    def add(self, func: Callable, args: Any, kwargs: Any, made: Any) -> None:
        """A call that returned `made`. One that returned no tensor was a question about sizes or types."""
        parts = made if isinstance(made, (list, tuple)) else [made]
        if not any(isinstance(part, torch.Tensor) for part in parts):
            return
        node = self.graph.call_function(func, self.arguments(args), self.arguments(kwargs))
        node.meta["traceback"] = CapturedTraceback.extract()
        node.meta["val"] = made
        if parts is not made:
            self._hold(made, node)
            return
        for i, part in enumerate(parts):
            if isinstance(part, torch.Tensor):
                self._hold(part, self.graph.call_function(operator.getitem, (node, i)))

    def _hold(self, value: torch.Tensor, node: fx.Node) -> fx.Node:
        node.meta["val"] = value
        self._nodes[id(value)] = node
        self._values.append(value)
        return node


class _Recorder(Recording, ProxyTorchDispatchMode):
    """Records each operator as it is called. The dispatcher takes proxy modes alone this early."""

    def __init__(self, names: Mapping[int, str]) -> None:
        Recording.__init__(self, names)
        TorchDispatchMode.__init__(self, torch._C.DispatchKey.PreDispatch)
        self._mode_key = torch._C._TorchDispatchModeKey.PROXY
        self.enter_stack: list = []
        self.pre_dispatch = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.add(func, args, kwargs or {}, made)
        return made


@dataclass(frozen=True)
class Recorded:
    """graph_module: aten. parameters, buffers: placeholder name -> name. constants: the values of other tensors, by the
    name of the node. written: output name -> the buffer that it is the next value of; such outputs come first."""

    graph_module: fx.GraphModule
    parameters: Mapping[str, str]
    buffers: Mapping[str, str]
    constants: Mapping[str, torch.Tensor]
    written: Mapping[str, str] = field(default_factory=dict)


def record(model: nn.Module, args: tuple, kwargs: Mapping[str, Any], names: Mapping[int, str]) -> Recorded:
    """Records one call of a model. names: of the tensors that its modules hold besides, by id. Raises `NotRecorded`, or whatever its code raises on values without numbers."""
    given, spec = pytree.tree_flatten((args, dict(kwargs)))
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    for t in (*held.values(), *given):
        if isinstance(t, torch.Tensor) and type(t) not in (torch.Tensor, nn.Parameter, nn.Buffer):
            raise NotRecorded(f"a {type(t).__name__} is not a plain tensor")
    recorder, functional = _Recorder(names), FunctionalTensorMode(pre_dispatch=True, export=True)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    places: dict[str, dict[str, str]] = {"p": {}, "b": {}}
    shapes: dict[int, tuple[FunctionalTensor, torch.Tensor]] = {}

    def wrap(t: torch.Tensor, name: str) -> tuple[FunctionalTensor, str]:
        shaped = fake.from_tensor(t.detach(), static_shapes=True)
        place = recorder.placeholder(shaped, name.replace(".", "_")).name
        with functional:
            made = FunctionalTensor.to_functional(shaped)
        shapes[id(made)] = made, shaped
        return made, place

    def unwrap(t: Any) -> Any:
        return t.from_functional() if isinstance(t, FunctionalTensor) else t

    with fake, exporting(), enable_python_dispatcher(), _as_before(model):
        state: dict[str, torch.Tensor] = {}
        for kind, tensors in (("p", model.named_parameters()), ("b", model.named_buffers())):
            for name, t in tensors:
                state[name], place = wrap(t, f"{kind}_{name}")
                places[kind][place] = name
        inputs = [wrap(t, f"input_{i}")[0] if isinstance(t, torch.Tensor) else t for i, t in enumerate(given)]
        args, kwargs = pytree.tree_unflatten(inputs, spec)
        with recorder, functional:
            made = torch.func.functional_call(model, state, args, kwargs)
        outputs = pytree.tree_leaves(made)
        if odd := [o for o in outputs if not isinstance(o, (torch.Tensor, *PLAIN))]:
            raise NotRecorded(f"it returns a {type(odd[0]).__name__}, in which there may be tensors")
        buffers = {name: state[name] for name in places["b"].values()}  # functional_call puts new ones there
        written = {n: unwrap(t) for n, t in buffers.items() if unwrap(t) is not shapes.get(id(t), (t, None))[1]}
        if any(unwrap(t) is not shaped for t, shaped in shapes.values() if not any(t is b for b in buffers.values())):
            raise NotRecorded("it writes to a parameter or an input")
        results = recorder.arguments((*written.values(), *map(unwrap, outputs)))
    recorder.graph.output(results)
    module = _LazyGraphModule(dict(recorder.constants), recorder.graph)
    now = {node.name: name for node, name in zip(results, written)}
    return Recorded(module, places["p"], places["b"], recorder.constants, now)


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
def _as_before(model: nn.Module) -> Iterator[None]:
    """Every module has the attributes of before afterwards, and every list or dict among them its items: a forward may
    keep what it computed."""
    attributes = [(m, dict(vars(m))) for m in model.modules()]
    items = [(v, v.copy()) for _, held in attributes for v in held.values() if type(v) in (dict, list)]
    try:
        yield
    finally:
        for now, was in (*((vars(m), held) for m, held in attributes), *items):
            if not _same(now, was):
                now.clear()
                now.update(was) if isinstance(now, dict) else now.extend(was)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return list(a) == list(b) and all(a[key] is b[key] for key in a)
    return len(a) == len(b) and all(x is y for x, y in zip(a, b))
