"""`s2ft.optimizer`: which delta trains by what, its schedule, its checkpoints, and what it refuses."""

import copy

import pytest
import torch
from small import hf, prepared, same_bits, tokens
from torch import nn, optim

import s2ft_compile as s2ft
from s2ft_compile.errors import ConfigError, StateError
from s2ft_compile.slices.optimizers import _width, learning_rate
from s2ft_compile.slices.state import state_of

CHANNELS = {"ffn.in": 3, "ffn.out": 3}
BIASES = {**CHANNELS, "*.ffn.up.bias": 3}
HEADS_TOO = {**BIASES, "attention.out": 1, "attention.query": 1}


def trained(case, model: nn.Module, opt: optim.Optimizer, steps: int) -> list[torch.Tensor]:
    """The deltas after some steps on one loss."""
    for _ in range(steps):
        sum(out.square().sum() for out in case.outputs(model)).backward()
        opt.step()
        opt.zero_grad()
    return [p.detach().clone() for p in s2ft.parameters(model)]


def rates(opt: optim.Optimizer) -> set[float]:
    return {group["lr"] for group in opt.param_groups}


def test_matrices_train_by_muon_and_biases_by_adamw():
    case, model = prepared(BIASES, bias=True)
    matrices = [p.ndim == 2 for p in s2ft.parameters(model)]
    assert set(matrices) == {True, False}
    both = trained(case, model, s2ft.optimizer(model, "muon", 1e-2), 3)
    case, model = prepared(BIASES, bias=True)
    deltas = s2ft.parameters(model)
    muon = optim.Muon([p for p in deltas if p.ndim == 2], lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adamw = optim.AdamW([p for p in deltas if p.ndim != 2], lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        sum(out.square().sum() for out in case.outputs(model)).backward()
        muon.step()
        adamw.step()
        model.zero_grad()
    for a, b in zip(both, deltas):
        torch.testing.assert_close(a, b.detach())


@pytest.mark.parametrize("heads", [None, 3e-3])
def test_heads_train_by_adamw_at_a_rate_of_their_own(heads):
    """A fifth of the geometric mean of the rate and of the one that the width and the steps give."""
    case, model = prepared(HEADS_TOO, bias=True)
    by_rule = learning_rate(model, 100)
    both = trained(case, model, s2ft.optimizer(model, "muon", 1e-2, steps=100, heads=heads), 3)
    case, model = prepared(HEADS_TOO, bias=True)
    kinds: dict[str, list[nn.Parameter]] = {"muon": [], "heads": [], "others": []}
    for s in state_of(model).plan.slices:
        of_heads = any(role.startswith("attention") for role in s.roles)
        kinds["others" if s.delta.ndim != 2 else "heads" if of_heads else "muon"].append(s.delta)
    assert all(kinds.values())
    parts = (
        optim.Muon(kinds["muon"], lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        optim.AdamW(kinds["heads"], lr=heads or 0.2 * (1e-2 * by_rule) ** 0.5, weight_decay=0.0),
        optim.AdamW(kinds["others"], lr=1e-2, weight_decay=0.0),
    )
    for _ in range(3):
        sum(out.square().sum() for out in case.outputs(model)).backward()
        for part in parts:
            part.step()
        model.zero_grad()
    for a, b in zip(both, s2ft.parameters(model)):
        torch.testing.assert_close(a, b.detach())


@pytest.mark.parametrize("name, kind", [("muon", optim.Muon), ("adamw", optim.AdamW)])
def test_one_kind_of_delta_gives_an_optimizer_of_torch(name, kind):
    _, model = prepared(CHANNELS, bias=False)
    opt = s2ft.optimizer(model, name)
    assert type(opt) is kind and opt.defaults["weight_decay"] == 0.0
    assert [id(p) for p in opt.param_groups[0]["params"]] == [id(p) for p in s2ft.parameters(model)]


def test_a_schedule_reaches_both():
    case, model = prepared(BIASES, bias=True)
    opt = s2ft.optimizer(model, "muon", 1e-2)
    schedule = optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)
    before = trained(case, model, opt, 1)
    schedule.step()
    assert rates(opt) == {5e-3} == {lr for part in opt.parts for lr in rates(part)}
    for group in opt.param_groups:
        group["lr"] = 0.0
    assert all(same_bits(a, b) for a, b in zip(before, trained(case, model, opt, 1)))


def test_it_resumes_bit_for_bit():
    case, model = prepared(BIASES, bias=True)
    opt = s2ft.optimizer(model)
    halfway = trained(case, model, opt, 2)
    saved, expected = copy.deepcopy(opt.state_dict()), trained(case, model, opt, 2)
    case, other = prepared(BIASES, bias=True)
    with torch.no_grad():
        for p, value in zip(s2ft.parameters(other), halfway):
            p.copy_(value)
    fresh = s2ft.optimizer(other, lr=1.0)  # whose rate the checkpoint's replaces
    fresh.load_state_dict(saved)
    assert all(same_bits(a, b) for a, b in zip(expected, trained(case, other, fresh, 2)))


def rate(model: nn.Module, **given) -> float:
    (rate,) = rates(s2ft.optimizer(model, **given))
    return rate


def test_the_rate_falls_with_the_width_and_the_steps():
    """Whatever the weights are, and how many of them train."""
    narrow, again, wide = hf("llama"), hf("llama"), hf("llama", hidden_size=64, head_dim=16)
    with torch.no_grad():
        for p in again.parameters():
            p.mul_(4)
    for model, units in ((narrow, 3), (again, 5), (wide, 3)):
        s2ft.prepare(model, {"input_ids": tokens()}, s2ft.S2FTConfig({"ffn.in": units, "ffn.out": units}))
    assert rate(narrow) == rate(again) == pytest.approx(4 * rate(wide)) == pytest.approx(2 * rate(narrow, steps=4000))
    assert rate(narrow, name="adamw") == rate(narrow)


def test_the_width_of_experts_is_that_of_one():
    for shape, dim, roles, width in (
        ((8, 32, 16), 1, ("moe.in",), 16),
        ((8, 16, 32), 2, ("moe.out",), 16),
        ((32, 16), 0, ("ffn.in",), 16),
        ((32, 16, 3, 3), 0, ("conv.out",), 144),
    ):
        assert _width(s2ft.Slice("w", dim, torch.arange(2), shape, roles)) == width


def test_what_it_refuses():
    _, model = prepared()
    with pytest.raises(ConfigError, match="unknown optimizer 'sgd'; valid: muon, adamw"):
        s2ft.optimizer(model, "sgd")
    with pytest.raises(ConfigError, match="steps is a positive number, got 0"):
        s2ft.optimizer(model, steps=0)
    for lr in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="lr is a positive number"):
            s2ft.optimizer(model, lr=lr)
        with pytest.raises(ConfigError, match="heads is a positive number"):
            s2ft.optimizer(model, heads=lr)
    with pytest.raises(StateError, match="is not prepared"):
        s2ft.optimizer(nn.Linear(2, 2))
