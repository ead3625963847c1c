"""Triton kernels on the CPU, in Triton's interpreter, without `TRITON_INTERPRET`: nothing else in the process sees
it."""

import numpy as np
import torch
from triton import language as tl
from triton.runtime import interpreter


def interpreted(kernel) -> interpreter.InterpretedFunction:
    """A kernel as it would be had TRITON_INTERPRET been set when it was defined."""
    return interpreter.InterpretedFunction(kernel.fn)


def complete(monkeypatch) -> None:
    """What the interpreter lacks: it multiplies bf16 as if its bits were integers, and cuts float32 off to bf16 where a
    GPU rounds; and it asks numpy for the `int` of an array with one entry, which numpy has given up."""
    builder = interpreter.InterpreterBuilder
    create_dot, truncate, patch = builder.create_dot, builder.create_fp_trunc, interpreter._patch_lang_tensor

    def dot(self, a, b, *rest):
        return create_dot(self, _widened(a), _widened(b), *rest)

    def rounded(self, source, type):
        if (source.dtype.scalar, type.scalar) != (tl.float32, tl.bfloat16):
            return truncate(self, source, type)
        bits = torch.from_numpy(source.data).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(bits, tl.bfloat16)

    def patched(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    monkeypatch.setattr(builder, "create_dot", dot)
    monkeypatch.setattr(builder, "create_fp_trunc", rounded)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


def _widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
