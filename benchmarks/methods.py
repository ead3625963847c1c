"""What is compared: a model with random weights, and the ways of fine-tuning it as data.

The frozen floor is the same compiled model, forward and dX only. Every weight is frozen, and the output of the lowest
product that S²FT trains gets a zero added that requires a gradient: its gradient is that output's dY. So dX is
computed exactly as deep as S²FT needs it, no weight has a gradient, and there is no optimizer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import s2ft_compile as s2ft
from s2ft_compile.backend import s2ft as backend  # by its name only where the package is installed

LORA_RANK = 16
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # all but the head


@dataclass(frozen=True)
class Setting:
    """A decoder, what is trained on (`batch` rows of `length` tokens), and what torch.compile ends in.

    forwards: how many parts of the batch, one after another, a step accumulates the gradients of.
    """

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
    family: str = "llama"  # Hugging Face's model type
    head_dim: int | None = None  # hidden / heads
    tied: bool = False  # whether the head is the embedding
    forwards: int = 1
    targets: dict = field(default_factory=lambda: {"ffn.out": 0.03})  # of S²FT

    @property
    def tokens(self) -> int:
        return self.batch * self.length


FULL_SIZE = Setting(hidden=512, layers=8, ffn=1792, heads=8, kv_heads=2, vocabulary=8192, batch=4, length=256)
QUICK_SIZE = Setting(
    hidden=64, layers=2, ffn=224, heads=4, kv_heads=1, vocabulary=64, batch=2, length=16, inner="aot_eager"
)


@dataclass(frozen=True)
class Trial:
    """A model that is ready to train. leaves: what receives a gradient. optimizer: None where nothing trains."""

    model: nn.Module
    leaves: list[nn.Parameter]
    optimizer: torch.optim.Optimizer | None
    forwards: int = 1

    @property
    def trainable(self) -> int:
        return sum(p.numel() for p in self.leaves) if self.optimizer else 0

    def step(self, inputs: dict[str, Tensor]) -> float:
        """One whole step; its loss."""
        for leaf in self.leaves:
            leaf.grad = None
        for micro_batch in zip(*(x.chunk(self.forwards) for x in inputs.values())):
            loss = self.model(**dict(zip(inputs, micro_batch))).loss
            loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        return loss.item()


def build(setting: Setting) -> nn.Module:
    """The same random weights at every call."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        setting.family,
        vocab_size=setting.vocabulary,
        hidden_size=setting.hidden,
        intermediate_size=setting.ffn,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.kv_heads,
        head_dim=setting.head_dim or setting.hidden // setting.heads,
        tie_word_embeddings=setting.tied,
        max_position_embeddings=setting.length,
        use_cache=False,
    )
    with torch.device(setting.device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, setting.dtype)).train()


def batch(setting: Setting) -> dict[str, Tensor]:
    """input_ids and labels, int64 (batch, length)."""
    ids = torch.randint(setting.vocabulary, (setting.batch, setting.length), generator=torch.Generator().manual_seed(1))
    ids = ids.to(setting.device)
    return {"input_ids": ids, "labels": ids}


def _trial(setting: Setting, model: nn.Module, leaves: list[nn.Parameter]) -> Trial:
    return Trial(model, leaves, torch.optim.AdamW(leaves, lr=1e-5, fused=True), setting.forwards)


# --- methods: setting -> Trial -----------------------------------------------------------------------------------


