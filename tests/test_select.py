"""Selection: which indices each role, unit, ratio, glob, budget, seed and ranking stands for."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small import QUICK, cases, configs, hf, tokens
from torch import nn

import s2ft_compile as s2ft
from s2ft_compile.config import CHANNELS, HEADS, SELECTIONS, S2FTConfig, units_for
from s2ft_compile.errors import ConfigError
from s2ft_compile.passes.select import scores
from s2ft_compile.passes.select.scores import low_rank_squares
from s2ft_compile.passes.select.select import notes, offered, roles_of, select
from s2ft_compile.passes.select.selections import SCORES
from s2ft_compile.testing.models import Drawn, Spec


@pytest.fixture(scope="module")
def analyzed():
    """name -> (model, analysis), each traced once."""
    cache = {}

    def get(name):
        if name not in cache:
            tied, family = name.endswith("-tied"), name.removesuffix("-tied")
            model = hf(family, tie_word_embeddings=True) if tied else hf(family)
            cache[name] = model, s2ft.analyze(model, {"input_ids": tokens()})
        return cache[name]

    return get


def chosen(model_and_analysis, **config) -> dict:
    """parameter name -> Selection."""
    model, analysis = model_and_analysis
    selected = select(analysis, s2ft.S2FTConfig(**config), dict(model.named_parameters()))
    assert len({s.parameter_name for s in selected}) == len(selected)
    return {s.parameter_name: s for s in selected}


def heads_of(indices, head_dim=4) -> list[int]:
    """The whole heads that indices consist of."""
    rows = indices.view(-1, head_dim)
    assert torch.equal(rows, rows[:, :1] + torch.arange(head_dim)) and (rows[:, 0] % head_dim == 0).all()
    return (rows[:, 0] // head_dim).tolist()


# --- roles: 4 query heads on 2 kv heads of 4 channels, 24 FFN channels, 2 layers ----------------------------------

ROLE_UNITS = [
    ("attention.out", "self_attn.o_proj.weight", 1, 4, 4),
    ("attention.query", "self_attn.q_proj.weight", 0, 4, 4),
    ("attention.key", "self_attn.k_proj.weight", 0, 2, 4),
    ("attention.value", "self_attn.v_proj.weight", 0, 2, 4),
    ("ffn.out", "mlp.down_proj.weight", 1, 24, 1),
]


@pytest.mark.parametrize(
    "role, name, dim, heads", [("out", "self_attn.o_proj.weight", 1, 4), ("value", "self_attn.v_proj.weight", 0, 2)]
)
@pytest.mark.parametrize("amount", [1, 3, 0.5])
def test_a_channel_of_heads_is_the_same_of_every_head(analyzed, role, name, dim, heads, amount):
    selected = chosen(analyzed("llama"), targets={f"attention.{role}.channels": amount})
    assert list(selected) == [f"model.layers.{i}.{name}" for i in (0, 1)]
    for s in selected.values():
        rows = s.indices.view(heads, -1)
        assert s.dim == dim and rows.shape[1] == (2 if amount == 0.5 else amount)
        assert torch.equal(rows, rows[:1] + 4 * torch.arange(heads)[:, None])


def test_values_and_what_reads_them_share_the_ranking_of_their_channels(analyzed):
    both = {"attention.out.channels": 1, "attention.value.channels": 3}
    selected = chosen(analyzed("llama"), targets=both, selection="weight")
    for i in (0, 1):
        out, value = (selected[f"model.layers.{i}.self_attn.{p}_proj.weight"].indices % 4 for p in "ov")
        assert set(out.tolist()) < set(value.tolist())


def test_positions_keep_channels_of_queries_and_keys(analyzed):
    """Rotary positions turn pairs of them; learned ones do not."""
    assert {r for r in offered(analyzed("llama")[1]) if r.endswith(CHANNELS)} == {
        "attention.out.channels",
        "attention.value.channels",
    }
    assert {r for r in offered(analyzed("gpt2")[1]) if r.endswith(CHANNELS)} == {f"{r}{CHANNELS}" for r in HEADS[:4]}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("role, name, dim, units, width", ROLE_UNITS)
@pytest.mark.parametrize("amount", [1, 2, 0.5, 1.0])
def test_a_role_selects_whole_units_of_its_weight(analyzed, family, role, name, dim, units, width, amount):
    selected = chosen(analyzed(family), targets={role: amount})
    assert list(selected) == [f"model.layers.{i}.{name}" for i in (0, 1)]  # a bias is not a target
    for s in selected.values():
        wanted = amount if isinstance(amount, int) else int(amount * units)
        assert (s.dim, s.roles, len(s.indices)) == (dim, (role,), wanted * width)
        assert s.indices.dtype == torch.int64 and (s.indices.diff() > 0).all()
        if width > 1:
            assert all(h < units for h in heads_of(s.indices))


def test_ffn_in_takes_the_same_channels_of_gate_and_up_as_ffn_out_of_down(analyzed):
    selected = chosen(analyzed("llama"), targets={"ffn.in": 5, "ffn.out": 5})
    for i in (0, 1):
        gate, up, down = (selected[f"model.layers.{i}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        assert (gate.dim, up.dim, down.dim) == (0, 0, 1)
        assert gate.indices.tolist() == up.indices.tolist() == down.indices.tolist()
    fewer = chosen(analyzed("llama"), targets={"ffn.in": 2, "ffn.out": 5})
    up, down = (fewer[f"model.layers.0.mlp.{n}_proj.weight"].indices.tolist() for n in ("up", "down"))
    assert len(up) == 2 and set(up) < set(down), "a channel that trains in both has the highest rank in both"


def test_heads_are_shared_between_query_and_out_and_between_key_and_value(analyzed):
    selected = chosen(
        analyzed("llama"), targets={"attention.query": 2, "attention.out": 2, "attention.key": 1, "attention.value": 1}
    )
    q, o, k, v = (selected[f"model.layers.0.self_attn.{n}_proj.weight"].indices.tolist() for n in "qokv")
    assert q == o and k == v


@pytest.mark.parametrize("role, third", [("attention.query", 0), ("attention.key", 1), ("attention.value", 2)])
def test_a_fused_projection_has_a_third_for_each_role(analyzed, role, third):
    s = chosen(analyzed("gpt2"), targets={role: 2})["transformer.h.0.attn.c_attn.weight"]
    assert s.dim == 1, "GPT-2 stores its weights transposed"
    assert ((s.indices >= 16 * third) & (s.indices < 16 * (third + 1))).all()
    assert len(heads_of(s.indices - 16 * third)) == 2


def test_several_roles_of_a_fused_projection_are_one_slice(analyzed):
    s = chosen(analyzed("gpt2"), targets={"attention.query": 1, "attention.value": 2})[
        "transformer.h.1.attn.c_attn.weight"
    ]
    query, value = s.indices[s.indices < 16], s.indices[s.indices >= 32]
    assert s.roles == ("attention.query", "attention.value") and len(s.indices) == 12
    assert set(heads_of(query)) < set(heads_of(value - 32)), "one ranking of the heads for all roles"


def test_bert_has_separate_projections_with_biases_that_are_no_targets(analyzed):
    selected = chosen(analyzed("bert"), targets={"attention.value": 1, "ffn.in": 3})
    assert {n.split("layer.")[1] for n in selected} == {
        f"{i}.{n}.weight" for i in (0, 1) for n in ("attention.self.value", "intermediate.dense")
    }


# --- amounts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratio, available, units",
    [(0.29, 100, 29), (0.29, 24, 6), (1.0, 7, 7), (0.999, 7, 6), (1 / 3, 3, 1), (1 / 49, 49, 1), (0.07, 100, 7)],
)
def test_a_ratio_is_rounded_down(ratio, available, units):
    assert units_for(ratio, available, "x") == units


@pytest.mark.parametrize("budget, units, of", [("layer", 2, "24"), ("model", 1, "48")])
def test_a_ratio_below_one_unit_is_one_unit_and_said(analyzed, budget, units, of):
    model, analysis = analyzed("llama")
    config = S2FTConfig(targets={"ffn.out": 0.01, "attention.value": 0.5}, budget=budget)
    selected = select(analysis, config, dict(model.named_parameters()))
    assert sum(len(s.indices) for s in selected if s.roles == ("ffn.out",)) == units
    assert notes(analysis, config) == (f"ffn.out: 0.01 of {of} units is less than one, and 1 trains",)


def test_a_number_of_units_too_large_says_how_many_there_are(analyzed):
    with pytest.raises(ConfigError, match="asks for 3 units, but there are 2; use 1 to 2"):
        chosen(analyzed("llama"), targets={"attention.key": 3})


# --- globs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "glob, names",
    [
        ("*.down_proj.weight", ["model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"]),
        ("model.layers.1.mlp.*", [f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down")]),
        ("model.layers.0.self_attn.q_proj.weight", ["model.layers.0.self_attn.q_proj.weight"]),
    ],
)
def test_a_glob_selects_the_parameters_it_matches(analyzed, glob, names):
    selected = chosen(analyzed("llama"), targets={glob: 1})
    assert sorted(selected) == sorted(names)


def test_a_glob_and_the_role_of_the_same_weight_agree(analyzed):
    by_glob = chosen(analyzed("llama"), targets={"*.down_proj.weight": 7})
    by_role = chosen(analyzed("llama"), targets={"ffn.out": 7})
    assert {n: s.indices.tolist() for n, s in by_glob.items()} == {n: s.indices.tolist() for n, s in by_role.items()}


def test_a_tied_parameter_is_found_under_each_name_and_listed_under_the_first(analyzed):
    for name in ("lm_head.weight", "model.embed_tokens.weight", "*embed_tokens*"):
        selected = chosen(analyzed("llama-tied"), targets={name: 3})
        assert {n: (s.dim, len(s.indices)) for n, s in selected.items()} == {"model.embed_tokens.weight": (1, 3)}


def test_a_bias_can_be_named(analyzed):
    selected = chosen(analyzed("qwen2"), targets={"model.layers.0.self_attn.v_proj.bias": 1})
    assert len(selected["model.layers.0.self_attn.v_proj.bias"].indices) == 4


# --- budgets and rankings ---------------------------------------------------------------------------------------------


def test_budget_layer_gives_each_layer_as_many_and_budget_model_draws_once(analyzed):
    by_layer = chosen(analyzed("llama"), targets={"ffn.out": 6}, budget="layer")
    assert [len(s.indices) for s in by_layer.values()] == [6, 6]
    by_model = chosen(analyzed("llama"), targets={"ffn.out": 6}, budget="model")
    assert sum(len(s.indices) for s in by_model.values()) == 6
    half = chosen(analyzed("llama"), targets={"ffn.out": 0.5}, budget="model")
    assert sum(len(s.indices) for s in half.values()) == 24
    one = chosen(analyzed("llama"), targets={"ffn.out": 1}, budget="model")
    assert [len(s.indices) for s in one.values()] == [1], "a layer without a unit has no slice"


def norms(weight, dim, width=1):
    """The squared norm of each unit of `width` along `dim`, plainly."""
    return weight.detach().double().movedim(dim, 0).square().flatten(1).sum(1).view(-1, width).sum(1)


@pytest.mark.parametrize("largest", [True, False])
def test_weight_selection_takes_the_units_of_the_largest_or_smallest_norm(analyzed, largest):
    model, _ = analyzed("llama")
    weights = dict(model.named_parameters())
    selected = chosen(
        analyzed("llama"), targets={"ffn.out": 5, "attention.out": 2}, selection="weight", largest=largest
    )
    for name, s in selected.items():
        width = 1 if "mlp" in name else 4
        score = norms(weights[name], 1, width)
        best = score.argsort(descending=largest)[: len(s.indices) // width].sort().values
        expected = (best[:, None] * width + torch.arange(width)).flatten()
        assert s.indices.tolist() == expected.tolist(), name


@pytest.mark.parametrize("largest", [True, False])
def test_weight_selection_over_the_model_compares_layers(analyzed, largest):
    model, _ = analyzed("llama")
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    score = torch.cat([norms(dict(model.named_parameters())[n], 1) for n in names])
    expected = set(score.argsort(descending=largest)[:9].tolist())
    selected = chosen(analyzed("llama"), targets={"ffn.out": 9}, selection="weight", budget="model", largest=largest)
    assert {24 * names.index(n) + i for n, s in selected.items() for i in s.indices.tolist()} == expected


def test_weight_selection_counts_every_targeted_weight_of_a_unit(analyzed):
    model, _ = analyzed("llama")
    weights = dict(model.named_parameters())
    selected = chosen(analyzed("llama"), targets={"ffn.in": 4}, selection="weight")
    score = sum(norms(weights[f"model.layers.0.mlp.{n}_proj.weight"], 0) for n in ("gate", "up"))
    for n in ("gate", "up"):
        assert (
            selected[f"model.layers.0.mlp.{n}_proj.weight"].indices.tolist()
            == score.topk(4).indices.sort().values.tolist()
        )


def test_a_seed_selects_the_same_units_on_every_machine(analyzed):
    """Written down once: another machine, another torch, the same units."""
    selected = chosen(analyzed("llama"), targets={"ffn.out": 5, "attention.out": 1}, seed=7)
    assert {n: s.indices.tolist() for n, s in selected.items()} == SEED_7


SEED_7 = {
    "model.layers.0.mlp.down_proj.weight": [3, 4, 6, 12, 18],
    "model.layers.0.self_attn.o_proj.weight": [12, 13, 14, 15],
    "model.layers.1.mlp.down_proj.weight": [0, 3, 4, 8, 18],
    "model.layers.1.self_attn.o_proj.weight": [0, 1, 2, 3],
}


def test_seeds_and_layers_differ(analyzed):
    draws = {
        seed: {n: s.indices.tolist() for n, s in chosen(analyzed("llama"), targets={"ffn.out": 8}, seed=seed).items()}
        for seed in (0, 1)
    }
    assert draws[0] != draws[1]
    assert len({tuple(i) for draw in draws.values() for i in draw.values()}) == 4, "no two layers or seeds alike"
    again = chosen(analyzed("llama"), targets={"ffn.out": 8}, seed=0)
    assert {n: s.indices.tolist() for n, s in again.items()} == draws[0]


@given(cases(), configs(head=False))
@settings(max_examples=max(5, settings.default.max_examples // 4), phases=QUICK)
def test_selections_of_drawn_models(case, config):
    """Ascending, each once, in range, as many as asked for, and whole heads."""
    spec = case.spec
    analysis = s2ft.analyze(case.model, case.inputs)
    units = {
        "attention.out": spec.heads,
        "attention.query": spec.heads,
        "attention.key": spec.kv_heads,
        "attention.value": spec.kv_heads,
        "attention.out.channels": spec.head_dim,
        "attention.value.channels": spec.head_dim,
        "ffn.out": spec.ffn,
        "ffn.in": spec.ffn,
    }
    selected = select(analysis, config, dict(case.model.named_parameters()))
    for role, amount in config.targets.items():
        width = spec.head_dim if role in s2ft.config.HEADS else 1
        mine = [s for s in selected if s.roles == (role,)]
        if any(role in s.roles for s in selected if len(s.roles) > 1):
            continue  # a fused projection: its parts are counted by the tests above
        fused = 2 if role == "ffn.in" and spec.gate != "none" else 1  # gate and up
        heads = units[role.removesuffix(CHANNELS)] if role.endswith(CHANNELS) else 1
        per_layer = units_for(amount, units[role], role) * fused * width * heads
        if config.budget == "layer":
            assert sum(len(s.indices) for s in mine) == per_layer * spec.blocks
    for s in selected:
        size = dict(case.model.named_parameters())[s.parameter_name].shape[s.dim]
        assert (s.indices.diff() > 0).all() and s.indices[0] >= 0 and s.indices[-1] < size


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("role", ["attention.query", "attention.out"])
def test_a_query_that_shares_a_broadcast_key_is_a_unit_of_its_own(kv_heads, role):
    """Products of (batch, kv heads, queries, ...) with (batch, kv heads, 1, ...): a unit is one query head."""
    spec = Spec(kv_heads=kv_heads, groups=2, head_dim=4, qkv="separate", attention="eager", share="grouped")
    case = Drawn(spec)
    selected = chosen((case.model, s2ft.analyze(case.model, case.inputs)), targets={role: 1})
    (selection,) = selected.values()
    assert len(heads_of(selection.indices)) == 1


# --- lowrank, budgets by score, the top layers, a user's own function ----------------------------------------------

DOWN = [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]


def truncated(weight, rank):
    """The best approximation of a matrix, by its SVD."""
    U, S, V = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ V[:rank]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=20)
def test_low_rank_squares_are_those_of_the_truncated_svd(rows, columns, rank, dtype):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(10 * rows + columns)).to(dtype)
    expected = truncated(weight, rank).square()
    for dim in (0, 1):  # squares of values of order 1 in float64; the Gram matrix squares the condition
        torch.testing.assert_close(low_rank_squares(weight, dim, rank), expected.sum(1 - dim), rtol=1e-9, atol=1e-9)
    assert torch.equal(low_rank_squares(weight, 0), low_rank_squares(weight, 0, max(1, min(rows, columns) // 4)))


def test_the_rank_is_at_most_128_and_expert_weights_are_one_matrix_per_dimension():
    wide = torch.randn(600, 700, dtype=torch.float64)
    torch.testing.assert_close(low_rank_squares(wide, 1), truncated(wide, 128).square().sum(0), rtol=1e-9, atol=1e-9)
    experts = torch.randn(3, 8, 5, dtype=torch.float64)
    expected = truncated(experts.movedim(1, 0).flatten(1), 2).square().sum(1)
    torch.testing.assert_close(low_rank_squares(experts, 1), expected, rtol=1e-9, atol=1e-9)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.data())
def test_squares_in_parts(shape, data):
    """Small parts, so that every tensor takes several."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    dims = sorted(data.draw(st.sets(st.integers(0, len(shape) - 1))))
    others = [d for d in range(len(shape)) if d not in dims]
    expected = x.double().square().sum(others) if others else x.double().square()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "PART", 16)
        torch.testing.assert_close(scores.squares(x, *dims), expected, rtol=1e-12, atol=1e-12)


