"""Units chosen anew: what trained before stays, exactly, and the new ones train in its place."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small import assert_weights, cases, full_gradients, hf, same_bits, tokens
from test_resume import trainer
from torch import nn

import s2ft_compile as s2ft
from s2ft_compile import exporters
from s2ft_compile.errors import ConfigError, StateError
from s2ft_compile.passes.select.select import offered
from s2ft_compile.slices.state import merged, state_of
from s2ft_compile.testing.models import Drawn

BATCH = {"input_ids": tokens(), "labels": tokens()}
INPUTS = {"input_ids": BATCH["input_ids"]}


def steps(model: nn.Module, optimizer, net=None, number: int = 2) -> None:
    for _ in range(number):
        (model if net is None else net)(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(base: nn.Module, rounds: list[dict[str, tuple[int, torch.Tensor, torch.Tensor]]]) -> dict:
    """What the weights have to be: of each unit cast(W0 + D), with the last D that it had."""
    expected = {n: p.detach().clone() for n, p in base.named_parameters()}
    for one in rounds:
        for name, (dim, indices, delta) in one.items():
            W0 = dict(base.named_parameters())[name].detach().index_select(dim, indices)
            wide = torch.promote_types(W0.dtype, torch.float32)
            expected[name].index_copy_(dim, indices, (W0.to(wide) + delta.to(wide)).to(W0.dtype))
    return expected


def deltas(plan: s2ft.Plan) -> dict:
    return {s.parameter_name: (s.dim, s.indices.clone(), s.delta.detach().clone()) for s in plan.slices}


@pytest.mark.parametrize(
    "family, targets, dtype",
    [
        ("llama", {"ffn.in": 8, "ffn.out": 8}, torch.float32),
        ("gpt2", {"attention.out": 1, "ffn.out": 6}, torch.bfloat16),
        pytest.param("llama", {"ffn.in": 8, "ffn.out": 8}, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("gpt2", {"attention.out": 1, "ffn.out": 6}, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_three_rounds_in_one_graph(family, targets, dtype, tmp_path):
    """Of 24 (64) channels 8 (6) train at a time; some are chosen twice. One graph, and each way of reading the result
    has every unit's last value, bit for bit."""
    base = hf(family).to(dtype)
    model, graphs = copy.deepcopy(base), []

    def backend(gm, inputs, **options):
        graphs.append(gm)
        return s2ft.backend.s2ft(gm, inputs, options={"inner": "aot_eager"})

    s2ft.prepare(model, INPUTS, s2ft.S2FTConfig(targets))
    net, optimizer = torch.compile(model, backend=backend), s2ft.optimizer(model, lr=3e-2)
    rounds, compiled = [], 0
    for number in range(3):
        plan = s2ft.reselect(model, seed=number) if number else state_of(model).plan
        steps(model, optimizer, net)
        rounds.append(deltas(plan))
        compiled = compiled or len(graphs)
    assert len(graphs) == compiled
    name = next(n for n in rounds[0] if "down_proj" in n or "mlp.c_proj" in n)
    chosen = [set(r[name][1].tolist()) for r in rounds]
    assert len(set.union(*chosen)) > len(chosen[0]) and any(a & b for a in chosen for b in chosen if a is not b)

    expected = everything(base, rounds)
    exporters.save_adapter(model, tmp_path / "adapter")
    before = model(**INPUTS).logits
    with s2ft.disabled(model):
        assert_weights(model, {**dict(model.named_parameters()), **dict(base.named_parameters())})
    with s2ft.base_values(model), torch.no_grad():
        torch.testing.assert_close(
            model(**INPUTS).logits, base(**INPUTS).logits, rtol=0.1, atol=0.1 if dtype != torch.float32 else 1e-4
        )
    assert same_bits(before, model(**INPUTS).logits)
    patched = copy.deepcopy(base)
    for patch in s2ft.patches(model):
        patch.apply(dict(patched.named_parameters())[patch.name])
    assert_weights(patched, expected)
    copied = copy.deepcopy(model)
    for one in (copied, model):
        s2ft.release(one)
        assert_weights(one, expected)
    loaded = copy.deepcopy(base)
    exporters.load_adapter(loaded, tmp_path / "adapter")
    assert_weights(loaded, expected)


