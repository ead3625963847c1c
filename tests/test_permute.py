"""`permute`: one coupling's units in a new order, everywhere they occur, and back bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import s2ft_compile as s2ft
from s2ft_compile.slices.state import state_of
from s2ft_compile.testing import assert_same, changed, random_orders
from s2ft_compile.testing.models import Drawn, Spec, models

FEW = settings(max_examples=max(3, settings.default.max_examples // 3))


def bits(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_bits(model, kept: dict) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[name]), name


@given(models(dropout=True), st.integers(0, 99))
@FEW
def test_all_couplings_one_after_another(drawn: Drawn, seed: int):
    """Each reordering keeps the outputs, and the couplings found before remain those of the model."""
    model, kept = drawn.model, bits(drawn.model)
    analysis = s2ft.analyze(model, drawn.inputs)
    orders = random_orders(analysis.couplings, seed)
    with torch.no_grad():
        before = drawn.outputs()
        for coupling in analysis.couplings:
            s2ft.permute(model, coupling, orders[coupling.axis])
            assert_same(model, before, drawn.outputs())
        assert any(not torch.equal(v, kept[n]) for n, v in model.state_dict().items())
        for coupling in analysis.couplings:
            s2ft.permute(model, coupling, orders[coupling.axis].argsort())
    assert_bits(model, kept)


@given(models(max_blocks=1, dtype=torch.float32), st.data())
@FEW
def test_orders_compose(drawn: Drawn, data):
    """p after q is the order q[p], bit for bit."""
    coupling = data.draw(st.sampled_from(s2ft.analyze(drawn.model, drawn.inputs).couplings))
    p, q = (torch.tensor(data.draw(st.permutations(range(coupling.units)))) for _ in range(2))
    twice, once = drawn.make(), drawn.make()
    s2ft.permute(twice, coupling, q)
    s2ft.permute(twice, coupling, p)
    s2ft.permute(once, coupling, q[p])
    assert_bits(twice, bits(once))


@given(st.data())
@settings(max_examples=max(8, settings.default.max_examples // 3))
def test_heads_that_share_groups_alike_lie_alike(data):
    """Query heads and a key head of one layer, and those that other groups and other places in them make of these: both
    layers' blocks have the same ranges, so both have one graph."""
    groups, kv_heads = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 4))
    every = [(k, g) for k in range(kv_heads) for g in range(groups)]
    heads = data.draw(st.lists(st.sampled_from(every), min_size=1, max_size=min(3, len(every) - 1), unique=True))
    key = data.draw(st.integers(0, kv_heads - 1))
    kv, place = (data.draw(st.permutations(range(n))) for n in (kv_heads, groups))
    queries = [[k * groups + g for k, g in heads], sorted(kv[k] * groups + place[g] for k, g in heads)]

    def chosen(bands, scores):
        layer = int(bands[0].parameter_name.split(".")[1])
        return [key, kv[key]][layer] if len(scores) == kv_heads and bands[0].role == "attention.key" else queries[layer]

    drawn = Drawn(Spec(blocks=2, kv_heads=kv_heads, groups=groups, qkv="separate"))
    s2ft.prepare(
        drawn.model, drawn.inputs, s2ft.S2FTConfig({"attention.key": 1, "attention.query": len(heads)}, chosen)
    )
    ranges = {b.name.split(".", 2)[2]: set() for b in state_of(drawn.model).blocks}
    for block in state_of(drawn.model).blocks:
        ranges[block.name.split(".", 2)[2]].add(block.ranges)
    assert all(len(of) == 1 for of in ranges.values()), ranges


def test_new_unit_i_is_old_unit_order_i():
    drawn = Drawn(Spec(ffn=4))
    up, down = drawn.model.blocks[0].ffn.up.weight, drawn.model.blocks[0].ffn.down.weight
    ffn = next(c for c in s2ft.analyze(drawn.model, drawn.inputs).couplings if c.role == "ffn")
    old_up, old_down = up.detach().clone(), down.detach().clone()
    s2ft.permute(drawn.model, ffn, [2, 0, 3, 1])
    assert torch.equal(up, old_up[[2, 0, 3, 1]]) and torch.equal(down, old_down[:, [2, 0, 3, 1]])


def test_parameters_keep_their_identity():
    """An optimizer that holds them, and names tied to them, must not notice."""
    drawn = Drawn(Spec(tied=True))
    held = dict(drawn.model.named_parameters())
    for coupling in s2ft.analyze(drawn.model, drawn.inputs).couplings:
        s2ft.permute(drawn.model, coupling, random_orders([coupling])[coupling.axis])
    assert all(held[n] is p and p.requires_grad for n, p in drawn.model.named_parameters())
    assert drawn.model.head.weight is drawn.model.embed.weight


def test_through_wrappers():
    drawn = Drawn(Spec())
    coupling = s2ft.analyze(drawn.model, drawn.inputs).couplings[0]
    kept, order = bits(drawn.model), random_orders([coupling])[coupling.axis]
    s2ft.permute(torch.compile(drawn.model, backend="eager"), coupling, order)
    s2ft.permute(drawn.model, coupling, order.argsort())
    assert_bits(drawn.model, kept)


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 1, 2, 2], [1, 2, 3, 4], [0, 1, 2, -1], [], [[0, 1, 2, 3]]])
def test_what_is_no_order_is_refused(order):
    drawn = Drawn(Spec(ffn=4))
    kept = bits(drawn.model)
    ffn = next(c for c in s2ft.analyze(drawn.model, drawn.inputs).couplings if c.role == "ffn")
    with pytest.raises(s2ft.ConfigError, match="0 to 3"):
        s2ft.permute(drawn.model, ffn, order)
    assert_bits(drawn.model, kept)


def test_a_coupling_of_another_model_is_refused():
    small, large = Drawn(Spec(ffn=4)), Drawn(Spec(ffn=6))
    kept = bits(large.model)
    ffn = next(c for c in s2ft.analyze(small.model, small.inputs).couplings if c.role == "ffn")
    with pytest.raises(s2ft.ConfigError, match="another model"):
        s2ft.permute(large.model, ffn, [3, 2, 1, 0])
    assert_bits(large.model, kept)


def test_the_comparison_would_notice():
    """One wrong member moves outputs by far more than the tolerance."""
    drawn = Drawn(Spec())
    with torch.no_grad():
        before = drawn.outputs()
        down = drawn.model.blocks[0].ffn.down.weight
        down.copy_(down.flip(1))
        assert changed(drawn.model, before, drawn.outputs())