def test_lowrank_selects_by_the_weight_after_rank_reduction(analyzed):
    model, _ = analyzed("llama")
    selected = chosen(analyzed("llama"), targets={"ffn.out": 5}, selection="lowrank")
    for name in DOWN:
        score = truncated(model.get_parameter(name), 4).square().sum(0)  # a quarter of 16
        assert selected[name].indices.tolist() == score.topk(5).indices.sort().values.tolist()
    assert (
        selected[DOWN[0]].indices.tolist()
        != chosen(analyzed("llama"), targets={"ffn.out": 5}, selection="weight")[DOWN[0]].indices.tolist()
    ), "or the test does not tell them apart"


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("amount", [1, 13, 30, 40, 48])
def test_budget_score_shares_units_out_by_the_layers_scores(analyzed, largest, amount):
    """D'Hondt: the holder of a unit has at least as much score for each of its units as another would have with it."""
    model, _ = analyzed("llama")
    score = {n: norms(model.get_parameter(n), 1) * (3.0 if "0" in n else 1.0) for n in DOWN}
    measured = {(n, 1): s for n, s in score.items()}
    config = s2ft.S2FTConfig(targets={"ffn.out": amount}, selection="gradient", budget="score", largest=largest)
    chosen_units = {s.parameter_name: s.indices for s in select(analyzed("llama")[1], config, {}, measured)}
    counts = {n: len(chosen_units.get(n, ())) for n in DOWN}
    assert sum(counts.values()) == amount
    share = {n: float(score[n if largest else DOWN[1 - i]].sum()) for i, n in enumerate(DOWN)}
    for a, b in (DOWN, DOWN[::-1]):
        if counts[a] < 24 and counts[b]:
            assert share[a] / (counts[a] + 1) <= share[b] / counts[b]
    for n, indices in chosen_units.items():
        best = score[n].argsort(descending=largest)[: len(indices)].sort().values
        assert indices.tolist() == best.tolist()