@settings(max_examples=8)
@given(cases(), st.data())
def test_gradients_of_the_new_units_are_those_of_the_whole_weights(case, data):
    """Of any model and role, after a step of the first selection."""
    analysis = s2ft.analyze(case.make(), case.inputs)
    role = data.draw(st.sampled_from(sorted(offered(analysis))))
    model = case.make()
    s2ft.prepare(model, case.inputs, s2ft.S2FTConfig({role: 1}))
    optimizer = torch.optim.SGD(s2ft.parameters(model), lr=0.1)
    model(*case.inputs).sin().sum().backward()
    optimizer.step()
    plan = s2ft.reselect(model, seed=data.draw(st.integers(0, 99)))
    released = copy.deepcopy(model)
    s2ft.release(released)
    full = full_gradients(released, lambda m: m(*case.inputs).sin().sum())
    model(*case.inputs).sin().sum().backward()
    for s in plan.slices:
        expected = full[s.parameter_name].index_select(s.dim, s.indices)
        torch.testing.assert_close(
            s.delta.grad.double(), expected.double(), rtol=1e-4, atol=1e-5 * float(full[s.parameter_name].abs().max())
        )


def ranges_of(model: nn.Module) -> list:
    return [(block.name, block.starts, block.lengths) for block in state_of(model).blocks]


@settings(max_examples=10)
@given(cases(max_blocks=1), st.integers(2, 4), st.integers(1, 3), st.data())
def test_heads_are_chosen_anew_in_the_places_of_others(case, kv_heads, groups, data):
    """Whatever heads of grouped queries train, beside keys, values and channels: other units, and the same ranges. A
    fresh model that is given such a state has every weight's bits."""
    case = Drawn(replace(case.spec, kv_heads=kv_heads, groups=groups))
    few = st.integers(1, kv_heads - 1)
    others = data.draw(st.sets(st.sampled_from(["key", "out", "value", "out.channels"])))
    targets = {f"attention.{role}": 1 if "." in role else data.draw(few) for role in ["query", *sorted(others)]}
    model, fresh = case.make(), case.make()
    for one in (model, fresh):
        s2ft.prepare(one, case.inputs, s2ft.S2FTConfig(targets))
    places, chosen = ranges_of(model), set()
    for _ in range(6):
        for s in s2ft.reselect(model).slices:
            nn.init.normal_(s.delta, std=0.1)
            chosen.add((s.parameter_name, tuple(s.indices.tolist())))
        assert ranges_of(model) == places
    assert len(chosen) > len(places)
    model(*case.inputs)  # writes the deltas
    s2ft.load_trained_state(fresh, s2ft.trained_state(model))
    assert all(same_bits(p, dict(fresh.named_parameters())[n]) for n, p in model.named_parameters())


