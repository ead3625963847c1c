"""A cheap content hash of a model's weights: which base model an adapter belongs to."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from s2ft_compile.capture.models import unwrap
from s2ft_compile.quantized import quantized_in, sampled
from s2ft_compile.slices.blocks import base_parameters

SAMPLES = 4096  # elements read of each parameter: 300 parameters of an 8B model are 2.4 MB, milliseconds


def fingerprint(model: nn.Module) -> str:
    """sha256 (hex) over the name, shape, dtype and a sample of the content of each parameter, sorted by name.

    `model` has to be in base order: a plain model, or a prepared one inside `disabled`. Tied parameters
    count once, under their first name, and deltas do not count. The sample is evenly spaced from the first
    element to the last, read as raw bytes, so the device and strides do not matter; a parameter on the meta
    device has no content. Two models that differ only between the samples have the same fingerprint: it
    tells models, checkpoints and dtypes apart, and does not prove that a file was not edited.
    """
    return combined(samples_of(model))


def samples_of(model: nn.Module) -> dict[str, str]:
    """Parameter name -> `sample` of it, or of all that a quantized one is made of: what the fingerprint is made of."""
    model = unwrap(model)
    quantized = quantized_in(model)
    return {
        name: sampled(quantized[name], sample) if name in quantized else sample(tensor)
        for name, tensor in base_parameters(model).items()
    }


def combined(samples: Mapping[str, str]) -> str:
    """The fingerprint of a model with these samples."""
    return hashlib.sha256("".join(f"{name} {samples[name]}\n" for name in sorted(samples)).encode()).hexdigest()


def sample(tensor: Tensor) -> str:
    """128 bits (hex) of the sha256 over a tensor's shape, dtype and sampled content."""
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}\n".encode())
    digest.update(_content(tensor.detach()))
    return digest.hexdigest()[:32]


def _content(tensor: Tensor) -> bytes:
    """The bytes of up to `SAMPLES` evenly spaced elements in logical order, without a copy of the whole."""
    n = tensor.numel()
    if tensor.is_meta or n == 0:
        return b""
    count = min(n, SAMPLES)
    positions = torch.arange(count, device=tensor.device) * (n - 1) // max(count - 1, 1)
    picked = tensor.reshape(1) if tensor.dim() == 0 else tensor[torch.unravel_index(positions, tensor.shape)]
    return picked.cpu().contiguous().view(torch.uint8).numpy().tobytes()
