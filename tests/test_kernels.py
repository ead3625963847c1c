"""Each Triton kernel against its reference: drawn shapes, strides and types, in Triton's interpreter, and on a GPU
where there is one. And each compiled for GPUs that need not be there."""

import copy
import subprocess
import sys
from contextlib import nullcontext
from importlib.machinery import PathFinder
from math import prod
from pathlib import Path

import pytest
import torch
from ahead import Ahead
from hypothesis import given
from hypothesis import strategies as st
from interpreted import interpreted
from small import U32, hf, prepared, randomize, same_bits, tokens
from torch import Tensor

import s2ft_compile as s2ft
from s2ft_compile.adapters import batched as rows_module
from s2ft_compile.exporters import load_adapter, save_adapter
from s2ft_compile.kernels import adapters, refresh, slice_grad, support
from s2ft_compile.slices import state as state_module

pytestmark = pytest.mark.interpreted

HALF = (torch.bfloat16, torch.float16)
TYPES = (*HALF, torch.float32)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
on_devices = pytest.mark.parametrize("device", DEVICES)
CANARY = 77.0


def kernel_on(device: str, kernel):
    return kernel if device == "cuda" else interpreted(kernel)


class Guarded:
    """A copy of a tensor in the middle of a larger one, with other strides; `check` sees what was written around it."""

    def __init__(self, values: Tensor, order=None):
        order = list(order or range(values.ndim))
        self.around = torch.full([values.shape[d] + 4 for d in order], CANARY, dtype=values.dtype, device=values.device)
        inner = self.around
        for d in range(values.ndim):
            inner = inner.narrow(d, 2, inner.shape[d] - 4)
        self.tensor = inner.permute([order.index(d) for d in range(values.ndim)])
        self.tensor.copy_(values)

    def check(self) -> None:
        held = self.tensor.clone()
        self.tensor.fill_(CANARY)
        assert (self.around == CANARY).all(), "written outside of the tensor"
        self.tensor.copy_(held)


def randn(shape, dtype, seed, device="cpu") -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).to(device)


# --- slice_grad -----------------------------------------------------------------------------------------------

sizes = st.one_of(st.sampled_from([1, 16, 64, 65, 128, 130]), st.integers(1, 150))
orders = st.sampled_from([(0, 1), (1, 0)])


@on_devices
@given(
    T=st.one_of(st.sampled_from([0, 1, 64]), st.integers(0, 200)),
    M=sizes,
    N=sizes,
    dtype=st.sampled_from(TYPES),
    orders=st.tuples(orders, orders, orders),
    add=st.sampled_from(["no", "to another", "in place"]),
    at_once=st.sampled_from([1, 7]),
    seed=st.integers(0, 99),
)
def test_slice_grad(device, T, M, N, dtype, orders, add, at_once, seed):
    """float32 sums in any order: (terms + 1) roundings of sum |a||b|; matrix units cut off, so 2^-23 for each."""
    A, B = (Guarded(randn((T, n), dtype, seed + i, device), order) for i, (n, order) in enumerate(zip((M, N), orders)))
    C, out = (Guarded(randn((M, N), torch.float32, seed + i, device), orders[2]) for i in (2, 3))
    start = C.tensor.double() if add != "no" else torch.zeros((), dtype=torch.float64, device=device)
    a, b = A.tensor.double(), B.tensor.double()
    target = C if add == "in place" else out
    gradient = slice_grad.launch(
        kernel_on(device, slice_grad._kernel),
        A.tensor,
        B.tensor,
        None if add == "no" else C.tensor,
        target.tensor,
        at_once,
    )
    bound = (T + slice_grad.MAX_SPLITS + 2) * 2.0**-23 * (a.abs().T @ b.abs() + start.abs())
    assert ((gradient.double() - (start + a.T @ b)).abs() <= bound).all()
    for guarded in (A, B, C, out):
        guarded.check()


@on_devices
def test_the_operators_are_the_reference(device):
    A, B = randn((70, 20), torch.bfloat16, 0, device), randn((70, 9), torch.bfloat16, 1, device)[:, 2:6]
    C = randn((20, 4), torch.float32, 2, device)
    expected, bound = C + slice_grad.slice_grad_reference(A, B), 70 * 2.0**-23 * 70
    torch.testing.assert_close(torch.ops.s2ft.slice_grad(A, B, C), expected, rtol=0, atol=bound)
    torch.ops.s2ft.slice_grad_(C, A, B)
    torch.testing.assert_close(C, expected, rtol=0, atol=bound)
    for wrong in ((A, B[1:]), (A.float(), B), (A, B, C[1:]), (A, B, C.bfloat16())):
        with pytest.raises(ValueError, match="slice_grad"):
            slice_grad._result(*wrong)


