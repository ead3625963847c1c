"""Checkpoints of trainers: each holds the deltas in float32, and a run that goes on from it ends where it would have.

Nothing of this package is called to save or to load: the deltas are a part of `state_dict()`.
"""

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file
from small import hf, same_bits, tokens

import s2ft_compile as s2ft
from s2ft_compile.errors import StateError
from s2ft_compile.exporters.conversion import as_stored
from s2ft_compile.slices.state import state_of

CONFIG = s2ft.S2FTConfig(targets={"attention.out": 1, "ffn.in": 3, "ffn.out": 5})


def prepared(dtype=torch.bfloat16, config=CONFIG, **changes):
    """A prepared model: bfloat16, whose weights alone hold next to nothing of small steps."""
    key = str((dtype, config, changes))
    if key not in _models:
        _models[key] = hf("llama", num_hidden_layers=1, **changes).to(dtype).train()
        s2ft.prepare(_models[key], {"input_ids": tokens()}, config, train=False)
    return copy.deepcopy(_models[key])


_models: dict[str, torch.nn.Module] = {}


def trainer(model, folder, **changes):
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in tokens(12, 8, seed=1)]
    given = dict(
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        warmup_steps=2,
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        save_strategy="steps",
    )
    return Trainer(model, TrainingArguments(str(folder), **{**given, **changes}), train_dataset=data, eval_dataset=data)


def deltas(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in s2ft.parameters(model)]


def equal(first, second) -> bool:
    return all(same_bits(a, b) for a, b in zip(first, second, strict=True))


# --- transformers' Trainer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_trainer_resumes_bit_for_bit(tmp_path, dtype):
    whole = prepared(dtype)
    first = trainer(whole, tmp_path)
    first.train()
    state = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert {state[n].dtype for n in state if n.endswith("_delta")} == {torch.float32}
    again = prepared(dtype)
    second = trainer(again, tmp_path)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert equal(deltas(again), deltas(whole)) and any(d.any() for d in deltas(whole))
    assert equal(again.state_dict().values(), whole.state_dict().values())
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (first, second)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    with s2ft.disabled(again):
        assert equal(base_weights(again), hf("llama", num_hidden_layers=1).to(dtype).parameters())


def base_weights(model):
    return [p for n, p in model.named_parameters() if not n.endswith("_delta")]


def test_the_best_model_comes_back_at_the_end(tmp_path):
    """With `save_only_model` and a limit: the deltas are those of the best checkpoint, not rounded to the weights."""
    model = prepared()
    ran = trainer(
        model,
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        save_total_limit=1,
        save_only_model=True,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the first is the best
    )
    ran.train()
    best = ran.state.best_model_checkpoint
    assert best.endswith("checkpoint-2")
    left = sorted(p.name for p in tmp_path.glob("checkpoint-*"))
    assert left == ["checkpoint-2"]
    held = load_file(f"{best}/model.safetensors")
    names = [f"{b.name}_delta" for b in state_of(model).blocks]
    assert equal(deltas(model), [held[n] for n in names])
    assert not equal(deltas(model), [held[n].bfloat16().float() for n in names])


def test_save_pretrained_of_a_prepared_model_is_a_checkpoint(tmp_path):
    """Weights in training order and the deltas: the function is the trained one, and a prepared model takes it back."""
    from transformers import AutoModelForCausalLM

    model = prepared()
    trainer(model, tmp_path / "run", max_steps=2, save_strategy="no").train()
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto").eval()
    with torch.no_grad():
        assert same_bits(again(tokens()).logits, model.eval()(tokens()).logits)
    s2ft.prepare(again, {"input_ids": tokens()}, CONFIG)  # of what is no base model: its checkpoints are refused
    with pytest.raises(StateError, match="not in this prepared model's order or not of its base"):
        again.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"))
    twin = prepared()
    twin.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"), strict=False)
    assert equal(deltas(twin), deltas(model))


