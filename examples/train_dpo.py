"""TRL's DPOTrainer. The reference is the base in the same weights (`s2ft.Reference`): no second copy of the model.

python examples/train_dpo.py MODEL PREFERENCES.jsonl OUTPUT        rows of prompt, chosen, rejected
"""

import sys
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import s2ft_compile as s2ft

TARGETS = {"ffn.in": 0.05, "ffn.out": 0.05}


def make(model, tokenizer, dataset, output, targets=TARGETS, compiled=True, **arguments):
    s2ft.prepare(model, {"input_ids": model.dummy_inputs["input_ids"]}, s2ft.S2FTConfig(targets))
    if compiled:
        s2ft.compile_layers(model)
    return DPOTrainer(
        model,
        ref_model=s2ft.Reference(model),
        args=DPOConfig(str(output), **{"learning_rate": 1e-4, **arguments}),
        train_dataset=dataset,
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    name, data, output = sys.argv[1:]
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    trainer = make(model, tokenizer, load_dataset("json", data_files=data, split="train"), output)
    trainer.train()
    if trainer.is_world_process_zero():  # of several, each of which has the whole model
        s2ft.exporters.save_merged(model, Path(output) / "merged")
