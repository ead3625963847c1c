"""What axes are for, read off the graph: models whose modules have no telling names."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import s2ft_compile as s2ft
from s2ft_compile.capture.capture import capture
from s2ft_compile.passes.couple.couple import couple
from s2ft_compile.passes.select.select import targeted_bands


class Packed(nn.Module):
    """nn.MultiheadAttention: one weight for queries, keys and values."""

    def __init__(self):
        super().__init__()
        self.m = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return x + self.m(x, x, x, need_weights=False)[0]


class Absorbed(nn.Module):
    """Attention over latents: keys' and values' projection applied to queries and results, all heads share latents."""

    def __init__(self, heads=2, latent=5, key=4, value=3):
        super().__init__()
        self.sizes = heads, key, value
        self.a, self.b = nn.Linear(8, heads * key), nn.Linear(8, latent)
        self.c, self.d = nn.Linear(latent, heads * (key + value), bias=False), nn.Linear(heads * value, 8)

    def forward(self, x):
        heads, key, value = self.sizes
        q, latent = self.a(x).unflatten(-1, (heads, key)).transpose(1, 2), self.b(x)
        by_key, by_value = self.c.weight.view(heads, key + value, -1).split([key, value], 1)
        scores = torch.einsum("bhtr,bsr->bhts", q @ by_key, latent)
        y = torch.einsum("bhtr,hvr->bhtv", torch.einsum("bhts,bsr->bhtr", scores.softmax(-1), latent), by_value)
        return x + self.d(y.transpose(1, 2).flatten(2))


class Adapted(nn.Module):
    """An FFN with low-rank adapters on both of its layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 8)
        self.c, self.d, self.e, self.f = (nn.Linear(*s, bias=False) for s in ((8, 2), (2, 12), (12, 3), (3, 8)))

    def forward(self, x):
        h = (self.a(x) + self.d(self.c(x))).relu()
        return x + self.b(h) + self.f(self.e(h))


class Once(nn.Module):
    """A stream with one sum, right behind a projection."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(5, 8), nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.a(x[..., :5])
        return self.d(x + self.c(self.b(x).relu()))


class Streams(nn.Module):
    """Several residual streams, mixed by a matrix in each layer."""

    def __init__(self, streams=3):
        super().__init__()
        self.n = streams
        self.a, self.z = nn.Linear(8, 6), nn.Linear(6, 8)
        self.mix, self.read, self.write = (
            nn.ParameterList([torch.randn(*shape) for _ in range(2)])
            for shape in ((streams, streams), (streams,), (streams, 1))
        )
        self.up = nn.ModuleList([nn.Linear(6, 12) for _ in range(2)])
        self.down = nn.ModuleList([nn.Linear(12, 6) for _ in range(2)])

    def forward(self, x):
        x = self.a(x)
        h = x.unsqueeze(-2).expand(*x.shape[:-1], self.n, 6)
        for mix, read, write, up, down in zip(self.mix, self.read, self.write, self.up, self.down):
            y = down(up(torch.einsum("btnd,n->btd", h, read)).relu())
            h = torch.einsum("nm,btmd->btnd", mix, h) + y.unsqueeze(-2) * write
        return self.z(h.sum(-2))


class Scan(nn.Module):
    """A selective state-space model: channels filtered along the sequence, whose steps and states they decide."""

    def __init__(self, inner=12, states=3, rank=2):
        super().__init__()
        self.sizes = rank, states, states
        self.a, self.z = nn.Linear(8, 2 * inner), nn.Linear(inner, 8)
        self.filter = nn.Conv1d(inner, inner, 3, groups=inner, padding=2)
        self.steer, self.step = nn.Linear(inner, rank + 2 * states), nn.Linear(rank, inner)
        self.decay = nn.Parameter(torch.rand(inner, states))

    def forward(self, x):
        h, gate = self.a(x).chunk(2, -1)
        h = F.silu(self.filter(h.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        step, write, read = self.steer(h).split(self.sizes, -1)
        step = F.softplus(self.step(step)).unsqueeze(-1)
        state, outputs = torch.zeros_like(step[:, 0] * self.decay), []
        for t in range(x.shape[1]):
            state = torch.exp(-step[:, t] * self.decay) * state + step[:, t] * write[:, t, None] * h[:, t, :, None]
            outputs.append((state @ read[:, t, :, None]).squeeze(-1))
        return x + self.z(torch.stack(outputs, 1) * F.silu(gate))


class Spectral(nn.Module):
    """Long convolutions by Fourier transforms."""

    def __init__(self, length=9):
        super().__init__()
        self.a, self.z, self.kernel = nn.Linear(8, 12), nn.Linear(12, 8), nn.Parameter(torch.randn(12, length))

    def forward(self, x):
        h, n = self.a(x).transpose(1, 2), 2 * x.shape[1]
        spectrum = torch.fft.rfft(h, n=n) * torch.fft.rfft(self.kernel[:, : x.shape[1]], n=n)
        return x + self.z(torch.fft.irfft(spectrum, n=n)[..., : x.shape[1]].transpose(1, 2))


class Convolved(nn.Module):
    """A residual block of convolutions."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(8, 12, 3, padding=1), nn.Conv1d(12, 8, 3, padding=1)

    def forward(self, x):
        x = x.transpose(1, 2)
        return x + self.b(self.a(x).relu())


