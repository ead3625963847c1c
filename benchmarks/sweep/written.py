"""Models as people write them by hand, for `zoo.py`: one idea of the literature each, small and at random.

A model is two residual blocks around what is looked at.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, H, N = 16, 4, 24  # width, heads, hidden units


class Block(nn.Module):
    def __init__(self, attn: nn.Module, ffn: nn.Module):
        super().__init__()
        self.norm1, self.norm2, self.attn, self.ffn = nn.LayerNorm(D), nn.LayerNorm(D), attn, ffn

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class Mixed(nn.Module):
    """The same with what is no attention in its place."""

    def __init__(self, mixer: nn.Module, ffn: nn.Module):
        super().__init__()
        self.norm1, self.norm2, self.mixer, self.ffn = nn.LayerNorm(D), nn.LayerNorm(D), mixer, ffn

    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class Model(nn.Module):
    """Embedding, two blocks, a head."""

    def __init__(self, block: Callable[[], nn.Module]):
        super().__init__()
        self.inputs, self.outputs = nn.Linear(7, D), nn.Linear(D, 5)
        self.layers = nn.ModuleList([block() for _ in range(2)])

    def forward(self, x):
        x = self.inputs(x)
        for layer in self.layers:
            x = layer(x)
        return self.outputs(x)


class MLP(nn.Module):
    def __init__(self, act=F.gelu):
        super().__init__()
        self.up, self.down, self.act = nn.Linear(D, N), nn.Linear(N, D), act

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class GLU(nn.Module):
    """Gate and up in one weight."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * N), nn.Linear(N, D)

    def forward(self, x):
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Packed(nn.Module):
    """Queries, keys and values in one weight; `mix` is (q, k, v) -> results, all (batch, heads, length, head_dim)."""

    def __init__(self, mix: Callable[..., Tensor] = F.scaled_dot_product_attention):
        super().__init__()
        self.qkv, self.proj, self.mix = nn.Linear(D, 3 * D), nn.Linear(D, D), mix

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, H, D // H)).permute(2, 0, 3, 1, 4)
        return self.proj(self.mix(q, k, v).transpose(1, 2).flatten(2))


def causal(q, k, v):
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


def linear(q, k, v):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state = torch.einsum("bhtd,bhtv->bhdv", k, v)
    return torch.einsum("bhtd,bhdv->bhtv", q, state) / torch.einsum("bhtd,bhd->bht", q, k.sum(2)).unsqueeze(-1)


def decayed(q, k, v):
    """Retention: each head has a decay of its own."""
    gamma = 1 - 2.0 ** (-5 - torch.arange(H, dtype=q.dtype))
    t = torch.arange(q.shape[2])
    power = (t[:, None] - t).clamp(min=0)
    return ((q @ k.transpose(-2, -1)) * (gamma[:, None, None] ** power).tril()) @ v


def cosine(q, k, v):
    return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * 5).softmax(-1) @ v


def distance(q, k, v):
    return (-torch.cdist(q, k)).softmax(-1) @ v


class Grouped(nn.Module):
    """Grouped queries with rotary embeddings of complex numbers."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(D, D), nn.Linear(D, D // 2), nn.Linear(D, D // 2)
        self.o = nn.Linear(D, D)

    def forward(self, x):
        q, k, v = (m(x).unflatten(-1, (-1, D // H)).transpose(1, 2) for m in (self.q, self.k, self.v))
        angles = torch.outer(torch.arange(x.shape[1]).to(x), torch.tensor([1.0, 0.1], dtype=x.dtype))
        turn = torch.polar(torch.ones_like(angles), angles)
        q, k = (torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn).flatten(-2) for t in (q, k))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Parallel(nn.Module):
    """Attention and FFN side by side, everything in one weight before and in one after."""

    def __init__(self):
        super().__init__()
        self.norm, self.wi, self.wo = nn.LayerNorm(D), nn.Linear(D, 3 * D + 2 * N), nn.Linear(D + N, D)

    def forward(self, x):
        q, k, v, gate, up = self.wi(self.norm(x)).split([D, D, D, N, N], -1)
        q, k, v = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.wo(torch.cat([y, F.silu(gate) * up], -1))


class Latents(nn.Module):
    """Learned latents that read the input, and are read by it."""

    def __init__(self):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(3, D))
        self.read, self.write = (nn.MultiheadAttention(D, H, batch_first=True) for _ in range(2))

    def forward(self, x):
        latents = self.latents.expand(x.shape[0], -1, -1)
        latents = self.read(latents, x, x, need_weights=False)[0]
        return self.write(x, latents, latents, need_weights=False)[0]


class Experts(nn.Module):
    """All experts for all tokens, weighted."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(D, 3), nn.Parameter(torch.randn(3, D, N) / 4)
        self.down = nn.Parameter(torch.randn(3, N, D) / 5)

    def forward(self, x):
        hidden = torch.einsum("btd,edn->bten", x, self.up).relu()
        return torch.einsum("bten,end,bte->btd", hidden, self.down, self.gate(x).softmax(-1))


