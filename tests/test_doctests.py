"""The examples in docstrings."""

import doctest
from importlib import import_module

import pytest
from test_layers import modules

EXAMPLES = sorted(name for name, path in modules().items() if "\n    >>> " in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", EXAMPLES)
@pytest.mark.usefixtures("fresh_compiler")
def test_examples_in_docstrings(module):
    done = doctest.testmod(import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert done.attempted and not done.failed


def test_there_are_examples():
    assert {"s2ft_compile.config", "s2ft_compile.rules", "s2ft_compile.preparation"} <= set(EXAMPLES)
