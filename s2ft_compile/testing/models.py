"""Small transformers drawn at random, each with the couplings it must have, worked out from its specification.

The oracle never sees a trace: `Spec` says how the model is wired, `_expected` lists from that alone which parameter
dimensions belong together. `models()` draws a `Drawn`:

    drawn.model, drawn.inputs      a module (eval mode, every parameter random) and a tuple of inputs
    drawn.make()                   the same model again, same weights
    drawn.loss(model)              a scalar that depends on all outputs
    drawn.expected                 tuple of Expected(role, units, members), members a frozenset of (name, dim)
    drawn.refused                  tuple of Refused(places, operators): what no coupling may contain
"""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

DECOYS = ("cumsum", "flip", "constant", "output", "gather", "sort", "roll", "reshape", "mix", "tied", "slope", "heads")
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}


class Expected(NamedTuple):
    """A coupling the analysis has to find: what it permutes, as (parameter name, dim)."""

    role: str
    units: int
    members: frozenset


class Refused(NamedTuple):
    """Places of which no unit may be permuted, and the operators one of which a refusal has to name."""

    places: frozenset
    operators: tuple[str, ...] = ()


@dataclass(frozen=True)
class Spec:
    """How a drawn model is wired. Sizes may coincide on purpose (length == hidden, batch == heads, ...)."""

    blocks: int = 1
    batch: int = 2
    length: int = 4
    hidden: int = 6
    kv_heads: int = 2
    groups: int = 2  # query heads per kv head
    head_dim: int = 4
    ffn: int = 6
    vocab: int = 11
    qkv: str = "separate"  # separate | thirds (split of one projection) | grouped (viewed per kv head, then split)
    transposed: bool = False  # weights stored (in, out), as GPT-2 does
    bias: bool = True
    positions: str = "none"  # none | learned | rope
    gate: str = "none"  # none | separate | fused (one projection, then chunk)
    activation: str = "gelu"
    norm: str = "layer"  # layer | rms
    post: bool = False  # norm after the residual sum
    qk_norm: bool = False
    tokens: bool = True
    tied: bool = False  # head and embedding share a weight
    dropout: float = 0.0
    attention: str = "sdpa"  # sdpa | eager
    share: str = "expand"  # how queries share keys: expand | interleave | gqa (SDPA's own) | grouped (5-D products)
    causal: bool = True
    pooled: bool = False  # a symmetric second consumer of the FFN's hidden activations: no reason to refuse
    decoy: str = ""

    @property
    def heads(self) -> int:
        """Of queries."""
        return self.kv_heads * self.groups


# --- the model --------------------------------------------------------------------------------------------------


