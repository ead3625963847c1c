"""Hypothesis profiles, and settings that make runs alike.

`HYPOTHESIS_PROFILE=ci` (default) draws the same examples every time; `wide` draws new ones, and more.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

if "s2ft" not in torch._dynamo.list_backends():  # a checkout that is not installed, as on a GPU machine without pip
    from s2ft_compile.backend import s2ft

    torch._dynamo.register_backend(s2ft)

# the first trace in a process takes seconds, which says nothing about the strategies
pytest_plugins = ["s2ft_compile.testing.fixtures"]
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=25, derandomize=True, database=None, **COMMON)
settings.register_profile("wide", max_examples=400, print_blob=True, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")))


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh(fresh_compiler):
    """Every test compiles anew."""


@pytest.fixture(autouse=True)
def whole_interpreter(request, monkeypatch):
    """Tests marked `interpreted` have what Triton's interpreter lacks (`interpreted.complete`)."""
    if request.node.get_closest_marker("interpreted"):
        from interpreted import complete

        complete(monkeypatch)
