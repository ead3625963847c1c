"""Couplings: found exactly where a drawn model has them, and true symmetries wherever they are found.

The central property: for every coupling found in any model, any permutation of its units leaves the outputs
unchanged. The oracle of `drawn` says what has to be found; the Hugging Face models below say how often.
"""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import s2ft_compile as s2ft
from s2ft_compile.testing import Promoted, assert_same, changed, outputs_of, random_orders, reorder, signature
from s2ft_compile.testing.models import DECOYS, Drawn, Spec, models

FEW = settings(max_examples=max(4, settings.default.max_examples // 3), suppress_health_check=[HealthCheck.too_slow])


def assert_symmetric(model, run, analysis, seed=0):
    """All couplings at once, then each alone; every permutation is undone, bit for bit."""
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        before = run()
        for chosen in [analysis.couplings, *([c] for c in analysis.couplings)]:
            orders = random_orders(chosen, seed)
            reorder(model, analysis, orders)
            assert_same(model, before, run())
            reorder(model, analysis, {axis: order.argsort() for axis, order in orders.items()})
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[name]), f"{name} after a permutation and its inverse"


# --- drawn models -----------------------------------------------------------------------------------------------


@given(models())
def test_found_equals_the_oracle_and_is_symmetric(drawn: Drawn):
    analysis = s2ft.analyze(drawn.model, drawn.inputs)
    assert Counter(map(signature, analysis.couplings)) == Counter(map(tuple, drawn.expected))
    assert_symmetric(drawn.model, drawn.outputs, analysis, drawn.seed)


@pytest.mark.parametrize("decoy", DECOYS)
@given(data=st.data())
@settings(max_examples=max(2, settings.default.max_examples // 12))
def test_decoys_are_refused(decoy: str, data):
    drawn = data.draw(models(max_blocks=2, decoys=(decoy,)))
    analysis = s2ft.analyze(drawn.model, drawn.inputs)
    assert Counter(map(signature, analysis.couplings)) == Counter(map(tuple, drawn.expected))
    for place in (place for r in drawn.refused for place in r.places):
        assert all(place != (m.parameter_name, m.dim) for c in analysis.couplings for m in c.members), place
    for refused in drawn.refused:
        if refused.operators:
            assert_explained(analysis, refused)
    assert_symmetric(drawn.model, drawn.outputs, analysis, drawn.seed)


def assert_explained(analysis, refused):
    """Some refusal lists all the places and names one of the operators."""
    listing = [r for r in analysis.refusals if refused.places <= {(m.parameter_name, m.dim) for m in r.members}]
    assert any(o in r.operator or o in r.reason for r in listing for o in refused.operators), [str(r) for r in listing]


@given(models(max_blocks=1), st.data())
@FEW
def test_a_member_left_out_changes_the_outputs(drawn: Drawn, data):
    """What makes the property above a test: it fails when one member of a coupling stays behind."""
    analysis = s2ft.analyze(drawn.model, drawn.inputs)
    coupling = data.draw(st.sampled_from(analysis.couplings))
    member = data.draw(st.sampled_from(coupling.members))
    with torch.no_grad():
        before = drawn.outputs()
        orders = random_orders([coupling], drawn.seed)
        reorder(drawn.model, analysis, orders, skip=((member.parameter_name, member.dim),))
        assert _immune(drawn.spec, coupling, member) or changed(drawn.model, before, drawn.outputs())


def _immune(spec: Spec, coupling, member) -> bool:
    """Members that the outputs do not depend on: softmax does not see what all its scores share.

    A bias of the keys adds q · b to all scores of a query, and without rotary positions or a norm of keys that is one
    number for each.
    """
    return member.parameter_name.endswith(".k.bias") and spec.positions != "rope" and not spec.qk_norm


# --- where sizes coincide ---------------------------------------------------------------------------------------

COINCIDING = {
    "all equal": Spec(batch=4, length=4, hidden=4, kv_heads=2, groups=2, head_dim=4, ffn=4, vocab=5),
    "one head": Spec(kv_heads=1, groups=1, head_dim=6, qkv="thirds"),
    "one kv head": Spec(kv_heads=1, groups=4, attention="eager", share="grouped", positions="rope"),
    "one position": Spec(length=1, batch=1, qkv="grouped"),
    "batch is heads": Spec(batch=4, kv_heads=4, groups=1, attention="eager", causal=False, tokens=False),
    "length is head_dim": Spec(length=4, head_dim=4, attention="eager", share="interleave", qkv="grouped"),
    "ffn is hidden, tied": Spec(hidden=8, ffn=8, tied=True, transposed=True, gate="fused"),
}


@pytest.mark.parametrize("case", COINCIDING)
def test_sizes_that_coincide(case: str):
    drawn = Drawn(COINCIDING[case])
    analysis = s2ft.analyze(drawn.model, drawn.inputs)
    if case != "one position":  # the single position's scores are constant, and its softmax reads neither q nor k
        assert Counter(map(signature, analysis.couplings)) == Counter(map(tuple, drawn.expected))
    assert_symmetric(drawn.model, drawn.outputs, analysis)


# --- small adversaries: (parameters, forward, couplings as (units, members)) -------------------------------------


class Formula(nn.Module):
    """A module of named parameters and one expression over them."""

    def __init__(self, shapes: dict, formula):
        super().__init__()
        self.formula = formula
        random = torch.Generator().manual_seed(1)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=random, dtype=torch.float64)))

    def forward(self, x):
        return self.formula(self, x)