@given(M=st.integers(1, 20000), N=st.integers(1, 20000), at_once=st.integers(1, 200))
def test_tiles_fill_a_gpu_and_no_more(M, N, at_once):
    how = slice_grad.tiles(M, N, 2, at_once)
    count = -(-M // how.BLOCK_M) * -(-N // how.BLOCK_N)
    assert 1 <= how.SPLITS <= slice_grad.MAX_SPLITS
    assert how.SPLITS == 1 or how.SPLITS * count <= at_once < (how.SPLITS + 1) * count or how.SPLITS == 32
    assert how.num_stages * how.BLOCK_T * (how.BLOCK_M + how.BLOCK_N) * 2 <= 96 * 2**10


# --- refresh --------------------------------------------------------------------------------------------------


@st.composite
def parts(draw):
    """A weight's shape, the dimension that is sliced, and its ranges, in any order and with empty ones."""
    sizes = st.lists(st.sampled_from([1, 2, 3, 9, 17, 520]), min_size=1, max_size=3)
    shape = draw(sizes.filter(lambda sizes: prod(sizes) <= 10_000))  # the interpreter is slow
    dim = draw(st.integers(0, len(shape) - 1))
    cuts = sorted(draw(st.lists(st.integers(0, shape[dim]), min_size=2, max_size=6)))
    ranges = [(a, b - a) for a, b in zip(cuts[::2], cuts[1::2])]
    return tuple(shape), dim, tuple(draw(st.permutations(ranges)))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # of numpy, in the interpreter: inf is right
@on_devices
@given(drawn=st.lists(parts(), min_size=1, max_size=4), dtype=st.sampled_from(TYPES), seed=st.integers(0, 99))
def test_refresh(device, drawn, dtype, seed):
    """Bit for bit, and nothing beside the blocks."""
    fresh, expected = [], []
    for i, (shape, dim, ranges) in enumerate(drawn):
        block = [sum(n for _, n in ranges) if d == dim else size for d, size in enumerate(shape)]
        D = randn(block, torch.float32, seed + i, device) * 10.0 ** randn(block, torch.float32, seed - i, device).mul(4)
        around = torch.full((torch.Size(shape).numel() + 32,), CANARY, dtype=dtype, device=device)
        around[16:-16] = randn((len(around) - 32,), dtype, seed + 7 * i, device)
        W, W0 = around[16:-16].view(shape), randn(block, dtype, seed + 9 * i, device)
        expected.append(around.clone())
        refresh.refresh_reference(expected[-1][16:-16].view(shape), W0, D, dim, ranges)
        fresh.append((around, (W, W0, D, dim, ranges)))
    versions = [around._version for around, _ in fresh]
    refresh.launch(kernel_on(device, refresh._kernel), [part for _, part in fresh])
    for (around, _), right, version in zip(fresh, expected, versions):
        assert same_bits(around, right)
        assert around._version > version, "autograd sees the write"


@pytest.fixture
def in_one_launch(monkeypatch):
    """The GPU's way of refreshing, in the interpreter; the sizes of its launches."""
    launches, launch = [], refresh.launch
    monkeypatch.setattr(refresh, "fits", lambda W, W0, D: W.dtype in TYPES)
    monkeypatch.setattr(refresh, "_kernel", interpreted(refresh._kernel))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(refresh, "launch", lambda kernel, group: launches.append(len(group)) or launch(kernel, group))
    return launches


@pytest.mark.parametrize("dtype", HALF)
def test_a_model_refreshes_as_block_by_block(in_one_launch, dtype):
    model = hf("llama").to(dtype)
    targets = {"attention.out": 1, "ffn.in": 2, "ffn.out": 3}
    s2ft.prepare(model, {"input_ids": tokens()}, s2ft.S2FTConfig(targets=targets))
    randomize(model)
    state = state_module.state_of(model)
    for _ in range(2):
        other = copy.deepcopy(model)
        for block in state_module.state_of(other).blocks:
            block.refresh()
        in_one_launch.clear()
        state.refresh()
        assert in_one_launch == [len(state.blocks)] and all(same_bits(b.read(), b.trained()) for b in state.blocks)
        assert all(same_bits(a, b) for a, b in zip(model.parameters(), other.parameters()))
        for p in model.parameters():  # elsewhere in memory, with other deltas
            p.data = p.data.clone()
        randomize(model, seed=1)


def test_an_optimizer_step_and_disabled_refresh_in_one_launch(in_one_launch):
    case, model = prepared()
    model.float()
    optimizer = torch.optim.SGD(s2ft.parameters(model), lr=0.1)
    for p in s2ft.parameters(model):
        p.grad = torch.ones_like(p)
    model(*[x.float() if x.is_floating_point() else x for x in case.inputs])
    in_one_launch.clear()
    optimizer.step()
    assert in_one_launch == [len(s2ft.parameters(model))]
    before = [p.detach().clone() for p in model.parameters()]
    with s2ft.disabled(model):
        assert not all(same_bits(a, b) for a, b in zip(before, model.parameters()))
    assert all(same_bits(a, b) for a, b in zip(before, model.parameters())), "written again, though nothing was stale"


def test_what_does_not_fit_a_launch():
    W = torch.randn(4, 4)
    assert not refresh.fits(W, W[:2].clone(), torch.randn(2, 4)), "the CPU goes block by block"


# --- adapters -------------------------------------------------------------------------------------------------


@on_devices
@given(
    N=st.integers(1, 4),
    L=st.sampled_from([1, 2, 17, 70]),
    inner=st.integers(1, 70),
    outer=st.integers(1, 70),
    contracts=st.booleans(),
    dtype=st.sampled_from(TYPES),
    data=st.data(),
    seed=st.integers(0, 99),
)
def test_adapter_add(device, N, L, inner, outer, contracts, dtype, data, seed):
    """Sums of K terms in float32, rounded once to y's type; a row without an adapter stays as it is, bit for bit."""
    side = inner if contracts else outer
    ranks = [0, *data.draw(st.lists(st.integers(0, min(side, 40)), min_size=1, max_size=4))]
    ids = torch.tensor(data.draw(st.lists(st.integers(0, len(ranks) - 1), min_size=N, max_size=N)), device=device)
    n = max(*ranks, 1)
    random = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(side, generator=random)[:n] for _ in ranks])
    delta = randn((len(ranks), n, outer) if contracts else (len(ranks), inner, n), dtype, seed, device)
    for k, rank in enumerate(ranks):  # padding that must not be read
        index[k, rank:] = 2**40
        delta[k].narrow(0 if contracts else 1, rank, n - rank).fill_(float("nan"))
    index, rank = index.to(device), torch.tensor(ranks, dtype=torch.int32, device=device)
    x = Guarded(randn((N, L, inner), dtype, seed + 1, device), data.draw(st.permutations(range(3))))
    y = Guarded(randn((N, L, outer), dtype, seed + 2, device), data.draw(st.permutations(range(3))))
    exact, size = y.tensor.double(), y.tensor.double().abs()
    before = y.tensor.clone()
    adapters.adapter_add_reference(exact, x.tensor.double(), ids, index, delta.double(), rank, contracts)
    adapters.adapter_add_reference(size, x.tensor.double().abs(), ids, index, delta.double().abs(), rank, contracts)
    adapters.launch(kernel_on(device, adapters._kernel), y.tensor, x.tensor, ids, index, delta, rank, contracts)
    bound = (71 * 2.0**-23 + torch.finfo(dtype).eps / 2) * size
    assert ((y.tensor.double() - exact).abs() <= bound).all()
    assert torch.equal(y.tensor[ids == 0], before[ids == 0])
    for guarded in (x, y):
        guarded.check()