def test_equal_scores_go_to_the_first_units_and_layers(analyzed):
    for largest in (True, False):
        for budget, expected in (("layer", [[0, 1, 2]] * 2), ("model", [[0, 1, 2]]), ("score", [[0, 1], [0]])):
            config = s2ft.S2FTConfig(targets={"ffn.out": 3}, selection="activation", budget=budget, largest=largest)
            ones = {(n, 1): 0.3 + 1e-16 * torch.arange(24, dtype=torch.float64) for n in DOWN}  # equal up to rounding
            assert len(ones[DOWN[0], 1].unique()) > 1
            selected = select(analyzed("llama")[1], config, {}, ones)
            assert [s.indices.tolist() for s in selected] == expected


class Branches(nn.Module):
    """Layers of two experts side by side, registered in another order than they run in."""

    def __init__(self, layers=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(Branches.expert() for _ in range(2)) for _ in range(layers))

    @staticmethod
    def expert():
        return nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)})

    def forward(self, x):
        for layer in reversed(self.layers):
            x = x + sum(e["down"](F.relu(e["up"](x))) for e in layer)
        return x


def test_the_top_layers_are_the_last_ones_that_run(analyzed):
    assert list(chosen(analyzed("llama"), targets={"ffn.out": 2}, top_layers=1)) == DOWN[1:]
    both = chosen(analyzed("llama"), targets={"ffn.out": 2, "attention.out": 1, "ffn.in": 2}, top_layers=1)
    assert len(both) == 4 and all("layers.1." in n for n in both)
    assert len(chosen(analyzed("llama"), targets={"ffn.out": 2}, top_layers=2)) == 2
    model = Branches()
    analysis = s2ft.analyze(model, (torch.randn(2, 6),))
    for n in (1, 2):
        selected = chosen((model, analysis), targets={"ffn.in": 2}, top_layers=n)
        assert set(selected) == {f"layers.{i}.{e}.up.weight" for i in range(n) for e in (0, 1)}, "run in reverse"
    pooled = chosen((model, analysis), targets={"ffn.in": 1.0}, top_layers=1, budget="model")
    assert set(pooled) == {"layers.0.0.up.weight", "layers.0.1.up.weight"}


