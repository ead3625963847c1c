"""Norms and biases in a batch: every row is that of its adapter alone, for whatever module holds the vectors."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import QUICK, assert_weights, hf, randomize, same_bits, tokens, tuned
from torch import nn
from torch.func import functional_call

import s2ft_compile as s2ft
from s2ft_compile.adapters.bank import AdapterBank
from s2ft_compile.adapters.fingerprint import combined, samples_of
from s2ft_compile.adapters.format import Adapter, describe_base, hash_of_block, read_adapter
from s2ft_compile.errors import ExportError, StateError
from s2ft_compile.exporters import load_adapter, save_adapter
from s2ft_compile.slices.state import disabled, merged, state_of

EPS = 2.0**-24


class Plain(nn.Module):
    """A norm of elementary operators, as language models have it; with a gate, another input of the same rows."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x, gate=None):
        x = x if gate is None else x * gate
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Turned(Plain):
    """Its rows come third inside, where a gain along the first would be another's."""

    def forward(self, x):
        return (self.weight * super().forward(x).transpose(0, 1)).transpose(0, 1)


MODULES = {
    "plain": (lambda: Plain(6), (4, 6)),
    "gated": (lambda: Plain(6), (4, 6)),
    "turned": (lambda: Turned(6), (4, 6)),
    "rms": (lambda: nn.RMSNorm(6), (4, 6)),
    "layer": (lambda: nn.LayerNorm(6), (4, 6)),
    "heads": (lambda: nn.LayerNorm(6), (4, 3, 6)),
    "group": (lambda: nn.GroupNorm(2, 6), (6, 5)),
    "batch": (lambda: nn.BatchNorm2d(6), (6, 3, 2)),
    "conv": (lambda: nn.Conv1d(6, 4, 3), (6, 5)),
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
}


def made(kind: str) -> nn.Module:
    """The module in a model, every number random."""
    torch.manual_seed(0)
    model = nn.Sequential(MODULES[kind][0]()).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
        for _, b in model.named_buffers():
            if b.is_floating_point():
                b.copy_(torch.rand_like(b) + 0.5)
    return model


def adapter_for(model: nn.Module, names: list[str], seed: int, share: float = 1.0) -> Adapter:
    """Random deltas of a share of each of these vectors."""
    random, held = torch.Generator().manual_seed(seed), dict(model.named_parameters())
    slices = []
    for name in names:
        size = held[name].shape[0]
        n = max(1, int(share * size))
        indices = torch.randperm(size, generator=random)[:n].sort().values
        slices.append(s2ft.Slice(name, 0, indices, (size,), (), torch.randn(n, generator=random)))
    samples = samples_of(model)
    blocks = {s.parameter_name: hash_of_block(held[s.parameter_name], s) for s in slices}
    plan = s2ft.Plan(s2ft.S2FTConfig(), combined(samples), tuple(slices))
    return Adapter(plan, describe_base(type(model).__name__, "float32", samples, blocks))


def trained(model: nn.Module, adapter: Adapter | None, double: bool = False) -> dict[str, torch.Tensor]:
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    for s in adapter.slices if adapter else ():
        weights[s.parameter_name].index_add_(0, s.indices, s.delta)
    return {n: w.double() for n, w in weights.items()} if double else weights


def bank_of(model: nn.Module, adapters: dict[str, Adapter]) -> AdapterBank:
    bank = AdapterBank(model)
    for name, adapter in adapters.items():
        bank.add(name, adapter)
    return bank


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """One of all vectors, one of half of the first, one of the last."""
    names = [n for n, p in model.named_parameters() if p.dim() == 1]
    chosen = {"all": (names, 1.0), "half": (names[:1], 0.5), "last": (names[-1:], 1.0)}
    return {name: adapter_for(model, which, seed, n) for seed, (name, (which, n)) in enumerate(chosen.items())}


