"""The comparison's search for a learning rate, the choice of rows, equal numbers, and files that were cut short."""

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import hf, tokens

import s2ft_compile as s2ft

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks" / "compare"))
import contenders  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
from base import SETTINGS  # noqa: E402
from material import IGNORED, Rows  # noqa: E402

GRID = [run.LIMITS[0] + i * run.STEP for i in range(int((run.LIMITS[1] - run.LIMITS[0]) / run.STEP) + 1)]


@given(st.sampled_from(GRID), st.sampled_from(GRID), st.sampled_from(GRID))
def test_the_search_ends_at_the_best_rate_with_a_worse_one_on_both_sides(least, start, diverges):
    asked = []

    def loss(exponent: float) -> float:
        asked.append(exponent)
        return math.nan if exponent > max(least, diverges) else (exponent - least) ** 2

    best = run.search(loss, start)
    assert len(asked) == len(set(asked))  # no rate runs twice
    assert all(e in asked for e in (best - run.STEP, best + run.STEP) if run.LIMITS[0] <= e <= run.LIMITS[1])
    if start <= max(least, diverges):
        assert best == least


def row(exponent: float, seed: int, choose: float, test: float = 0.0, method: str = "s2ft") -> run.Row:
    return {
        "task": "far",
        "method": method,
        "exponent": exponent,
        "seed": seed,
        "choose_loss": choose,
        "test_loss": test,
    }


def test_rows_are_reported_at_the_rate_that_the_first_seed_chose_on_other_rows():
    rows = [row(-2, 0, 1.0, 9.0), row(-2, 1, 9.0, 8.0), row(-1, 0, 2.0, 0.0), row(-1, 1, 0.0, 0.0), row(0, 0, math.nan)]
    assert [r["test_loss"] for r in report.Runs(rows).best("far", "s2ft")] == [9.0, 8.0]
    assert report.Runs(rows).best("far", "lora") == []
    between = report.Runs([*rows, row(-2.25, 0, 0.0)])  # a point of the line, whatever it chose
    assert between.best("far", "s2ft") == rows[:2] and len(between.curve("far", "s2ft")) == 4


def test_a_rate_between_is_run_once_below_the_best():
    written = []
    for _ in range(2):  # what is there is not run again
        run.job(lambda e, seed: row(e, seed, (e + 2) ** 2), -1.0, 2, list(written), written.append, between=True)
    assert [(r["exponent"], r["seed"]) for r in written] == [
        (-1, 0),
        (-0.5, 0),
        (-1.5, 0),
        (-2, 0),
        (-2.5, 0),
        (-2, 1),
        (-2.25, 0),
    ]


def test_a_gain_is_a_share_of_full_fine_tunings():
    rows = [row(0, 0, 0.0, test, m) for m, test in (("base", 5.0), ("full", 3.0), ("s2ft", 3.5))]
    assert report.Runs(rows).gain("far", "s2ft") == 0.75


def test_what_is_kept_is_read_where_a_method_learns_as_much_as_lora():
    def learned(method, exponent, test, kl):
        return row(exponent, 0, test, test, method) | {"kl": kl, "facts_exact": 0.5}

    rows = [learned("base", 0, 5.0, 0.0), learned("lora", -2, 3.0, 1.0), learned("lora", -3, 4.0, 0.1)]
    rows += [learned("s2ft", e, test, kl) for e, test, kl in ((-1, 2.9, 2.0), (-2, 3.01, 0.4), (-3, 3.1, 0.1))]
    table = report.equally(report.Runs([*rows, learned("full", -3, 3.5, 0.1)]), ["lora", "s2ft", "full"])
    cells = {line.split(" | ")[0]: line.split(" | ")[2] for line in table.splitlines()[2:]}
    assert list(cells.values()) == ["1.000, 50%", "0.400, 50%", "never"]


def test_half_an_interval_is_students():
    assert report.spread([1.0, 2.0, 3.0], ".2f") == "2.00 ± 2.48"  # 4.30 / sqrt(3)
    assert report.spread([1.0], ".2f") == "1.00"


def test_an_answer_is_right_if_all_of_its_tokens_are():
    logits = torch.eye(4).repeat(2, 1, 1)  # after token i it says i
    labels = torch.tensor([[IGNORED, 0, 1, 2], [IGNORED, 0, 3, IGNORED]])
    scores = run.score(logits, Rows(labels, labels, exact=True))
    assert scores["exact"] == 0.5 and scores["loss"] > 0


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_slices_have_as_many_numbers_as_the_lora(setting):
    wanted = contenders.lora_numbers(setting) / setting.layers
    head = setting.hidden // setting.heads // 2 * 2
    width = {"attention.out.channels": setting.heads, "attention.value.channels": setting.heads // 3, "ffn.in": 2}
    for parts in (("channels", {}), ("columns", {}), ("channels", contenders.HEADS), ("channels", contenders.INSIDE)):
        amounts = contenders.targets(setting, *parts)
        rows = sum(n * width.get(role, 1 if role == "ffn.out" else head) for role, n in amounts.items())
        assert abs(rows * setting.hidden - wanted) <= 1.5 * setting.hidden


def test_a_line_that_was_cut_short_is_run_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    run.append(path, {"seed": 0})
    run.append(path, {"seed": 1})
    path.write_bytes(path.read_bytes()[:-4])
    assert run.read(path) == [{"seed": 0}]
    run.append(path, {"seed": 2})
    assert run.read(path) == [{"seed": 0}, {"seed": 2}]


def test_a_model_whose_structures_are_known_is_prepared_alike():
    shapes = []
    for _ in range(2):
        config = s2ft.S2FTConfig({"ffn.out": 3, "attention.value.channels": 1})
        shapes.append([p.shape for p in contenders._prepare(hf("llama"), config, [{"input_ids": tokens()}])])
    assert shapes[0] == shapes[1] and len(shapes[0]) == 4
