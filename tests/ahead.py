"""Triton kernels compiled for a GPU that is not there, with the ptxas that comes with Triton."""

import inspect
from typing import Any

import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


class Ahead:
    """Stands where a launcher expects a kernel: compiles what it would launch, and keeps it in `made`."""

    def __init__(self, kernel, capability: int):
        self.kernel, self.target = kernel, GPUTarget("cuda", capability, 32)
        self.made: list[Any] = []

    def __getitem__(self, grid):
        assert len(grid) <= 3 and all(1 <= n for n in grid) and all(n < 2**16 for n in grid[1:]), grid
        return self._compile

    def _compile(self, *args, num_warps: int = 4, num_stages: int = 3, **kwargs):
        given = inspect.signature(self.kernel.fn).bind(*args, **kwargs).arguments
        fixed = {p.name for p in self.kernel.params if p.is_constexpr}
        never = {p.name for p in self.kernel.params if p.do_not_specialize}
        constants = {n: v for n, v in given.items() if n in fixed or (n not in never and v is not None and _is_one(v))}
        signature = {n: "constexpr" if n in constants else _type(v) for n, v in given.items()}
        hints = {
            (i,): [["tt.divisibility", 16]]
            for i, (n, v) in enumerate(given.items())
            if n not in constants and n not in never and (isinstance(v, torch.Tensor) or v % 16 == 0)
        }
        source = ASTSource(self.kernel, signature, constants, hints)
        self.made.append(compile(source, self.target, {"num_warps": num_warps, "num_stages": num_stages}))


def _is_one(value) -> bool:
    return isinstance(value, int) and value == 1


def _type(value) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "i32" if -(2**31) <= value < 2**31 else "i64"
