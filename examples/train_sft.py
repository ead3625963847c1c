"""TRL's SFTTrainer with its own defaults: checkpointing, a chunked loss, the completions alone where there are prompts.

python examples/train_sft.py MODEL DATA.jsonl OUTPUT
"""

import sys
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import s2ft_compile as s2ft

TARGETS = {"ffn.in": 0.05, "ffn.out": 0.05}


def make(model, tokenizer, dataset, output, targets=TARGETS, compiled=True, **arguments):
    """An SFTTrainer. Compiled by layer: checkpointing and the chunked loss lie outside of the layers."""
    s2ft.prepare(model, {"input_ids": model.dummy_inputs["input_ids"]}, s2ft.S2FTConfig(targets))
    if compiled:
        s2ft.compile_layers(model)
    given = {"learning_rate": 1e-3, **arguments}
    return SFTTrainer(model, SFTConfig(str(output), **given), train_dataset=dataset, processing_class=tokenizer)


if __name__ == "__main__":
    name, data, output = sys.argv[1:]
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    trainer = make(model, tokenizer, load_dataset("json", data_files=data, split="train"), output)
    trainer.train()
    if trainer.is_world_process_zero():  # of several, each of which has the whole model
        s2ft.exporters.save_merged(model, Path(output) / "merged")