class Looped(nn.Module):
    """The same with a loop over a list of modules."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(D, 3), nn.ModuleList([GLU() for _ in range(3)])

    def forward(self, x):
        weights = self.gate(x).softmax(-1)
        return sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


class Splines(nn.Module):
    """A Kolmogorov-Arnold layer: a weight for each of five basis functions of each input."""

    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(*s) / 8) for s in ((N, D, 5), (D, N, 5)))
        self.register_buffer("grid", torch.linspace(-2, 2, 5), persistent=False)

    def forward(self, x):
        for weight in (self.up, self.down):
            basis = torch.exp(-((x.unsqueeze(-1) - self.grid) ** 2))
            x = F.linear(basis.flatten(-2), weight.flatten(1))
        return x


class Convolution(nn.Module):
    """A Conformer's: pointwise, gated, depthwise, batch norm, pointwise."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Conv1d(D, 2 * N, 1), nn.Conv1d(N, D, 1)
        self.depth, self.norm = nn.Conv1d(N, N, 3, padding=1, groups=N), nn.BatchNorm1d(N)

    def forward(self, x):
        h = F.glu(self.up(x.transpose(1, 2)), 1)
        return self.down(F.silu(self.norm(self.depth(h)))).transpose(1, 2)


class Excited(nn.Module):
    """Two convolutions with squeeze and excitation between, one of them normed by its weights."""

    def __init__(self):
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Conv1d(D, N, 3, padding=1))
        self.b, self.squeeze, self.excite = nn.Conv1d(N, D, 3, padding=1), nn.Linear(N, 6), nn.Linear(6, N)

    def forward(self, x):
        h = self.a(x.transpose(1, 2)).relu()
        h = h * self.excite(self.squeeze(h.mean(-1)).relu()).sigmoid().unsqueeze(-1)
        return self.b(h).transpose(1, 2)


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.rnn, self.proj = kind(D, N, batch_first=True), nn.Linear(N, D)

    def forward(self, x):
        return self.proj(self.rnn(x)[0])


class Stepped(nn.Module):
    """A cell in a loop over the sequence."""

    def __init__(self):
        super().__init__()
        self.cell, self.proj = nn.GRUCell(D, N), nn.Linear(N, D)

    def forward(self, x):
        state, states = x.new_zeros(x.shape[0], N), []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            states.append(state)
        return self.proj(torch.stack(states, 1))


class Spectral(nn.Module):
    """A long convolution by Fourier transforms, gated."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.kernel = nn.Linear(D, 2 * N), nn.Linear(N, D), nn.Parameter(torch.randn(N, 64))

    def forward(self, x):
        gate, h = self.up(x).chunk(2, -1)
        length = x.shape[1]
        spectrum = torch.fft.rfft(h.transpose(1, 2), n=2 * length) * torch.fft.rfft(
            self.kernel[:, :length], n=2 * length
        )
        h = torch.fft.irfft(spectrum, n=2 * length)[..., :length].transpose(1, 2)
        return self.down(h * gate.sigmoid())


class Adapted(nn.Module):
    """A frozen-style FFN with a low-rank adapter on each layer."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, N), nn.Linear(N, D)
        self.a, self.b, self.c, self.d = (nn.Linear(*s, bias=False) for s in ((D, 2), (2, N), (N, 2), (2, D)))

    def forward(self, x):
        h = F.gelu(self.up(x) + self.b(self.a(x)))
        return self.down(h) + self.d(self.c(h))


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.pair, self.down = nn.Linear(D, N), nn.Bilinear(N, N, 6), nn.Linear(6, D)

    def forward(self, x):
        h = self.up(x).tanh()
        return self.down(self.pair(h, h))


class Skips(nn.Module):
    """Down and up again, with channels put beside those of before."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(D, N, 3, 2, 1), nn.ConvTranspose2d(N, D, 2, 2)
        self.join, self.norm, self.last = nn.Conv2d(2 * D, D, 3, padding=1), nn.GroupNorm(4, N), nn.Conv2d(D, D, 1)

    def forward(self, x):
        image = x.transpose(1, 2).unflatten(-1, (4, -1))
        h = F.silu(self.norm(self.down(image)))
        joined = self.join(torch.cat([self.up(h), image], 1)).relu()
        return self.last(joined).flatten(2).transpose(1, 2)


class Latent(nn.Module):
    """Attention over latents that all heads share, by products of three operands."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(D, H * 4), nn.Linear(D, 8), nn.Linear(H * 5, D)
        self.by_key, self.by_value = nn.Parameter(torch.randn(H, 4, 8) / 3), nn.Parameter(torch.randn(H, 8, 5) / 3)

    def forward(self, x):
        q, latent = self.q(x).unflatten(-1, (H, 4)), self.kv(x)
        scores = torch.einsum("bthk,hkr,bsr->bhts", q, self.by_key, latent).softmax(-1)
        return self.o(torch.einsum("bhts,bsr,hrv->bthv", scores, latent, self.by_value).flatten(2))