def test_experts_that_transformers_stores_one_by_one_resume(tmp_path):
    """A checkpoint has the model's own names, which Trainer loads; what is merged has those on the hub."""
    import transformers

    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_local_experts=4)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, use_cache=False, output_router_logits=False)
    whole = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).bfloat16().train()
    on_disk = set(as_stored(whole, whole.state_dict()))
    s2ft.prepare(whole, {"input_ids": tokens()}, s2ft.S2FTConfig(targets={"moe.in": 2, "moe.out": 3}), train=False)
    again = copy.deepcopy(whole)
    trainer(whole, tmp_path).train()
    trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert equal(deltas(again), deltas(whole)) and any(d.any() for d in deltas(whole))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6", dtype="auto").eval()
    with torch.no_grad():
        assert same_bits(loaded(tokens()).logits, whole.eval()(tokens()).logits)
    s2ft.exporters.save_merged(whole, tmp_path / "merged")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert stored.keys() == on_disk and "model.layers.0.mlp.experts.gate_up_proj" not in on_disk
    with pytest.raises(StateError, match="nothing for model.layers.0.mlp.experts.*, but model"):
        again.load_state_dict(stored, strict=False)


def test_a_tied_weight_has_its_delta_once(tmp_path):
    config = s2ft.S2FTConfig(targets={"lm_head.weight": 3, "ffn.out": 2})
    model = prepared(config=config, tie_word_embeddings=True)
    with torch.no_grad():
        for p in s2ft.parameters(model):
            p.normal_(std=1e-4)
    model.save_pretrained(tmp_path)
    other = prepared(config=config, tie_word_embeddings=True)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert equal(deltas(other), deltas(model))
    third = prepared(config=config, tie_word_embeddings=True)
    third.load_state_dict(model.state_dict())
    assert equal(deltas(third), deltas(model))


# --- what does not belong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["seed", "base", "order", "released"])
def test_what_does_not_belong_is_refused_by_name_and_changes_nothing(what):
    model = prepared()
    other = prepared(config=s2ft.S2FTConfig(targets=CONFIG.targets, seed=1)) if what == "seed" else prepared()
    with torch.no_grad():
        for p in s2ft.parameters(other):
            p.normal_(std=1e-2)
        if what == "base":  # which differs in the trained blocks alone
            for block in state_of(other).blocks:
                block.backup.add_(0.25)
                block.write(block.trained())
    if what in ("order", "released"):
        s2ft.release(other)
    given = hf("llama", num_hidden_layers=1).bfloat16().state_dict() if what == "order" else other.state_dict()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(StateError, match="not of (its|this prepared model's) base.*model.layers.0"):
        model.load_state_dict(given)
    assert equal(model.state_dict().values(), before.values())


def test_a_mean_of_two_checkpoints_is_taken():
    """Weights and deltas are averaged each by themselves, and agree up to rounding."""
    model, parts = prepared(torch.float32), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in s2ft.parameters(model):
                p.normal_(std=1e-2)
        parts.append({n: v.clone() for n, v in model.state_dict().items()})
    mean = {n: (v + parts[1][n]) / 2 for n, v in parts[0].items()}
    model.load_state_dict(mean)
    assert all(torch.equal(b.delta, mean[f"{b.name}_delta"]) for b in state_of(model).blocks)
    assert all(torch.equal(b.read(), b.trained()) for b in state_of(model).blocks)


# --- accelerate, plain loops ----------------------------------------------------------------------------------------


def test_accelerate_saves_and_loads_its_state(tmp_path):
    from accelerate import Accelerator

    def run(steps, start=None, stop=None):
        accelerator = Accelerator(cpu=True)
        model = prepared()
        optimizer = torch.optim.AdamW(s2ft.parameters(model), lr=1e-4)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 4)
        model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
        first = 0
        if start:
            accelerator.load_state(str(start))
            first = 2
        for step in range(first, steps):
            ids = tokens(2, 8, seed=step)
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if stop and step == 1:
                accelerator.save_state(str(stop))
        return deltas(model)

    whole = run(4, stop=tmp_path / "state")
    assert equal(run(4, start=tmp_path / "state"), whole)
    shutil.rmtree(tmp_path / "state")


