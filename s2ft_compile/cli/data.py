"""What a person brings: a model folder, its tokenizer and records of text (`records`), turned into tensors.

Every block of tokens has the same length, so a training run compiles once: running text is cut into blocks, examples
are padded on the right, or packed. There is no attention mask: under causal attention nothing looks at the padding that
follows it, and its labels are `IGNORE`. Of packed examples each starts at position 0 again, from which transformers
tells that it looks at none before it.
"""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from s2ft_compile.config import check_choice
from s2ft_compile.errors import ConfigError
from s2ft_compile.quantized import quantized_in

from .pieces import in_pieces
from .quantize import check_not_stored, check_some, on_one_device, quantization, stored_as
from .records import Records

DTYPES = ("auto", "float32", "bfloat16", "float16")
IGNORE = -100  # the label that a cross-entropy skips


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
    position_ids: torch.Tensor | None = None  # of packed examples

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index) -> dict[str, torch.Tensor]:
        positions = {} if self.position_ids is None else {"position_ids": self.position_ids[index]}
        return {"input_ids": self.input_ids[index], "labels": self.labels[index], **positions}

    def take(self, indices) -> "Blocks":
        positions = None if self.position_ids is None else self.position_ids[indices]
        return Blocks(self.input_ids[indices], self.labels[indices], position_ids=positions)


def tokenize(records: Records, tokenizer, seq_len: int, packing: bool = False) -> Blocks:
    """Records as blocks of at most `seq_len` tokens; with packing, several examples in one. Raises `ConfigError` when
    they are too few or do not fit.
    """
    if records.form == "text":
        return cut(_encode(tokenizer, [row["text"] for row in records.rows], end=True), seq_len)
    encode = _encode_prompt if records.form == "prompt" else _chat_encoder(tokenizer)
    examples = [encode(tokenizer, row) for row in records.rows]
    return (pack if packing else pad)(examples, seq_len, _pad_id(tokenizer))


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


Example = tuple[list[int], list[bool]]  # tokens, and which of them to learn


