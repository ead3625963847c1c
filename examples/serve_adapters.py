"""Three adapters behind one model: each row of a batch is generated with its own, and the base needs no copy.

python examples/serve_adapters.py            on a small random Llama; the adapters are random too
python examples/serve_adapters.py BASE A B C on a Hugging Face folder and three adapter folders of it
"""

import copy
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import s2ft_compile as s2ft


def base_and_adapters(folder: Path) -> tuple[torch.nn.Module, list[Path]]:
    """A base model, and three adapters as if they had been trained."""
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            eos_token_id=None,
        )
    ).eval()
    for seed in range(3):
        model = copy.deepcopy(base)
        config = s2ft.S2FTConfig(targets={"ffn.out": 8, "attention.out": 1}, seed=seed)
        s2ft.prepare(model, {"input_ids": torch.arange(8)[None]}, config)
        with torch.no_grad():
            for delta in s2ft.parameters(model):
                delta.normal_(std=0.2)
        s2ft.exporters.save_adapter(model, folder / f"adapter{seed}")
    return base, [folder / f"adapter{seed}" for seed in range(3)]


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if arguments:
            base, adapters = AutoModelForCausalLM.from_pretrained(arguments[0]), [Path(a) for a in arguments[1:]]
        else:
            base, adapters = base_and_adapters(Path(folder))
        bank = s2ft.AdapterBank(base)
        for adapter in adapters:
            bank.add(adapter.name, adapter)
    rows = [*bank.names, None]  # the last row is the base model's
    prompts = torch.arange(1, 7).repeat(len(rows), 1)  # the same tokens in each row
    with bank.batch(rows):
        tokens = base.generate(prompts, max_new_tokens=10, do_sample=False, pad_token_id=0)
    for name, row in zip(rows, tokens):
        print(f"{name or 'base':>10}: {row[prompts.shape[1] :].tolist()}")


if __name__ == "__main__":
    main(sys.argv[1:])
