"""The benchmarks' turns: whom the clock times and when; verdicts of goals; what a rehearsal writes."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import turns  # noqa: E402


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 4))
def test_each_round_runs_every_method_and_starts_with_another_one(methods, rounds, warm_up):
    calls: list[int] = []
    trials = {str(k): lambda k=k: calls.append(k) for k in range(methods)}
    times = turns.in_turn(trials, rounds, warm_up, lambda run: run() or len(calls))  # a clock that counts calls
    rounds_run = [calls[i : i + methods] for i in range(0, len(calls), methods)]
    assert [sorted(calls_of_round) for calls_of_round in rounds_run] == [list(range(methods))] * (warm_up + rounds)
    assert [calls_of_round[0] for calls_of_round in rounds_run] == [turn % methods for turn in range(warm_up + rounds)]
    assert times == {
        name: [turn * methods + calls_of_round.index(int(name)) + 1 for turn, calls_of_round in enumerate(rounds_run)][
            warm_up:
        ]
        for name in trials
    }


@pytest.mark.parametrize(
    "sense, measured, verdict", [(">=", 2.0, "met"), (">=", 1.9, "missed"), ("<=", 2.0, "met"), ("<=", 2.1, "missed")]
)
def test_a_goal_is_met_up_to_its_value(sense, measured, verdict):
    table = turns.goal_table({"figure": (sense, 2)}, {"figure": measured, "no goal": 0.0})
    assert table.row_count == 1 and verdict in list(table.columns[3].cells)[0]


@pytest.mark.parametrize("quick", [False, True])
def test_a_rehearsal_writes_only_where_it_is_told_to(tmp_path, monkeypatch, quick):
    monkeypatch.setattr(turns, "RESULTS", tmp_path / "results")
    result = turns.facts("cpu", quick)
    turns.save(result, "name", None)
    assert (tmp_path / "results" / "name.json").exists() is not quick
    turns.save(result, "name", tmp_path / "there.json")
    assert json.loads((tmp_path / "there.json").read_text()) == result
