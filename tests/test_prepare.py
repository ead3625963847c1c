"""Preparing: outputs stay, names stay, only the deltas train; a refusal changes nothing; release undoes it."""

import json

import pytest
import torch
from hypothesis import given, settings
from small import (
    LLAMA,
    QUICK,
    assert_unchanged,
    assert_weights,
    cases,
    configs,
    drawn,
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
from s2ft_compile.config import HEADS
from s2ft_compile.errors import CaptureError, ConfigError, StateError
from s2ft_compile.slices.state import state_of
from s2ft_compile.testing import assert_same

FEW = settings(max_examples=max(6, settings.default.max_examples // 3), phases=QUICK)


# --- any model, any configuration -----------------------------------------------------------------------------------


@given(case=cases(), config=configs())
@FEW
def test_prepare_keeps_the_function_and_release_the_bits(case, config):
    model, base = case.make(), case.make()
    keys, before = list(model.state_dict()), case.outputs(base)
    plan = s2ft.prepare(model, case.inputs, config)
    assert_same(base, before, case.outputs(model))
    assert [n for n in model.state_dict() if not n.endswith("_delta")] == keys
    trains = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trains) == len(plan.slices) and all(
        n.endswith("weight_delta") or n.endswith("bias_delta") for n in trains
    )
    assert all(not s.delta.any() and s.delta.dtype == torch.float32 for s in plan.slices)
    _check_slices(plan, base, config)

    randomize(model, case.seed)
    expected = tuned(case.make(), plan)
    changed = case.make()
    changed.load_state_dict(expected, strict=False)
    with s2ft.disabled(model):
        assert_weights_of(model, base)
        with torch.no_grad():
            assert all(same_bits(a, b) for a, b in zip(before, case.outputs(model)))
    assert_same(base, case.outputs(changed), case.outputs(model))
    s2ft.release(model)
    assert_weights(model, expected)
    assert all(p.requires_grad for p in model.parameters()) and not s2ft.is_prepared(model)
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in base.named_modules()}


def _check_slices(plan, base, config):
    weights = dict(base.named_parameters())
    assert len({s.parameter_name for s in plan.slices}) == len(plan.slices)
    for s in plan.slices:
        shape = list(s.shape)
        assert tuple(shape) == tuple(weights[s.parameter_name].shape)
        shape[s.dim] = len(s.indices)
        assert tuple(s.delta.shape) == tuple(shape)
        assert s.indices.dtype == torch.int64 and len(s.indices.unique()) == len(s.indices)
        assert 0 <= s.indices.min() and s.indices.max() < s.shape[s.dim]
        head = {"residual.out", "residual.in"} if "head.weight" in config.targets else set()  # `in`: an embedding's
        assert set(s.roles) <= set(config.targets) | head


def assert_weights_of(model, base):
    """Every parameter but the deltas, bit for bit."""
    weights = {n: p for n, p in model.named_parameters() if not n.endswith("_delta")}
    expected = dict(base.named_parameters())
    assert weights.keys() == expected.keys()
    assert all(same_bits(weights[n], expected[n]) for n in expected)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert"])
def test_prepare_hugging_face_models(family):
    model, base, ids = hf(family).train(), hf(family), tokens()
    targets = {"attention.out": 1, "attention.value": 1, "ffn.in": 3, "ffn.out": 0.5}
    plan = s2ft.prepare(model, {"input_ids": ids}, s2ft.S2FTConfig(targets=targets))
    assert model.training, "traced in eval mode, and put back"
    assert model.config.to_dict() == base.config.to_dict()
    model.eval()
    with torch.no_grad():
        a, b = base(input_ids=ids).logits, model(input_ids=ids).logits
    # float32; sums of up to 24 terms through some ten layers in another order
    assert (a - b).abs().max() <= 24 * 10 * 2.0**-24 * 4 * a.abs().max()
    assert [n for n in model.state_dict() if not n.endswith("_delta")] == list(base.state_dict())
    randomize(model)
    expected = tuned(base, plan)
    s2ft.release(model)
    assert_weights(model, expected)


def test_the_selected_block_is_dense():
    """Channels and heads come first, as one range; heads of different groups are a range of whole heads each."""
    _, model = prepared({"ffn.out": 3, "ffn.in": 3, "attention.value": 1})
    for block in state_of(model).blocks:
        assert len(block.ranges) == 1 and block.ranges[0][0] == 0, block.name
    _, model = prepared({"attention.out": 2, "attention.query": 3})
    for block in state_of(model).blocks:
        assert all(start % 4 == 0 and n % 4 == 0 for start, n in block.ranges), block.name


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=2, num_experts_per_tok=1)).eval()


