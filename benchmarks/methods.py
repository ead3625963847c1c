"""What is compared: a Llama-style model with random weights, and the ways of fine-tuning it as data.

The frozen floor is the same compiled model, forward and dX only. Every weight is frozen, and the output of the lowest
product that S²FT trains gets a zero added that requires a gradient: its gradient is that output's dY. So dX is
computed exactly as deep as S²FT needs it, no weight has a gradient, and there is no optimizer.
"""

from dataclasses import dataclass, field
from typing import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import s2ft_compile as s2ft
from s2ft_compile.backend import s2ft as backend  # by its name only where the package is installed

LORA_RANK = 16


@dataclass(frozen=True)
class Setting:
    """A Llama-style model, what is trained on (`batch` rows of `length` tokens), and what torch.compile ends in."""

    hidden: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    batch: int
    length: int
    dtype: str = "float32"
    inner: str = "inductor"
    device: str = "cpu"
    targets: dict = field(default_factory=lambda: s2ft.S2FTConfig().targets)  # of S²FT: the default of `prepare`

    @property
    def tokens(self) -> int:
        return self.batch * self.length


FULL_SIZE = Setting(hidden=512, layers=8, ffn=1792, heads=8, kv_heads=2, vocabulary=8192, batch=4, length=256)
QUICK_SIZE = Setting(hidden=64, layers=2, ffn=224, heads=4, kv_heads=1, vocabulary=64, batch=2, length=16,
                     inner="aot_eager")


@dataclass(frozen=True)
class Trial:
    """A model that is ready to train. leaves: what receives a gradient. optimizer: None where nothing trains."""

    model: nn.Module
    leaves: list[nn.Parameter]
    optimizer: torch.optim.Optimizer | None

    @property
    def trainable(self) -> int:
        return sum(p.numel() for p in self.leaves) if self.optimizer else 0

    def step(self, inputs: dict[str, Tensor]) -> float:
        """One whole step; its loss."""
        for leaf in self.leaves:
            leaf.grad = None
        loss = self.model(**inputs).loss
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        return loss.item()


def build(setting: Setting) -> nn.Module:
    """The same random weights at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=setting.vocabulary, hidden_size=setting.hidden, intermediate_size=setting.ffn,
        num_hidden_layers=setting.layers, num_attention_heads=setting.heads, num_key_value_heads=setting.kv_heads,
        max_position_embeddings=setting.length, use_cache=False,
    )
    with torch.device(setting.device):
        return LlamaForCausalLM._from_config(config, dtype=getattr(torch, setting.dtype)).train()


def batch(setting: Setting) -> dict[str, Tensor]:
    """input_ids and labels, int64 (batch, length)."""
    ids = torch.randint(setting.vocabulary, (setting.batch, setting.length), generator=torch.Generator().manual_seed(1))
    ids = ids.to(setting.device)
    return {"input_ids": ids, "labels": ids}


def _trial(model: nn.Module, leaves: list[nn.Parameter]) -> Trial:
    return Trial(model, leaves, torch.optim.AdamW(leaves, lr=1e-5, fused=True))


# --- methods: setting -> Trial -----------------------------------------------------------------------------------


class Tapped(nn.Module):
    """A module with a zero added to its output, (batch, length, hidden), that receives the output's gradient."""

    def __init__(self, module: nn.Module, setting: Setting):
        super().__init__()
        self.module = module
        size = (setting.batch, setting.length, setting.hidden)
        self.tap = nn.Parameter(torch.zeros(size, dtype=getattr(torch, setting.dtype), device=setting.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) + self.tap


def floor_method(setting: Setting) -> Trial:
    model = build(setting).requires_grad_(False)
    first = model.model.layers[0]
    parent, name = (first.self_attn, "o_proj") if "attention.out" in setting.targets else (first.mlp, "down_proj")
    tapped = Tapped(getattr(parent, name), setting)  # the lowest product that trains
    setattr(parent, name, tapped)
    return Trial(torch.compile(model, backend=setting.inner), [tapped.tap], None)


def ours_method(setting: Setting) -> Trial:
    model = build(setting)
    s2ft.prepare(model, {"input_ids": batch(setting)["input_ids"]}, s2ft.S2FTConfig(setting.targets))
    return _trial(torch.compile(model, backend=backend, options={"inner": setting.inner}), s2ft.parameters(model))


def lora_method(setting: Setting) -> Trial:
    model = _lora(setting)
    return _trial(torch.compile(model, backend=setting.inner), _trainable(model))


def lora_eager_method(setting: Setting) -> Trial:
    model = _lora(setting)
    return _trial(model, _trainable(model))


def full_method(setting: Setting) -> Trial:
    model = build(setting)
    return _trial(torch.compile(model, backend=setting.inner), _trainable(model))


def _lora(setting: Setting) -> nn.Module:
    from peft import LoraConfig, get_peft_model  # a GPU machine may not have it

    return get_peft_model(build(setting), LoraConfig(r=LORA_RANK, target_modules="all-linear"))


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


METHODS: dict[str, Callable[[Setting], Trial]] = {
    "floor": floor_method,
    "ours": ours_method,
    "lora_compiled": lora_method,
    "lora_eager": lora_eager_method,
    "full": full_method,
}
TITLES = {
    "floor": "frozen floor: forward and dX",
    "ours": "S²FT",
    "lora_compiled": f"PEFT LoRA r={LORA_RANK}, compiled",
    "lora_eager": f"PEFT LoRA r={LORA_RANK}, eager",
    "full": "full fine-tuning",
}
