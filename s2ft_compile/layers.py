"""Compiling a model layer by layer: layers that are alike share their graphs, so depth costs little."""

from typing import Any

from torch import nn

from .capture.models import unwrap
from .errors import ConfigError
from .slices.blocks import InPlace, blocks_in

MODES = 4  # graphs of one layer, about: the first layer's, whose input needs no gradient, and those of evaluation


def compile_layers(model: nn.Module, **options: Any) -> list[nn.Module]:
    """Compiles each repeated layer of a model by itself, in place, with backend="s2ft"; returns the layers.

    options: the fields of `CompileOptions`, but for `logits`: the head and the loss stay outside of every graph. The
    first step then takes as long for 32 layers as for 8, but that heads of grouped queries may share groups in five or
    six ways, each with a graph; so dynamo's limit of graphs (`torch._dynamo.config.recompile_limit`) is raised where it
    is low. A cache of keys and values makes every layer another one: `use_cache=False`. After `prepare`, before FSDP's
    `fully_shard`, which cannot be traced. Raises `ConfigError` for a model without a list of layers of one class, or
    for an option that is unknown.
    """
    from torch._dynamo import config as dynamo
    from torch._dynamo import lookup_backend

    from .config import CompileOptions

    CompileOptions(**options)
    layers = repeated_layers(unwrap(model))
    if not layers:
        raise ConfigError(
            f"{type(unwrap(model)).__name__} has no list of layers of one class (nn.ModuleList, nn.Sequential); "
            f'compile all of it: model.compile(backend="s2ft")'
        )
    blocks = [[b for b in blocks_in(layer) if isinstance(b, InPlace)] for layer in layers]
    kinds = {tuple((*b.starts, *b.lengths) for b in of) for of in blocks}
    dynamo.recompile_limit = max(dynamo.recompile_limit, MODES * len(kinds))
    backend = lookup_backend("s2ft")
    for layer in layers:
        layer.compile(backend=backend, options=options)
    return layers


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The members of a model's outermost lists that hold several modules of one class, in their order."""
    layers: list[nn.Module] = []
    for child in model.children():
        members = list(child.children()) if isinstance(child, (nn.ModuleList, nn.Sequential)) else []
        alike = len({getattr(type(m), "_s2ft_base", type(m)) for m in members}) == 1
        layers += members if len(members) > 1 and alike and _holds_weights(members[0]) else repeated_layers(child)
    return layers


def _holds_weights(layer: nn.Module) -> bool:
    """Whether a layer is made of several modules, and not a single product that is not worth a graph."""
    return sum(1 for p in layer.parameters() if p.ndim > 1) > 1
