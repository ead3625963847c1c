"""A prepared model's life: copies, types, state dicts, disabled and merged, what optimizers see."""

import copy
import gc
import io

import pytest
import torch
from small import (
    assert_gradients,
    assert_weights,
    compiled,
    drawn,
    full_gradients,
    hf,
    prepared,
    randomize,
    same_bits,
    snapshot,
    tokens,
    tuned,
)
from torch import nn

import s2ft_compile as s2ft
from s2ft_compile.errors import StateError
from s2ft_compile.slices.state import live_states, merged, state_of


def weights(model) -> dict:
    return {n: p.detach().clone() for n, p in model.named_parameters() if not n.endswith("_delta")}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[n], b[n]) for n in a)


# --- names -------------------------------------------------------------------------------------------------------


def test_deltas_are_parameters_of_the_model_and_of_its_state():
    case, model = prepared()
    plain = case.make()
    deltas = s2ft.parameters(model)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in deltas}
    assert own_keys(model) == list(plain.state_dict())
    named = {f"{b.name}_delta" for b in state_of(model).blocks}
    assert {n for n in model.state_dict() if n.endswith("_delta")} == named
    assert {n for n, _ in model.named_parameters()} > {n for n, _ in plain.named_parameters()}
    assert type(model) is type(plain)
    assert [s.delta for s in state_of(model).plan.slices] == deltas


def own_keys(model) -> list[str]:
    return [n for n in model.state_dict() if not n.endswith("_delta")]


def test_a_saved_state_dict_is_that_of_a_model_that_computes_the_same():
    case, model = prepared()
    randomize(model)
    with torch.no_grad():
        expected = case.outputs(model)  # writes the deltas into the weights
    plain = case.make()
    with pytest.raises(RuntimeError, match="Unexpected key.*_delta"):  # it is in training order, and says so
        plain.load_state_dict(model.state_dict())
    plain.load_state_dict(model.state_dict(), strict=False)
    assert all(same_bits(a, b) for a, b in zip(expected, case.outputs(plain)))


def test_a_state_dict_without_deltas_is_taken_as_trained():
    case, model = prepared()
    randomize(model, seed=1)
    case.outputs(model)
    saved, deltas = copy.deepcopy(model.state_dict()), [p.detach().clone() for p in s2ft.parameters(model)]
    randomize(model, seed=2)
    case.outputs(model)
    model.load_state_dict({n: w for n, w in saved.items() if not n.endswith("_delta")})
    for p, d in zip(s2ft.parameters(model), deltas):
        torch.testing.assert_close(p.detach(), d, rtol=0, atol=2**-24)  # W - W0, rounded to float32
    assert all(b.delta.abs().sum() > 0 for b in state_of(model).blocks)


def test_save_pretrained_keeps_the_function(tmp_path):
    from transformers import AutoModelForCausalLM

    model, ids = hf("llama"), tokens()
    keys = list(model.state_dict())
    s2ft.prepare(model, {"input_ids": ids}, s2ft.S2FTConfig(targets={"ffn.out": 3}))
    randomize(model)
    with torch.no_grad():
        expected = model(ids).logits
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert list(again.state_dict()) == keys  # transformers reports the deltas as unexpected
        assert same_bits(again(ids).logits, expected)


def test_parameters_that_would_share_a_name():
    class Odd(nn.Module):
        """`a.b__c` and `a__b.c`, and names that a module has itself."""

        def __init__(self):
            super().__init__()
            self.blocks, self.plan = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5, 6))

        def forward(self, x):
            return (x @ self.blocks.t()).relu() @ self.plan.t()

    model = Odd()
    plan = s2ft.prepare(model, (torch.randn(2, 5),), s2ft.S2FTConfig(targets={"ffn.out": 2, "ffn.in": 2}))
    assert {s.parameter_name for s in plan.slices} == {"blocks", "plan"}


def test_calls_that_do_not_fit_the_state():
    model = drawn().make()
    assert not s2ft.is_prepared(model)
    for call in (s2ft.parameters, s2ft.release, state_of):
        with pytest.raises(StateError, match="is not prepared; call s2ft.prepare"):
            call(model)
    with pytest.raises(StateError, match="is not prepared"):
        with s2ft.disabled(model):
            pass
    _, model = prepared()
    s2ft.release(model)
    with pytest.raises(StateError, match="is not prepared"):
        s2ft.release(model)


