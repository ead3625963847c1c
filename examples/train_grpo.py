"""TRL's GRPOTrainer: it generates with the trained weights, which are in their places, and compares with the base.

python examples/train_grpo.py MODEL PROMPTS.jsonl OUTPUT        rows of prompt
"""

import sys
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import s2ft_compile as s2ft

TARGETS = {"ffn.in": 0.05, "ffn.out": 0.05}


def brevity(completions, **_) -> list[float]:
    """A reward to start with: short answers."""
    return [-float(len(completion)) for completion in completions]


def make(model, tokenizer, dataset, output, reward=brevity, beta=0.04, targets=TARGETS, compiled=True, **arguments):
    """beta: of the divergence from the base. Given to GRPOConfig it would load a second model."""
    s2ft.prepare(model, {"input_ids": model.dummy_inputs["input_ids"]}, s2ft.S2FTConfig(targets))
    if compiled:
        s2ft.compile_layers(model)
    config = GRPOConfig(str(output), **{"learning_rate": 1e-4, "beta": 0.0, **arguments})
    trainer = GRPOTrainer(model, reward, args=config, train_dataset=dataset, processing_class=tokenizer)
    trainer.beta, trainer.ref_model = beta, s2ft.Reference(model)
    return trainer


if __name__ == "__main__":
    name, data, output = sys.argv[1:]
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    trainer = make(model, tokenizer, load_dataset("json", data_files=data, split="train"), output)
    trainer.train()
    if trainer.is_world_process_zero():  # of several, each of which has the whole model
        s2ft.exporters.save_merged(model, Path(output) / "merged")
