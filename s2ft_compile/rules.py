"""Rules for operators that the compiler does not know: a custom Triton kernel, a fused operator of a library.

    @axis_rule("ns::op")        which axes of its operands are the same, or in order: finds couplings through it
    @slice_rule("ns::op")       how a slice of its result is computed from slices of its operands: its weight gradients
    axis_rule("ns::op", like="aten.mm"), slice_rule("ns::op", like="aten.mm"): as an operator that has a rule

A rule holds in this process from then on; one that is given again takes the first one's place. `testing.rulecheck`
checks a rule of axes against the operator itself. Operators are named, so a rule may come before its operator.
"""

from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import fx

from s2ft_compile.passes.backward import slice_rules as slices
from s2ft_compile.passes.backward.pushdown import Slicer
from s2ft_compile.passes.couple import rules as axes
from s2ft_compile.passes.couple.axes import Axis, Pin, cut, pin, product, reshape, unify
from s2ft_compile.passes.couple.rules.context import Context, Value, axes_unknown
from s2ft_compile.passes.editor import Mismatch

from .errors import ConfigError

__all__ = ["axis_rule", "slice_rule"]
__all__ += ["Axis", "Context", "Mismatch", "Pin", "Slicer", "Value", "cut", "pin", "product", "reshape", "unify"]

AxisRule = Callable[..., Any]
SliceRule = Callable[[Slicer, fx.Node, fx.Node, int], fx.Node | Mismatch | None]


def axis_rule(operator: str, *, like: str | None = None) -> Callable[[AxisRule], AxisRule]:
    """Registers (cx, node, *args) -> the axes of the result; every tensor argument is a `Value` with its `dims`.

    The rule says what must be equal (`unify`) or in order (`pin`), and returns a list of axes, a `Value`, or a list of
    those for several results. like: the rule of this operator, which needs none of its own. Raises `ConfigError` for
    one of torch's own operators, whose rules are fixed, and for a `like` that has no rule.

    >>> @axis_rule("mine::scan")
    ... def axes_scan(cx, node, x, weight):
    ...     pin(x.dims[1], Pin("a scan has an order", node))
    ...     unify(x.dims[-1], weight.dims[0], Pin("channels of another order", node))
    ...     return Value(x.dims)
    """
    _check(operator)
    if like is not None:
        known = [rule for op in _overloads(like) if (rule := axes.rule_for(op)) is not axes_unknown]
        axes.NAMED_AXIS_RULES[operator] = _first(known, like, "axis")
    return lambda rule: _put(axes.NAMED_AXIS_RULES, operator, rule)


def slice_rule(operator: str, *, like: str | None = None) -> Callable[[SliceRule], SliceRule]:
    """Registers (slicer, node, x, dim) -> what computes the slice `node` of x along dim, or a `Mismatch("why not")`.

    x is the operator's node, `node` the slice of its result. `slicer.take(arg, d, node)` is the same slice of an
    operand's dimension d, `slicer.push(arg, d, node)` that of an operand as large as the gradient, by its own rule, and
    `slicer.call(x.target, *args, like=x)` the operator on them. like: the rule of this operator (with the same
    arguments), which needs none of its own. Raises `ConfigError` as `axis_rule` does.

    >>> @slice_rule("mine::scan_backward")
    ... def push_scan(slicer, node, x, dim):
    ...     grad, states = x.args
    ...     if dim != 0:
    ...         return Mismatch("a scan has an order")
    ...     return slicer.call(x.target, slicer.take(grad, -1, node), slicer.take(states, -1, node), like=x)
    """
    _check(operator)
    if like is not None:
        known = [(op, rule) for op in _overloads(like) if (rule := slices.rule_for(op))]
        slices.NAMED_SLICE_RULES[operator] = _in_place_of(*_first(known, like, "slice"))
    return lambda rule: _put(slices.NAMED_SLICE_RULES, operator, rule)


def _put(table: dict[str, Any], operator: str, rule: Any) -> Any:
    if not callable(rule):
        raise ConfigError(f"the rule of {operator} is a function, got {rule!r}")
    table[operator] = rule
    return rule


def _check(operator: str) -> None:
    namespace, separator, name = operator.partition("::") if isinstance(operator, str) else ("", "", "")
    if not (separator and namespace and name) or "." in name:
        raise ConfigError(f"an operator is named 'namespace::operator', without an overload; got {operator!r}")
    if namespace in ("aten", "prims", "s2ft"):
        raise ConfigError(f"{operator} has the rules that it comes with; valid: operators of other libraries")


def _overloads(like: str) -> list[torch._ops.OpOverload]:
    """`aten.mm`, `aten::mm` or with an overload, `aten.sum.dim_IntList`; the default overload comes first."""
    packet: Any = torch.ops
    for part in like.replace("::", ".").split("."):
        packet = getattr(packet, part, None)
    if isinstance(packet, torch._ops.OpOverload):
        return [packet]
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        raise ConfigError(f"like={like!r} is no operator; valid for example 'aten.mm'")
    names: list[str] = packet.overloads()  # type: ignore[no-untyped-call]
    return [getattr(packet, name) for name in sorted(names, key=lambda name: name != "default")]


def _first(known: list[Any], like: str, kind: str) -> Any:
    if not known:
        raise ConfigError(f"like={like!r} has no {kind} rule; valid for example 'aten.mm'")
    return known[0]


def _in_place_of(known: Any, rule: SliceRule) -> SliceRule:
    """The known operator's rule, which computes the slice by the operator that it stands in for."""

    def in_place(slicer: Slicer, node: fx.Node, x: fx.Node, dim: int) -> fx.Node | Mismatch | None:
        sliced = rule(slicer, node, x, dim)
        if isinstance(sliced, fx.Node) and sliced.target is known:
            sliced.target = x.target
        return sliced

    return in_place


# --- the key of compile caches -----------------------------------------------------------------------------------


def rules_key() -> str:
    """Another text whenever the code of a registered rule changes, or the file that defines one."""
    tables = (axes.NAMED_AXIS_RULES, slices.NAMED_SLICE_RULES)
    codes = [(name, _code(rule)) for table in tables for name, rule in sorted(table.items())]
    return sha256(repr(codes).encode()).hexdigest()


def _code(value: Any) -> Any:
    """What a rule does, as far as text can say: of a function its code, what it captures and its file."""
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, [_code(constant) for constant in value.co_consts]
    if not isinstance(value, FunctionType):
        return repr(value)  # an operator's name; of any other object, its address: nothing is found in a cache then
    file = Path(value.__code__.co_filename)
    held = [_code(cell.cell_contents) for cell in value.__closure__ or ()]
    return _code(value.__code__), repr(value.__defaults__), held, _digest(file) if file.is_file() else ""


@cache
def _digest(file: Path) -> str:
    return sha256(file.read_bytes()).hexdigest()