def test_a_model_that_is_gone_leaves_nothing_behind():
    gc.collect()
    before = len(live_states())
    case, model = prepared()
    assert len(live_states()) == before + 1
    del model
    gc.collect()
    assert len(live_states()) == before


# --- disabled, merged --------------------------------------------------------------------------------------------


def test_disabled_is_the_base_model_and_the_trained_one_returns():
    case, model = prepared()
    randomize(model)
    with torch.no_grad():
        trained = case.outputs(model)
        state = weights(model)
        with s2ft.disabled(model):
            assert same(weights(model), weights(case.make()))
            assert all(same_bits(a, b) for a, b in zip(case.outputs(model), case.outputs(case.make())))
        assert same(weights(model), state)
        assert all(same_bits(a, b) for a, b in zip(case.outputs(model), trained))


@pytest.mark.parametrize("context", [s2ft.disabled, merged])
def test_an_error_inside_brings_the_prepared_model_back(context):
    case, model = prepared()
    randomize(model)
    case.outputs(model)
    before, hooks = weights(model), snapshot(model)["hooks"]
    with pytest.raises(ZeroDivisionError):
        with context(model):
            raise ZeroDivisionError
    assert same(weights(model), before) and s2ft.is_prepared(model)
    assert {n: tuple(map(len, h)) for n, h in snapshot(model)["hooks"].items()} == {
        n: tuple(map(len, h)) for n, h in hooks.items()
    }
    case.loss(model).backward()
    assert all(p.grad is not None for p in s2ft.parameters(model))


@pytest.mark.parametrize("outer", [s2ft.disabled, merged])
def test_contexts_do_not_nest(outer):
    case, model = prepared()
    with outer(model):
        with pytest.raises(StateError):
            with s2ft.disabled(model):
                pass
    assert s2ft.is_prepared(model)


def test_disabled_sees_a_change_that_no_forward_has_seen():
    case, model = prepared()
    randomize(model)  # no forward since
    with s2ft.disabled(model):
        assert same(weights(model), weights(case.make()))
    s2ft_state = state_of(model)
    assert all(torch.equal(b.read(), b.trained()) for b in s2ft_state.blocks)


def test_disabled_of_a_compiled_model():
    case, model = prepared()
    net = compiled(model)
    case.loss(net).backward()
    randomize(model)
    with torch.no_grad():
        trained, base = case.outputs(net), case.outputs(case.make())
        with s2ft.disabled(net):
            inside = case.outputs(net)
        after = case.outputs(net)
    torch.testing.assert_close(inside, base, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after, trained, rtol=0, atol=0)
    assert (trained[0] - base[0]).abs().max() > 1e-3


def test_merged_is_a_plain_model():
    case, model = prepared()
    randomize(model)
    expected = tuned(case.make(), state_of(model).plan)
    with merged(model):
        assert_weights(model, expected)
        assert not s2ft.is_prepared(model)
    assert s2ft.is_prepared(model)
    case.loss(model).backward()
    assert all(p.grad is not None for p in s2ft.parameters(model))


def test_training_goes_on_after_disabled_and_merged():
    """Three steps with a look at the base model in between are three steps."""
    losses = {}
    for look in (False, True):
        case, model = prepared()
        optimizer = torch.optim.AdamW(s2ft.parameters(model), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            case.loss(model).backward()
            optimizer.step()
            if look:
                with s2ft.disabled(model), torch.no_grad():
                    case.outputs(model)
                with merged(model):
                    pass
        losses[look] = weights(model)
    assert same(losses[False], losses[True])


def test_release_of_tied_weights_keeps_the_tie():
    case, model = prepared({"head.weight": 2}, tied=True)
    plan = state_of(model).plan
    randomize(model)
    expected = tuned(case.make(), plan)
    s2ft.release(model)
    assert model.head.weight is model.embed.weight
    assert_weights(model, expected)


def test_release_through_wrappers_and_training_afterwards():
    case, model = prepared()
    net = compiled(model)
    case.loss(net).backward()
    s2ft.release(net)
    assert_unchanged_names(model, case.make())
    case.loss(model).backward()
    assert all(p.grad is not None for p in model.parameters())


def assert_unchanged_names(model, plain):
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- copies, pickles, types --------------------------------------------------------------------------------------


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved_and_loaded])
@pytest.mark.parametrize("stale", [False, True])
def test_a_copy_is_prepared_and_independent(duplicate, stale):
    case, model = prepared()
    randomize(model)
    if not stale:
        case.outputs(model)
    twin = duplicate(model)
    with torch.no_grad():
        assert all(same_bits(a, b) for a, b in zip(case.outputs(model), case.outputs(twin)))
    theirs = s2ft.parameters(twin)
    assert not {id(p) for p in theirs} & {id(p) for p in s2ft.parameters(model)}
    optimizer = torch.optim.SGD(theirs, lr=0.5)
    before = weights(model)
    case.loss(compiled(twin)).backward()
    assert all(p.grad is not None for p in theirs) and all(p.grad is None for p in s2ft.parameters(model))
    optimizer.step()
    case.outputs(model)
    assert same(weights(model), before), "the original does not move with its copy"
    expected = tuned(case.make(), state_of(twin).plan)
    s2ft.release(twin)
    assert_weights(twin, expected)
    assert s2ft.is_prepared(model)