def heads(t, n):
    return t.view(*t.shape[:2], n, -1).transpose(1, 2)


def of_hidden(formula, act=torch.relu):
    """A function of the parameters and the hidden units act(x uᵀ), as one of the parameters and x."""
    return lambda m, x: formula(m, act(x @ m.u.T))


ADVERSARIES = {
    "one weight, twice": (
        dict(u=(6, 5), b=(6,), d=(6, 5)),
        lambda m, x: (x @ m.u.T + m.b).tanh() @ m.u + (x @ m.u.T).relu() @ m.d,
        [(6, "u0 b0 d0")],
    ),
    "weight times itself": (
        dict(u=(6, 5), w=(6, 6), d=(5, 6)),
        lambda m, x: x @ m.u.T @ (m.w @ m.w) @ m.d.T,
        [(6, "u0 w0 w1 d1")],
    ),
    "outer product of a weight": (
        dict(u=(6, 5), b=(6,)),
        lambda m, x: (x @ m.u.T + m.b) @ (m.u @ m.u.T) @ m.u,
        [(6, "u0 b0")],
    ),
    "low rank": (
        dict(a=(3, 5), b=(6, 3), d=(5, 6)),
        lambda m, x: (x @ (m.b @ m.a).T).relu() @ m.d.T,
        [(3, "a0 b1"), (6, "b0 d1")],
    ),
    "bias of a matrix": (
        dict(a=(6, 5), b=(5, 7), c=(6, 7), d=(6, 7)),
        lambda m, x: (torch.addmm(m.c, m.a, m.b) * m.d).sum() + x,
        [(6, "a0 c0 d0"), (5, "a1 b0"), (7, "b1 c1 d1")],
    ),
    "bias that broadcasts": (
        dict(a=(6, 5), b=(5, 7), c=(1,), d=(7,)),
        lambda m, x: (torch.addmm(m.c, m.a, m.b) * m.d).exp().sum() + x,
        [(5, "a1 b0"), (7, "b1 d0")],
    ),
    "heads that broadcast": (
        dict(q=(5, 24), k=(5, 3), v=(5, 3), o=(24, 5)),
        lambda m, x: (
            F.scaled_dot_product_attention(heads(x @ m.q, 8), heads(x @ m.k, 1), heads(x @ m.v, 1))
            .transpose(1, 2)
            .flatten(2)
            @ m.o
        ),
        [(8, "q1 o0"), (3, "q1 k1"), (3, "v1 o0")],
    ),
    "a head bias in scores": (
        dict(q=(5, 8), k=(5, 8), v=(5, 8), o=(8, 5), bias=(4, 1, 1)),
        lambda m, x: (
            F.scaled_dot_product_attention(
                heads(x @ m.q, 4),
                heads(x @ m.k, 4),
                heads(x @ m.v, 4),
                attn_mask=m.bias * x[:, None, :, :1].expand(-1, 4, -1, x.shape[1]),
            )
            .transpose(1, 2)
            .flatten(2)
            @ m.o
        ),
        [(4, "q1 k1 v1 o0 bias0"), (2, "q1 k1"), (2, "v1 o0")],
    ),
    "halves swapped": (
        dict(u=(8, 5), d=(5, 8)),
        of_hidden(lambda m, h: (h + torch.cat([h[..., 4:], h[..., :4]], -1)) @ m.d.T),
        [(4, "u0 d1")],
    ),
    "a slice across units": (
        dict(u=(8, 5), d=(5, 8)),
        of_hidden(lambda m, h: h @ m.d.T + h[..., :3].mean(-1, keepdim=True)),
        [(3, "u0 d1"), (5, "u0 d1")],
    ),
    "one unit taken out": (
        dict(u=(8, 5), d=(5, 8)),
        of_hidden(lambda m, h: h @ m.d.T + h[..., 2:3]),
        [(2, "u0 d1"), (5, "u0 d1")],
    ),
    "shifted by one": (dict(u=(8, 5), d=(5, 7)), of_hidden(lambda m, h: (h[..., 1:] + h[..., :-1]) @ m.d.T), []),
    "shifted by one, long": (
        dict(u=(1200, 5), d=(5, 1199)),
        of_hidden(lambda m, h: (h[..., 1:] + h[..., :-1]) @ m.d.T),
        [],
    ),
    "written in place": (
        dict(u=(8, 5), d=(5, 8)),
        of_hidden(lambda m, h: (h[..., :4].mul_(2), h[..., 6].zero_(), h)[2] @ m.d.T),
        [(4, "u0 d1"), (2, "u0 d1")],
    ),
    "every other unit": (
        dict(u=(8, 5), d=(5, 4)),
        of_hidden(lambda m, h: (h[..., ::2].sigmoid() * h[..., 1::2]) @ m.d.T, act=lambda h: h),
        None,
    ),
    "joined blocks, seen twice": (
        dict(a=(4,), b=(4,), p=(4,), q=(4,)),
        lambda m, x: (
            (torch.cat([m.a, m.b]).view(2, 4) * m.q).exp().sum()
            + (m.p.view(2, 2) * m.a.view(2, 2)).sum()
            + (m.p * m.q).sum()
            + x
        ),
        [(2, "a0 b0 p0 q0"), (2, "a0 b0 p0 q0")],
    ),
    "broadcast in an einsum": (
        dict(u=(7, 6), w=(7, 1), d=(6, 5)),
        lambda m, x: (torch.einsum("ij,ij->ij", m.u, m.w).exp() @ m.d)[0] + x,
        None,
    ),
    "square transposed": (
        dict(w=(4, 4), v=(4, 4), a=(4,)),
        lambda m, x: ((m.w * m.w.T * m.v).exp() @ m.a).sum() + x,
        [(4, "w0 w1 v0 v1 a0")],
    ),
    "the diagonal": (dict(w=(4, 4), a=(4,)), lambda m, x: (m.w.diagonal() * m.a).sum() + m.w.exp().sum() + x, []),
    "expanded and joined": (
        dict(u=(4, 5), d=(5, 12)),
        lambda m, x: (x @ m.u.T).relu()[..., None].expand(-1, -1, -1, 3).flatten(2) @ m.d.T,
        [(4, "u0 d1")],
    ),
    "repeated end to end": (
        dict(u=(4, 5), d=(5, 12)),
        lambda m, x: (x @ m.u.T).relu().repeat(1, 1, 3) @ m.d.T,
        [(4, "u0 d1")],
    ),
    "as bits": (
        dict(u=(6, 5), d=(5, 6)),
        lambda m, x: (x @ m.u.T).float().view(torch.float16).view(torch.float32).double() @ m.d.T,
        [],
    ),
    "rms_norm with eps": (
        dict(u=(6, 5), w=(6,), d=(5, 6)),
        lambda m, x: F.rms_norm(x @ m.u.T, (6,), m.w, 1e-6) @ m.d.T,
        [(6, "u0 w0 d1")],
    ),
    "a linear to one number": (dict(u=(6, 5), w=(6,)), lambda m, x: F.linear(x @ m.u.T, m.w), [(6, "u0 w0")]),
    "an empty piece": (
        dict(u=(6, 5), d=(5, 6)),
        of_hidden(lambda m, h: torch.cat([h[..., :6], h[..., 6:]], -1) @ m.d.T),
        [(6, "u0 d1")],
    ),
    "grouped convolution": (
        dict(u=(8, 5), w=(8, 2, 1), c=(8,), d=(5, 8)),
        lambda m, x: F.conv1d((x @ m.u.T).transpose(1, 2), m.w, m.c, groups=4).relu().transpose(1, 2) @ m.d.T,
        [(4, "u0 w0 c0 d1"), (2, "u0 w1"), (2, "w0 c0 d1")],
    ),
    "grouped norm": (
        dict(u=(8, 5), w=(8,), d=(5, 8)),
        lambda m, x: F.group_norm((x @ m.u.T).transpose(1, 2), 4, m.w).transpose(1, 2) @ m.d.T,
        [(4, "u0 w0 d1"), (2, "u0 w0 d1")],
    ),
    "largest of the units": (
        dict(u=(6, 5), d=(5, 6)),
        of_hidden(lambda m, h: (h / h.amax(-1, keepdim=True)) @ m.d.T, act=lambda h: h.relu() + 1),
        [(6, "u0 d1")],
    ),
    "where the largest is": (
        dict(u=(6, 5), d=(5, 6)),
        of_hidden(lambda m, h: h @ m.d.T + h.argmax(-1, keepdim=True), act=lambda h: h),
        [],
    ),
    "a constant that varies": (dict(u=(6, 5), d=(5, 6)), lambda m, x: (x @ m.u.T + torch.arange(6)) @ m.d.T, []),
    "a loop over heads": (
        dict(u=(6, 5), d=(5, 6)),
        lambda m, x: (
            torch.stack([h.softmax(-1) for h in (x @ m.u.T).view(*x.shape[:2], 3, 2).unbind(2)], 2).flatten(2) @ m.d.T
        ),
        [(2, "u0 d1")],
    ),
}