def test_too_many_top_layers_are_refused(analyzed):
    with pytest.raises(ConfigError, match="top_layers = 3, but target 'ffn.out' has 2 layers; use 1 to 2"):
        chosen(analyzed("llama"), targets={"ffn.out": 2}, top_layers=3)


def test_a_function_names_the_units_best_first(analyzed):
    model, _ = analyzed("llama")
    seen = []

    def every_third(bands, score):
        seen.append(([(b.parameter_name, b.dim, b.role, tuple(b.positions.shape)) for b in bands], score))
        return torch.arange(len(score) - 1, -1, -3)  # 23, 20, 17, ...

    for largest in (True, False):
        selected = chosen(
            analyzed("llama"), targets={"ffn.out": 2, "ffn.in": 3}, selection=every_third, largest=largest
        )
        assert selected[DOWN[0]].indices.tolist() == [20, 23]
        assert selected["model.layers.1.mlp.up_proj.weight"].indices.tolist() == [17, 20, 23]
    names = [
        (f"model.layers.0.mlp.{n}_proj.weight", d, r, (24, 1))
        for n, d, r in (("down", 1, "ffn.out"), ("gate", 0, "ffn.in"), ("up", 0, "ffn.in"))
    ]
    assert seen[0][0] == names
    torch.testing.assert_close(seen[0][1], sum(norms(model.get_parameter(n), d) for n, d, _, _ in names))