def mamba() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    sizes = dict(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4, use_cache=False)
    return MambaForCausalLM(MambaConfig(**sizes)).eval()


# positions keep the channels of queries and keys where they are, so whole heads of those train
ROTATED = {
    "attention.query": 0.0625,
    "attention.key": 0.0625,
    "attention.out.channels": 0.05,
    "attention.value.channels": 0.05,
}


@pytest.mark.parametrize(
    "make, roles",
    [
        (lambda: hf("llama"), {"ffn.in": 0.0125, "ffn.out": 0.0125, **ROTATED}),
        (lambda: hf("gpt2"), {"ffn.in": 0.0125, "ffn.out": 0.0125, **{f"{r}.channels": 0.05 for r in HEADS[:4]}}),
        (mixtral, {"moe.in": 0.0125, "moe.out": 0.0125, **ROTATED}),
        (mamba, {"ssm.in": 0.0125, "ssm.out": 0.0125}),
    ],
    ids=["llama", "gpt2", "mixtral", "mamba"],
)
def test_the_default_is_what_a_model_has(make, roles):
    """By gradient where there is data, else at random; one unit at least."""
    model = make()
    plan = s2ft.prepare(model, {"input_ids": tokens()})
    assert plan.config == s2ft.S2FTConfig({**roles, "norm": 1.0}, selection="random", budget="layer", seed=0)
    assert {role for s in plan.slices for role in s.roles} == {*roles, "whole"}
    norms = {name for name, _ in model.named_parameters() if ("norm" in name or ".ln_" in name) and "delta" not in name}
    assert {s.parameter_name for s in plan.slices if "whole" in s.roles} == norms
    s2ft.release(model)
    batch = {"input_ids": tokens(), "labels": tokens()}
    assert s2ft.prepare(model, {"input_ids": tokens()}, calibration=[batch]).config.selection == "gradient"


def test_default_stands_for_the_roles_that_are_not_named():
    model = hf("llama")
    plan = s2ft.prepare(model, {"input_ids": tokens()}, s2ft.S2FTConfig({"default": 0.1, "ffn.out": 3}))
    assert plan.config.targets == {
        "ffn.in": 0.1,
        **dict.fromkeys(("attention.query", "attention.key"), 0.5),
        **dict.fromkeys(("attention.out.channels", "attention.value.channels"), 0.4),
        "ffn.out": 3,
        "norm": 1.0,
    }
    assert {s.indices.numel() for s in plan.slices if "ffn.out" in s.roles} == {3}
    assert {s.parameter_name for s in plan.slices if len(s.shape) == 1} == {
        name for name, p in hf("llama").named_parameters() if p.ndim == 1
    }


