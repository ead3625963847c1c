"""What the tests of training share: drawn and tiny Hugging Face models, the eager oracle, and snapshots of a model."""

import copy
from functools import cache

import torch
from hypothesis import Phase
from hypothesis import strategies as st
from torch import Tensor, nn

import s2ft_compile as s2ft
from s2ft_compile.testing.gradients import U32, full_gradients  # noqa: F401
from s2ft_compile.testing.gradients import assert_slices as assert_gradients  # noqa: F401
from s2ft_compile.testing.models import Drawn, Spec, models

# Reordered float64 sums: the relative difference of gradients, with room for the depth of these models.
NOISE64 = 1e-10
QUICK = (Phase.explicit, Phase.reuse, Phase.generate)  # shrinking compiled models takes minutes
INNER = ("aot_eager", "eager")  # without Inductor: seconds less for every test


def compiled(model: nn.Module, inner: str = "aot_eager", **options) -> nn.Module:
    return torch.compile(model, backend="s2ft", options={"inner": inner, **options})


def drawn(**spec) -> Drawn:
    """A fixed model of two blocks: 4 query heads on 2 kv heads of 4 channels, 6 hidden, 8 FFN channels, float64."""
    return Drawn(Spec(**{"blocks": 2, "ffn": 8, **spec}))


def prepared(targets=None, **spec) -> tuple[Drawn, nn.Module]:
    """A fixed drawn model, prepared; its `.make()` gives the base model."""
    targets = targets or {"ffn.out": 0.5, "attention.out": 1}
    return copy.deepcopy(_prepared(tuple(targets.items()), tuple(spec.items())))


@cache
def _prepared(targets, spec) -> tuple[Drawn, nn.Module]:
    case = drawn(**dict(spec))
    model = case.make()
    s2ft.prepare(model, case.inputs, s2ft.S2FTConfig(targets=dict(targets)))
    return case, model


def cases(max_blocks: int = 2, **kwargs):
    """Drawn models in which every role can be told apart. Not so: two rotated channels (halves of one have no axis),
    and a fused projection viewed per kv head (its queries, keys and values are one axis of channels)."""
    return models(max_blocks=max_blocks, **kwargs).filter(
        lambda case: case.spec.qkv != "grouped" and not (case.spec.positions == "rope" and case.spec.head_dim == 2)
    )


@st.composite
def configs(draw, head: bool = True) -> s2ft.S2FTConfig:
    """Any combination of roles, some with the head, with amounts that every drawn model has."""
    dense = [*s2ft.config.HEADS[:4], "attention.out.channels", "attention.value.channels", "ffn.in", "ffn.out"]
    roles = draw(st.lists(st.sampled_from(dense), min_size=1, max_size=4, unique=True))
    targets = {r: draw(st.sampled_from([1, 1.0] + [0.5, 2] * r.startswith("ffn"))) for r in roles}
    if head and draw(st.booleans()):
        targets["head.weight"] = 1  # channels of the residual stream, which all other weights share
    selection = draw(st.sampled_from(("random", "weight", "lowrank")))
    return s2ft.S2FTConfig(
        targets=targets,
        selection=selection,
        largest=draw(st.booleans()),
        budget=draw(st.sampled_from(("layer", "model") if selection == "random" else s2ft.config.BUDGETS)),
        seed=draw(st.integers(0, 99)),
    )


# --- Hugging Face models ------------------------------------------------------------------------------------------

LLAMA = dict(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=32,
    use_cache=False,
)
GPT2 = dict(
    vocab_size=50,
    n_embd=16,
    n_layer=2,
    n_head=4,
    n_positions=32,
    use_cache=False,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
)
BERT = dict(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=32,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def hf(name: str, **changes) -> nn.Module:
    """llama (grouped queries), qwen2 (biases), gpt2 (fused, transposed) or bert; tiny, float32, every weight random."""
    import transformers as t

    config, model, fields = {
        "llama": (t.LlamaConfig, t.LlamaForCausalLM, LLAMA),
        "qwen2": (t.Qwen2Config, t.Qwen2ForCausalLM, LLAMA),
        "gpt2": (t.GPT2Config, t.GPT2LMHeadModel, GPT2),
        "bert": (t.BertConfig, t.BertForMaskedLM, BERT),
    }[name]
    torch.manual_seed(0)
    built = model(config(**{**fields, **changes})).eval()
    with torch.no_grad():
        for p in built.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return built


def tokens(batch: int = 2, length: int = 8, seed: int = 0) -> Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


# --- oracles ------------------------------------------------------------------------------------------------------


def tuned(base: nn.Module, plan) -> dict[str, Tensor]:
    """What the weights have to be: the base's, with cast(W0 + delta) at the indices."""
    expected = {n: p.detach().clone() for n, p in base.named_parameters()}
    for s in plan.slices:
        W = expected[s.parameter_name]
        wide = torch.promote_types(W.dtype, torch.float32)
        block = W.index_select(s.dim, s.indices).to(wide) + s.delta.detach().to(wide)
        W.index_copy_(s.dim, s.indices, block.to(W.dtype))
    return expected


def assert_weights(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """Every parameter, bit for bit."""
    weights = dict(model.named_parameters())
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert same_bits(weights[name], value), name


def same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach().contiguous(), b.detach().contiguous()
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def randomize(model: nn.Module, seed: int = 0, scale: float = 0.1) -> None:
    """Deltas as if something had been trained."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for delta in s2ft.parameters(model):
            delta.copy_(scale * torch.randn(delta.shape, generator=random))


def snapshot(model: nn.Module) -> dict:
    """Everything about a model that a refused call must leave as it was."""
    return {
        "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
        "identities": {n: id(p) for n, p in model.named_parameters()},
        "trainable": {n: p.requires_grad for n, p in model.named_parameters()},
        "gradients": {n: p.grad is None for n, p in model.named_parameters()},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "modules": {n: id(m) for n, m in model.named_modules()},
        "training": {n: m.training for n, m in model.named_modules()},
        "hooks": {
            n: (list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks))
            for n, m in model.named_modules()
        },
        "keys": list(model.state_dict()),
        "config": copy.deepcopy(model.config.to_dict()) if hasattr(model, "config") else None,
    }


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = snapshot(model)
    for what, old in before.items():
        new = after[what]
        if what in ("weights", "buffers"):
            assert old.keys() == new.keys() and all(same_bits(old[n], new[n]) for n in old), what
        else:
            assert old == new, what
