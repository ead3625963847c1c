"""Triton kernels on the CPU, in Triton's interpreter, without `TRITON_INTERPRET`: nothing else in the process sees it."""

import numpy as np
import pytest
from triton import language as tl
from triton.runtime import interpreter


def interpreted(kernel) -> interpreter.InterpretedFunction:
    """A kernel as it would be had TRITON_INTERPRET been set when it was defined."""
    return interpreter.InterpretedFunction(kernel.fn)


@pytest.fixture(autouse=True)
def whole_interpreter(monkeypatch):
    """What the interpreter lacks: it multiplies the bits of bf16 as integers, and loops to bounds that are computed
    need an `int` of an array with one entry, which numpy has given up."""
    create_dot, patch_tensor = interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang_tensor

    def dot(self, a, b, *rest):
        return create_dot(self, _widened(a), _widened(b), *rest)

    def patched(tensor, *scope):
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


def _widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
