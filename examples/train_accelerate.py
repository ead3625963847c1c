"""A loop with accelerate, which saves its state and goes on from it.

accelerate launch examples/train_accelerate.py MODEL TEXT OUTPUT [STATE]
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

import s2ft_compile as s2ft

TARGETS = {"ffn.in": 0.05, "ffn.out": 0.05}


def train(model, batches, steps, state=None, save_to=None, stop=None, targets=TARGETS, compiled=True, lr=1e-3):
    """`steps` steps over a list of batches of tokens (int64, batch by length), from `state` on, or until `stop`."""
    accelerator = Accelerator()
    s2ft.prepare(model, {"input_ids": batches[0]}, s2ft.S2FTConfig(targets))
    if compiled:
        model.compile(backend="s2ft")
    optimizer = torch.optim.AdamW(s2ft.parameters(model), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    model, optimizer, schedule = accelerator.prepare(model.train(), optimizer, schedule)
    accelerator.register_for_checkpointing(done := Done())
    if state:
        accelerator.load_state(str(state))
    while done.steps < (stop or steps):
        ids = batches[done.steps % len(batches)].to(accelerator.device)
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        done.steps += 1
    if save_to:
        accelerator.save_state(str(save_to))
    return accelerator.unwrap_model(model)


class Done:
    """How many steps were made, in accelerate's checkpoints."""

    def __init__(self):
        self.steps = 0

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


if __name__ == "__main__":
    name, text, output, *state = sys.argv[1:]
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    ids = torch.tensor(tokenizer(Path(text).read_text())["input_ids"])
    batches = list(ids[: len(ids) // 2048 * 2048].view(-1, 4, 512))
    trained = train(model, batches, 100, *state, save_to=f"{output}/state")
    if Accelerator().is_main_process:  # of several, each of which has the whole model
        s2ft.exporters.save_merged(trained, Path(output) / "merged")
