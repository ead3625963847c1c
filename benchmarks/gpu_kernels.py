"""The kernels against what one would run without them, at the shapes of an 8B Llama, bf16, on one GPU.

    python benchmarks/gpu_kernels.py [--quick] [--only slice_grad,refresh,optimizer,switch,decode]

The methods of a row take turns, one call each; a figure is the median of 30 after 5 to warm up, by device events. What
runs inside a compiled graph (slice_grad, decode) is replayed as a CUDA graph, so that the time is the device's; the
rest is called as it is in training, with its launches. What is done for each layer on its own is measured on one layer
and multiplied. `--quick` is a rehearsal with tiny shapes on any device, without a GPU through the kernels' references:
its figures mean nothing, and are written only where `--output` says.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gpu import device_ms, gemm_tflops
from rich.table import Table
from torch import Tensor
from turns import DEVICE, Run, console, facts, in_turn, medians, parser, save

from s2ft_compile.adapters.bank import _write
from s2ft_compile.adapters.batched import Stack
from s2ft_compile.kernels.refresh import fits, refresh, refresh_reference

WARM_UP, ROUNDS = 5, 30
Methods = dict[str, Run]


@dataclass(frozen=True)
class Shape:
    hidden: int
    ffn: int
    kv: int  # width of keys and values
    layers: int
    head: int  # columns of the output projection that train: one head
    tokens: tuple[int, ...]
    ratios: tuple[float, ...] = (0.03, 0.01)
    adapters: int = 32
    lora_rank: int = 16

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(out, in) of q, k, v, o, gate, up, down."""
        d, f = self.hidden, self.ffn
        return [(d, d), (self.kv, d), (self.kv, d), (d, d), (f, d), (f, d), (d, f)]

    def slices(self, ratio: float) -> list[tuple[int, int]]:
        """(width of the weight, columns that train) of o and down."""
        return [(self.hidden, self.head), (self.ffn, round(ratio * self.ffn))]


FULL = Shape(hidden=4096, ffn=14336, kv=1024, layers=32, head=128, tokens=(512, 2048, 8192))
QUICK = Shape(hidden=64, ffn=224, kv=16, layers=2, head=16, tokens=(32,), adapters=4, lora_rank=4)


@torch.no_grad()
def main() -> None:
    arguments = _arguments()
    rows = []
    for part in arguments.only.split(","):
        for name, methods, factor in PARTS[part](QUICK if arguments.quick else FULL):
            if part in IN_GRAPHS and DEVICE == "cuda":
                methods = {method: replayed(run) for method, run in methods.items()}
            ms = medians(in_turn(methods, ROUNDS, WARM_UP, device_ms))
            rows.append({"part": part, "name": name, "ms": {method: factor * one for method, one in ms.items()}})
    console.print(table(rows))
    result = {**facts(DEVICE, arguments.quick), "gemm_tflops": gemm_tflops(), "rows": rows}
    save(result, "gpu_kernels", arguments.output)


def _arguments() -> Namespace:
    options = parser(__doc__)
    options.add_argument("--only", default=",".join(PARTS), help="parts, by commas (default: all)")
    arguments = options.parse_args()
    unknown = set(arguments.only.split(",")) - PARTS.keys()
    if unknown:
        options.error(f"unknown part {', '.join(unknown)}; valid: {', '.join(PARTS)}")
    if DEVICE == "cpu" and not arguments.quick:
        options.error("there is no CUDA GPU here; --quick rehearses on the CPU")
    return arguments


def replayed(run: Run) -> Run:
    for _ in range(WARM_UP):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def table(rows: list[dict[str, Any]]) -> Table:
    table = Table("part", "what", "method", "time", "ours / it")
    for row in rows:
        for method, ms in row["ms"].items():
            table.add_row(row["part"], row["name"], method, f"{ms:.3f} ms", f"{row['ms']['ours'] / ms:.2f}")
    return table


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


# --- parts: name, methods, and how often it is done in a model -----------------------------------------------------

Part = Iterator[tuple[str, Methods, int]]


def slice_grad(shape: Shape) -> Part:
    """Into a gradient that is there, as in the second micro-batch."""
    for ratio in shape.ratios:
        n = round(ratio * shape.ffn)
        for T in shape.tokens:
            X, dY, activations = randn(T, n), randn(T, shape.hidden), randn(T, shape.ffn)[:, :n]
            yield f"columns, {n} × {shape.hidden}, {T} tokens", _gradients(dY, X), 1
            yield f"rows, {n} × {shape.hidden}, {T} tokens", _gradients(activations, dY), 1