class Behind(nn.Module):
    """An FFN right behind attention, with no sum between, and one more layer into the stream."""

    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(8, 24), nn.Linear(8, 10)
        self.a, self.b, self.c = nn.Linear(10, 12), nn.Linear(12, 6), nn.Linear(6, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.c(self.b(self.a(y).relu()))


class Picked(nn.Module):
    """Experts by index, one product for every token with the weights of its own."""

    def __init__(self, experts=3):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(experts, 24, 8)), nn.Parameter(torch.randn(experts, 8, 12))
        self.route = nn.Linear(8, experts)

    def forward(self, x):
        flat = x.reshape(-1, 8)
        scores, expert = self.route(flat).max(-1)
        gate, up = (self.up[expert] @ flat.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        y = (self.down[expert] @ (gate.relu() * up).unsqueeze(-1)).squeeze(-1) * scores[:, None]
        return x + y.view(x.shape)


class Twice(nn.Module):
    """Attention whose result is a sum over two sets of keys, with one softmax over both; no stream around it."""

    def __init__(self):
        super().__init__()
        self.a, self.q, self.k, self.v, self.o = (nn.Linear(*s) for s in ((8, 10), (10, 8), (10, 8), (10, 6), (6, 8)))

    def forward(self, x):
        x = self.a(x)
        near, far = x, x[:, :2]
        q = self.q(x).unflatten(-1, (2, 4))
        (k, v), (m, w) = ((self.k(y).unflatten(-1, (2, 4)), self.v(y).unflatten(-1, (2, 3))) for y in (near, far))
        scores = [torch.einsum("bthd,bshd->bhts", q, keys) for keys in (k, m)]
        near, far = torch.cat(scores, -1).softmax(-1).split([x.shape[1], 2], -1)
        y = torch.einsum("bhts,bshd->bthd", near, v) + torch.einsum("bhts,bshd->bthd", far, w)
        return self.o(y.flatten(2))


class Kept(nn.Module):
    """nn.MultiheadAttention with a key and a value of its own, and one of zeros, which are put behind the others."""

    def __init__(self):
        super().__init__()
        self.m = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True)

    def forward(self, x):
        return x + self.m(x, x, x, need_weights=False)[0]


class Splines(nn.Module):
    """Layers of functions (KAN): a product of an activation with two weights, which have their outputs in common."""

    def __init__(self, sizes=(8, 12, 8), knots=3):
        super().__init__()
        pairs = list(zip(sizes, sizes[1:]))
        self.base = nn.ModuleList([nn.Linear(i, o, bias=False) for i, o in pairs])
        self.by_knot = nn.ParameterList([torch.randn(o, i, knots) for i, o in pairs])
        self.scale = nn.ParameterList([torch.randn(o, i) for i, o in pairs])
        self.register_buffer("knots", torch.linspace(-1, 1, knots))

    def forward(self, x):
        for base, by_knot, scale in zip(self.base, self.by_knot, self.scale):
            near = torch.exp(-((x.unsqueeze(-1) - self.knots) ** 2))
            x = base(F.silu(x)) + torch.einsum("...ik,oik,oi->...o", near, by_knot, scale)
        return x


