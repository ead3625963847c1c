"""What onnxruntime-genai needs beside a graph with a KV cache: a genai_config.json.

It finds the graph's values by the names that stand there, makes the attention mask and the positions itself, and
takes adapters as `.onnx_adapter` files. Source: microsoft/onnxruntime-genai, src/config.h and models/builders/base.py.
"""

import json
from pathlib import Path
from typing import Any

from torch import nn

from s2ft_compile.errors import ConfigError

FILE = "genai_config.json"
TYPE = "decoder"  # its name for any decoder-only graph; those of model families add nothing for such a graph
CACHE_NAMES = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
PRESENT_NAMES = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}


def write_genai_config(module: nn.Module, graph: Any, file: Path, name: str) -> None:
    """Writes the configuration of the graph of `module` that will be called `name`. Raises `ConfigError`."""
    config = genai_config(module.config.get_text_config(), tokens_of(module), graph, name)
    file.write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")


def tokens_of(module: nn.Module) -> dict[str, Any]:
    """What the configuration says of tokens. Raises `ConfigError` for what the model's own lacks."""
    config = getattr(module, "config", None)
    sources = (getattr(module, "generation_config", None), config and config.get_text_config())

    def find(name: str, default: Any = None) -> Any:
        values = [getattr(source, name, None) for source in sources]
        return next((value for value in values if value is not None), default)

    needed = {"eos_token_id": find("eos_token_id"), "max_position_embeddings": find("max_position_embeddings")}
    for name, value in needed.items():
        if value is None or value == []:
            raise ConfigError(
                f"genai_config.json needs the model's {name}, and its configuration has none; set model.config.{name}"
            )
    ends = needed["eos_token_id"]
    last = ends if isinstance(ends, int) else ends[0]
    return {
        "bos_token_id": find("bos_token_id", last),
        "eos_token_id": ends,
        "pad_token_id": find("pad_token_id", last),
        "context_length": needed["max_position_embeddings"],
        "vocab_size": find("vocab_size"),
    }


def genai_config(config: Any, tokens: dict[str, Any], graph: Any, name: str) -> dict[str, Any]:
    """The configuration, sizes of the cache read from the graph. config: Hugging Face's. Raises `ConfigError`."""
    inputs = {value.name: value.shape for value in graph.inputs}
    keys = [shape for value, shape in inputs.items() if value.endswith(".key")]
    values = [shape for value, shape in inputs.items() if value.endswith(".value")]
    if any(k[i] != v[i] for k, v in zip(keys, values) for i in (1, 3)):
        raise ConfigError(
            "onnxruntime-genai takes keys and values of one shape, and this model's differ: "
            f"{list(keys[0])} and {list(values[0])}; names='model' exports it"
        )
    decoder = {
        "filename": name,
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "hidden_size": config.hidden_size,
        "head_size": keys[0][3],
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": keys[0][1],
        "num_hidden_layers": len(keys),
        "inputs": {n: n for n in ("input_ids", "attention_mask", "position_ids") if n in inputs} | CACHE_NAMES,
        "outputs": {"logits": "logits", **PRESENT_NAMES},
    }
    # the past is handed over as it was returned: a buffer of full length would need a graph that writes into it
    search = {"max_length": tokens["context_length"], "do_sample": False, "past_present_share_buffer": False}
    return {"model": {"type": TYPE, **tokens, "decoder": decoder}, "search": search}
