"""What a person brings: a model folder, its tokenizer and a file of text, checked and turned into tensors.

Every block of tokens has the same length, so a training run compiles once: running text is cut into blocks,
examples are padded on the right. There is no attention mask: under causal attention nothing looks at the
padding that follows it, and its labels are `IGNORE`.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from s2ft_compile.config import check_choice
from s2ft_compile.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
IGNORE = -100  # the label that a cross-entropy skips
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
FORMS = (
    '{"text": "..."}',
    '{"prompt": "...", "completion": "..."}',
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
)
VALID = f"valid: a plain text file, or a .jsonl file whose lines are all {', or all '.join(FORMS)}"


# Files ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Records:
    """The rows of a data file, all of one form: `text`, `prompt` (with `completion`) or `messages`."""

    form: str
    rows: tuple[Mapping[str, Any], ...]


def read_records(path: Path) -> Records:
    """A plain text or JSONL file as records. Raises `ConfigError` with the line and the valid forms."""
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"data file {path} {what}; {VALID}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark first
    except UnicodeDecodeError as error:
        raise ConfigError(f"data file {path} is not UTF-8 text (byte {error.start}); {VALID}") from None
    if not text.strip():
        raise ConfigError(f"data file {path} is empty; {VALID}")
    if path.suffix.lower() not in JSON_SUFFIXES:
        return Records("text", ({"text": text},))
    rows = [_row(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    forms = [form for _, form, _ in rows]
    for number, form, _ in rows:
        if form != forms[0]:
            raise ConfigError(f"{path}, line {number}: has {form!r}, but line {rows[0][0]} has {forms[0]!r}; {VALID}")
    return Records(forms[0], tuple(row for _, _, row in rows))


def _row(path: Path, number: int, line: str) -> tuple[int, str, Mapping]:
    """(line number, form, row) of one line of JSON."""

    def refuse(found):
        raise ConfigError(f"{path}, line {number}: {found}; {VALID}")

    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        refuse(f"not JSON ({error.msg} at column {error.colno})")
    if not isinstance(row, dict):
        refuse(f"a JSON object was expected, found {_kind(row)}")
    form = next((form for form in ("text", "prompt", "messages") if form in row), None)
    if form is None:
        refuse(f"none of the known fields, found {', '.join(map(repr, row)) or 'an empty object'}")
    if any("\ud800" <= c <= "\udfff" for c in json.dumps(row, ensure_ascii=False)):
        refuse("half of a surrogate pair (\\ud800 to \\udfff), which is no text")
    if form == "messages":
        _check_messages(row["messages"], refuse)
    for field in {"text": ("text",), "prompt": ("prompt", "completion")}.get(form, ()):
        if not isinstance(row.get(field), str):
            refuse(f"{field!r} is {_kind(row[field]) if field in row else 'missing'}, a string was expected")
        if not row[field] and field != "prompt":
            refuse(f"{field!r} is empty")
    return number, form, row


def _check_messages(messages: Any, refuse) -> None:
    if not isinstance(messages, list) or not messages:
        refuse(f"'messages' is {_kind(messages)}, a list of messages was expected")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            refuse("a message needs the strings 'role' and 'content'")
    if all(message["role"] != "assistant" for message in messages):
        refuse("no message has the role 'assistant', so there is nothing to train on")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return "an empty list" if value == [] else names.get(type(value), "a number")


# Tokens -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """Blocks of tokens, all of one length. `input_ids` and `labels` are int64 of shape (blocks, length).

    A label is the token itself (the model shifts), or `IGNORE` where nothing is to be learned. truncated: how
    many examples were cut at the end. dropped: how many were left out, with nothing to learn in what is left.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    truncated: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index) -> dict[str, torch.Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}

    def take(self, indices) -> "Blocks":
        return Blocks(self.input_ids[indices], self.labels[indices])


def tokenize(records: Records, tokenizer, seq_len: int) -> Blocks:
    """Records as blocks of at most `seq_len` tokens. Raises `ConfigError` when they are too few or do not
    fit.
    """
    if records.form == "text":
        return cut(_encode(tokenizer, [row["text"] for row in records.rows], end=True), seq_len)
    encode = _encode_prompt if records.form == "prompt" else _chat_encoder(tokenizer)
    return pad([encode(tokenizer, row) for row in records.rows], seq_len, _pad_id(tokenizer))


