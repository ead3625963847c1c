"""Rules of recurrent layers and cells: the gates are parts of one axis, each with a position for every hidden unit."""

from collections.abc import Sequence

from s2ft_compile.passes.couple.axes import Axis, Pin, concat, pin, reshape, unify

from .context import Value, axes_unknown, name, shapes, tensors


def axes_recurrent(cx, node, x, *args, **kwargs):
    """lstm, gru, rnn over (time, batch, features): states is (layers · directions, batch, hidden)."""
    states, weights, biased, layers, _, _, both_ways, batch_first = _arguments(args)
    directions = 2 if both_ways else 1
    each = 4 if biased else 2
    if kwargs or len(x.dims) != 3 or len(weights) != each * layers * directions:  # packed, or with projections
        return axes_unknown(cx, node, x, *args, *kwargs.values())
    why = Pin(f"{name(node)} depends on the order along the axis", node)
    time, batch = (x.dims[1], x.dims[0]) if batch_first else (x.dims[0], x.dims[1])
    pin(time, why)
    for state in states:
        pin(state.dims[0], why)
        unify(batch, state.dims[1], why)
    below, groups = x.dims[2], [weights[i : i + each] for i in range(0, len(weights), each)]
    for layer in range(layers):
        hidden = []
        for group in groups[layer * directions : (layer + 1) * directions]:
            hidden.append(_hidden(cx, node, below, group))
            for state in states:  # one tensor for all layers and directions
                unify(hidden[-1], state.dims[2], why)
        below = concat(hidden)
    out = [*((batch, time) if batch_first else (time, batch)), below]
    return [out, *[[Axis(s.dims[0].size, pin=why), batch, s.dims[2]] for s in states]]


def axes_cell(cx, node, x, state, *weights, **kwargs):
    """One step: (batch, features) and states (batch, hidden) to the next states."""
    states = tensors(state)
    why = Pin(f"{name(node)} of two axes that cannot be aligned", node)
    hidden = _hidden(cx, node, x.dims[1], [w for w in weights if w is not None])
    for value in states:
        unify(x.dims[0], value.dims[0], why)
        unify(hidden, value.dims[1], why)
    outputs = [[x.dims[0], hidden] for _ in shapes(node)]
    return outputs if isinstance(node.meta["val"], (list, tuple)) else outputs[0]


def _arguments(args: Sequence) -> tuple:
    states, *rest = args
    return (tensors(states), *rest)


def _hidden(cx, node, features: Axis, weights: Sequence[Value]) -> Axis:
    """The hidden units of (gates · hidden, features), (gates · hidden, hidden) and their biases."""
    why = Pin(f"{name(node)} of two axes that cannot be aligned", node)
    from_input, from_state, *_ = weights
    size = from_state.dims[1].size
    gates = Axis(from_state.dims[0].size // size, pin=Pin("the gates of a recurrent layer differ", node))
    for weight in weights:
        parts = reshape([weight.dims[0]], [gates.size, size], why)
        unify(parts[0], gates, why)
        unify(parts[1], from_state.dims[1], why)
    unify(from_input.dims[1], features, why)
    cx.consumed += [features, from_state.dims[1]]
    cx.project(node, from_input, [0], [1])
    cx.project(node, from_state, [0], [1])
    return from_state.dims[1]