class Edges(nn.Module):
    """Attention along the edges of a graph: each head weighs what it sends by a softmax over the edges that meet."""

    def __init__(self, heads=2):
        super().__init__()
        self.w, self.o, self.heads = nn.Linear(8, 6 * heads), nn.Linear(6 * heads, 8), heads
        self.sends, self.takes = nn.Parameter(torch.randn(heads, 6)), nn.Parameter(torch.randn(heads, 6))
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 3, 0, 2], [1, 2, 3, 0, 2, 1]]))

    def forward(self, x):
        h, (source, to) = self.w(x).unflatten(-1, (self.heads, 6)), self.edges
        weights = ((h * self.sends).sum(-1)[:, source] + (h * self.takes).sum(-1)[:, to]).exp()
        total = torch.zeros_like(h[..., 0]).index_add(1, to, weights)
        sent = h[:, source] * (weights / total[:, to]).unsqueeze(-1)
        return x + self.o(torch.zeros_like(h).index_add(1, to, sent).flatten(2))


class Additive(nn.Module):
    """Scores of queries and keys by the sum of each with each, and a vector."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 5), nn.Linear(8, 5), nn.Linear(8, 6)
        self.s, self.o = nn.Linear(5, 1), nn.Linear(6, 8)

    def forward(self, x):
        scores = self.s((self.q(x).unsqueeze(2) + self.k(x).unsqueeze(1)).tanh()).squeeze(-1)
        return x + self.o(scores.softmax(-1) @ self.v(x))


class Stacked(nn.Module):
    """Queries, keys and values by one weight (3, width, heads × channels): a head of it is a head of all three."""

    def __init__(self):
        super().__init__()
        self.w, self.o = nn.Parameter(torch.randn(3, 8, 12)), nn.Linear(12, 8)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 6)).transpose(1, 2) for t in torch.einsum("btd,nde->nbte", x, self.w))
        return x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class AtOnce(Absorbed):
    """The same by products of three."""

    def forward(self, x):
        heads, key, value = self.sizes
        q, latent = self.a(x).unflatten(-1, (heads, key)), self.b(x)
        by_key, by_value = self.c.weight.view(heads, key + value, -1).split([key, value], 1)
        scores = torch.einsum("bthk,hkr,bsr->bhts", q, by_key, latent)
        return x + self.d(torch.einsum("bhts,bsr,hvr->bthv", scores.softmax(-1), latent, by_value).flatten(2))


class Slots(nn.Module):
    """Experts that each read a mixture of all tokens, and tokens that each read a mixture of all experts' results."""

    def __init__(self):
        super().__init__()
        self.a, self.slots = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 3, 2))
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 12)), nn.Parameter(torch.randn(3, 12, 8))

    def forward(self, x):
        x = self.a(x)
        scores = torch.einsum("btd,dep->btep", x, self.slots)
        h = torch.einsum("btd,btep->bepd", x, scores.softmax(1))
        y = torch.einsum("bepn,end->bepd", torch.einsum("bepd,edn->bepn", h, self.up).relu(), self.down)
        return x + torch.einsum("bepd,btep->btd", y, scores.flatten(2).softmax(-1).view_as(scores))


class HeadsChosen(nn.Module):
    """Attention whose heads' results are weighed for each token, by a product of three."""

    def __init__(self):
        super().__init__()
        self.qkv, self.gate, self.o = nn.Linear(8, 24), nn.Linear(8, 2), nn.Parameter(torch.randn(2, 4, 8))

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v)
        return x + torch.einsum("bhtk,hkd,bth->btd", y, self.o, self.gate(x).softmax(-1))


class Maxout(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 36), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.b(self.a(x).unflatten(-1, (12, 3)).amax(-1))


