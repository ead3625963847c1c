"""Quantized weights that are only planned: what an estimate has in their place, on the `meta` device.

They have the size of the real ones, and training does with them what it does with those: they are dequantized for each
product, forward and backward, and gone after it, in the arithmetic of the library that quantizes them.
"""

from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantized import Kind, is_conv1d, register


@torch.library.custom_op("s2ft::dequantized", mutates_args=())
def _dequantized(weight: Tensor, out: int, dtype: torch.dtype, backward: bool) -> Tensor:
    raise NotImplementedError("only planned")


@_dequantized.register_fake
def _(weight, out, dtype, backward):
    return weight.new_empty((out, weight.shape[1]), dtype=dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, out):
        ctx.save_for_backward(weight)
        ctx.out = out
        return F.linear(x, torch.ops.s2ft.dequantized(weight, out, x.dtype, False))

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return grad @ torch.ops.s2ft.dequantized(weight, ctx.out, grad.dtype, True), None, None


class Planned(nn.Linear):
    """values_dtype: of the weight's values."""


class PlannedNF4(Planned):
    """weight: uint8, of as many bytes as the quantized one has, for each column as many."""

    def forward(self, x: Tensor) -> Tensor:
        y = _Product.apply(x, self.weight, self.out_features)
        return y if self.bias is None else y + self.bias


class PlannedInt8(Planned):
    """weight: int8 (out, in), multiplied by without its scales, which are those of y, and of dY where dX is made. So
    dY is there twice while a slice's gradient is made: as it is, and scaled."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(0, -2) @ self.weight.t().to(x.dtype) * self.scale.to(x.dtype).flatten()
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class PlannedFP8(Planned):
    """weight: float8_e4m3fn (out, in)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight.to(torch.float32) * self.scale).to(x.dtype), self.bias)


PLANS = {  # what a layer becomes, and the type of its weight; the scales of int8 and fp8 are float32, one for each row
    "nf4": (PlannedNF4, torch.uint8),
    "int8": (PlannedInt8, torch.int8),
    "fp8": (PlannedFP8, torch.float8_e4m3fn),
}


def plan_quantization(model: nn.Module, to: str) -> None:
    """Has the linear layers of a model on the meta device but its output embedding planned as quantized, in place. to:
    one of `PLANS`."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for layer in model.modules():
        turned = to == "nf4" and is_conv1d(layer)  # which bitsandbytes quantizes too
        if (turned or type(layer) is nn.Linear) and layer is not head:
            out, k = layer.weight.shape[::-1] if turned else layer.weight.shape
            layer.in_features, layer.out_features, layer.values_dtype = k, out, layer.weight.dtype
            layer.__class__, dtype = PLANS[to]
            rows = ceil(nf4_bytes(out * k) / k) if to == "nf4" else out
            layer.weight = nn.Parameter(torch.empty(rows, k, dtype=dtype, device="meta"), requires_grad=False)
            if to != "nf4":
                layer.register_buffer("scale", torch.empty(out, 1, device="meta"))
            if to == "int8":
                layer.register_buffer("zero", torch.empty(out, dtype=torch.int8, device="meta"))


def nf4_bytes(n: int) -> float:
    """Of n numbers: half a byte each, and a byte of scale for 64 of them, which share 4 bytes for 256 scales."""
    return n / 2 + n / 64 + 4 * n / (64 * 256)


def _is_planned(layer: nn.Module, key: str) -> bool:
    return isinstance(layer, Planned) and key == "weight"


def _values(layer: nn.Module, key: str) -> Tensor:
    return torch.empty(layer.out_features, layer.in_features, dtype=layer.values_dtype, device="meta")


register(Kind("planned", _is_planned, lambda layer, key: layer.values_dtype, _values))
