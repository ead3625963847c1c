"""The base model: made on the spot, once for each setting, and kept in the user's cache folder."""

import hashlib
import inspect
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from material import Material
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Setting:
    """A model, how long it is pretrained (steps of `blocks` blocks of `length` tokens) and tuned (`steps` of `rows`
    blocks of text, or of `lines` short lines).

    rank: of the LoRA whose numbers every method but full fine-tuning trains as many as.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    length: int
    pretraining: int
    blocks: int
    steps: int
    rows: int
    lines: int
    rank: int


SETTINGS = {
    s.name: s
    for s in (
        Setting("quick", 48, 2, 6, 32, 20, 8, 6, 2, 4, 2),
        Setting("small", 96, 4, 6, 128, 1000, 16, 100, 4, 8, 8),
        Setting("default", 192, 4, 12, 128, 1000, 16, 100, 4, 8, 8),
        Setting("large", 512, 8, 12, 256, 12000, 32, 500, 16, 32, 16),
    )
}


def build(setting: Setting, material: Material) -> nn.Module:
    """A Llama-style decoder: 3 queries for each kv head, SwiGLU of 3.5 times the hidden size, a head of its own."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(material.tokenizer),
            hidden_size=setting.hidden,
            intermediate_size=7 * setting.hidden // 2,
            num_hidden_layers=setting.layers,
            num_attention_heads=setting.heads,
            num_key_value_heads=setting.heads // 3,
            head_dim=setting.hidden // setting.heads // 2 * 2,
            max_position_embeddings=2 * setting.length,
            eos_token_id=material.tokenizer.eos_token_id,
            pad_token_id=material.tokenizer.pad_token_id,
            bos_token_id=None,
            use_cache=False,
        )
    )


def folder(setting: Setting) -> Path:
    """Where a setting's model lies: named by all that it depends on."""
    sizes = (setting.hidden, setting.layers, setting.heads, setting.length, setting.pretraining, setting.blocks)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"  # whose library is the text
    content = (
        (HERE / "material.py").read_text() + "".join(map(inspect.getsource, (build, pretrain, cycle))) + repr(sizes)
    )
    name = f"{setting.name}-{python}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "s2ft-compile" / "compare" / name


def base(setting: Setting, material: Material, say=print) -> nn.Module:
    """The pretrained model, from the cache where it is there."""
    path = folder(setting)
    if not path.exists():
        model = pretrain(setting, material, say)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        model.save_pretrained(part)
        part.rename(path)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(DEVICE)


def pretrain(setting: Setting, material: Material, say) -> nn.Module:
    """All of it for `pretraining` steps; then, for seven tenths as many, mostly facts and skills, on shorter blocks."""
    model = build(setting, material).to(DEVICE)
    peak = 3e-3 * min(1.0, (192 / setting.hidden) ** 0.5)
    cycle(model, material.pretraining(setting.blocks), setting.pretraining, peak, say)
    cycle(model, material.schooling(setting.blocks), 7 * setting.pretraining // 10, 2 / 3 * peak, say)
    return model.eval()


def cycle(model: nn.Module, batches: Iterator[Tensor], steps: int, peak: float, say) -> None:
    """One warm-up and cosine of AdamW."""
    compiled = torch.compile(model.train()) if steps > 100 else model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    for step in range(steps):
        decay = 0.525 + 0.475 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = peak * min(1.0, (step + 1) / 50) * decay
        tokens = next(batches).to(DEVICE)
        loss = compiled(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            say(f"pretraining {step}/{steps}, loss {loss.item():.3f}")
