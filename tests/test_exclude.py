"""Exclusion: adapters that share no entry, whatever was selected by whatever means, so that they fuse exactly."""

import copy
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import LLAMA, QUICK, cases, compiled, configs, hf, randomize, same_bits, tokens
from transformers import MixtralConfig, MixtralForCausalLM

import s2ft_compile as s2ft
from s2ft_compile.adapters.format import read_adapter
from s2ft_compile.config import BUDGETS, CALIBRATED, SELECTIONS
from s2ft_compile.errors import AdapterError, ConfigError
from s2ft_compile.exporters import save_adapter
from s2ft_compile.passes.select.select import select
from s2ft_compile.slices.state import state_of

INPUTS = {"input_ids": tokens(), "labels": tokens()}
MIXED = {"ffn.out": 0.25, "ffn.in": 5, "attention.out": 1, "attention.value": 0.5}


def entries(slices, parameters) -> dict[str, torch.Tensor]:
    """Parameter name -> a mask of its entries that train."""
    masks = {}
    for s in slices:
        mask = masks.setdefault(s.parameter_name, torch.zeros(parameters[s.parameter_name].shape, dtype=torch.bool))
        mask.index_fill_(s.dim, s.indices, True)
    return masks


def disjoint(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return not any((a[name] & b[name]).any() for name in a.keys() & b.keys())


def taken(*chosen) -> dict:
    units = {}
    for s in (s for slices in chosen for s in slices):
        units.setdefault(s.parameter_name, []).append((s.dim, s.indices))
    return units


def train(base, folder, seed: int = 0, **fields):
    """An adapter of `base`, as if trained, in a folder."""
    model = copy.deepcopy(base)
    config = s2ft.S2FTConfig(**{"targets": MIXED, "seed": seed, **fields})
    s2ft.prepare(model, INPUTS, config, calibration=[INPUTS] if config.selection in CALIBRATED else None)
    randomize(model, seed)
    return save_adapter(model, folder)


# --- what is selected ------------------------------------------------------------


@given(cases(), st.lists(configs(), min_size=2, max_size=3))
@settings(max_examples=max(5, settings.default.max_examples // 4), phases=QUICK)
def test_chains_of_drawn_selections_share_no_entry(case, chain):
    check_chain(s2ft.analyze(case.model, case.inputs), dict(case.model.named_parameters()), chain)


ATTENTION = ("attention.out", "attention.query", "attention.key", "attention.value")
ROLES = {
    "gpt2": (*ATTENTION, *(f"{role}.channels" for role in ATTENTION), "ffn.in", "ffn.out"),
    "mixtral": (*ATTENTION, "attention.out.channels", "attention.value.channels", "moe.in", "moe.out"),
}


@cache
def fused_or_experts(kind: str):
    """gpt2: queries, keys and values are parts of one weight. mixtral: a channel is one of every expert."""
    torch.manual_seed(0)
    model = hf("gpt2") if kind == "gpt2" else MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=2))
    return s2ft.analyze(model, {"input_ids": tokens()}), dict(model.named_parameters())


@st.composite
def chains(draw):
    kind = draw(st.sampled_from(sorted(ROLES)))
    amounts = st.dictionaries(st.sampled_from(ROLES[kind]), st.sampled_from((1, 0.5)), min_size=1, max_size=4)
    models = st.builds(
        s2ft.S2FTConfig,
        targets=amounts,
        selection=st.sampled_from(("random", "weight")),
        budget=st.sampled_from(("layer", "model")),
        seed=st.integers(0, 99),
    )
    return kind, draw(st.lists(models, min_size=2, max_size=4))


@given(chains())
def test_chains_of_parts_of_one_weight_and_of_experts_share_no_entry(drawn):
    kind, chain = drawn
    check_chain(*fused_or_experts(kind), chain)


def check_chain(analysis, parameters, chain) -> None:
    """No entry twice, or there are too few free units and the error says so; the first is what it is by itself."""
    before = []
    for config in chain:
        try:
            plain = select(analysis, config, parameters)
        except ConfigError:
            continue  # a weight along both of its dimensions
        try:
            selected = select(analysis, config, parameters, taken=taken(*before))
        except ConfigError as error:
            assert "are free" in str(error) and before
            continue
        masks = entries(selected, parameters)
        assert all(disjoint(masks, entries(other, parameters)) for other in before)
        if config.budget == "layer":  # ratios count of all units, free or not
            assert [(s.parameter_name, len(s.indices)) for s in selected] == [
                (s.parameter_name, len(s.indices)) for s in plain
            ]
        if not before:
            assert all(torch.equal(a.indices, b.indices) for a, b in zip(selected, plain, strict=True))
        before.append(selected)


@pytest.fixture(scope="module")
def llama():
    model = hf("llama")
    return model, s2ft.analyze(model, INPUTS)


def by_hand(bands, scores):
    return scores.argsort(descending=True)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("selection", ["weight", "gradient", by_hand])
def test_the_free_units_of_the_best_score_are_taken(llama, selection, budget, largest):
    """Oracle: the ranking of everything, without what was excluded."""
    model, analysis = llama
    if selection is by_hand and budget == "score":
        pytest.raises(ConfigError, s2ft.S2FTConfig, selection=by_hand, budget="score")
        return
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    score = {n: model.get_parameter(n).detach().double().square().sum(0) for n in names}
    measured = {(n, 1): s for n, s in score.items()}
    gone = {n: torch.arange(0, 24, 2 + i) for i, n in enumerate(names)}
    config = s2ft.S2FTConfig(targets={"ffn.out": 7}, selection=selection, budget=budget, largest=largest)
    chosen = select(analysis, config, dict(model.named_parameters()), measured, {n: [(1, gone[n])] for n in names})
    indices = {s.parameter_name: s.indices.tolist() for s in chosen}
    down = largest or selection is by_hand
    left = {n: [u for u in score[n].argsort(descending=down).tolist() if u not in gone[n]] for n in names}
    if budget == "layer":
        assert indices == {n: sorted(left[n][:7]) for n in names}
    else:
        assert sum(map(len, indices.values())) == 7
        assert indices == {n: sorted(left[n][: len(indices.get(n, ()))]) for n in names if n in indices}
    if budget == "model":
        pool = sorted((float(score[n][u]), n, u) for n in names for u in left[n])
        assert {(n, u) for n in indices for u in indices[n]} == {
            (n, u) for _, n, u in (pool[-7:] if down else pool[:7])
        } or selection is by_hand  # a function's ranks are those within a layer


def test_gate_up_and_down_share_what_is_free(llama):
    """A channel that an adapter trains in one of them trains in none; where only other weights are targeted, it may."""
    model, analysis = llama
    up = "model.layers.0.mlp.up_proj.weight"
    gone = {up: [(0, torch.arange(20))]}
    both = select(analysis, s2ft.S2FTConfig(targets={"ffn.in": 4, "ffn.out": 4}), {}, taken=gone)
    assert all(s.indices.tolist() == [20, 21, 22, 23] for s in both if "layers.0." in s.parameter_name)
    with pytest.raises(ConfigError, match="'ffn.in' asks for 5 of 24 units, but 4 are free.*use 1 to 4 units"):
        select(analysis, s2ft.S2FTConfig(targets={"ffn.in": 5}), {}, taken=gone)
    assert len(select(analysis, s2ft.S2FTConfig(targets={"ffn.out": 24}), {}, taken=gone)) == 2
    with pytest.raises(ConfigError, match="asks for 48 of 48 units, but 28 are free"):
        select(analysis, s2ft.S2FTConfig(targets={"ffn.in": 1.0}, budget="model"), {}, taken=gone)


def test_a_layer_with_fewer_free_units_has_a_smaller_share(llama):
    """Equal scores, 6 and 18 units free: of 8 units 2 and 6."""
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    gone = {names[0]: [(1, torch.arange(18))], names[1]: [(1, torch.arange(6))]}
    ones = {(n, 1): torch.ones(24, dtype=torch.float64) for n in names}
    config = s2ft.S2FTConfig(targets={"ffn.out": 8}, selection="gradient", budget="score")
    indices = {s.parameter_name: s.indices.tolist() for s in select(llama[1], config, {}, ones, gone)}
    assert indices == {names[0]: [18, 19], names[1]: [6, 7, 8, 9, 10, 11]}


def test_a_head_is_free_if_all_of_it_is(llama):
    gone = {f"model.layers.{i}.self_attn.o_proj.weight": [(1, torch.tensor([1, 6, 11]))] for i in (0, 1)}
    selected = select(llama[1], s2ft.S2FTConfig(targets={"attention.out": 1}), {}, taken=gone)
    assert [s.indices.tolist() for s in selected] == [[12, 13, 14, 15]] * 2


def test_an_adapter_along_the_other_dimension_crosses_every_unit(llama):
    model, analysis = llama
    gone = {"model.layers.0.mlp.down_proj.weight": [(0, torch.tensor([3]))]}
    with pytest.raises(ConfigError, match="asks for 2 of 24 units, but 0 are free.*the other dimension.*exclude fewer"):
        select(analysis, s2ft.S2FTConfig(targets={"ffn.out": 2}), {}, taken=gone)
    for fields in ({"budget": "model"}, {"top_layers": 1}):  # what is left of the model will do
        (s,) = select(analysis, s2ft.S2FTConfig(targets={"ffn.out": 2}, **fields), {}, taken=gone)
        assert s.parameter_name == "model.layers.1.mlp.down_proj.weight"


# --- whole adapters --------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, selections",
    [
        ("llama", ("random", "weight", "gradient")),
        ("gpt2", ("activation", "random", "lowrank")),
        ("qwen2", ("weight_activation", by_hand, "random")),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_chain_of_adapters_fuses_without_overlap_and_exactly(kind, selections, tmp_path):
    assert set(SELECTIONS) <= {"random", "weight", "gradient", "activation", "lowrank", "weight_activation"}
    base, folders = hf(kind), []
    for i, selection in enumerate(selections):
        targets = {**MIXED, "attention.value": 1, "attention.out": 1} if i < 2 else {"ffn.out": 0.25, "ffn.in": 5}
        folders.append(train(base, tmp_path / str(i), i, targets=targets, selection=selection, exclude=list(folders)))
    bank, expected = s2ft.AdapterBank(base), {n: p.detach().clone() for n, p in base.named_parameters()}
    for folder in folders:
        bank.add(folder.name, folder)
        for s in read_adapter(folder).slices:  # entry by entry from the base's: nothing is added twice
            W = base.get_parameter(s.parameter_name).detach()
            expected[s.parameter_name].index_copy_(s.dim, s.indices, W.index_select(s.dim, s.indices) + s.delta)
    assert bank.fuse({f.name: 1.0 for f in folders}) == {("0", "1"): 0, ("0", "2"): 0, ("1", "2"): 0}
    for name, p in base.named_parameters():
        assert same_bits(p, expected[name]), name


def test_without_exclusion_they_overlap(tmp_path):
    base, bank = hf("llama"), s2ft.AdapterBank(hf("llama"))
    for i in (0, 1):
        bank.add(str(i), train(base, tmp_path / str(i), selection="weight"))
    assert bank.fuse({"0": 1.0, "1": 1.0})["0", "1"] > 0


def test_a_plan_is_read_where_the_excluded_folder_is_not(tmp_path):
    base = hf("llama")
    first = train(base, tmp_path / "first")
    second = train(base, tmp_path / "second", exclude=[first])
    first.rename(tmp_path / "elsewhere")
    plan = read_adapter(second).plan
    assert plan.config.exclude == (str(first),) and s2ft.Plan.from_json(plan.to_json()).config == plan.config
    with pytest.raises(AdapterError, match="first is not an adapter"):
        s2ft.prepare(base, INPUTS, plan.config)
    assert not s2ft.is_prepared(base)


def test_an_adapter_of_another_base_is_refused_and_changes_nothing(tmp_path):
    folder, other = train(hf("llama"), tmp_path / "a"), hf("llama")
    with torch.no_grad():
        other.model.norm.weight.add_(1)
    before = {n: p.detach().clone() for n, p in other.named_parameters()}
    with pytest.raises(AdapterError, match="was trained from another base model"):
        s2ft.prepare(other, INPUTS, s2ft.S2FTConfig(exclude=[folder]))
    assert not s2ft.is_prepared(other) and all(same_bits(p, before[n]) for n, p in other.named_parameters())


def test_the_options_of_the_backend(tmp_path):
    base = hf("llama")
    folder = train(base, tmp_path / "a", targets={"ffn.out": 20})
    compiled(base, "eager", targets={"ffn.out": 4}, exclude=[folder])(**INPUTS)
    gone = {s.parameter_name: set(s.indices.tolist()) for s in read_adapter(folder).slices}
    for s in state_of(base).plan.slices:
        assert set(s.indices.tolist()) == set(range(24)) - gone[s.parameter_name]