def test_a_function_may_leave_units_and_layers_out(analyzed):
    def only_layer_1(bands, score):
        return [5, 4] if ".1." in bands[0].parameter_name else []

    for budget in ("layer", "model"):
        selected = chosen(analyzed("llama"), targets={"ffn.out": 1.0}, selection=only_layer_1, budget=budget)
        assert {n: s.indices.tolist() for n, s in selected.items()} == {DOWN[1]: [4, 5]}


@pytest.mark.parametrize("units", [[0, 0], [24], [-1], [0.5], [True, False], "no", None], ids=str)
def test_a_function_that_returns_no_units_is_refused(analyzed, units):
    def mine(bands, score):
        return units

    with pytest.raises(ConfigError, match="mine .*it has to return distinct integers from 0 to 23"):
        chosen(analyzed("llama"), targets={"ffn.out": 2}, selection=mine)


def test_a_recorded_function_is_not_run(analyzed):
    with pytest.raises(ConfigError, match="'somebody:function' is the name of a function, .* pass the function itself"):
        chosen(analyzed("llama"), targets={"ffn.out": 2}, selection="somebody:function")


@pytest.mark.parametrize("parts", [("up",), ("gate",), ("up", "down"), ("gate", "up"), ("gate", "up", "down")], ids=str)
def test_up_gate_and_down_alone_or_mixed(analyzed, parts):
    """Each is a target by name; what several share is one ranking over those that train."""
    model, _ = analyzed("llama")
    selected = chosen(analyzed("llama"), targets={f"*.{p}_proj.weight": 4 for p in parts}, selection="weight")
    assert set(selected) == {f"model.layers.{i}.mlp.{p}_proj.weight" for i in (0, 1) for p in parts}
    for i in (0, 1):
        names = {p: f"model.layers.{i}.mlp.{p}_proj.weight" for p in parts}
        score = sum(norms(model.get_parameter(name), int(p == "down")) for p, name in names.items())
        best = score.topk(4).indices.sort().values.tolist()
        assert all(selected[name].indices.tolist() == best for name in names.values())


