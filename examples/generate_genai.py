"""Requests for several adapters of one graph in onnxruntime-genai, each with the adapter that it names.

    s2ft export onnx --model BASE --adapter law --genai --separate --output onnx/model.onnx
    pip install onnxruntime-genai
    python examples/generate_genai.py onnx --adapter law=onnx/model.onnx_adapter "law: Once upon a time" "base: Once"

A graph takes every adapter of the same weights, of any size:
`s2ft.exporters.save_onnx_adapter(base, "chat.onnx_adapter", adapter="chat", names="genai")` makes another file.
`Server` is what a program of your own needs.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnxruntime_genai as og

BASE = "base"  # the name of no adapter


class Server:
    """A folder of `export_onnx(..., names="genai")`, and adapters for it by name."""

    def __init__(self, folder: str | Path, adapters: Mapping[str, str | Path]):
        self.model = og.Model(str(folder))
        self.adapters = og.Adapters(self.model)
        self.names = {BASE, *adapters}
        for name, file in adapters.items():
            self.adapters.load(str(file), name)

    def generate(self, tokens: list[int], adapter: str = BASE, max_new_tokens: int = 50) -> Iterator[int]:
        """The tokens that follow, greedily, one after the other. Raises `KeyError` for an adapter that is not there."""
        if adapter not in self.names:
            raise KeyError(f"no adapter {adapter!r}; there are: {', '.join(sorted(self.names))}")
        parameters = og.GeneratorParams(self.model)
        parameters.set_search_options(max_length=len(tokens) + max_new_tokens, do_sample=False)
        generator = og.Generator(self.model, parameters)
        if adapter != BASE:
            generator.set_active_adapter(self.adapters, adapter)
        generator.append_tokens(np.array(tokens, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of the .onnx file, its genai_config.json and its tokenizer")
    parser.add_argument("requests", nargs="+", help="ADAPTER: PROMPT; base: is the model without one")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--max-new-tokens", type=int, default=50)
    given = parser.parse_args()
    server = Server(given.folder, dict(pair.split("=", 1) for pair in given.adapter))
    tokenizer = og.Tokenizer(server.model)
    for request in given.requests:
        name, _, prompt = request.partition(": ")
        generated = list(server.generate(tokenizer.encode(prompt).tolist(), name, given.max_new_tokens))
        print(f"{name}: {prompt}{tokenizer.decode(np.array(generated, np.int32))}")


if __name__ == "__main__":
    main()