@pytest.mark.parametrize(
    "example_inputs",
    [
        lambda ids: {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        lambda ids: (ids,),
        lambda ids: [ids],
        lambda ids: {"input_ids": ids, "labels": ids},
    ],
    ids=["dict", "tuple", "list", "with labels"],
)
def test_forms_of_example_inputs(example_inputs):
    model = hf("llama", num_hidden_layers=1)
    plan = s2ft.prepare(model, example_inputs(tokens()), s2ft.S2FTConfig(targets={"ffn.out": 2}))
    assert len(plan.slices) == 1


def test_frozen_parameters_stay_frozen_after_release():
    case = drawn()
    model = case.make()
    model.embed.requires_grad_(False)
    model.blocks[0].ffn.down.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    s2ft.prepare(model, case.inputs, s2ft.S2FTConfig(targets={"ffn.out": 2}))
    case.loss(model).backward()
    assert all(p.grad is not None for p in s2ft.parameters(model)), "a frozen weight can be a target"
    s2ft.release(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_the_same_seed_prepares_the_same_plan():
    plans = [
        s2ft.prepare(drawn().make(), drawn().inputs, s2ft.S2FTConfig(targets={"ffn.out": 3}, seed=5)) for _ in range(2)
    ]
    assert plans[0].to_json() == plans[1].to_json()


# --- Plan -----------------------------------------------------------------------------------------------------------


def test_a_plan_survives_json():
    case = drawn()
    config = s2ft.S2FTConfig(
        targets={"ffn.out": 3, "attention.out": 0.5}, selection="weight", largest=False, budget="model", seed=9
    )
    plan = s2ft.prepare(case.make(), case.inputs, config)
    again = s2ft.Plan.from_json(plan.to_json())
    assert again.config == plan.config and again.fingerprint == plan.fingerprint
    for a, b in zip(plan.slices, again.slices, strict=True):
        assert (a.parameter_name, a.dim, a.shape, a.roles) == (b.parameter_name, b.dim, b.shape, b.roles)
        assert torch.equal(a.indices, b.indices) and b.indices.dtype == torch.int64 and b.delta is None
    assert again.to_json() == plan.to_json()
    assert "blocks.0.ffn.down.weight[1]" in str(plan) and "parameters train" in str(plan)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda text: text[:40], "not a plan"),
        (lambda text: "[]", "not a plan"),
        (lambda text: "{}", "not a plan: KeyError"),
        (lambda text: json.dumps({**json.loads(text), "version": 99}), "plan version 99"),
        (lambda text: json.dumps({**json.loads(text), "slices": [{}]}), "not a plan"),
        (lambda text: json.dumps({**json.loads(text), "config": {"sead": 1}}), "unknown option 'sead'"),
    ],
)
def test_a_damaged_plan_is_refused(edit, message):
    plan = s2ft.prepare(drawn().make(), drawn().inputs, s2ft.S2FTConfig(targets={"ffn.out": 3}))
    with pytest.raises(ConfigError, match=message):
        s2ft.Plan.from_json(edit(plan.to_json()))


# --- refusals change nothing ------------------------------------------------------------------------------------------