def members_of(text: str) -> frozenset:
    return frozenset((word.rstrip("0123456789"), int(word[-1])) for word in text.split())


@pytest.mark.parametrize("case", ADVERSARIES)
def test_adversary(case: str):
    """None: what is found may vary, but it has to be symmetric."""
    shapes, formula, expected = ADVERSARIES[case]
    model, x = Formula(shapes, formula), torch.randn(3, 4, 5, dtype=torch.float64)
    analysis = s2ft.analyze(model, (x,))
    if expected is not None:
        couplings = Counter(
            (c.units, frozenset((m.parameter_name, m.dim) for m in c.members)) for c in analysis.couplings
        )
        assert couplings == Counter((units, members_of(text)) for units, text in expected), str(analysis)
    assert_symmetric(model, lambda: model(x), analysis)


# --- Hugging Face: tiny random models of several families --------------------------------------------------------

SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GQA = dict(SMALL, num_key_value_heads=2)

# family: (config, model class, config arguments, attention couplings per layer or None where that is not asserted)
#   Llama and Qwen2: kv groups, queries per group, value channels (RoPE pins those of queries and keys).
#   GPT-2 and BERT: heads, query-key channels, value channels.
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", GQA, 3),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GQA, 3),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2),
        3,
    ),
    "gpt2 eager": (
        "GPT2Config",
        "GPT2LMHeadModel",
        dict(
            vocab_size=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=32,
            attn_implementation="eager",
            bos_token_id=1,
            eos_token_id=2,
        ),
        3,
    ),
    "bert": ("BertConfig", "BertForMaskedLM", SMALL, 3),
    "minilm": ("BertConfig", "BertModel", SMALL, 3),  # its output is the residual stream
    "mistral": ("MistralConfig", "MistralForCausalLM", dict(GQA, head_dim=8), None),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", dict(GQA, head_dim=8), None),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", dict(GQA, head_dim=8), None),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", dict(GQA, head_dim=8), None),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", GQA, None),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SMALL, None),
    "opt": ("OPTConfig", "OPTForCausalLM", dict(SMALL, ffn_dim=48, word_embed_proj_dim=32), None),
    "bloom": ("BloomConfig", "BloomForCausalLM", dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4), None),
    "falcon": ("FalconConfig", "FalconForCausalLM", dict(SMALL, multi_query=True), None),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0),
        None,
    ),
    "vit": (
        "ViTConfig",
        "ViTModel",
        dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=16,
            patch_size=8,
        ),
        None,
    ),
}