def cut(documents: Sequence[Sequence[int]], seq_len: int) -> Blocks:
    """Documents one after the other, cut into blocks of `seq_len`; what does not fill the last one is
    dropped.
    """
    tokens = torch.cat([torch.tensor(document, dtype=torch.int64) for document in documents])
    count = len(tokens) // seq_len
    if count < 2:
        raise ConfigError(
            f"the data has {len(tokens)} tokens, which is less than two blocks of {seq_len} (one to "
            f"train on, one held out); use a sequence length of at most {max(len(tokens) // 2, 1)}"
        )
    blocks = tokens[: count * seq_len].view(count, seq_len)
    return Blocks(blocks, blocks.clone())


def pad(examples: Sequence[tuple[list[int], list[bool]]], seq_len: int, pad_id: int) -> Blocks:
    """(tokens, which of them to learn) of each example, cut at `seq_len` and padded on the right to one
    length.
    """
    kept = [(tokens[:seq_len], learn[:seq_len]) for tokens, learn in examples]
    kept = [(tokens, learn) for tokens, learn in kept if any(learn[1:])]  # the first token is never predicted
    if len(kept) < 2:
        raise ConfigError(
            f"{len(kept)} of {len(examples)} examples have something to learn within {seq_len} tokens, "
            f"at least two are needed; the longest has {max(len(t) for t, _ in examples)} tokens"
        )
    longest = max(len(tokens) for tokens, _ in kept)
    length = min(seq_len, -(-longest // 16) * 16)
    input_ids = torch.full((len(kept), length), pad_id, dtype=torch.int64)
    labels = torch.full((len(kept), length), IGNORE, dtype=torch.int64)
    for i, (tokens, learn) in enumerate(kept):
        ids = torch.tensor(tokens, dtype=torch.int64)
        input_ids[i, : len(ids)] = ids
        labels[i, : len(ids)] = torch.where(torch.tensor(learn), ids, IGNORE)
    truncated = sum(len(tokens) > seq_len for tokens, _ in examples)
    return Blocks(input_ids, labels, truncated, len(examples) - len(kept))


def split(blocks: Blocks, share: float, seed: int, shuffle: bool) -> tuple[Blocks, Blocks]:
    """(to train on, held out): the last blocks of a text, a random draw of examples; at least one of each,
    and no more than 64 held out, which is measured twice.
    """
    count = min(max(1, round(share * len(blocks))), 64, len(blocks) - 1)
    order = torch.arange(len(blocks))
    if shuffle:
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    return blocks.take(order[:-count]), blocks.take(order[-count:])


def _encode(tokenizer, texts: list[str], end: bool) -> list[list[int]]:
    """Token ids of each text, with the end-of-text token behind where there is one and `end` asks for it."""
    documents = tokenizer(texts, verbose=False)["input_ids"]  # verbose: a text longer than the model is to be cut
    eos = tokenizer.eos_token_id
    return [ids if not end or eos is None or ids[-1:] == [eos] else [*ids, eos] for ids in documents]


def _encode_prompt(tokenizer, row: Mapping[str, str]) -> tuple[list[int], list[bool]]:
    """Prompt and completion as one text; learned is what follows the tokens shared with the prompt alone."""
    (prompt,) = _encode(tokenizer, [row["prompt"]], end=False) if row["prompt"] else ([],)
    (tokens,) = _encode(tokenizer, [row["prompt"] + row["completion"]], end=True)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, tokens)))
    return tokens, [i >= shared for i in range(len(tokens))]


def _chat_encoder(tokenizer):
    """(tokenizer, row) -> (tokens, which to learn): the assistant's turns, or all of it if they cannot be
    told.
    """
    template = assistant_template(tokenizer)

    def encode(tokenizer, row):
        encoded = tokenizer.apply_chat_template(
            row["messages"],
            tokenize=True,
            return_dict=True,
            chat_template=template,
            return_assistant_tokens_mask=bool(template),
        )
        tokens = encoded["input_ids"]
        return tokens, [bool(m) for m in encoded["assistant_masks"]] if template else [True] * len(tokens)

    return encode


def assistant_template(tokenizer) -> str | None:
    """The chat template with the assistant's turns marked, as the tokenizer or TRL knows it; None if neither
    does.
    """
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if not tokenizer.chat_template:
        raise ConfigError(
            "the data has 'messages', but the model's tokenizer has no chat template; use the fields "
            "'prompt' and 'completion', or a tokenizer with a chat template"
        )
    if has_generation_markers(tokenizer.chat_template):
        return tokenizer.chat_template
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:  # TRL knows the templates of some model families
        return None


def _pad_id(tokenizer) -> int:
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