def test_heads_stay_where_no_others_fit():
    """Two of six heads train that share a group. Then those may that do not, then some that do."""
    allowed = [[0, 1], [2, 3], [3, 2, 5]]
    model = hf("llama", num_attention_heads=6, hidden_size=24)
    config = s2ft.S2FTConfig({"attention.query": 2}, lambda *_: allowed[0])
    plan = s2ft.prepare(model, INPUTS, config)
    places = ranges_of(model)
    for heads in ([0, 1], [3, 5]):
        allowed.pop(0)
        plan = s2ft.reselect(model)
        assert ranges_of(model) == places
        assert all(sorted({i // 4 for i in s.indices.tolist()}) == heads for s in plan.slices)


def test_an_optimizer_forgets_other_units_and_goes_on():
    model = hf("llama")
    s2ft.prepare(model, INPUTS, s2ft.S2FTConfig({"ffn.out": 4}))
    optimizer = torch.optim.AdamW(s2ft.parameters(model), lr=1e-2)
    steps(model, optimizer, number=3)
    s2ft.reselect(model)
    steps(model, optimizer, number=1)
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}
    steps(model, optimizer, number=1)
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


def test_an_optimizer_remembers_what_trains_whole():
    """Norms, and the bias of channels, whose order changes with the channels that are chosen."""
    model = hf("gpt2")
    s2ft.prepare(model, INPUTS, s2ft.S2FTConfig({"ffn.out": 6, "norm": 1.0, "*c_fc.bias": 1.0}))
    optimizer = torch.optim.AdamW(s2ft.parameters(model), lr=1e-2, betas=(0.5, 0.5))
    steps(model, optimizer, number=3)

    def known() -> dict[str, tuple[torch.Tensor, list[torch.Tensor]]]:
        """Of each slice its units, and what the optimizer knows of each."""
        slices = [s for s in state_of(model).plan.slices if s.delta in optimizer.state]
        return {
            s.parameter_name: (
                s.indices.clone(),
                [optimizer.state[s.delta][k].clone() for k in ("exp_avg", "exp_avg_sq")],
            )
            for s in slices
        }

    before = known()
    s2ft.reselect(model)
    s2ft.reselect(model)  # again before a step
    for delta in s2ft.parameters(model):
        delta.grad = torch.zeros_like(delta)
    optimizer.step()
    moved = 0
    for name, (units, values) in known().items():
        were, earlier = before[name]
        whole = len(units) == dict(model.named_parameters())[name].shape[0] and units.numel() == values[0].numel()
        for value, old in zip(values, earlier):
            expected = old[torch.argsort(were)][units] / 2 if whole else torch.zeros_like(old)
            assert torch.equal(value, expected), name
        moved += whole and not torch.equal(units, were)
    assert moved  # some of those that train whole lie in another order


def test_a_selection_by_gradient_looks_at_the_present_weights():
    model = hf("llama")
    config = s2ft.S2FTConfig({"ffn.in": 3, "ffn.out": 3}, selection="gradient")
    s2ft.prepare(model, INPUTS, config, calibration=[BATCH])
    steps(model, s2ft.optimizer(model, lr=0.3), number=4)
    with merged(model):
        plain = copy.deepcopy(model)
    plan = s2ft.reselect(model, [BATCH])
    fresh = s2ft.prepare(plain, INPUTS, config, calibration=[BATCH])
    for ours, theirs in zip(plan.slices, fresh.slices):
        assert torch.equal(ours.indices.sort().values, theirs.indices.sort().values)
    with pytest.raises(ConfigError, match="calibration"):
        s2ft.reselect(model)


def test_what_cannot_be_chosen_anew_is_refused_and_nothing_changes():
    model = hf("llama")
    with pytest.raises(StateError, match="not prepared"):
        s2ft.reselect(model)
    s2ft.prepare(model, INPUTS, s2ft.S2FTConfig({"ffn.out": 5}, budget="model"))
    with pytest.raises(ConfigError, match="budget='layer'"):
        for seed in range(20):  # a draw may be of the same sizes
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            s2ft.reselect(model, seed=seed)
    assert all(same_bits(p, before[n]) for n, p in model.named_parameters())
    with s2ft.disabled(model), pytest.raises(StateError, match="inside"):
        s2ft.reselect(model)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
@settings(max_examples=6)
@given(data=st.data())
def test_a_trained_state_goes_back_and_on(dtype, data):
    """Of some rounds it is taken in one. A running model goes back to it, and a fresh one goes on from it, to the same
    bits."""
    taken, rounds = data.draw(st.integers(0, 2)), 3
    base = hf("llama").to(dtype)
    config = s2ft.S2FTConfig({"ffn.in": 6, "ffn.out": 6, "attention.query": 2, "attention.key": 1}, "gradient")

    def prepared():
        model = copy.deepcopy(base)
        s2ft.prepare(model, INPUTS, config, calibration=[BATCH])
        return model, torch.optim.AdamW(s2ft.parameters(model), lr=3e-2)

    def go_on(model, optimizer, left):
        for _ in range(left):
            s2ft.reselect(model, [BATCH])
            steps(model, optimizer)

    def now(model):
        released = copy.deepcopy(model)
        s2ft.release(released)
        return dict(released.named_parameters())

    model, optimizer = prepared()
    steps(model, optimizer)
    for number in range(rounds):
        if number == taken:
            saved = {name: t.clone() for name, t in s2ft.trained_state(model).items()}
            momenta, then = copy.deepcopy(optimizer.state_dict()), now(model)
        s2ft.reselect(model, [BATCH])
        steps(model, optimizer)
    end = now(model)
    s2ft.load_trained_state(model, saved)
    assert all(same_bits(p, then[n]) for n, p in now(model).items())
    assert not all(same_bits(p, then[n]) for n, p in end.items())
    fresh, optimizer = prepared()
    s2ft.load_trained_state(fresh, saved)
    optimizer.load_state_dict(momenta)
    go_on(fresh, optimizer, rounds - taken)
    assert all(same_bits(p, end[n]) for n, p in now(fresh).items())


def test_a_trained_state_of_something_else_is_refused():
    model = hf("llama")
    plan = s2ft.prepare(model, INPUTS, s2ft.S2FTConfig({"ffn.out": 4}))
    steps(model, s2ft.optimizer(model, lr=1e-2))
    s2ft.reselect(model)
    values = s2ft.trained_state(model)
    name = next(n for n in values if n.endswith("delta") or n + ".units" in values)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    places = values[name + ".units"]
    wrong = {
        "is none of this model's slices": values | {"other": torch.zeros(1)},
        "is missing": {n: t for n, t in values.items() if n != name},
        "a position twice": values
        | {name + ".earlier_units": values[name + ".units"], name + ".earlier": values[name]},
        "earlier units without": {n: t for n, t in values.items() if n != name + ".earlier"},
        "float32 delta": values | {name: values[name].half()},
        "positions below": values | {name + ".units": places + 10**6},
    }
    for message, given_values in wrong.items():
        with pytest.raises(StateError, match=message):
            s2ft.load_trained_state(model, given_values)
    assert all(same_bits(p, before[n]) for n, p in model.named_parameters())
    assert len(plan.slices) == len(state_of(model).blocks)


def test_a_trainer_that_chooses_units_anew_resumes_bit_for_bit(tmp_path):
    """With checkpoints between two choices and at one, and the best model, which is one from before the first."""
    config = s2ft.S2FTConfig({"ffn.in": 6, "ffn.out": 6}, selection="gradient")
    base = hf("llama").bfloat16().train()

    def run(**changes):
        model = copy.deepcopy(base)
        s2ft.prepare(model, INPUTS, config, calibration=[BATCH], train=False)
        one = trainer(model, tmp_path, learning_rate=1e-2, save_steps=1, **changes)
        one.add_callback(s2ft.S2FTCallback(reselect_every=2))
        return model, one

    whole, first = run()
    first.train()
    assert state_of(whole).reselected == 2 and state_of(whole).left_behind
    for step in (2, 3):
        again, second = run()
        second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert again.state_dict().keys() == whole.state_dict().keys()
        assert all(same_bits(t, again.state_dict()[n]) for n, t in whole.state_dict().items())
        losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (first, second)]
        assert losses[0] == losses[1] and len(losses[0]) == 6
    plan = s2ft.Plan.from_json((tmp_path / "checkpoint-3" / "s2ft_plan.json").read_text())
    held = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(s.indices, held[f"{s.parameter_name}_delta.units"]) for s in plan.slices)
    best = dict(eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, greater_is_better=True)
    model, third = run(**best, metric_for_best_model="eval_loss")  # so that the first is the best
    third.train()
    held = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert third.state.best_model_checkpoint.endswith("checkpoint-1") and state_of(model).reselected == 0
    assert all(same_bits(t, held[n]) for n, t in model.state_dict().items())
    with s2ft.disabled(model):
        assert_weights(model, {**dict(model.named_parameters()), **dict(base.named_parameters())})