def hugging_face(family: str):
    """A tiny float32 model whose parameters are all random, and its inputs."""
    import transformers

    config, model, arguments, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, model)(getattr(transformers, config)(**arguments)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # biases start at zero and norms at one, which would hide mistakes
    if family == "vit":
        return model, {"pixel_values": torch.randn(2, 3, 16, 16)}
    ids = torch.randint(3, 64, (2, 7))
    return model, {
        "input_ids": ids,
        **({"decoder_input_ids": ids[:, :5], "use_cache": False} if family == "t5" else {}),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face(family: str):
    model, inputs = hugging_face(family)
    analysis = s2ft.analyze(model, inputs)
    counts = Counter(c.role for c in analysis.couplings)
    per_layer = FAMILIES[family][3]
    if per_layer is not None:
        residual = 0 if family == "minilm" else 1
        assert counts == Counter(residual=residual, ffn=2, attention=2 * per_layer), str(analysis)
    assert counts["ffn"], str(analysis)
    model = model.double()
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    if hasattr(model.config, "use_cache"):
        inputs["use_cache"] = False

    def run():
        with Promoted():
            return model(**inputs)

    assert all(t.dtype == torch.float64 for t in outputs_of(run()))
    assert_symmetric(model, run, analysis)


class ConstantBias(torch.nn.Module):
    """Heads whose keys have no bias: zeros between those of queries and values."""

    def __init__(self, persistent: bool):
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48, bias=False, dtype=torch.float64)
        self.out = torch.nn.Linear(16, 16, dtype=torch.float64)
        self.q, self.v = (torch.nn.Parameter(torch.randn(16, dtype=torch.float64)) for _ in "qv")
        self.register_buffer("k", torch.zeros(16, dtype=torch.float64), persistent=persistent)

    def forward(self, x):
        qkv = F.linear(x, self.qkv.weight, torch.cat([self.q, self.k, self.v]))
        q, k, v = qkv.reshape(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("persistent, heads", [(False, True), (True, False)])
def test_a_constant_that_does_not_vary_is_free_and_state_is_not(persistent, heads):
    model, x = ConstantBias(persistent), torch.randn(2, 5, 16, dtype=torch.float64)
    analysis = s2ft.analyze(model, (x,))
    assert any(m.parameter_name == "q" for c in analysis.couplings for m in c.members) == heads
    assert_symmetric(model, lambda: model(x), analysis)


@pytest.mark.parametrize("value", [torch.arange(16.0), torch.eye(1, 16)[0]])
def test_a_constant_that_varies_is_not_free(value):
    model, x = ConstantBias(False), torch.randn(2, 5, 16, dtype=torch.float64)
    model.k.copy_(value)
    assert not any(m.parameter_name == "q" for c in s2ft.analyze(model, (x,)).couplings for m in c.members)


class Recurrent(nn.Module):
    """A module that keeps a list of its own weights."""

    def __init__(self):
        super().__init__()
        self.up, self.rnn, self.down = nn.Linear(6, 8), nn.GRU(8, 10, batch_first=True), nn.Linear(10, 4)

    def forward(self, x):
        return self.down(self.rnn(self.up(x).relu())[0])


class Spectral(nn.Module):
    """A weight over its largest singular value, whose vectors are state: each forward in train mode moves them."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.utils.parametrizations.spectral_norm(nn.Linear(8, 4))

    def forward(self, x):
        return self.down(self.up(x).relu())


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (Recurrent, {8: {"up.weight", "rnn.weight_ih_l0"}, 10: {"rnn.weight_hh_l0", "rnn.bias_hh_l0", "down.weight"}}),
        (Spectral, {8: {"up.weight", "down.parametrizations.weight.original", "down.parametrizations.weight.0._v"}}),
    ],
)
def test_weights_that_a_module_lists_again_and_state_that_it_moves(make, found):
    torch.manual_seed(0)
    model, inputs = make(), (torch.randn(2, 5, 6),)
    analysis = s2ft.analyze(model, inputs, verify=True)
    members = {c.units: {m.parameter_name for m in c.members} for c in analysis.couplings}
    assert members.keys() == found.keys() and all(members[units] >= names for units, names in found.items()), members


def test_a_weight_that_is_read_from_a_list_is_no_weight_to_train(caplog):
    model, inputs = Recurrent(), (torch.randn(2, 5, 6),)
    with pytest.raises(s2ft.ConfigError, match="_flat_weights"):
        s2ft.prepare(model, inputs, s2ft.S2FTConfig({"rnn.bias_hh_l0": 2}))
    plan = s2ft.prepare(model, inputs, s2ft.S2FTConfig({"ffn.in": 2}))
    assert [s.parameter_name for s in plan.slices] == ["up.weight"] and "rnn.weight_ih_l0 is left out" in caplog.text


class Rescaling(nn.Module):
    """A weight that a forward in eval mode divides, once."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.rescaled = nn.Linear(6, 8), nn.Linear(8, 4), False

    def forward(self, x):
        if not self.training and not self.rescaled:
            with torch.no_grad():
                self.down.weight.div_(2)
            self.rescaled = True
        return self.down(self.up(x).relu())


def test_a_weight_that_a_forward_scales_has_the_axes_of_before():
    analysis = s2ft.analyze(Rescaling(), (torch.randn(2, 6),))
    assert [c.units for c in analysis.couplings] == [8]