class Mixture(nn.Module):
    """Four experts as batched weights (expert, out, in), mixed by a router, and a dense layer below."""

    def __init__(self):
        super().__init__()
        self.low, self.high, self.router = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 10, 6)), nn.Parameter(torch.randn(4, 6, 10))

    def forward(self, x):
        x = x + self.high(F.relu(self.low(x)))
        share = self.router(x).softmax(-1)
        h = F.gelu(torch.einsum("ti,eoi->eto", x, self.up))
        return x + torch.einsum("eto,te->to", torch.einsum("eto,eio->eti", h, self.down), share)


def test_experts_train_the_same_channels_of_each():
    model = Mixture()
    analyzed = model, s2ft.analyze(model, (torch.randn(5, 6),))
    roles = {(m.parameter_name, m.dim): m.role for c in analyzed[1].couplings for m in c.members}
    assert {roles[place] for place in (("up", 0), ("down", 0), ("router.weight", 0))} == {"moe.expert"}
    selected = chosen(analyzed, targets={"moe.in": 3, "moe.out": 3, "ffn.out": 2}, selection="weight")
    assert {n: (s.dim, s.roles, len(s.indices)) for n, s in selected.items()} == {
        "up": (1, ("moe.in",), 3),
        "down": (2, ("moe.out",), 3),
        "high.weight": (1, ("ffn.out",), 2),
    }
    score = norms(model.up, 1) + norms(model.down, 2)
    assert (
        selected["up"].indices.tolist()
        == selected["down"].indices.tolist()
        == score.topk(3).indices.sort().values.tolist()
    )


