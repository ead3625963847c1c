"""Training: gradients are the slices of eager full gradients, and steps those of full training with masks."""

import copy

import pytest
import torch
from hypothesis import given, settings
from small import (
    INNER,
    NOISE64,
    QUICK,
    U32,
    assert_gradients,
    assert_weights,
    cases,
    compiled,
    configs,
    full_gradients,
    hf,
    prepared,
    tokens,
    tuned,
)
from torch import nn

import s2ft_compile as s2ft
from s2ft_compile.slices.state import state_of

# A float32 model: full and sliced gradient sum the same at most 64 products in another order, through some ten layers.
NOISE32 = 64 * 10 * U32
FEW = settings(max_examples=max(4, settings.default.max_examples // 6), phases=QUICK)


def run(model: nn.Module, how: str) -> nn.Module:
    """What is called to train: the prepared model itself (eager), or compiled with the backend."""
    return model if how == "none" else compiled(model, how)


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [*INNER, "none"])
@given(case=cases(), config=configs())
@FEW
def test_gradients_are_slices_of_full_gradients(how, case, config):
    torch._dynamo.reset()
    model = case.make()
    plan = s2ft.prepare(model, case.inputs, config)
    case.loss(run(model, how)).backward()
    assert_gradients(plan, full_gradients(case.make(), case.loss), NOISE64)
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ], "nothing else has a gradient"


TARGETS = {"attention.out": 1, "attention.value": 1, "attention.query": 2, "ffn.in": 3, "ffn.out": 5}


def hf_loss(ids):
    return lambda model: model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert"])
@pytest.mark.parametrize("how", ["aot_eager", "none"])
def test_gradients_of_hugging_face_models(family, how):
    model, ids = hf(family), tokens()
    full = full_gradients(hf(family), hf_loss(ids))
    plan = s2ft.prepare(model, {"input_ids": ids}, s2ft.S2FTConfig(targets=TARGETS))
    hf_loss(ids)(run(model, how)).backward()
    assert_gradients(plan, full, NOISE32)


def test_gradients_through_inductor():
    """All roles, and a weight with two uses (embedding and head)."""
    make = lambda: hf("llama", num_hidden_layers=1, tie_word_embeddings=True)  # noqa: E731
    model, ids = make(), tokens()
    config = s2ft.S2FTConfig(targets={**TARGETS, "lm_head.weight": 3})
    plan = s2ft.prepare(model, {"input_ids": ids}, config)
    hf_loss(ids)(compiled(model, "inductor")).backward()
    assert_gradients(plan, full_gradients(make(), hf_loss(ids)), NOISE32)


@pytest.mark.parametrize("how", ["aot_eager", "eager", "none"])
def test_gradients_of_tied_weights_add_up(how):
    """Embedding and head are one weight with two uses; both gradients are sliced."""
    case, model = prepared({"head.weight": 2, "blocks.*.attention.v.bias": 1}, tied=True)
    plan = state_of(model).plan
    assert plan.slices[0].parameter_name == "embed.weight"
    case.loss(run(model, how)).backward()
    assert_gradients(plan, full_gradients(case.make(), case.loss), NOISE64)


@pytest.mark.parametrize("how", ["aot_eager", "none"])
def test_gradients_in_train_mode_with_dropout(how):
    """The compiled graph draws its masks elsewhere, so what does not depend on them is compared: p = 0 there."""
    case, model = prepared()
    model.train()
    case.loss(run(model, how)).backward()
    assert_gradients(state_of(model).plan, full_gradients(case.make().train(), case.loss), NOISE64)


# --- steps ----------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1), 0.1),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), 0.5),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-2, weight_decay=0.0), 1.0),
}


def masked_training(case, plan, make, steps: int) -> nn.Module:
    """Full training of the base model in float64, eager, every gradient outside the slices set to zero."""
    model = case.make()
    masks = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for s in plan.slices:
        masks[s.parameter_name].index_fill_(s.dim, s.indices, 1.0)
    optimizer = make(list(model.parameters()))
    for _ in range(steps):
        optimizer.zero_grad()
        case.loss(model).backward()
        for n, p in model.named_parameters():
            p.grad = masks[n] * (torch.zeros_like(p) if p.grad is None else p.grad)
        optimizer.step()
    return model