def pad(examples: Sequence[Example], seq_len: int, pad_id: int) -> Blocks:
    """Each example cut at `seq_len` and padded on the right to one length."""
    kept = _learnable(examples, seq_len)
    longest = max(len(tokens) for tokens, _ in kept)
    return _filled([[example] for example in kept], min(seq_len, -(-longest // 16) * 16), pad_id, examples)


def pack(examples: Sequence[Example], seq_len: int, pad_id: int) -> Blocks:
    """Examples cut at `seq_len`, the longest first, each into the fullest block that has room for it (TRL's "bfd")."""
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    kept = _learnable(examples, seq_len)
    lengths = Dataset.from_dict({"input_ids": [[i] * len(tokens) for i, (tokens, _) in enumerate(kept)]})
    rows = pack_dataset(lengths, seq_len, "bfd")["input_ids"]
    groups = [[kept[i] for i in dict.fromkeys(row)] for row in rows]
    if len(groups) < 2:
        raise ConfigError(
            f"all {len(kept)} examples fit into one block of {seq_len} tokens, and at least two blocks are needed (one "
            f"to train on, one held out); use a shorter sequence, or no packing"
        )
    return _filled(groups, seq_len, pad_id, examples, positions=True)


def _learnable(examples: Sequence[Example], seq_len: int) -> list[Example]:
    kept = [(tokens[:seq_len], learn[:seq_len]) for tokens, learn in examples]
    kept = [(tokens, learn) for tokens, learn in kept if any(learn[1:])]  # the first token is never predicted
    if len(kept) < 2:
        raise ConfigError(
            f"{len(kept)} of {len(examples)} examples have something to learn within {seq_len} tokens, "
            f"at least two are needed; the longest has {max(len(t) for t, _ in examples)} tokens"
        )
    return kept


def _filled(groups: list[list[Example]], length: int, pad_id: int, examples, positions: bool = False) -> Blocks:
    """A block for each group of examples, one after the other, and padding behind them."""
    input_ids = torch.full((len(groups), length), pad_id, dtype=torch.int64)
    labels = torch.full((len(groups), length), IGNORE, dtype=torch.int64)
    places = torch.zeros((len(groups), length), dtype=torch.int64)
    for i, group in enumerate(groups):
        at = 0
        for tokens, learn in group:
            ids, end = torch.tensor(tokens, dtype=torch.int64), at + len(tokens)
            input_ids[i, at:end] = ids
            labels[i, at:end] = torch.where(torch.tensor(learn), ids, IGNORE)
            if at:
                labels[i, at] = IGNORE  # the token before it is another example's
            places[i, at:end] = torch.arange(len(tokens))
            at = end
        places[i, at:] = torch.arange(length - at)
    seen = sum(len(group) for group in groups)
    truncated = sum(len(tokens) > length for tokens, _ in examples)
    return Blocks(input_ids, labels, truncated, len(examples) - seen, places if positions else None)


def split(blocks: Blocks, share: float, seed: int, shuffle: bool) -> tuple[Blocks, Blocks]:
    """(to train on, held out): the last blocks of a text, a random draw of examples; at least one of each but for a
    share of 0, and no more than 64 held out, which is measured twice.
    """
    count = min(max(1, round(share * len(blocks))), 64, len(blocks) - 1) if share else 0
    order = torch.arange(len(blocks))
    if shuffle:
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    return blocks.take(order[: len(blocks) - count]), blocks.take(order[len(blocks) - count :])


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
    """(tokenizer, row) -> (tokens, which to learn): the assistant's turns, and never another's."""
    template = assistant_template(tokenizer)
    if template is None:
        return _encode_chat_by_prefixes

    def encode(tokenizer, row):
        encoded = tokenizer.apply_chat_template(
            row["messages"],
            tools=row.get("tools"),
            tokenize=True,
            return_dict=True,
            chat_template=template,
            return_assistant_tokens_mask=True,
        )
        return encoded["input_ids"], [bool(m) for m in encoded["assistant_masks"]]

    return encode


def _encode_chat_by_prefixes(tokenizer, row) -> Example:
    """For a template without marks: an assistant's turn is what the conversation up to it adds to the one before it.

    Raises `ConfigError` where a template writes earlier turns in another way once later ones follow.
    """
    messages = row["messages"]

    def written(count: int, prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(
            messages[:count], tools=row.get("tools"), tokenize=False, add_generation_prompt=prompt
        )

    whole, spans = written(len(messages)), []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, until = (written(i, prompt=True) if i else ""), written(i + 1)
            if not whole.startswith(before) or not whole.startswith(until):
                raise ConfigError(
                    "the tokenizer's chat template neither marks what the assistant says ({% generation %}) nor keeps "
                    "earlier turns as they are when later ones follow, so the user's turns cannot be told from the "
                    "assistant's; add the marks to the template, or use the fields 'prompt' and 'completion'"
                )
            spans.append((len(before), len(until)))
    if not tokenizer.is_fast:
        raise ConfigError(
            "the tokenizer's chat template does not mark what the assistant says ({% generation %}), and this "
            "tokenizer does not tell which text a token is of; add the marks to the template"
        )
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    learn = [
        any(start < end and low < end and start < high for start, end in spans)
        for low, high in encoded["offset_mapping"]
    ]
    return encoded["input_ids"], learn


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
        content = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) if folder.is_dir() else "a file"
        raise ConfigError(f"{model} is no model folder: config.json is missing (found: {content or 'nothing'})")
    with _one_line(model, "model"):
        return AutoConfig.from_pretrained(model)


def model_class(config):
    """The class that a configuration names in `architectures`, or else AutoModel."""
    import transformers

    names = getattr(config, "architectures", None) or ()
    return next((cls for name in names if (cls := getattr(transformers, name, None))), transformers.AutoModel)


def load_model(model: str | Path, dtype: str = "auto", quantize: str = "none") -> nn.Module:
    """A model in eval mode, from a folder or hub id. dtype: `auto` (as stored) or the name of one. quantize: its linear
    layers but the head, on the device that trains, a weight at a time, in pieces; a checkpoint that is stored quantized
    is loaded as it is. Raises `ConfigError`."""
    check_choice("dtype", dtype, DTYPES)
    config = load_config(model)
    check_not_stored(model, config, quantize)
    if stored_as(config):
        how = on_one_device()
    else:
        how = quantization(quantize, getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype))
    with _one_line(model, "model"), in_pieces(quantize):
        loaded = model_class(config).from_pretrained(model, dtype=dtype, **how).eval()
    check_some(loaded, quantize)
    return _with_loss(loaded)


def load_structure(model: str | Path, dtype: str = "auto") -> nn.Module:
    """A model without its weights, on the `meta` device: all that `analyze` needs, whatever the model's size."""
    config = load_config(model)
    cls = model_class(config)
    with _one_line(model, "model"), torch.device("meta"):
        built = getattr(cls, "_from_config", getattr(cls, "from_config", None))(config).eval()
    return _with_loss(built if dtype == "auto" else built.to(getattr(torch, dtype)))


def checkpoint_if(model: nn.Module, checkpointing: bool | None) -> None:
    """`checkpoint_layers` where that is wanted: None is for a quantized base, of a model that can."""
    if checkpointing is None:
        checkpointing = bool(quantized_in(model)) and getattr(model, "supports_gradient_checkpointing", False)
    if checkpointing:
        checkpoint_layers(model)


def checkpoint_layers(model: nn.Module) -> None:
    """Has each layer keep its input alone, and computed again in the backward. Raises `ConfigError` for a model that
    transformers cannot do that to."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"transformers has no gradient checkpointing for {type(model).__name__}; a smaller activation budget "
            f"(--activation-budget 0.5) takes less memory too"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the method's new name is not in all versions yet
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if getattr(model, "_require_grads_hooks", None) or hasattr(model, "_require_grads_hook"):
        model.disable_input_require_grads()  # a hook that only reentrant checkpoints need, and that breaks the graph


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
        if isinstance(error, (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)):
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
