"""Exporters of one's own, beside the built-in ones: complete, or not there.

@exporter
def save_numpy(model, folder):
    np.savez(folder / "weights.npz", **{name: w.float().numpy() for name, w in model.state_dict().items()})

s2ft.exporters.save_numpy(model, "out/")
"""

import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from torch import nn

from s2ft_compile.capture.models import unwrap
from s2ft_compile.errors import ConfigError

from .files import new_directory
from .merged import plain

REGISTERED: dict[str, Callable[..., Path]] = {}


def exporter(write: Callable[..., Any]) -> Callable[..., Path]:
    """Registers (model, folder, **options) as `s2ft.exporters.<name>(model, directory, **options)` -> the directory.

    model: in the base model's order with its trained weights, whether it was prepared or not; it is afterwards as it
    was. folder: a new one, that becomes `directory` if the function returns and that is gone if it raises. A name that
    is given again takes the first one's place. Raises `ConfigError` for the name of a built-in exporter.
    """
    package, name = sys.modules[__package__], getattr(write, "__name__", "")
    if not callable(write) or not name.isidentifier():
        raise ConfigError(f"an exporter is a function with a name, got {write!r}")
    if name not in REGISTERED and name in dir(package):
        raise ConfigError(f"s2ft_compile.exporters has a {name} already; name the function otherwise")

    @wraps(write)
    def save(model: nn.Module, directory: str | os.PathLike[str], **options: Any) -> Path:
        with new_directory(directory) as folder, plain(model):
            write(unwrap(model), folder, **options)
        return Path(directory)

    REGISTERED[name] = save
    setattr(package, name, save)
    return save