class Tapped(nn.Module):
    """A module with a zero added to its output, (batch, length, hidden), that receives the output's gradient."""

    def __init__(self, module: nn.Module, setting: Setting):
        super().__init__()
        self.module = module
        size = (setting.batch // setting.forwards, setting.length, setting.hidden)
        self.tap = nn.Parameter(torch.zeros(size, dtype=getattr(torch, setting.dtype), device=setting.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) + self.tap


def floor_method(setting: Setting) -> Trial:
    model = build(setting).requires_grad_(False)
    first = model.model.layers[0]
    parent, name = (first.self_attn, "o_proj") if "attention.out" in setting.targets else (first.mlp, "down_proj")
    tapped = Tapped(getattr(parent, name), setting)  # the lowest product that trains
    setattr(parent, name, tapped)
    return Trial(torch.compile(model, backend=setting.inner), [tapped.tap], None, setting.forwards)


def ours_method(setting: Setting, base_in_fp8: bool = False, **options) -> Trial:
    model = build(setting)
    if base_in_fp8:
        from torchao.quantization import Float8WeightOnlyConfig, quantize_  # a GPU machine may not have it

        quantize_(model, Float8WeightOnlyConfig(), lambda module, name: name.split(".")[-1] in LINEARS)
    s2ft.prepare(model, {"input_ids": batch(setting)["input_ids"]}, s2ft.S2FTConfig(setting.targets))
    net = torch.compile(model, backend=backend, options={"inner": setting.inner, **options})
    return _trial(setting, net, s2ft.parameters(model))


def full_method(setting: Setting) -> Trial:
    model = build(setting)
    return _trial(setting, torch.compile(model, backend=setting.inner), _trainable(model))


def peft_method(
    setting: Setting,
    config: str = "LoraConfig",
    compiled: bool = False,
    liger: bool = False,
    recomputed: bool = False,
    own_type: bool = True,
    **options,
) -> Trial:
    """config: the name of PEFT's class. own_type: adapters in float32 whatever the model's type, PEFT's default."""
    import peft  # a GPU machine may not have it

    model = build(setting)
    if liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adapter = getattr(peft, config)(r=min(LORA_RANK, setting.hidden // 16), target_modules=LINEARS, **options)
    model = peft.get_peft_model(model, adapter, autocast_adapter_dtype=own_type)
    return _trial(setting, torch.compile(model, backend=setting.inner) if compiled else model, _trainable(model))


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


METHODS: dict[str, Callable[[Setting], Trial]] = {
    "floor": floor_method,
    "ours": ours_method,
    "ours_loss": partial(ours_method, logits=False),
    "ours_recomputed": partial(ours_method, logits=False, activation_budget=0.5),
    "ours_graphs": partial(ours_method, logits=False, mode="reduce-overhead"),
    "ours_fp8": partial(ours_method, base_in_fp8=True, logits=False, fp8=True),
    "lora_compiled": partial(peft_method, compiled=True),
    "lora_eager": peft_method,
    "full": full_method,
    "lora_bf16": partial(peft_method, compiled=True, own_type=False),
    "lora_recomputed": partial(peft_method, recomputed=True),
    "lora_liger": partial(peft_method, liger=True),
    "dora": partial(peft_method, use_dora=True),
    "shira": partial(peft_method, config="ShiraConfig"),
}
TITLES = {
    "floor": "frozen floor: forward and dX",
    "ours": "S²FT",
    "ours_loss": "S²FT, logits not returned",
    "ours_recomputed": "S²FT, the same, half recomputed",
    "ours_graphs": "S²FT, the same, CUDA graphs",
    "ours_fp8": "S²FT, the same, base and its products in fp8",
    "lora_compiled": f"PEFT LoRA r={LORA_RANK}, compiled",
    "lora_eager": f"PEFT LoRA r={LORA_RANK}, eager",
    "full": "full fine-tuning",
    "lora_bf16": f"PEFT LoRA r={LORA_RANK} in bf16, compiled",
    "lora_recomputed": f"PEFT LoRA r={LORA_RANK}, eager, checkpoints",
    "lora_liger": f"PEFT LoRA r={LORA_RANK}, eager, Liger kernels",
    "dora": f"PEFT DoRA r={LORA_RANK}, eager",
    "shira": f"PEFT SHiRA r={LORA_RANK}, eager",
}
NEEDS = {
    name: ("peft", "liger_kernel") if name == "lora_liger" else ("peft",)
    for name in METHODS
    if name.split("_")[0] in ("lora", "dora", "shira")
} | {"ours_fp8": ("torchao",)}  # packages
CPU_METHODS = ("floor", "ours", "ours_loss", "lora_compiled", "lora_eager", "full")
