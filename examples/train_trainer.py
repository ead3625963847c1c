"""transformers' Trainer: prepare the model first. Everything else is Trainer's own, checkpoints and resuming included.

python examples/train_trainer.py MODEL TEXT OUTPUT [--resume]
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import s2ft_compile as s2ft

TARGETS = {"ffn.in": 0.05, "ffn.out": 0.05}


def make(model, dataset, output, targets=TARGETS, compiled=True, **arguments):
    """A Trainer of a plain model. dataset: rows of `input_ids` and `labels`, all of one length."""
    s2ft.prepare(model, {"input_ids": model.dummy_inputs["input_ids"]}, s2ft.S2FTConfig(targets))
    if compiled:
        model.compile(backend="s2ft")
    given = {"learning_rate": 1e-3, "per_device_train_batch_size": 4, **arguments}
    return Trainer(model, TrainingArguments(str(output), **given), train_dataset=dataset)


if __name__ == "__main__":
    name, text, output, *rest = sys.argv[1:]
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    ids = tokenizer(Path(text).read_text())["input_ids"]
    rows = [ids[i : i + 512] for i in range(0, len(ids) - 511, 512)]
    trainer = make(model, [{"input_ids": row, "labels": row} for row in rows], output)
    trainer.train(resume_from_checkpoint=bool(rest))
    if trainer.is_world_process_zero():  # of several, each of which has the whole model
        s2ft.exporters.save_merged(model, Path(output) / "merged")  # or save_adapter