BAD = {
    "unknown role": (dict(config={"attention.vaule": 1}), ConfigError, "is neither a role"),
    "a role it lacks": (dict(config={"*.nothing.*": 1}), ConfigError, "is neither a role"),
    "too many units": (dict(config={"ffn.out": 9}), ConfigError, "use 1 to 8"),
    "one bad target of two": (dict(config={"ffn.out": 2, "attention.key": 3}), ConfigError, "use 1 to 2"),
    "a dict for a config": (
        dict(raw={"targets": {"ffn.out": 2}}),
        ConfigError,
        "config must be an S2FTConfig, got dict",
    ),
    "inputs of another type": (dict(inputs="text"), ConfigError, "tuple or a dict of the forward's arguments, got str"),
    "no inputs": (dict(inputs=()), CaptureError, "could not be traced"),
    "inputs of a wrong shape": (dict(inputs=(torch.zeros(3, 4, 5, 6),)), CaptureError, "could not be traced"),
    "an unknown argument": (dict(inputs={"nonsense": torch.zeros(2)}), CaptureError, "could not be traced"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_refusal_leaves_the_model_as_it_was(name):
    how, error, message = BAD[name]
    case = drawn()
    model = case.make().train()
    model.blocks[0].eval()  # modules need not be in one mode
    model.embed.requires_grad_(False)
    before = snapshot(model)
    config = how.get("raw", s2ft.S2FTConfig(targets=how.get("config", {"ffn.out": 2})))
    with pytest.raises(error, match=message):
        s2ft.prepare(model, how.get("inputs", case.inputs), config)
    assert_unchanged(model, before)
    s2ft.prepare(model, case.inputs, s2ft.S2FTConfig(targets={"ffn.out": 2}))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        if x.sum() > 0:
            x = -x
        return self.down(self.up(x).relu())


def test_a_model_that_cannot_be_traced_names_the_line():
    model = Branching()
    before = snapshot(model)
    with pytest.raises(CaptureError, match=r"Branching could not be traced") as error:
        s2ft.prepare(model, (torch.ones(2, 4),), s2ft.S2FTConfig(targets={"ffn.out": 2}))
    assert "test_prepare.py" in str(error.value), str(error.value)
    assert_unchanged(model, before)


def test_preparing_twice_is_refused_and_releasing_first_helps():
    case, model = prepared()
    randomize(model)
    state_of(model).refresh()
    before = snapshot(model)
    with pytest.raises(StateError, match="prepared already; call s2ft.release"):
        s2ft.prepare(model, case.inputs, s2ft.S2FTConfig(targets={"ffn.out": 2}))
    assert_unchanged(model, before)
    s2ft.release(model)
    s2ft.prepare(model, case.inputs, s2ft.S2FTConfig(targets={"ffn.out": 2}))


def test_analyze_changes_nothing():
    model = hf("llama", use_cache=True).train()
    before = snapshot(model)
    analysis = s2ft.analyze(model, {"input_ids": tokens()})
    assert_unchanged(model, before)
    assert model.config.use_cache
    assert {c.role for c in analysis.couplings} == {"residual", "attention", "ffn"}
    text = str(analysis)
    assert "ffn × 24: model.layers.0.mlp.gate_proj.weight[0] (ffn.in)" in text and "refused × 50" in text


# --- permute ----------------------------------------------------------------------------------------------------------


def test_permute_and_its_inverse():
    case = drawn()
    model, base = case.make(), case.make()
    for coupling in s2ft.analyze(model, case.inputs).couplings:
        order = torch.randperm(coupling.units)
        s2ft.permute(model, coupling, order)
        assert_same(base, case.outputs(base), case.outputs(model))
        s2ft.permute(model, coupling, order.argsort().tolist())
    assert_weights_of(model, base)


def test_new_unit_i_is_old_unit_order_i():
    case = drawn()
    model, base = case.make(), case.make()
    coupling = next(c for c in s2ft.analyze(model, case.inputs).couplings if c.role == "ffn")
    order = [3, 0, 1, 2, 7, 6, 5, 4]
    s2ft.permute(model, coupling, order)
    assert torch.equal(model.blocks[0].ffn.up.weight, base.blocks[0].ffn.up.weight[order])
    assert torch.equal(model.blocks[0].ffn.up.bias, base.blocks[0].ffn.up.bias[order])
    assert torch.equal(model.blocks[0].ffn.down.weight, base.blocks[0].ffn.down.weight[:, order])


def test_permute_refuses_what_is_no_order_and_leaves_the_model():
    case = drawn()
    model = case.make()
    coupling = next(c for c in s2ft.analyze(model, case.inputs).couplings if c.role == "ffn")
    before = snapshot(model)
    for order in ([0, 1, 2], [0] * 8, list(range(1, 9)), [[0, 1, 2, 3], [4, 5, 6, 7]]):
        with pytest.raises(ConfigError, match="each of 0 to 7 once"):
            s2ft.permute(model, coupling, order)
    with pytest.raises(ConfigError, match="this coupling is of another model"):
        s2ft.permute(drawn(ffn=12).make(), coupling, list(range(8)))
    assert_unchanged(model, before)
    s2ft.prepare(model, case.inputs, s2ft.S2FTConfig(targets={"ffn.out": 2}))
    with pytest.raises(StateError, match="is prepared"):
        s2ft.permute(model, coupling, list(range(8)))