@settings(max_examples=40)
@given(
    st.sampled_from(list(MODULES)),
    st.lists(st.sampled_from(["all", "half", "last", None]), min_size=1, max_size=5),
    st.integers(1, 2),
    st.booleans(),
)
def test_each_row_is_what_the_module_gives_with_its_vectors(kind, ids, times, grad):
    """Oracle: the module alone, in float64, on one row. Rows stand for several (beams)."""
    model = made(kind)
    adapters = adapters_of(model)
    bank = bank_of(model, adapters)
    random = torch.Generator().manual_seed(len(ids))
    x = torch.randn(len(ids) * times, *MODULES[kind][1], generator=random)
    more = {"gate": torch.rand(x.shape, generator=random)} if kind == "gated" else {}
    before = model[0](x, **more).detach()
    with torch.set_grad_enabled(grad), bank.batch(ids):
        y = model[0](x, **more).detach()
    oracle = copy.deepcopy(model).double()
    for i in range(len(x)):
        weights = trained(model, adapters.get(ids[i // times]), double=True)
        part = {k: v[i : i + 1].double() for k, v in more.items()}
        own = {n.removeprefix("0."): w for n, w in weights.items()}
        want = functional_call(oracle[0], own, (x[i : i + 1].double(),), part)
        # at most 18 products a sum, and a division and two products after it
        torch.testing.assert_close(y[i : i + 1].double(), want, rtol=0, atol=64 * EPS * float(want.abs().max()) + 1e-7)
    assert torch.equal(model[0](x, **more), before)


@given(st.lists(st.sampled_from(["all", "half", None]), min_size=1, max_size=4))
def test_a_norm_of_elementary_operators_gives_the_bits_of_each_row_alone(ids):
    model = made("plain")
    adapters = adapters_of(model)
    bank, x = bank_of(model, adapters), torch.randn(len(ids), 4, 6)
    with torch.no_grad(), bank.batch(ids):
        y = model(x)
    for i, name in enumerate(ids):
        assert torch.equal(y[i : i + 1], functional_call(model, trained(model, adapters.get(name)), (x[i : i + 1],)))


@pytest.mark.parametrize(
    "kind, way",
    [("plain", "_broadcast"), ("rms", "_affine"), ("layer", "_affine"), ("turned", "_by_row"), ("group", "_by_row")],
)
def test_the_shortest_way_that_is_right_is_taken(kind, way):
    """As many rows as there are tokens, where a gain along the wrong dimension fits."""
    model = made(kind)
    bank = bank_of(model, adapters_of(model))
    with torch.no_grad(), bank.batch(["all", None, "half", "all"]):
        model(torch.randn(4, *MODULES[kind][1]))
    (taken,) = bank._stacks["0"][0].ways.values()
    assert taken.__name__ == way


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.sampled_from(["all", "half", None]), st.integers(1, 4)), min_size=1, max_size=5), st.data()
)
def test_packed_tokens_have_the_vectors_of_their_request(requests, data):
    """Wherever the tokens are in the input: second, third behind the heads, or first."""
    kind, place = data.draw(st.sampled_from(["plain", "layer", "rms"])), data.draw(st.sampled_from([0, 1, 2]))
    model = made(kind)
    adapters = adapters_of(model)
    bank, lengths = bank_of(model, adapters), [n for _, n in requests]
    shape = [(7, 6), (1, 7, 6), (1, 3, 7, 6)][place]
    bank.learn_token_axes(lambda n: model(torch.zeros([n if size == 7 else size for size in shape])))
    total = sum(lengths)
    x = torch.randn([total if size == 7 else size for size in shape])
    with torch.no_grad(), bank.batch([name for name, _ in requests], lengths):
        y = model(x)
    for (name, _), part, got in zip(requests, x.split(lengths, place), y.split(lengths, place)):
        want = functional_call(model, trained(model, adapters.get(name)), (part,))
        torch.testing.assert_close(got, want, rtol=0, atol=16 * EPS * float(want.abs().max()))


