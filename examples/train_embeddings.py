"""sentence-transformers: prepare the SentenceTransformer itself, whose forward takes a dict of features.

python examples/train_embeddings.py MODEL PAIRS.jsonl OUTPUT        rows of anchor, positive
"""

import sys
from pathlib import Path

import torch
from datasets import load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss

import s2ft_compile as s2ft

TARGETS = {"ffn.in": 0.05, "ffn.out": 0.05}


def make(model, dataset, output, targets=TARGETS, compiled=True, **arguments):
    features = {k: v for k, v in model.tokenize(["an example", "and another one"]).items() if torch.is_tensor(v)}
    s2ft.prepare(model, (features,), s2ft.S2FTConfig(targets))
    if compiled:
        s2ft.compile_layers(model)
    args = SentenceTransformerTrainingArguments(str(output), **{"learning_rate": 1e-3, **arguments})
    return SentenceTransformerTrainer(model, args, train_dataset=dataset, loss=MultipleNegativesRankingLoss(model))


if __name__ == "__main__":
    name, data, output = sys.argv[1:]
    model = SentenceTransformer(name)
    make(model, load_dataset("json", data_files=data, split="train"), output).train()
    s2ft.release(model)  # a plain SentenceTransformer with the trained weights
    model.save(str(Path(output) / "trained"))