@on_devices
def test_a_bank_uses_the_operator(device, tmp_path, monkeypatch):
    """Every row is that of its adapter alone; on the CPU with the reference behind the operator."""
    if device == "cpu":
        monkeypatch.setattr(rows_module, "capability", lambda device: (9, 0))
    for name, targets in (("a", {"ffn.out": 5, "attention.value": 1}), ("b", {"ffn.out": 2, "ffn.in": 3})):
        model = hf("llama")
        s2ft.prepare(model, {"input_ids": tokens()}, s2ft.S2FTConfig(targets=targets))
        randomize(model)
        save_adapter(model, tmp_path / name)
    bank, ids = s2ft.AdapterBank(hf("llama").to(device)), tokens(3, 6).to(device)
    for name in "ab":
        bank.add(name, tmp_path / name)
    calls = []
    monkeypatch.setattr(rows_module, "adapter_add_", lambda *args: calls.append(args) or adapters.adapter_add_(*args))
    with torch.no_grad(), bank.batch(["b", None, "a"]):
        output = bank.model(ids).logits
    assert calls
    for row, name in zip(range(3), ("b", None, "a")):
        model = hf("llama").to(device)
        if name:
            load_adapter(model, tmp_path / name)
        expected = model(ids[row : row + 1]).logits[0].detach()  # layers of at most 64 terms, two blocks, float32
        torch.testing.assert_close(output[row], expected, rtol=0, atol=2**9 * U32 * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("contracts", [True, False])
def test_the_operators_compile_on_a_gpu(contracts):
    """Within torch.compile, where Inductor sees the kernels; other lengths compile once more at most."""
    torch._functorch.config.enable_autograd_cache = False
    index, rank = torch.arange(8, device="cuda").expand(3, 8), torch.tensor([0, 8, 5], dtype=torch.int32, device="cuda")
    delta = randn((3, 8, 48) if contracts else (3, 32, 8), torch.bfloat16, 0, "cuda")
    ids = torch.tensor([2, 0, 1], device="cuda")

    def function(x, y):
        y = y * 1.0
        torch.ops.s2ft.adapter_add_(y, x, ids, index, delta, rank, contracts)
        return y, torch.ops.s2ft.slice_grad(x.flatten(0, 1), y.flatten(0, 1))

    net = torch.compile(function, dynamic=True, fullgraph=True)
    for L in (1, 7, 64, 300):
        x, y = randn((3, L, 32), torch.bfloat16, 1, "cuda"), randn((3, L, 48), torch.bfloat16, 2, "cuda")
        for a, b in zip(net(x, y), function(x, y), strict=True):
            torch.testing.assert_close(a, b, rtol=2.0**-7, atol=1e-3 * 3 * L)


# --- on GPUs that are not there -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles(capability, dtype):
    gradient, fresh_weights, added = (Ahead(m._kernel, capability) for m in (slice_grad, refresh, adapters))
    probe = Ahead(support._probe, capability)
    probe[(1,)](torch.empty(16, 16, dtype=dtype), torch.empty(16, 16))
    for T, M, N, start in ((512, 4096, 128, None), (1000, 4096, 430, torch.empty(4096, 430))):
        slice_grad.launch(
            gradient, torch.empty(T, M, dtype=dtype), torch.empty(T, N, dtype=dtype), start, torch.empty(M, N), 132
        )
    W = torch.zeros(9, 70, dtype=dtype)
    refresh.launch(fresh_weights, [(W, W[:, :5].contiguous(), torch.zeros(9, 5), 1, ((2, 5),))])
    for L, contracts in ((1, True), (1, False), (70, True)):
        delta = torch.empty((4, 40, 512) if contracts else (4, 256, 40), dtype=dtype)
        adapters.launch(
            added,
            torch.empty(5, L, 512, dtype=dtype),
            torch.empty(5, L, 256, dtype=dtype),
            torch.zeros(5, dtype=torch.int64),
            torch.zeros(4, 40, dtype=torch.int64),
            delta,
            torch.zeros(4, dtype=torch.int32),
            contracts,
        )
    compiled = gradient.made + fresh_weights.made + added.made + probe.made
    assert len(compiled) == 7 and all(m.asm["cubin"] for m in compiled)
    assert all(m.metadata.shared <= 99 * 2**10 for m in compiled), "more shared memory than every GPU since Ampere has"
    assert all(("wgmma" in m.asm["ptx"]) == (capability == 90) for m in gradient.made), "Hopper's matrix units"


def test_a_new_sequence_length_compiles_nothing():
    kernel = Ahead(slice_grad._kernel, 90)
    for T in (1, 512, 1000):
        A, B = torch.empty(T, 64, dtype=torch.bfloat16), torch.empty(T, 16, dtype=torch.bfloat16)
        slice_grad.launch(kernel, A, B, None, torch.empty(64, 16), 132)
    assert len({compiled.hash for compiled in kernel.made}) == 1


def test_nothing_here_is_taken_for_the_package_kernels():
    """transformers imports a package of that name where it finds one: `kernels/` has to stay without `__init__.py`, and
    no script beside another one may be called so."""
    root = Path(__file__).resolve().parents[1]
    spec = PathFinder.find_spec("kernels", [str(root), str(root / "benchmarks"), str(root / "tests")])
    assert spec is None or spec.origin is None, spec


WITHOUT = """
import sys
sys.modules["triton"] = None
import torch
from s2ft_compile.kernels import adapters, refresh, slice_grad
A = torch.ones(3, 2)
assert torch.equal(torch.ops.s2ft.slice_grad(A, A), torch.full((2, 2), 3.0))
"""


@pytest.mark.slow
def test_without_triton_the_references_are_there():
    subprocess.run([sys.executable, "-c", WITHOUT], check=True, timeout=120)
