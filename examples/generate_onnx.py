"""Greedy generation from an ONNX file with a KV cache: ONNX Runtime, NumPy and a tokenizer, no PyTorch model.

    s2ft export onnx --model BASE --adapter run --cache --separate --output onnx/model.onnx
    python examples/generate_onnx.py onnx/model.onnx BASE "Once upon a time" --adapter onnx/model.onnx_adapter

`generate` is what a program of your own needs: one graph reads the prompts and then continues them token by token.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime


def load(path: str | Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of each input that an adapter may override
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def load_adapter(path: str | Path) -> onnxruntime.LoraAdapter:
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(path))
    return adapter


def generate(
    session: onnxruntime.InferenceSession,
    input_ids: np.ndarray,
    attention_mask: np.ndarray,
    max_new_tokens: int,
    eos: Sequence[int] = (),
    pad: int = 0,
    adapter: onnxruntime.LoraAdapter | None = None,
) -> np.ndarray:
    """The prompts, int64 of shape (batch, length), padded on the left, with what follows them: at most
    `max_new_tokens` columns more, `pad` behind a row's first token of `eos`."""
    options = onnxruntime.RunOptions()
    if adapter is not None:
        options.add_active_adapter(adapter)
    takes = [i.name for i in session.get_inputs()]
    gives = [o.name for o in session.get_outputs()]
    past, new = empty_past(session, len(input_ids)), input_ids
    running = np.ones(len(input_ids), bool)
    for _ in range(max_new_tokens):
        positions = np.maximum(attention_mask.cumsum(1) - 1, 0)[:, -new.shape[1] :]
        feeds = {"input_ids": new, "attention_mask": attention_mask, "position_ids": positions, **past}
        output = dict(zip(gives, session.run(gives, {name: feeds[name] for name in takes}, options)))
        past = {name.replace("present", "past_key_values"): t for name, t in output.items() if name != "logits"}
        new = np.where(running, output["logits"][:, -1].argmax(-1), pad)[:, None]
        input_ids = np.concatenate([input_ids, new], 1)
        attention_mask = np.concatenate([attention_mask, np.ones_like(new)], 1)
        running &= ~np.isin(new[:, 0], eos)
        if not running.any():
            break
    return input_ids


def empty_past(session: onnxruntime.InferenceSession, batch: int) -> dict[str, np.ndarray]:
    """Keys and values of no tokens, (batch, heads, 0, channels)."""
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
    return {
        i.name: np.zeros((batch, i.shape[1], 0, i.shape[3]), dtypes[i.type])
        for i in session.get_inputs()
        if i.name.startswith("past_key_values.")
    }


def main() -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the .onnx file")
    parser.add_argument("tokenizer", help="the folder of the tokenizer")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--adapter", help="an .onnx_adapter file")
    parser.add_argument("--max-new-tokens", type=int, default=50)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer, padding_side="left")
    eos = tokenizer.eos_token_id
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    encoded = tokenizer(given.prompts, return_tensors="np", padding=len(given.prompts) > 1)
    ids, mask = (encoded[name].astype(np.int64) for name in ("input_ids", "attention_mask"))
    adapter = load_adapter(given.adapter) if given.adapter else None
    tokens = generate(
        load(given.model),
        ids,
        mask,
        given.max_new_tokens,
        [] if eos is None else [eos],
        tokenizer.pad_token_id or 0,
        adapter,
    )
    for row, length in zip(tokens, mask.sum(1)):
        print(tokenizer.decode(row[len(ids[0]) - length :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