def test_a_state_dict_has_the_units_that_were_chosen_anew():
    """It is loaded where other units train; one that does not belong changes nothing."""
    base, config = hf("llama"), s2ft.S2FTConfig({"ffn.in": 6, "ffn.out": 6})
    model, fresh = copy.deepcopy(base), copy.deepcopy(base)
    for one in (model, fresh):
        name = s2ft.prepare(one, INPUTS, config).slices[0].parameter_name
    optimizer, states = s2ft.optimizer(model, lr=3e-2), []
    for _ in range(3):
        steps(model, optimizer, number=1)
        states.append({n: t.clone() for n, t in model.state_dict().items()})
        s2ft.reselect(model)
    for state in (states[1], states[0], states[2]):
        for one in (model, fresh):
            assert str(one.load_state_dict(state)) == "<All keys matched successfully>"
            assert one.state_dict().keys() == state.keys()
            assert all(same_bits(t, state[n]) for n, t in one.state_dict().items())
        assert same_bits(model(**INPUTS).logits, fresh(**INPUTS).logits)
    before = {n: t.clone() for n, t in fresh.state_dict().items()}
    for wrong in (
        {**states[1], "model.layers.0.mlp.up_proj.weight": states[1]["model.layers.0.mlp.up_proj.weight"] * 2},
        {n: t for n, t in states[1].items() if n != f"{name}_delta"},
        {**states[1], f"{name}_delta.units": torch.arange(6) + 100},
    ):
        with pytest.raises(StateError):
            fresh.load_state_dict(wrong)
        assert all(same_bits(t, before[n]) for n, t in fresh.state_dict().items())


def test_what_the_callback_does_not_take():
    for every in (0, 0.1, True):
        with pytest.raises(ConfigError, match="whole number of steps"):
            s2ft.S2FTCallback(every)
    with pytest.raises(StateError, match="not prepared"):
        s2ft.S2FTCallback(5).on_train_begin(None, None, None, model=hf("llama"))
