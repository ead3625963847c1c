"""PyTorch Lightning: prepare the model, then give it to a LightningModule; its checkpoints hold the deltas.

python examples/train_lightning.py MODEL TEXT OUTPUT
"""

import sys
from pathlib import Path

import pytorch_lightning as lightning
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import s2ft_compile as s2ft

TARGETS = {"ffn.in": 0.05, "ffn.out": 0.05}


class Module(lightning.LightningModule):
    """Automatic optimization: the step is given a closure, in which the gradients are made."""

    def __init__(self, model, targets=TARGETS, compiled=True, lr=1e-3):
        super().__init__()
        s2ft.prepare(model, {"input_ids": model.dummy_inputs["input_ids"]}, s2ft.S2FTConfig(targets))
        if compiled:
            model.compile(backend="s2ft")
        self.model, self.lr = model, lr

    def training_step(self, ids, _):
        return self.model(input_ids=ids, labels=ids).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(s2ft.parameters(self.model), lr=self.lr, weight_decay=0.0)


if __name__ == "__main__":
    name, text, output = sys.argv[1:]
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    ids = torch.tensor(tokenizer(Path(text).read_text())["input_ids"])
    rows = torch.utils.data.DataLoader(list(ids[: len(ids) // 512 * 512].view(-1, 512)), batch_size=4)
    lightning.Trainer(max_epochs=1, default_root_dir=output).fit(Module(model), rows)
    s2ft.exporters.save_merged(model, Path(output) / "merged")