# --- refusals ---------------------------------------------------------------------------------------------------------


class Tower(nn.Module):
    """Three projections in a row: the middle one produces units and contracts others."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


def tower():
    model = Tower()
    return model, s2ft.analyze(model, (torch.randn(2, 5),))


def test_a_weight_in_the_middle_trains_along_the_dimension_with_more_units():
    expected = {"a.weight": 0, "b.weight": 1, "c.weight": 1}
    selections = chosen(tower(), targets={"ffn.out": 2, "ffn.in": 2})
    assert {name: s.dim for name, s in selections.items()} == expected
    plan = s2ft.prepare(tower()[0], (torch.randn(2, 5),))  # the default
    assert {s.parameter_name: s.dim for s in plan.slices} == expected
    assert plan.notes[0] == "ffn.in: 1 of 2 weights, such as b.weight, train as another role"


def test_a_weight_targeted_along_both_dimensions_is_refused():
    with pytest.raises(ConfigError, match="b.weight is targeted along both of its dimensions"):
        chosen(tower(), targets={"b.weight": 1.0, "c.weight": 2, "ffn.out": 2})
    with pytest.raises(
        ConfigError, match=r"matches b.weight, which could train along dims \[0, 1\]; name one of its roles"
    ):
        chosen(tower(), targets={"b.weight": 2})


def test_an_unknown_target_lists_the_roles_and_names(analyzed):
    with pytest.raises(
        ConfigError, match="'ffn.outt' is neither a role .*attention.out.* nor a glob .* model.embed_tokens"
    ):
        chosen(analyzed("llama"), targets={"ffn.outt": 2})


def test_a_role_the_model_does_not_have_lists_those_it_has():
    with pytest.raises(
        ConfigError, match="no parameter of this model has the role 'attention.out'; roles found: ffn.in, ffn.out"
    ):
        chosen(tower(), targets={"attention.out": 1})


def test_a_glob_on_a_weight_that_cannot_be_permuted_says_why(analyzed):
    with pytest.raises(ConfigError, match="matches head.bias, which has no axis that may be permuted: it is an output"):
        model = nn.ModuleDict({"body": Tower(), "head": nn.Linear(5, 3)})
        model.forward = lambda x: model["head"](model["body"](x))
        chosen((model, s2ft.analyze(model, (torch.randn(2, 5),))), targets={"head.bias": 1})


def test_a_model_without_couplings_is_refused():
    model = nn.Linear(4, 3)
    with pytest.raises(ConfigError, match="no coupled structure was found"):
        chosen((model, s2ft.analyze(model, (torch.randn(2, 4),))), targets={"ffn.out": 1})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"targets": {}}, "targets must map"),
        ({"targets": "ffn.out"}, "targets must map"),
        ({"targets": {3: 1}}, "a target is a role"),
        ({"targets": {"ffn.out": 0.0}}, r"a ratio lies in \(0, 1\]"),
        ({"targets": {"ffn.out": 1.5}}, r"a ratio lies in \(0, 1\]"),
        ({"targets": {"ffn.out": float("nan")}}, r"a ratio lies in \(0, 1\]"),
        ({"targets": {"ffn.out": 0}}, "at least 1"),
        ({"targets": {"ffn.out": -2}}, "at least 1"),
        ({"targets": {"ffn.out": True}}, "expected a ratio"),
        ({"targets": {"ffn.out": "3%"}}, "expected a ratio"),
        ({"selection": "magic"}, "unknown selection 'magic'; valid: random, weight"),
        ({"budget": "global"}, "unknown budget 'global'; valid: layer, model"),
        ({"largest": 1}, "largest must be True or False"),
        ({"seed": -1}, "seed must be an integer"),
        ({"seed": 0.5}, "seed must be an integer"),
    ],
)
def test_a_bad_config_is_refused_when_it_is_made(fields, message):
    with pytest.raises(ConfigError, match=message):
        s2ft.S2FTConfig(**fields)


def test_a_config_from_a_dict():
    config = s2ft.S2FTConfig(targets={"ffn.out": 2}, seed=3)
    assert s2ft.S2FTConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="unknown option 'sead'; valid options: targets, selection"):
        s2ft.S2FTConfig.from_dict({"sead": 3})
    given = {"ffn.out": 2}
    config = s2ft.S2FTConfig(targets=given)
    given["ffn.in"] = 1
    assert config.targets == {"ffn.out": 2}, "a config does not change with what it was made from"


def test_every_selection_has_a_score_and_says_what_it_needs():
    assert list(SCORES) == list(SELECTIONS)
    assert set(SELECTIONS.values()) == {"nothing", "weight", "activations", "gradients"}


def test_a_new_selection_is_one_function_and_its_rows(analyzed, monkeypatch):
    monkeypatch.setitem(SELECTIONS, "last", "weight")
    monkeypatch.setitem(SCORES, "last", lambda W, dim: torch.arange(W.shape[dim], dtype=torch.float64))
    selected = chosen(analyzed("llama"), targets={"ffn.out": 3}, selection="last", budget="score")
    assert selected[DOWN[0]].indices.tolist() == [22, 23] and selected[DOWN[1]].indices.tolist() == [23]


# --- norms: modules that hold vectors alone ---------------------------------------------------------------------------


def test_norms_are_what_holds_vectors_alone():
    """Not the bias of a layer, not a vector beside matrices, and not what has statistics of batches."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)
            self.first, self.last = nn.LayerNorm(4), nn.RMSNorm(4)
            self.gain = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x + self.last(self.b(torch.relu(self.a(self.first(x)))) * self.gain)

    model = Model()
    analysis = s2ft.analyze(model, (torch.randn(2, 4),))
    assert {b.parameter_name for b in offered(analysis)["norm"]} == {"first.weight", "first.bias", "last.weight"}
    with pytest.raises(ConfigError, match="'norm'.*1.0, got 0.5"):
        S2FTConfig({"norm": 0.5})
    with pytest.raises(ConfigError, match="no parameter of this model has the role 'norm'; roles found: ffn"):
        chosen(tower(), targets={"norm": 1.0})


