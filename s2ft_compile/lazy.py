"""Names of a package that import their module when they are first used: importing the package itself costs nothing."""

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from sys import modules
from typing import Any


def attributes(package: str, where: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package (PEP 562). where: name -> the submodule that defines it.

    Submodules are attributes, too. Raises `AttributeError` for any other name.
    """

    def __getattr__(name: str) -> Any:
        if name in where:
            value = getattr(import_module(f"{package}.{where[name]}"), name)
        elif not name.startswith("_") and find_spec(f"{package}.{name}"):
            value = import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(modules[package]), *where})

    return __getattr__, __dir__