# Models -----------------------------------------------------------------------------------------------------


def load_config(model: str | Path):
    """The configuration of a Hugging Face folder or hub id. Raises `ConfigError` with one line."""
    from transformers import AutoConfig

    folder = Path(model)
    if not folder.exists() and (folder.is_absolute() or len(folder.parts) != 2 and "/" in str(model)):
        raise ConfigError(f"model folder {model} does not exist; valid: a Hugging Face folder, or the id of a model")
    if folder.exists() and not (folder / "config.json").is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) if folder.is_dir() else "a file"
        raise ConfigError(f"{model} is no model folder: config.json is missing (found: {found or 'nothing'})")
    with _one_line(model, "model"):
        return AutoConfig.from_pretrained(model)


def model_class(config):
    """The class that a configuration names in `architectures`, or else AutoModel."""
    import transformers

    names = getattr(config, "architectures", None) or ()
    return next((cls for name in names if (cls := getattr(transformers, name, None))), transformers.AutoModel)


def load_model(model: str | Path, dtype: str = "auto") -> nn.Module:
    """A model in eval mode, from a folder or hub id. dtype: `auto` (as stored) or the name of one."""
    check_choice("dtype", dtype, DTYPES)
    config = load_config(model)
    with _one_line(model, "model"):
        return _with_loss(model_class(config).from_pretrained(model, dtype=dtype).eval())


def load_structure(model: str | Path, dtype: str = "auto") -> nn.Module:
    """A model without its weights, on the `meta` device: all that `analyze` needs, whatever the model's size."""
    config = load_config(model)
    cls = model_class(config)
    with _one_line(model, "model"), torch.device("meta"):
        made = getattr(cls, "_from_config", getattr(cls, "from_config", None))(config).eval()
    return _with_loss(made if dtype == "auto" else made.to(getattr(torch, dtype)))


def takes_labels(model: nn.Module) -> bool:
    """Whether the forward computes a loss."""
    return "labels" in inspect.signature(model.forward).parameters


def _with_loss(model: nn.Module) -> nn.Module:
    """Looks up a loss that transformers chooses by the model's name: the warning where it knows none (GPT-2's) would
    end the compiled graph before the loss.
    """
    if takes_labels(model) and hasattr(model, "loss_function"):
        model.loss_function = model.loss_function
    return model


def load_tokenizer(model: str | Path):
    from transformers import AutoTokenizer

    with _one_line(model, "tokenizer"):
        return AutoTokenizer.from_pretrained(model)


class _one_line:
    """Turns what transformers raises for a missing or damaged folder into one `ConfigError`."""

    def __init__(self, model, what):
        self.model, self.what = model, what

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if isinstance(error, (OSError, ValueError, KeyError, ImportError, RuntimeError)):
            lines = str(error).strip().splitlines() or [kind.__name__]
            raise ConfigError(
                f"no {self.what} could be loaded from {self.model}: {lines[0]} "
                f"Valid: a Hugging Face folder, or the id of a model that can be reached"
            ) from error


def _pixels(model: nn.Module, config, batch: int) -> torch.Tensor:
    """Random pixels of the configuration's size, in the model's type: (batch, channels, height, width)."""
    size, weight = config.image_size, next(model.parameters())
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    shape = (batch, getattr(config, "num_channels", 3), height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight)


def example_inputs(model: nn.Module, batch: int = 2, length: int = 16) -> dict[str, torch.Tensor]:
    """Inputs to trace `model` with: random tokens, int64 of shape (batch, length), on the model's device.

    An encoder-decoder gets decoder tokens too, a model of images random pixels of its configuration's size,
    another model without token embeddings its own `dummy_inputs`.
    """
    device = next(model.parameters()).device
    config = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text_config, "vocab_size", None)
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values" and getattr(config, "image_size", None):
        return {main: _pixels(model, config, batch)}
    if main != "input_ids" or not vocabulary:
        dummy = getattr(model, "dummy_inputs", {})
        if main not in dummy:
            raise ConfigError(
                f"no example inputs are known for {type(model).__name__}: it takes {main}, and has "
                f"neither a vocabulary nor dummy_inputs with that name"
            )
        return {name: value.to(device) for name, value in dummy.items()}
    generator = torch.Generator().manual_seed(0)
    names = ("input_ids", "decoder_input_ids") if getattr(config, "is_encoder_decoder", False) else ("input_ids",)
    return {name: torch.randint(vocabulary, (batch, length), generator=generator).to(device) for name in names}