def test_top_layers_hold_the_norms_that_are_not_below_them(analyzed):
    targets = {"ffn.out": 1, "ffn.in": 1, "norm": 1.0}
    assert list(chosen(analyzed("llama"), targets=targets, top_layers=1)) == [
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
    ]


def test_structures_of_no_role_are_targeted_by_name():
    class Quantized(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.codes, self.out = nn.Linear(8, 6), nn.Embedding(5, 6), nn.Linear(6, 8)

        def forward(self, x):
            z = self.inside(x)
            q = self.codes(torch.cdist(z, self.codes.weight[None]).argmin(-1))
            return self.out(z + (q - z).detach())

    x = torch.randn(2, 4, 8)
    with pytest.raises(ConfigError, match="1 residual.*; target weights by their names, for example .'inside.weight'"):
        s2ft.prepare(Quantized(), (x,))
    assert s2ft.prepare(Quantized(), (x,), S2FTConfig({"inside.weight": 2})).slices


def test_norms_that_an_excluded_adapter_trains_are_not_of_the_default(analyzed):
    analysis = analyzed("llama")[1]
    gone = {"model.norm.weight": [(0, torch.arange(16))]}
    assert "norm" in roles_of(analysis) and roles_of(analysis, gone) == [r for r in roles_of(analysis) if r != "norm"]
