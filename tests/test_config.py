"""`S2FTConfig`: what is accepted, and that every refusal says what is valid."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2ft_compile import ConfigError, S2FTConfig
from s2ft_compile.config import BUDGETS, ROLES, SELECTIONS, is_glob, matches, units_for

amounts = st.one_of(st.integers(1, 10**6), st.floats(0, 1, exclude_min=True, allow_nan=False))
targets = st.dictionaries(
    st.one_of(st.sampled_from(ROLES), st.text(min_size=1, max_size=8)), amounts, min_size=1, max_size=4
).map(lambda drawn: drawn | ({"norm": 1.0} if "norm" in drawn else {}))
choices = st.tuples(st.sampled_from([*SELECTIONS]), st.sampled_from(BUDGETS)).filter(lambda c: c != ("random", "score"))
configs = st.builds(
    lambda choice, **fields: S2FTConfig(selection=choice[0], budget=choice[1], **fields),
    choices,
    targets=targets,
    largest=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
    top_layers=st.none() | st.integers(1, 99),
    exclude=st.lists(st.text(min_size=1, max_size=8) | st.sampled_from([Path("a/b"), Path("c")])),
)


@given(configs)
def test_a_dict_and_back(config):
    assert S2FTConfig.from_dict(config.to_dict()) == config
    assert set(config.to_dict()) == {"targets", "selection", "largest", "budget", "seed", "top_layers", "exclude"}
    assert S2FTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config, "and through a file"


def by_hand(bands, scores):
    return [0]


class Chooser:
    def __call__(self, bands, scores):
        return [0]


FUNCTIONS = [(by_hand, "by_hand"), (lambda bands, scores: [0], "<lambda>"), (Chooser(), "Chooser")]


@pytest.mark.parametrize("function, name", FUNCTIONS)
def test_a_function_is_written_down_by_its_name(function, name):
    config = S2FTConfig(selection=function)
    assert config.selection is function and config == S2FTConfig(selection=function)
    written = json.loads(json.dumps(config.to_dict()))
    assert written["selection"] == f"{__name__}:{name}"
    read = S2FTConfig.from_dict(written)
    assert read.to_dict() == written and read != config, "the name is not the function: nothing is imported"


def test_which_selections_have_scores():
    assert [s for s in SELECTIONS if not S2FTConfig(selection=s).scored] == ["random"]
    assert not S2FTConfig(selection=by_hand).scored


def test_the_default_leaves_targets_and_selection_open():
    config = S2FTConfig()
    assert config.targets is None and config.selection is None and config.budget == "layer"
    assert S2FTConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "targets, settled",
    [
        (None, {"ffn.in": 0.0125, "attention.key": 0.0625}),
        ({"default": 0.1}, {"ffn.in": 0.1, "attention.key": 0.5}),
        ({"default": 0.5, "ffn.in": 4, "*norm*": 1.0}, {"ffn.in": 4, "attention.key": 1.0, "*norm*": 1.0}),
        ({"ffn.in": 0.1}, {"ffn.in": 0.1}),
        ({"default": 3}, {"ffn.in": 3, "attention.key": 3}),
    ],
)
def test_default_stands_for_the_roles_of_the_model(targets, settled):
    """And a plan's configuration is known again by the one that was asked for."""
    config, has = S2FTConfig(targets), ["ffn.in", "attention.key"]
    assert config.targets_of(has) == settled and config.targets == targets
    plan = S2FTConfig(settled, "random")
    assert config.is_that_of(plan)
    assert not S2FTConfig({"default": 0.3}).is_that_of(plan)


def test_the_default_trains_norms_whole_and_zero_leaves_a_role_out():
    has = ["attention.query", "attention.query.channels", "ffn.in", "norm"]
    assert S2FTConfig({"default": 3}).targets_of(has) == {"attention.query.channels": 3, "ffn.in": 3, "norm": 1.0}
    some = S2FTConfig({"default": 0.5, "norm": 0, "attention.query": 0})
    assert some.targets_of(has) == {"ffn.in": 0.5}
    assert some.is_that_of(S2FTConfig({"ffn.in": 0.5}, "random"))


def test_the_default_is_of_channels_rather_than_heads():
    """But for heads that are asked for."""
    has = ["attention.out", "attention.value", "attention.out.channels", "attention.value.channels", "ffn.in"]
    assert S2FTConfig().targets_of(has) == {
        "attention.out.channels": 0.05,
        "attention.value.channels": 0.05,
        "ffn.in": 0.0125,
    }
    some = {"default": 0.5, "attention.value": 1}
    assert S2FTConfig(some).targets_of(has) == {"attention.out.channels": 1.0, "ffn.in": 0.5, "attention.value": 1}