class Slots(nn.Module):
    """Soft experts: each reads a mixture of all tokens, each token a mixture of all that they made."""

    def __init__(self):
        super().__init__()
        self.slots = nn.Parameter(torch.randn(D, 3, 2))
        self.up, self.down = nn.Parameter(torch.randn(3, D, N) / 4), nn.Parameter(torch.randn(3, N, D) / 5)

    def forward(self, x):
        scores = torch.einsum("btd,dep->btep", F.normalize(x, dim=-1), F.normalize(self.slots, dim=0))
        read = torch.einsum("btd,btep->bepd", x, scores.softmax(1))
        made = torch.einsum("bepn,end->bepd", torch.einsum("bepd,edn->bepn", read, self.up).relu(), self.down)
        return torch.einsum("bepd,btep->btd", made, scores.flatten(2).softmax(-1).view_as(scores))


class Maxout(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, 3 * N), nn.Linear(N, D)

    def forward(self, x):
        return self.down(self.up(x).unflatten(-1, (N, 3)).amax(-1))


class Diagonal(nn.Module):
    """A state-space model with complex diagonal states (S4D), as a long convolution."""

    def __init__(self, states=3):
        super().__init__()
        self.up, self.down, self.skip = nn.Linear(D, N), nn.Linear(N, 2 * D), nn.Parameter(torch.randn(N))
        self.read, self.step = nn.Parameter(torch.randn(N, states, 2)), nn.Parameter(torch.rand(N))
        self.decay, self.turn = nn.Parameter(torch.rand(N, states)), nn.Parameter(torch.rand(N, states))

    def forward(self, x):
        u, length = self.up(x).mT, x.shape[1]
        rate = torch.complex(-self.decay.exp(), self.turn)
        power = (rate * self.step.exp()[:, None])[..., None] * torch.arange(length).to(x)
        kernel = torch.einsum("hn,hnl->hl", torch.view_as_complex(self.read) / rate, power.exp()).real
        spectrum = torch.fft.rfft(kernel, n=2 * length) * torch.fft.rfft(u, n=2 * length)
        y = torch.fft.irfft(spectrum, n=2 * length)[..., :length] + u * self.skip[:, None]
        return F.glu(self.down(F.gelu(y).mT), -1)


def _blocks(attn: Callable[[], nn.Module], ffn: Callable[[], nn.Module] = MLP) -> Callable[[], nn.Module]:
    return lambda: Model(lambda: Block(attn(), ffn()))


def _mixed(mixer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Model(lambda: Mixed(mixer(), MLP()))


def _torch(layer: type[nn.Module], **options) -> Callable[[], nn.Module]:
    return lambda: Model(lambda: layer(D, H, N, batch_first=True, **options))


WRITTEN: dict[str, Callable[[], nn.Module]] = {
    "packed attention": _blocks(Packed),
    "causal by a mask": _blocks(lambda: Packed(causal), GLU),
    "linear attention": _blocks(lambda: Packed(linear)),
    "retention": _blocks(lambda: Packed(decayed)),
    "cosine attention": _blocks(lambda: Packed(cosine)),
    "attention by distance": _blocks(lambda: Packed(distance)),
    "grouped queries, complex rotary": _blocks(Grouped, GLU),
    "parallel, one weight": lambda: Model(Parallel),
    "latents": _blocks(Latents),
    "experts by einsum": _blocks(Packed, Experts),
    "experts in a loop": _blocks(Packed, Looped),
    "splines": _blocks(Packed, Splines),
    "convolution and batch norm": _mixed(Convolution),
    "squeeze and excitation": _mixed(Excited),
    "lstm": _mixed(Recurrent),
    "gru": _mixed(lambda: Recurrent(nn.GRU)),
    "gru cell": _mixed(Stepped),
    "fourier": _mixed(Spectral),
    "latent attention": _blocks(Latent),
    "soft experts": _blocks(Packed, Slots),
    "maxout": _blocks(Packed, Maxout),
    "diagonal states": _mixed(Diagonal),
    "low-rank adapters": _blocks(Packed, Adapted),
    "bilinear": _mixed(Bilinear),
    "skips": _mixed(Skips),
    "hardswish": _blocks(Packed, lambda: MLP(F.hardswish)),
    "prelu": _blocks(Packed, lambda: MLP(nn.PReLU())),
    "nn.TransformerEncoderLayer": _torch(nn.TransformerEncoderLayer),
    "nn.TransformerEncoderLayer, norm first": _torch(nn.TransformerEncoderLayer, norm_first=True, activation="gelu"),
}