class Transposed(nn.Module):
    """x @ W + b with W (in, out)."""

    def __init__(self, n_in: int, n_out: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return x @ self.weight
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


def projection(spec: Spec, n_in: int, n_out: int) -> nn.Module:
    return Transposed(n_in, n_out, spec.bias) if spec.transposed else nn.Linear(n_in, n_out, spec.bias)


def norm(spec: Spec, size: int) -> nn.Module:
    return nn.LayerNorm(size, bias=spec.bias) if spec.norm == "layer" else nn.RMSNorm(size, eps=1e-5)


def rotate(x: Tensor) -> Tensor:
    """Rotary positions over the last dimension of (batch, heads, length, head_dim)."""
    length, half = x.shape[-2], x.shape[-1] // 2
    angles = torch.arange(length)[:, None] / 10.0 ** torch.arange(half)[None, :]
    cos, sin = (torch.cat([f(angles)] * 2, -1).to(x.dtype) for f in (torch.cos, torch.sin))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class Attention(nn.Module):
    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        if spec.qkv == "separate":
            self.q, self.k, self.v = (projection(spec, spec.hidden, n) for n in (q, kv, kv))
        else:
            self.qkv = projection(spec, spec.hidden, q + 2 * kv)
        if spec.qk_norm:
            self.q_norm, self.k_norm = nn.RMSNorm(spec.head_dim), nn.RMSNorm(spec.head_dim)
        if spec.decoy == "slope":
            self.register_buffer("slope", torch.linspace(0.1, 1.0, spec.heads))
        self.o = projection(spec, q, spec.hidden)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (batch, length, hidden) -> q (batch, heads, length, head_dim), k and v with kv_heads."""
        s = self.spec
        if s.qkv == "grouped":
            grouped = self.qkv(x).view(*x.shape[:2], s.kv_heads, s.groups + 2, s.head_dim)
            q, k, v = grouped.split([s.groups, 1, 1], dim=3)
            q, k, v = (t.reshape(*x.shape[:2], -1, s.head_dim) for t in (q, k, v))
        else:
            flat = (
                (self.q(x), self.k(x), self.v(x))
                if s.qkv == "separate"
                else self.qkv(x).split([s.heads * s.head_dim, s.kv_heads * s.head_dim, s.kv_heads * s.head_dim], dim=-1)
            )
            q, k, v = (t.view(*x.shape[:2], -1, s.head_dim) for t in flat)
        if s.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return (rotate(q), rotate(k), v) if s.positions == "rope" else (q, k, v)

    def shared(self, t: Tensor) -> Tensor:
        """Each kv head once for every query head of its group."""
        s = self.spec
        if s.groups == 1:
            return t
        if s.share == "interleave":
            return t.repeat_interleave(s.groups, dim=1)
        return t[:, :, None].expand(-1, -1, s.groups, -1, -1).reshape(t.shape[0], s.heads, *t.shape[2:])

    def eager(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        s = self.spec
        if s.share == "grouped":
            q = q.view(q.shape[0], s.kv_heads, s.groups, *q.shape[2:])
            k, v = k[:, :, None], v[:, :, None]
        else:
            k, v = self.shared(k), self.shared(v)
        scores = q @ k.transpose(-1, -2) / math.sqrt(s.head_dim)
        if s.decoy == "slope":
            scores = scores * self.slope.view(*q.shape[1:-2], 1, 1)
        if s.causal:
            keep = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril()
            scores = scores.masked_fill(~keep, float("-inf"))
        weights = scores.softmax(-1)
        return (weights @ v).flatten(1, -3), weights.flatten(1, -3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        s, weights = self.spec, None
        q, k, v = self.heads_of(x)
        if s.attention == "eager":
            y, weights = self.eager(q, k, v)
        elif s.share == "gqa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=s.causal, enable_gqa=True)
        else:
            y = F.scaled_dot_product_attention(q, self.shared(k), self.shared(v), is_causal=s.causal)
        return self.o(y.transpose(1, 2).flatten(2)), weights


class FeedForward(nn.Module):
    def __init__(self, spec: Spec, decoy: str):
        super().__init__()
        self.spec, self.decoy = spec, decoy
        self.up = projection(spec, spec.hidden, spec.ffn * (2 if spec.gate == "fused" else 1))
        if spec.gate == "separate":
            self.gate = projection(spec, spec.hidden, spec.ffn)
        if decoy == "constant":
            self.register_buffer("ramp", torch.linspace(0.5, 1.5, spec.ffn))
        self.down = projection(spec, spec.ffn, spec.hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        activation = ACTIVATIONS[self.spec.activation]
        if self.spec.gate == "fused":
            up, gate = self.up(x).chunk(2, dim=-1)
            h = activation(gate) * up
        else:
            h = activation(self.gate(x)) * self.up(x) if self.spec.gate == "separate" else activation(self.up(x))
        h = F.dropout(self.spoiled(h), self.spec.dropout, self.training)
        y = self.down(h)
        return (y + h.mean(-1, keepdim=True) if self.spec.pooled else y), h

    def spoiled(self, h: Tensor) -> Tensor:
        """The decoys: each makes the order of the hidden units matter."""
        if self.decoy == "cumsum":
            return h.cumsum(-1)
        if self.decoy == "flip":
            return h + h.flip(-1)
        if self.decoy == "constant":
            return h * self.ramp
        if self.decoy == "gather":
            first = h.detach().abs().mean(-1, keepdim=True).long().clamp(0, h.shape[-1] - 1)
            return h + h.gather(-1, first)
        if self.decoy == "sort":
            return h * h.sort(-1).values
        if self.decoy == "roll":  # a slice across the units
            return h + 0.5 * torch.cat([h[..., 1:], h[..., :1]], -1)
        if self.decoy == "reshape":  # 2 × n read as n × 2, n odd
            return h + 0.5 * h.view(*h.shape[:2], 2, -1).transpose(-1, -2).reshape(h.shape)
        if self.decoy == "mix":  # the units and the positions in one axis
            return h + 0.5 * h.transpose(1, 2).reshape(h.shape)
        return h


class Block(nn.Module):
    def __init__(self, spec: Spec, decoy: str):
        super().__init__()
        self.post = spec.post
        self.norm1, self.norm2 = norm(spec, spec.hidden), norm(spec, spec.hidden)
        self.attention, self.ffn = Attention(spec), FeedForward(spec, decoy)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        y, weights = self.attention(x if self.post else self.norm1(x))
        x = self.norm1(x + y) if self.post else x + y
        y, h = self.ffn(x if self.post else self.norm2(x))
        return (self.norm2(x + y) if self.post else x + y), h, weights


class Model(nn.Module):
    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        self.embed = nn.Embedding(spec.vocab, spec.hidden) if spec.tokens else nn.Linear(5, spec.hidden)
        if spec.positions == "learned":
            self.positions = nn.Embedding(spec.length + 2, spec.hidden)
        self.blocks = nn.ModuleList(Block(spec, spec.decoy if i == 0 else "") for i in range(spec.blocks))
        self.norm = norm(spec, spec.hidden)
        self.head = nn.Linear(spec.hidden, spec.vocab, bias=False)
        if spec.tied:
            self.head.weight = self.embed.weight
        if spec.decoy == "tied":  # the outputs pin the rows of the weight that makes the hidden units
            self.head.weight = self.blocks[0].ffn.up.weight

    def forward(self, inputs: Tensor):
        x = self.embed(inputs)
        if self.spec.positions == "learned":
            x = x + self.positions(torch.arange(inputs.shape[1]))
        hidden = weights = None
        for i, block in enumerate(self.blocks):
            x, h, w = block(x)
            hidden, weights = (h, w) if i == 0 else (hidden, weights)
        logits = self.head(self.norm(x))
        if self.spec.decoy == "output":
            return logits, hidden
        return (logits, weights) if self.spec.decoy == "heads" else logits


def build(spec: Spec, dtype: torch.dtype = torch.float64, seed: int = 0) -> Model:
    """The model of a specification, in eval mode; no parameter is constant, or a wrong permutation would hide."""
    model = Model(spec).to(dtype)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=random, dtype=torch.float64)
            scale = 1.0 if "embed" in name else p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3
            p.copy_(noise * scale + (1.0 if "norm" in name and "weight" in name else 0.0))
    return model.eval()


# --- the oracle -------------------------------------------------------------------------------------------------


class Places:
    """Where a model keeps its dimensions, by specification."""

    def __init__(self, spec: Spec):
        self.spec = spec
        self.output, self.read = (1, 0) if spec.transposed else (0, 1)

    def out(self, module: str) -> set:
        """What a projection produces: its weight's rows and its bias."""
        return {(f"{module}.weight", self.output)} | ({(f"{module}.bias", 0)} if self.spec.bias else set())

    def into(self, module: str) -> set:
        return {(f"{module}.weight", self.read)}

    def norm(self, module: str) -> set:
        bias = self.spec.bias and self.spec.norm == "layer"
        return {(f"{module}.weight", 0)} | ({(f"{module}.bias", 0)} if bias else set())


def _attention(spec: Spec, at: str) -> tuple[list[Expected], list[Refused]]:
    p = Places(spec)
    q, k, v = [p.out(f"{at}.{n}") for n in "qkv"] if spec.qkv == "separate" else [p.out(f"{at}.qkv")] * 3
    o = p.into(f"{at}.o")
    norms = {(f"{at}.{n}_norm.weight", 0) for n in "qk"} if spec.qk_norm else set()
    axes = [
        ("kv heads", spec.kv_heads, q | k | v | o),
        ("queries", spec.groups, q | o),
        ("channels", spec.head_dim, q | k | norms),
        ("values", spec.head_dim, v | o),
    ]
    spoiled = {"kv heads", "queries"} if spec.decoy in ("slope", "heads") else set()
    if spec.positions == "rope":
        spoiled.add("channels")
    couplings = [Expected("attention", n, frozenset(m)) for name, n, m in axes if n > 1 and name not in spoiled]
    return couplings, []


def _ffn(spec: Spec, at: str, decoy: str) -> tuple[list[Expected], list[Refused]]:
    p = Places(spec)
    members = p.out(f"{at}.up") | p.into(f"{at}.down")
    if spec.gate == "separate":
        members |= p.out(f"{at}.gate")
    if decoy in ("", "slope", "heads"):
        return [Expected("ffn", spec.ffn, frozenset(members))], []
    operators = {
        "cumsum": ("cumsum",),
        "flip": ("flip",),
        "constant": ("mul",),
        "gather": ("gather",),
        "sort": ("sort",),
        "reshape": ("add", "reshape", "view"),
        "mix": ("add", "reshape", "view"),
    }
    return [], [Refused(frozenset(members), operators.get(decoy, ()))]


def _residual(spec: Spec) -> set:
    p = Places(spec)
    members = {("embed.weight", 1)} if spec.tokens else {("embed.weight", 0), ("embed.bias", 0)}
    members |= p.norm("norm") | ({("positions.weight", 1)} if spec.positions == "learned" else set())
    for i in range(spec.blocks):
        at = f"blocks.{i}"
        members |= p.norm(f"{at}.norm1") | p.norm(f"{at}.norm2")
        for name in ("q", "k", "v") if spec.qkv == "separate" else ("qkv",):
            members |= p.into(f"{at}.attention.{name}")
        for name in ("up", "gate") if spec.gate == "separate" else ("up",):
            members |= p.into(f"{at}.ffn.{name}")
        members |= p.out(f"{at}.attention.o") | p.out(f"{at}.ffn.down")
    if not spec.tied and spec.decoy != "tied":
        members.add(("head.weight", 1))
    return members


def oracle(spec: Spec) -> tuple[tuple[Expected, ...], tuple[Refused, ...]]:
    """Every coupling the model has, and every place that must not be permuted because of its decoy."""
    expected, refused = [Expected("residual", spec.hidden, frozenset(_residual(spec)))], []
    for i in range(spec.blocks):
        decoy = spec.decoy if i == 0 else ""
        per_block = replace(spec, decoy=spec.decoy if i == 0 or spec.decoy == "slope" else "")
        for couplings, missing in (
            _attention(per_block, f"blocks.{i}.attention"),
            _ffn(spec, f"blocks.{i}.ffn", decoy),
        ):
            expected += couplings
            refused += missing
    return tuple(expected), tuple(refused)


# --- drawing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """A drawn model with its inputs and its oracle; see the module's docstring."""

    spec: Spec
    dtype: torch.dtype = torch.float64
    seed: int = 0
    expected: tuple[Expected, ...] = field(init=False, repr=False)
    refused: tuple[Refused, ...] = field(init=False, repr=False)

    def __post_init__(self):
        expected, refused = oracle(self.spec)
        object.__setattr__(self, "expected", expected)
        object.__setattr__(self, "refused", refused)

    @cached_property
    def model(self) -> Model:
        """One such model, made at the first use."""
        return self.make()

    def make(self) -> Model:
        """A new model, with the same weights each time."""
        return build(self.spec, self.dtype, self.seed)

    @cached_property
    def inputs(self) -> tuple[Tensor, ...]:
        """Its forward's arguments: tokens (batch, length), or hidden values (batch, length, 5)."""
        random = torch.Generator().manual_seed(self.seed + 1)
        shape = (self.spec.batch, self.spec.length)
        if self.spec.tokens:
            return (torch.randint(self.spec.vocab, shape, generator=random),)
        return (torch.randn(*shape, 5, generator=random, dtype=torch.float64).to(self.dtype),)

    def outputs(self, model: nn.Module | None = None) -> tuple[Tensor, ...]:
        """What a model gives for the inputs; by default this one."""
        output = (self.model if model is None else model)(*self.inputs)
        return output if isinstance(output, tuple) else (output,)

    def loss(self, model: nn.Module | None = None) -> Tensor:
        """A scalar that every output, and so every parameter, has an uneven part in."""
        return sum(
            ((o - 0.1 * torch.linspace(-1, 1, o.shape[-1], dtype=o.dtype)) ** 2).mean() for o in self.outputs(model)
        )


@st.composite
def specs(draw, max_blocks: int = 2, decoys=(), dropout: bool = False) -> Spec:
    """A specification without contradictions, biased to sizes that coincide."""
    qkv = draw(st.sampled_from(["separate", "thirds", "grouped"]))
    attention = draw(st.sampled_from(["sdpa", "eager"]))
    tokens = draw(st.booleans())
    transposed = draw(st.booleans())
    gate = draw(st.sampled_from(["none", "separate", "fused"]))
    decoy = draw(st.sampled_from(DECOYS if decoys is True else tuple(decoys))) if decoys else ""
    spec = Spec(
        blocks=draw(st.integers(1, max_blocks)),
        batch=draw(st.integers(1, 3)),
        length=draw(st.integers(2, 6)),
        hidden=draw(st.sampled_from([4, 6, 8])),
        kv_heads=draw(st.integers(1, 3)),
        groups=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([2, 4])),
        ffn=draw(st.integers(3, 8)),
        vocab=draw(st.integers(5, 11)),
        qkv=qkv,
        transposed=transposed,
        bias=draw(st.booleans()),
        positions=draw(st.sampled_from(["none", "learned", "rope"])),
        gate=gate,
        activation=draw(st.sampled_from(list(ACTIVATIONS))),
        norm=draw(st.sampled_from(["layer", "rms"])),
        post=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tokens=tokens,
        tied=tokens and draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.5])) if dropout else 0.0,
        attention=attention,
        share=draw(st.sampled_from(["expand", "interleave", "gqa" if attention == "sdpa" else "grouped"])),
        causal=draw(st.booleans()),
        pooled=draw(st.booleans()),
        decoy=decoy,
    )
    return _consistent(spec)


def _consistent(spec: Spec) -> Spec:
    """What a decoy needs."""
    if spec.decoy == "tied":
        spec = replace(spec, tied=False, transposed=False, vocab=spec.ffn * (2 if spec.gate == "fused" else 1))
    if spec.decoy in ("slope", "heads"):
        spec = replace(spec, attention="eager", share=spec.share if spec.share != "gqa" else "grouped")
    if spec.decoy == "reshape":
        spec = replace(spec, ffn=6)  # 2 × 3 against 3 × 2; a square would be a symmetry
    return spec


def models(dtype: torch.dtype = torch.float64, max_blocks: int = 2, decoys=(), dropout: bool = False):
    """Strategy of `Drawn`. decoys: names from `DECOYS` (or True for all), one of which every model has."""
    return st.builds(Drawn, spec=specs(max_blocks, decoys, dropout), dtype=st.just(dtype), seed=st.integers(0, 2**16))