def test_the_targets_are_a_copy():
    mine = {"ffn.out": 0.5}
    config = S2FTConfig(targets=mine)
    mine["ffn.in"] = 1.0
    assert config.targets == {"ffn.out": 0.5}


BAD = {  # arguments -> words of the message: what was found, what is valid
    "no targets": (dict(targets={}), ["{}", "ffn.out"]),
    "targets as text": (dict(targets="ffn.out"), ["'ffn.out'", "0.02"]),
    "an empty target": (dict(targets={"": 0.1}), ["''", *ROLES]),
    "a target that is no text": (dict(targets={3: 0.1}), ["3", *ROLES]),
    "ratio 0": (dict(targets={"ffn.out": 0.0}), ["ffn.out", "0.0", "(0, 1]"]),
    "ratio above 1": (dict(targets={"ffn.out": 1.5}), ["1.5", "(0, 1]", "integer"]),
    "ratio below 0": (dict(targets={"ffn.out": -0.1}), ["-0.1", "(0, 1]"]),
    "ratio nan": (dict(targets={"ffn.out": float("nan")}), ["nan", "(0, 1]"]),
    "no units": (dict(targets={"ffn.out": 0}), ["0", "at least 1"]),
    "nothing by default": (dict(targets={"default": 0, "norm": 0}), ["'default'", "at least 1"]),
    "a part of norms": (dict(targets={"norm": 3}), ["'norm'", "1.0", "3"]),
    "fewer than none": (dict(targets={"ffn.out": -3}), ["-3", "at least 1"]),
    "amount as text": (dict(targets={"ffn.out": "0.1"}), ["'0.1'", "(0, 1]"]),
    "amount True": (dict(targets={"ffn.out": True}), ["True", "(0, 1]"]),
    "unknown selection": (dict(selection="best"), ["'best'", *SELECTIONS]),
    "selection as a list": (dict(selection=["random"]), ["random", *SELECTIONS]),
    "unknown budget": (dict(budget="all"), ["'all'", *BUDGETS]),
    "largest as text": (dict(largest="yes"), ["'yes'", "True", "False"]),
    "negative seed": (dict(seed=-1), ["-1", "0"]),
    "seed too large": (dict(seed=2**63), [str(2**63), "2**63 - 1"]),
    "seed as a float": (dict(seed=1.0), ["1.0", "integer"]),
    "random by score": (dict(budget="score", selection="random"), ["'random'", "layer", "model", "weight", "gradient"]),
    "a function by score": (dict(budget="score", selection=len), ["len", "layer", "model"]),
    "no layers": (dict(top_layers=0), ["0", "from 1", "None"]),
    "layers as a ratio": (dict(top_layers=0.5), ["0.5", "from 1"]),
    "layers True": (dict(top_layers=True), ["True"]),
    "one folder": (dict(exclude="adapter"), ["'adapter'", "list", "adapters/law"]),
    "no folders": (dict(exclude=[3, ""]), ["[3, '']", "list"]),
    "folders as None": (dict(exclude=None), ["None", "list"]),
    "seed True": (dict(seed=True), ["True", "integer"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_refused(case):
    values, words = BAD[case]
    with pytest.raises(ConfigError) as caught:
        S2FTConfig(**values)
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_field_is_refused_by_name():
    with pytest.raises(ConfigError, match="'ratio'.*valid options: targets, selection, largest, budget, seed, top"):
        S2FTConfig.from_dict({"ratio": 0.1})


def test_errors_are_value_errors():
    with pytest.raises(ValueError):
        S2FTConfig(budget="all")


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_number_of_units(amount, available):
    if amount <= available:
        assert units_for(amount, available, "x") == amount
    else:
        with pytest.raises(ConfigError, match=f"x .*{amount}.*1 to {available}"):
            units_for(amount, available, "x")


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_ratio_of_exactly_k_units_is_k_units(k, available):
    """k / n is not exact in floating point; rounding down must not lose a unit."""
    k = min(k, available)
    assert units_for(k / available, available, "x") == k


@given(st.floats(1e-6, 1), st.integers(1, 5000))
def test_a_ratio_rounds_down_to_one_unit_at_least(ratio, available):
    assert 1 <= units_for(ratio, available, "x") <= max(1, ratio * available + 1e-6)


def test_roles_are_no_globs():
    assert not any(is_glob(role) for role in ROLES) and is_glob("*.weight") and is_glob("head.weight")
    assert matches("blocks.*.up.weight", "blocks.0.ffn.up.weight") and not matches("*.Up.*", "blocks.0.up.weight")