@pytest.mark.parametrize(
    "convert, dtype",
    [
        (lambda m: m.half(), torch.float16),
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.to(torch.float32), torch.float32),
    ],
)
def test_a_conversion_keeps_the_deltas_in_float32(convert, dtype):
    case, model = prepared()
    randomize(model, scale=1 / 3)
    before = [p.detach().clone() for p in s2ft.parameters(model)]
    convert(model)
    assert all(same_bits(a, b) for a, b in zip(before, s2ft.parameters(model))), "exact, not through float16"
    assert {p.dtype for n, p in model.named_parameters() if not n.endswith("_delta")} == {dtype}
    base = convert(case.make())
    expected = tuned(base, state_of(model).plan)
    with s2ft.disabled(model):
        assert same(weights(model), weights(base))
    s2ft.release(model)
    assert_weights(model, expected)


# --- manual updates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["none", "aot_eager", "eager"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_change_by_hand_is_in_the_next_forward(how, grad):
    case, model = prepared()
    net = model if how == "none" else compiled(model, how)
    with torch.set_grad_enabled(grad):
        first = case.outputs(net)[0].detach()
        randomize(model)
        second = case.outputs(net)[0].detach()
        changed = case.make()
        changed.load_state_dict(tuned(case.make(), state_of(model).plan), strict=False)
        oracle = case.outputs(changed)[0].detach()
    assert (first - second).abs().max() > 1e-3
    torch.testing.assert_close(second, oracle, rtol=1e-11, atol=1e-11)


def test_gradient_descent_without_an_optimizer():
    case, model = prepared()
    net, losses = compiled(model), []
    for _ in range(4):
        loss = case.loss(net)
        grads = torch.autograd.grad(loss, s2ft.parameters(model))
        with torch.no_grad():
            for p, g in zip(s2ft.parameters(model), grads):
                p.sub_(g, alpha=0.1)
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_two_models_train_side_by_side():
    (case, a), (_, b) = prepared(), prepared({"ffn.in": 2})
    optimizers = [torch.optim.SGD(s2ft.parameters(m), lr=0.1) for m in (a, b)]
    before = weights(b)
    case.loss(a).backward()
    optimizers[0].step()
    assert same(weights(b), before)
    case.loss(b).backward()
    optimizers[1].step()
    assert not same(weights(b), before)


def test_one_optimizer_for_two_models():
    (case, a), (_, b) = prepared(), prepared({"ffn.in": 2})
    optimizer = torch.optim.SGD([*s2ft.parameters(a), *s2ft.parameters(b)], lr=0.1)
    (case.loss(a) + case.loss(b)).backward()
    optimizer.step()
    for model in (a, b):
        assert all(torch.equal(x.read(), x.trained()) and x.delta.any() for x in state_of(model).blocks)


def test_eager_forwards_that_fail_leave_the_weights_in_place():
    case, model = prepared()
    before = snapshot(model)["identities"]
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)):
        model(torch.zeros(1, 2, 3, 4))
    assert snapshot(model)["identities"] == before
    case.loss(model).backward()
    assert_gradients(state_of(model).plan, full_gradients(case.make(), case.loss), 1e-10)
