"""`s2ft --import`: code of one's own that registers rules, selections or exporters, before a command runs."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from s2ft_compile.errors import ConfigError


def import_plugin(name: str) -> ModuleType:
    """A module by its name, or a file by its path. Raises `ConfigError` that says what went wrong in it."""
    try:
        return _from_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
    except Exception as error:  # whatever a user's code raises
        raise ConfigError(f"--import {name}: {type(error).__name__}: {error}") from error


def _from_file(path: Path) -> ModuleType:
    """As `python FILE` would run it: its own folder is where it imports from."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, "a file that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(path.resolve().parent))
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module