ROLES = {  # model -> (parameter, dim, what it is, units), each of which one coupling has
    Packed: [
        ("m.in_proj_weight", 0, "attention.query", 2),
        ("m.in_proj_weight", 0, "attention.key", 2),
        ("m.in_proj_weight", 0, "attention.value", 2),
        ("m.out_proj.weight", 1, "attention.out", 2),
    ],
    Kept: [
        ("m.in_proj_weight", 0, "attention.query", 2),
        ("m.in_proj_weight", 0, "attention.key", 2),
        ("m.in_proj_weight", 0, "attention.value", 2),
        ("m.bias_k", 2, "attention.in", 2),
    ],
    Splines: [("base.0.weight", 0, "ffn.in", 12), ("by_knot.0", 0, "ffn.in", 12), ("scale.1", 1, "ffn.out", 12)],
    Absorbed: [
        ("a.weight", 0, "attention.query", 2),
        ("d.weight", 1, "attention.out", 2),
        ("b.weight", 0, "attention.key", 5),
    ],
    AtOnce: [
        ("a.weight", 0, "attention.query", 2),
        ("d.weight", 1, "attention.out", 2),
        ("b.weight", 0, "attention.key", 5),
    ],
    Slots: [("slots", 1, "moe.expert", 3), ("up", 2, "moe.in", 12), ("down", 1, "moe.out", 12)],
    HeadsChosen: [("o", 1, "attention.out", 4), ("qkv.weight", 0, "attention.value", 2)],
    Maxout: [("a.weight", 0, "ffn.in", 12), ("a.weight", 0, "ffn.in", 3), ("b.weight", 1, "ffn.out", 12)],
    Adapted: [("a.weight", 0, "ffn.in", 12), ("b.weight", 1, "ffn.out", 12), ("c.weight", 0, "other.in", 2)],
    Once: [("a.weight", 0, "residual.in", 8), ("c.weight", 1, "ffn.out", 12)],
    Streams: [
        ("a.weight", 0, "residual.in", 6),
        ("mix.1", 1, "other.out", 3),
        ("up.0.weight", 0, "ffn.in", 12),
        ("down.1.weight", 1, "ffn.out", 12),
    ],
    Scan: [("a.weight", 0, "ssm.in", 12), ("z.weight", 1, "ssm.out", 12), ("steer.weight", 0, "other.in", 3)],
    Spectral: [("a.weight", 0, "ssm.in", 12), ("kernel", 0, "ssm.in", 12), ("z.weight", 1, "ssm.out", 12)],
    Convolved: [("a.weight", 0, "conv.in", 12), ("b.weight", 1, "conv.out", 12)],
    Behind: [
        ("o.weight", 0, "other.in", 10),
        ("a.weight", 0, "ffn.in", 12),
        ("b.weight", 1, "ffn.out", 12),
        ("c.weight", 1, "other.out", 6),
    ],
    Twice: [
        ("q.weight", 0, "attention.query", 2),
        ("v.weight", 0, "attention.value", 3),
        ("o.weight", 1, "attention.out", 2),
    ],
    Edges: [
        ("w.weight", 0, "attention.value", 2),
        ("sends", 0, "attention.in", 2),
        ("o.weight", 1, "attention.out", 2),
    ],
    Additive: [
        ("q.weight", 0, "attention.query", 5),
        ("k.weight", 0, "attention.key", 5),
        ("s.weight", 1, "attention.in", 5),
        ("v.weight", 0, "attention.value", 6),
        ("o.weight", 1, "attention.out", 6),
    ],
    Stacked: [("w", 2, "attention.in", 2), ("o.weight", 1, "attention.out", 2)],
    Picked: [("up", 1, "moe.in", 12), ("down", 2, "moe.out", 12)],
}


@pytest.mark.parametrize("make", ROLES)
def test_a_graph_says_what_axes_are_for(make):
    torch.manual_seed(0)
    analysis = couple(capture(make(), (torch.randn(2, 4, 8),)))
    members = {(*member, c.units) for c in analysis.couplings for member in c.members}
    assert members >= set(ROLES[make]), "\n".join(map(str, analysis.couplings))


def test_queries_keys_and_values_of_one_weight_train_apart():
    torch.manual_seed(0)
    analysis = couple(capture(Packed(), (torch.randn(2, 4, 8),)))
    places = {}
    for role in ("attention.query", "attention.key", "attention.value"):
        (band,) = targeted_bands(analysis, s2ft.S2FTConfig({role: 1}))[role]
        assert band.positions.shape == (2, 4)
        places[role] = set(band.positions.flatten().tolist())
    assert [min(rows) for rows in places.values()] == [0, 8, 16] and len(set().union(*places.values())) == 24


def test_a_sum_over_experts_has_no_heads():
    analysis = couple(capture(Slots(), (torch.randn(2, 4, 8),)))
    assert not analysis.heads and not analysis.ordered