@pytest.mark.parametrize(
    "how, name", [("aot_eager", "sgd"), ("aot_eager", "adamw"), ("none", "momentum"), ("eager", "adamw")]
)
@given(case=cases(max_blocks=1), config=configs())
@FEW
def test_steps_are_those_of_full_training_with_masked_gradients(how, name, case, config):
    """Our deltas and their optimizer live in float32, the oracle in float64. A step rounds a gradient, a moment and a
    delta a few times (at most 16), relative to the delta; the loss's curvature passes an error on, at most doubling it
    per step with these small rates."""
    torch._dynamo.reset()
    steps, (make, rate) = 4, OPTIMIZERS[name]
    model = case.make()
    plan = s2ft.prepare(model, case.inputs, config)
    tuned_model, optimizer = run(model, how), make(s2ft.parameters(model))
    for _ in range(steps):
        optimizer.zero_grad()
        case.loss(tuned_model).backward()
        optimizer.step()
    expected_bits = tuned(case.make(), plan)
    s2ft.release(model)
    assert_weights(model, expected_bits)  # every other weight is the base's, bit for bit
    oracle = dict(masked_training(case, plan, make, steps).named_parameters())
    base = dict(case.make().named_parameters())
    for s in plan.slices:
        moved = (oracle[s.parameter_name] - base[s.parameter_name]).abs().max().item()
        error = (dict(model.named_parameters())[s.parameter_name] - oracle[s.parameter_name]).abs().max().item()
        allowed = 16 * 2**steps * U32 * max(moved, rate * 1e-3)
        assert error <= allowed, f"{s.parameter_name}: off by {error:.3g} after moving {moved:.3g}"


def test_the_loss_falls_and_only_the_slices_have_moved():
    model, ids = hf("llama"), tokens(4, 12)
    plan = s2ft.prepare(model, {"input_ids": ids}, s2ft.S2FTConfig(targets=TARGETS))
    net, optimizer, losses = compiled(model), torch.optim.AdamW(s2ft.parameters(model), lr=1e-2), []
    for _ in range(6):
        optimizer.zero_grad()
        loss = hf_loss(ids)(net)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.98 * losses[0], losses
    expected = tuned(hf("llama"), plan)
    s2ft.release(net)
    assert_weights(model, expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
        lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        lambda p: torch.optim.SGD(p, lr=1e-1, foreach=True, momentum=0.5),
        lambda p: torch.optim.SGD(p, lr=1e-1, fused=True),
        lambda p: torch.optim.Adagrad(p, lr=1e-2),
    ],
    ids=["plain", "foreach", "fused", "sgd foreach", "sgd fused", "adagrad"],
)
def test_every_optimizer_writes_the_weights_after_its_step(make):
    case, model = prepared()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = make(s2ft.parameters(model))
    case.loss(model).backward()
    optimizer.step()
    state = state_of(model)
    assert all(torch.equal(b.read(), b.trained()) and b.delta.abs().sum() > 0 for b in state.blocks)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_weight_decay_pulls_towards_the_base_model():
    case, model = prepared()
    with torch.no_grad():
        for p in s2ft.parameters(model):
            p.fill_(1.0)
    optimizer = torch.optim.AdamW(s2ft.parameters(model), lr=1e-3, weight_decay=100.0)
    case.loss(model).backward()
    for p in s2ft.parameters(model):
        p.grad.zero_()
    optimizer.step()
    assert all(torch.allclose(p, torch.tensor(0.9)) for p in s2ft.parameters(model))


def test_gradients_accumulate_over_batches():
    case, model = prepared()
    net = compiled(model)
    (case.loss(net) / 2).backward()
    (case.loss(net) / 4).backward()
    full = full_gradients(case.make(), lambda m: 0.75 * case.loss(m))
    assert_gradients(state_of(model).plan, full, NOISE64 + 4 * U32)


def test_several_forwards_before_one_backward():
    case, model = prepared()
    net, x = compiled(model), case.inputs[0]

    def loss(m):
        first, second = m(x), m(x.flip(0))
        return (first * second).mean() + m(x.flip(1)).square().mean()

    loss(net).backward()
    assert_gradients(state_of(model).plan, full_gradients(case.make(), loss), NOISE64 + 4 * U32)


def test_clipping_and_a_scheduler():
    case, model = prepared()
    net, optimizer = compiled(model), torch.optim.SGD(s2ft.parameters(model), lr=0.5)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 4)
    case.loss(net).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    full = full_gradients(case.make(), case.loss)
    plan = state_of(model).plan
    expected = sum(full[s.parameter_name].index_select(s.dim, s.indices).square().sum() for s in plan.slices).sqrt()
    assert abs(norm - expected) <= 1e-5 * expected
    optimizer.step()
    schedule.step()
    moved = torch.cat([p.detach().flatten() for p in s2ft.parameters(model)]).norm()
    assert abs(moved - 0.25 * 1e-3) < 1e-3 * 0.25 * 1e-3  # clip_grad_norm_ divides by norm + 1e-6