class Block(nn.Module):
    """A norm between two layers with biases, and one behind them."""

    def __init__(self, kind: str):
        super().__init__()
        conv = kind in ("group", "batch")
        layer = (lambda a, b: nn.Conv1d(a, b, 1)) if conv else nn.Linear
        norm = {"plain": Plain, "rms": nn.RMSNorm, "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}.get(kind)
        norm = norm or (lambda size: nn.GroupNorm(2, size))
        self.up, self.inner_norm, self.down, self.norm = layer(4, 8), norm(8), layer(8, 4), norm(4)

    def forward(self, x):
        return self.norm(x + self.down(torch.relu(self.inner_norm(self.up(x)))))


BLOCKS = ("plain", "rms", "layer", "group", "batch")
OTHERS = {"down.weight": 3, "up.weight": 0.5, "up.bias": 1.0, "down.bias": 1.0, "inner_norm.weight": 2}


@settings(max_examples=25, phases=QUICK)
@given(
    st.sampled_from(BLOCKS),
    st.dictionaries(st.sampled_from(list(OTHERS)), st.just(1), max_size=3),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_norms_train_switch_fuse_merge_and_release_as_any_slice(tmp_path_factory, kind, others, norms, dtype):
    """Oracle: cast(W0 + delta) of whole parameters, in the base's order."""
    targets = {name: OTHERS[name] for name in others} | ({"*norm.*": 1.0} if norms or not others else {})
    torch.manual_seed(0)
    base = Block(kind).eval().to(dtype)
    x = torch.randn((3, 4, 5) if kind in ("group", "batch") else (3, 5, 4)).to(dtype)
    before, root, plans, want = weights(base), tmp_path_factory.mktemp("block"), {}, {}
    for seed, name in enumerate(("a", "b")):
        model = copy.deepcopy(base)
        plans[name] = s2ft.prepare(model, (x,), s2ft.S2FTConfig(targets=targets, seed=seed))
        randomize(model, seed)
        save_adapter(model, root / name)
        plan = state_of(model).plan
        want[name] = tuned(base, plan)
        for state, expected in ((merged, want[name]), (disabled, before)):
            with state(model):
                assert all(same_bits(model.get_parameter(n), W) for n, W in expected.items())
        s2ft.release(model)
        assert_weights(model, want[name])
        load_adapter(loaded := copy.deepcopy(base), root / name)
        assert_weights(loaded, want[name])
    bank = bank_of(base, {name: root / name for name in want})
    for name in ("a", "b", "a"):
        bank.activate(name)
        assert_weights(base, want[name])
    bank.fuse({"a": 1.0, "b": 0.5})
    expected = {}
    for name, W in before.items():
        total = W.float().clone()
        for adapter, weight in (("a", 1.0), ("b", 0.5)):
            for s in read_adapter(root / adapter).slices:
                if s.parameter_name == name:
                    total.index_add_(s.dim, s.indices, s.delta * weight)
        expected[name] = total.to(dtype)
    assert_weights(base, expected)
    bank.activate(None)
    assert_weights(base, before)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


TARGETS = {"a": lambda globs: {"ffn.out": 3, **globs}, "b": lambda globs: globs, "c": lambda globs: {"ffn.in": 2}}
GLOBS = {"llama": {"*norm*": 1.0}, "gpt2": {"*ln_*": 1.0, "*.bias": 1.0}, "qwen2": {"*norm*": 1.0, "*.bias": 1.0}}


def saved(root, kind: str, dtype=torch.float32):
    base = hf(kind, use_cache=True).to(dtype)
    for seed, (name, targets) in enumerate(TARGETS.items()):
        model = copy.deepcopy(base)
        model.config.use_cache = False
        s2ft.prepare(model, {"input_ids": tokens()}, s2ft.S2FTConfig(targets=targets(GLOBS[kind]), seed=seed))
        randomize(model, seed)
        save_adapter(model, root / name)
    return base


@pytest.mark.parametrize("kind", GLOBS)
def test_a_batch_of_a_model_is_each_adapter_alone(tmp_path, kind):
    base, inputs, ids = saved(tmp_path, kind), tokens(4), ["a", "b", None, "c"]
    bank = bank_of(base, {name: tmp_path / name for name in TARGETS})
    with torch.no_grad(), bank.batch(ids):
        outputs = base(inputs).logits
    for i, name in enumerate(ids):
        alone = hf(kind, use_cache=True)
        if name:
            load_adapter(alone, tmp_path / name)
        want = alone(inputs[i : i + 1]).logits[0].detach()
        # float32, sums of at most 64 products, in two layers
        torch.testing.assert_close(outputs[i], want, rtol=0, atol=2**9 * EPS * float(want.abs().max()))


@pytest.mark.parametrize("kind", BLOCKS)
def test_one_graph_is_compiled_for_all_adapters(kind):
    """And it gives what the eager model does."""
    torch.manual_seed(0)
    model, graphs = Block(kind).eval(), []
    x = torch.randn((3, 4, 5) if kind in ("group", "batch") else (3, 5, 4))
    names = [n for n, p in model.named_parameters() if p.dim() == 1]
    bank = bank_of(model, {"a": adapter_for(model, names, 0), "b": adapter_for(model, names[:3], 1, 0.5)})

    def count(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count, fullgraph=True)
    with torch.no_grad():
        for ids in (["a", "b", None], [None, "a", "a"], ["b", None, "a"]):
            with bank.batch(ids):
                want = model(x)
                torch.testing.assert_close(compiled(x), want, rtol=0, atol=16 * EPS * float(want.abs().max()))
    assert len(graphs) == 1
    torch._dynamo.reset()


# --- refusals ---------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """A vector beside a layer, in one module; a shared one."""

    def __init__(self):
        super().__init__()
        self.scale, self.up, self.norm = nn.Parameter(torch.ones(6)), nn.Linear(6, 6), nn.LayerNorm(6)
        self.again = nn.LayerNorm(6)
        self.again.weight = self.norm.weight

    def forward(self, x):
        return self.again(self.norm(self.up(x) * self.scale))


@pytest.mark.parametrize(
    "name, match",
    [("0.scale", "it lies in a Holder, which holds other modules"), ("0.norm.weight", "tied, held as 0.norm.weight")],
)
def test_vectors_that_no_module_of_their_own_holds_are_refused(name, match):
    model = nn.Sequential(Holder())
    bank = bank_of(model, {"a": adapter_for(model, [name], 0)})
    with pytest.raises(ExportError, match=f"{name} cannot be in a batch: .*{match}"), bank.batch(["a"]):
        pytest.fail("the block must not run")
    bank.activate("a")
    assert not torch.equal(model.get_parameter(name), torch.ones(6))


def test_inputs_that_are_no_batch_of_the_rows_are_refused():
    model = made("plain")
    bank = bank_of(model, {"a": adapter_for(model, ["0.weight"], 0)})
    with bank.batch(["a", None]):
        with pytest.raises(StateError, match="2 adapters, and 3 rows, in 0, a Plain with vectors"):
            model(torch.randn(3, 4, 6))
    with bank.batch(["a", None], [1, 3]):
        for shape, match in (((1, 5, 6), "no dimension is"), ((1, 4, 4, 6), "several dimensions may be")):
            with pytest.raises(StateError, match=f"a batch of 4 tokens, and 0, a Plain .*{match} that of the tokens"):
                model(torch.randn(shape))
    model = made("gated")
    bank = bank_of(model, {"a": adapter_for(model, ["0.weight"], 0)})
    with (
        bank.batch(["a", None]),
        pytest.raises(StateError, match=r"has 2 rows .* and not in what else .*: \(1, 4, 6\)"),
    ):
        model[0](torch.randn(2, 4, 6), torch.randn(1, 4, 6))
    with bank.batch(["a", None]), pytest.raises(StateError, match="0, a Plain .* takes no tensors"):
        bank._now.picked["0"][0].instead(((), {}), None)
