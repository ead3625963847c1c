"""TRL's RewardTrainer. The head that gives the score is new, so all of it trains.

python examples/train_reward.py MODEL PREFERENCES.jsonl OUTPUT        rows of chosen, rejected
"""

import sys
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

import s2ft_compile as s2ft

TARGETS = {"ffn.in": 0.05, "ffn.out": 0.05, "score.weight": 1.0}


def make(model, tokenizer, dataset, output, targets=TARGETS, compiled=True, **arguments):
    """model: with one label, and the tokenizer's padding token in its configuration."""
    s2ft.prepare(model, {"input_ids": model.dummy_inputs["input_ids"]}, s2ft.S2FTConfig(targets))
    if compiled:
        s2ft.compile_layers(model)
    given = {"learning_rate": 1e-4, **arguments}
    return RewardTrainer(model, RewardConfig(str(output), **given), train_dataset=dataset, processing_class=tokenizer)


if __name__ == "__main__":
    name, data, output = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=1, dtype="auto", pad_token_id=tokenizer.pad_token_id
    )
    trainer = make(model, tokenizer, load_dataset("json", data_files=data, split="train"), output)
    trainer.train()
    if trainer.is_world_process_zero():  # of several, each of which has the whole model
        s2ft.exporters.save_merged(model, Path(output) / "merged")
