"""Property-based tests for models and operators of one's own. Needs hypothesis; see docs/testing.md.

    assert_equivalent(model, inputs)            every coupling found may be permuted, and the test would notice if not
    assert_gradients(model, plan, inputs)       the backend's gradients are the slices of the full ones
    assert_trains(model, inputs)                every role that a model offers trains, with exact gradients
    assert_sliced(model, inputs)                the same by slice rules alone, in seconds
    rulecheck("ns::op", samples)                an operator's axis rule against the operator, as `torch.library.opcheck`
    permutations(analysis)                      strategy of hypothesis: orders of any couplings of a model
    configurations(analysis)                    strategy: what may train of it
    models()                                    strategy: small transformers, with the couplings they must have

For pytest: `pytest_plugins = ["s2ft_compile.testing.fixtures"]` in a `conftest.py` gives the fixture `fresh_compiler`.
"""

from .equivalence import (
    Promoted,
    assert_equivalent,
    assert_same,
    changed,
    outputs_of,
    pairs,
    random_orders,
    reorder,
    signature,
    tolerance,
)
from .gradients import assert_gradients, assert_sliced, assert_slices, assert_trains, full_gradients
from .models import Drawn, Spec, models
from .operators import Solution, check_function, check_rule, frozen, infer, rulecheck
from .strategies import configurations, permutations

__all__ = [
    "assert_equivalent",
    "assert_gradients",
    "assert_sliced",
    "assert_trains",
    "configurations",
    "models",
    "permutations",
    "rulecheck",
]
__all__ += [
    "Drawn",
    "Promoted",
    "Solution",
    "Spec",
    "assert_same",
    "assert_slices",
    "changed",
    "check_function",
    "check_rule",
    "frozen",
]
__all__ += ["full_gradients", "infer", "outputs_of", "pairs", "random_orders", "reorder", "signature", "tolerance"]