def test_a_plain_loop_saves_state_dicts(tmp_path):
    def run(start=None):
        model = prepared()
        optimizer = torch.optim.AdamW(s2ft.parameters(model), lr=1e-4)
        if start:
            saved = torch.load(start, weights_only=True)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        for step in range(2 if start else 0, 4):
            if step == 2 and not start:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
            ids = tokens(2, 8, seed=step)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return deltas(model)

    whole = run()
    assert equal(run(tmp_path / "state.pt"), whole)


# --- patches of a rollout engine's weights ---------------------------------------------------------------------------


def test_patches_keep_another_models_weights_fresh():
    """After every step they make a plain base model the merged one, bit for bit; nothing is compared or gathered."""
    model, engine = prepared(), hf("llama", num_hidden_layers=1).bfloat16()
    optimizer = torch.optim.AdamW(s2ft.parameters(model), lr=1e-2)
    weights = dict(engine.named_parameters())
    for step in range(2):
        ids = tokens(2, 8, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        fresh = list(s2ft.patches(model))
        for patch in fresh:
            assert patch.indices.dtype == torch.int32 and patch.values.dtype == torch.bfloat16
            assert patch.indices.shape == patch.values.shape and patch.full_shape == weights[patch.name].shape
            patch.apply(weights[patch.name])
        twin = copy.deepcopy(model)
        s2ft.release(twin)
        assert equal(engine.parameters(), twin.parameters())
    assert sum(p.values.numel() for p in fresh) == sum(d.numel() for d in deltas(model))


def test_patches_have_the_names_of_a_checkpoint(tmp_path):
    """Experts that transformers fuses when it loads them: a patch for each of those on disk."""
    import transformers

    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_local_experts=4)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).eval()
    model.save_pretrained(tmp_path / "base")
    s2ft.prepare(model, {"input_ids": tokens()}, s2ft.S2FTConfig(targets={"moe.in": 2, "moe.out": 3}), train=False)
    with torch.no_grad():
        for p in s2ft.parameters(model):
            p.normal_(std=0.1)
    held = load_file(tmp_path / "base" / "model.safetensors")
    for patch in s2ft.patches(model):
        patch.apply(held[patch.name])
    s2ft.exporters.save_merged(model, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert held.keys() == merged.keys() and all(torch.equal(held[n], merged[n]) for n in held)


def test_a_plan_has_the_deltas_that_a_load_assigned(tmp_path):
    model, other = prepared(torch.float32), prepared(torch.float32)
    with torch.no_grad():
        for p in s2ft.parameters(other):
            p.normal_(std=1e-2)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    s2ft.exporters.save_adapter(model, tmp_path / "a")
    s2ft.exporters.save_adapter(other, tmp_path / "b")
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert all(torch.equal(a[n], b[n]) for n in b) and any(b[n].float().abs().sum() for n in b if "delta" in n)


def test_a_plan_prepares_its_base_with_the_same_slices_and_no_data():
    """Written and read as JSON, from a selection that looked at data."""
    base = hf("llama", num_hidden_layers=1).train()
    model, again = copy.deepcopy(base), copy.deepcopy(base)
    config = s2ft.S2FTConfig(CONFIG.targets, selection="weight_activation")
    plan = s2ft.prepare(
        model, {"input_ids": tokens()}, config, calibration=[{"input_ids": tokens(seed=3)}], train=False
    )
    read = s2ft.Plan.from_json(plan.to_json())
    repeated = s2ft.prepare(again, {"input_ids": tokens()}, read, train=False)
    assert repeated.to_dict() == plan.to_dict() and equal(again.state_dict().values(), model.state_dict().values())
    other = hf("llama", num_hidden_layers=1, vocab_size=51)
    with pytest.raises(s2ft.ConfigError, match="the plan is of another base model"):
        s2ft.prepare(other, {"input_ids": tokens()}, read, train=False)
