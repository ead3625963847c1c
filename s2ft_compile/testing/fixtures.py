"""A fixture for pytest: `pytest_plugins = ["s2ft_compile.testing.fixtures"]` in a `conftest.py`."""

from collections.abc import Iterator

import pytest
import torch

from s2ft_compile.config import SELECTIONS
from s2ft_compile.passes.backward.slice_rules import NAMED_SLICE_RULES
from s2ft_compile.passes.couple.rules import NAMED_AXIS_RULES
from s2ft_compile.passes.select.selections import SCORES


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing is compiled before the test nor after it, and the rules and selections that it registers are gone."""
    tables: tuple[dict, ...] = (NAMED_AXIS_RULES, NAMED_SLICE_RULES, SELECTIONS, SCORES)
    before = [dict(table) for table in tables]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
    for table, held in zip(tables, before):
        table.clear()
        table.update(held)
