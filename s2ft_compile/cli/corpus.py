"""The demo's two texts, which every Python installation has: the standard library's documentation and its
source code, and a tokenizer for them.
"""

import ast
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from s2ft_compile.errors import ConfigError

from .data import Blocks, cut

VOCABULARY = 1024
HELD_OUT = 32  # blocks of each text
CHARACTERS = 2_000_000  # of source code, and with it the docstrings in it


@dataclass(frozen=True)
class Text:
    train: Blocks
    held_out: Blocks


def corpus(length: int, seed: int) -> tuple[Text, Text, Any]:
    """(documentation, source code, tokenizer), the texts in blocks of `length` tokens. Every eighth module is
    held out of both.

    The tokenizer is built on the documentation alone: embeddings do not train afterwards, so a token should
    be one that the base model has seen.
    """
    raw = {"docs": ([], []), "code": ([], [])}
    for number, (docs, code) in enumerate(modules()):
        raw["docs"][number % 8 == 0].append(docs)
        raw["code"][number % 8 == 0].append(code)
    for number, topic in enumerate(topics()):
        raw["docs"][number % 8 == 0].append(topic)
    raw = {name: ["\n\n".join(filter(None, part)) for part in parts] for name, parts in raw.items()}
    tokenizer = build_tokenizer(raw["docs"][0])
    docs, code = (_blocks(tokenizer, *raw[name], length, seed) for name in ("docs", "code"))
    return docs, code, tokenizer


def _blocks(tokenizer, train: str, held_out: str, length: int, seed: int) -> Text:
    encoded = tokenizer([train, held_out], verbose=False)["input_ids"]
    blocks = [cut([ids], length) for ids in encoded]
    order = torch.randperm(len(blocks[1]), generator=torch.Generator().manual_seed(seed))
    return Text(blocks[0], blocks[1].take(order[:HELD_OUT]))


def modules() -> Iterator[tuple[str, str]]:
    """(docstrings, code without docstrings and comments) of the standard library's modules, in order of their
    names.
    """
    library = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings"}
    paths = [p for p in sorted(library.rglob("*.py")) if not skip & set(p.relative_to(library).parts)]
    characters = 0
    for path in paths:
        if characters > CHARACTERS:
            return
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # templates and tables that are no modules
            continue
        docs = strip_docstrings(tree)
        code = ast.unparse(tree)
        characters += len(code)
        yield docs, code
    if not characters:
        raise ConfigError(f"the standard library in {library} has no source code; the demo reads it as its text")


def strip_docstrings(tree: ast.Module) -> str:
    """Takes every docstring out of `tree`, and returns them."""
    taken = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text is not None:
                taken.append(text)
                node.body = node.body[1:] or [ast.Pass()]
    return "\n\n".join(taken)


def topics() -> list[str]:
    """The language reference that `help()` shows."""
    try:
        from pydoc_data.topics import topics as texts
    except ImportError:  # some distributions package it separately
        return []
    return [texts[name] for name in sorted(texts)]


def build_tokenizer(text: str):
    """A byte-level BPE of `VOCABULARY` tokens, trained on the first part of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([text[:1_000_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