# --- types ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["aot_eager", "none"])
def test_bf16_weights_have_float32_deltas_and_gradients(how):
    model, ids = hf("llama").bfloat16(), tokens()
    base = copy.deepcopy(model)
    plan = s2ft.prepare(model, {"input_ids": ids}, s2ft.S2FTConfig(targets=TARGETS))
    net, optimizer = run(model, how), torch.optim.AdamW(s2ft.parameters(model), lr=1e-4, eps=1e-12)
    for _ in range(3):
        optimizer.zero_grad()
        hf_loss(ids)(net).backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in s2ft.parameters(model))
        optimizer.step()
    steps = torch.cat([p.detach().flatten() for p in s2ft.parameters(model)]).abs()
    assert steps.max() > 2.5e-4, "steps far below bf16's resolution add up"
    expected = tuned(base, plan)
    s2ft.release(model)
    assert_weights(model, expected)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_bf16_gradients_are_close_to_float32_ones():
    model, ids = hf("llama").bfloat16(), tokens()
    full = full_gradients(copy.deepcopy(model).float(), hf_loss(ids))
    plan = s2ft.prepare(model, {"input_ids": ids}, s2ft.S2FTConfig(targets=TARGETS))
    hf_loss(ids)(compiled(model)).backward()
    for s in plan.slices:  # 2^-8 a rounding, some forty on the way, mostly independent
        expected = full[s.parameter_name].index_select(s.dim, s.indices)
        assert (s.delta.grad - expected).norm() <= 40**0.5 * 2**-8 * 4 * full[s.parameter_name].norm(), s.parameter_name


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_autocast_bf16_trains_float32_weights(inner):
    model, base, ids = hf("gpt2", n_layer=1), hf("gpt2", n_layer=1), tokens()
    plan = s2ft.prepare(model, {"input_ids": ids}, s2ft.S2FTConfig(targets=TARGETS))
    net = compiled(model, inner)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = hf_loss(ids)(net)
        loss.backward()
    full = full_gradients(base, hf_loss(ids))
    for s in plan.slices:
        expected = full[s.parameter_name].index_select(s.dim, s.indices)
        assert s.delta.grad.dtype == torch.float32 and s.delta.grad.abs().sum() > 0
        assert (s.delta.grad - expected).norm() <= 40**0.5 * 2**-8 * 4 * full[s.parameter_name].norm(), s.parameter_name


# --- Trainer, DDP ---------------------------------------------------------------------------------------------------


def test_hugging_face_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    model, ids = hf("llama"), tokens(4, 8)
    base = hf("llama")
    plan = s2ft.prepare(model, {"input_ids": ids[:2]}, s2ft.S2FTConfig(targets=TARGETS))
    model.compile(backend="s2ft", options={"inner": "aot_eager"})
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    held = [p for g in trainer.optimizer.param_groups for p in g["params"]]
    assert {id(p) for p in held} == {id(p) for p in s2ft.parameters(model)}
    assert all(s.delta.abs().sum() > 0 for s in plan.slices)
    expected = tuned(base, plan)
    s2ft.release(model)
    assert_weights(model, expected)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("outer", ["compile(DDP)", "DDP(compile)", "DDP"])
def test_distributed_data_parallel(one_process, outer):
    case, model = prepared()
    DDP = nn.parallel.DistributedDataParallel
    net = {
        "compile(DDP)": lambda: compiled(DDP(model)),
        "DDP(compile)": lambda: DDP(compiled(model)),
        "DDP": lambda: DDP(model),
    }
    net = net[outer]()
    assert [id(p) for p in s2ft.parameters(net)] == [id(p) for p in s2ft.parameters(model)]
    optimizer = torch.optim.SGD(s2ft.parameters(net), lr=0.1)
    case.loss(net).backward()
    plan = state_of(net).plan
    assert_gradients(plan, full_gradients(case.make(), case.loss), NOISE64)
    optimizer.step()
    expected = tuned(case.make(), plan)
    s2ft.release(net)
    assert_weights(model, expected)


# --- without the backend ----------------------------------------------------------------------------------------------


def test_eager_training_of_only_some_layers_is_no_error():
    """A slice that the loss does not reach has no gradient, and that is right."""
    case, model = prepared()
    optimizer = torch.optim.SGD(s2ft.parameters(model), lr=0.1)
    state = state_of(model)

    model.blocks[1].forward = lambda x: (x, x, None)
    case.loss(model).backward()
    with pytest.warns(UserWarning, match="loss does not reach them"):
        optimizer.step()
    optimizer.step()  # says it once
    assert {b.name for b in state.blocks if b.delta.grad is None} == {
        b.name for b in state.blocks if "blocks.1" in b.name
    }