def _gradients(A: Tensor, B: Tensor) -> Methods:
    ours, theirs, wide = (torch.zeros(A.shape[1], B.shape[1], device=DEVICE) for _ in range(3))
    methods = {
        "ours": lambda: torch.ops.s2ft.slice_grad_(ours, A, B),
        "cuBLAS, cast, add": lambda: theirs.add_(torch.mm(A.T, B).float()),
    }
    if DEVICE == "cuda":
        methods["cuBLAS to float32, add"] = lambda: wide.add_(torch.mm(A.T, B, out_dtype=torch.float32))
    return methods


def _blocks(shape: Shape, layers: int) -> list[tuple]:
    """W, W0, D, dim, ranges of o and down of some layers."""
    blocks = []
    for width, n in shape.slices(shape.ratios[0]) * layers:
        W, D = randn(shape.hidden, width), 1e-3 * randn(shape.hidden, n, dtype=torch.float32)
        blocks.append((W, W[:, :n].contiguous(), D, 1, ((0, n),)))
    return blocks


def refresh_all(shape: Shape) -> Part:
    blocks = _blocks(shape, shape.layers)
    targets, backups, deltas = [W[:, : D.shape[1]] for W, _, D, _, _ in blocks], *zip(*[b[1:3] for b in blocks])

    def loop():
        for block in blocks:
            refresh_reference(*block)

    def foreach():
        torch._foreach_copy_(targets, torch._foreach_add(list(deltas), list(backups)))

    ours = (lambda: refresh(blocks)) if fits(*blocks[0][:3]) else loop
    yield f"{len(blocks)} slices", {"ours": ours, "loop": loop, "foreach": foreach}, 1


def optimizer(shape: Shape) -> Part:
    deltas = [torch.nn.Parameter(block[2]) for block in _blocks(shape, shape.layers)]
    for p in deltas:
        p.grad = torch.randn_like(p)
    fused, many = (torch.optim.AdamW(deltas, lr=1e-6, **how) for how in ({"fused": True}, {"foreach": True}))
    yield f"AdamW, {sum(p.numel() for p in deltas) / 1e6:.1f}M", {"ours": fused.step, "foreach": many.step}, 1


def switch(shape: Shape) -> Part:
    """One adapter out and another in, and a LoRA of all linear layers merged."""
    blocks = _blocks(shape, 1)
    columns = [torch.randperm(W.shape[1], device=DEVICE)[: D.shape[1]] for W, _, D, _, _ in blocks]
    base = [(W, 1, i, W0) for (W, W0, *_), i in zip(blocks, columns)]
    tuned = [(W, 1, i, W0 + 1) for (W, W0, *_), i in zip(blocks, columns)]
    r = shape.lora_rank
    loras = [(randn(out, into), randn(out, r), randn(r, into)) for out, into in shape.linears]

    def merge():
        for W, B, A in loras:
            W.addmm_(B, A)

    yield f"{shape.layers} layers", {"ours": lambda: (_write(base), _write(tuned)), "LoRA merge": merge}, shape.layers


def decode(shape: Shape) -> Part:
    """One token for each of as many rows as there are adapters, each with its own, through the linears of a layer."""
    N, r = shape.adapters, shape.lora_rank
    ids = torch.arange(N, device=DEVICE)
    weights = [randn(out, into) / into**0.5 for out, into in shape.linears]
    xs = [randn(N, 1, into) for _, into in shape.linears]
    loras = [(randn(N, into, r), randn(N, r, out)) for out, into in shape.linears]
    stacks = {}
    for k, (width, n) in zip((3, 6), shape.slices(shape.ratios[1])):
        index = torch.stack([torch.randperm(width, device=DEVICE)[:n] for _ in range(N + 1)])
        stacks[k] = Stack.of(True, index, randn(N + 1, n, shape.hidden), [0] + [n] * N).picked(ids + 1, {})

    def base():
        return [torch.nn.functional.linear(x, W) for x, W in zip(xs, weights)]

    def ours():
        return [stacks[k].add(xs[k], y) if k in stacks else y for k, y in enumerate(base())]

    def lora():
        return [y + torch.bmm(torch.bmm(x, A[ids]), B[ids]) for y, x, (A, B) in zip(base(), xs, loras)]

    yield f"{N} adapters, a layer", {"ours": ours, "base": base, "LoRA batched": lora}, 1


PARTS: dict[str, Callable[[Shape], Part]] = {
    "slice_grad": slice_grad,
    "refresh": refresh_all,
    "optimizer": optimizer,
    "switch": switch,
    "decode": decode,
}
IN_GRAPHS = ("slice_grad", "decode")


if __name__ == "__main__":
    main()
