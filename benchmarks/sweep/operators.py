"""Every operator that torch tests, on the arguments that torch tests it with: do its axes move as inference says?

    python benchmarks/sweep/operators.py [NAME ...]        all, or some of them; writes results/operators.json

A call is recorded as a model's code is, its operands' axes start free, and what inference does not pin is permuted: the
operator itself is the oracle. *random* gives other values with another seed; *unrecorded* asks for values, or takes
no plain tensors; *blunt* is an operator of which nothing may be permuted in any sample. Needs the extra `zoo`.
"""

import json
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.testing._internal import common_methods_invocations as torchs_own
from torch.utils import _pytree as pytree

from s2ft_compile.testing import check_function

sys.path.append(str(Path(__file__).resolve().parents[1]))
from turns import RESULTS, versions  # noqa: E402

SAMPLES = 8  # of an operator, at most
SKIPPED = (
    "jiterator",
    "sparse",
    "to_sparse",
    "_scaled_mm",
    "empty",
    "new_empty",
)  # other devices and layouts, no values


def samples(info) -> Iterator[tuple[Callable, list[Tensor]]]:
    """(a function of tensors, the tensors), for some of the arguments that torch tests an operator with."""
    dtype = next(
        (t for t in (torch.float64, torch.complex128, torch.int64) if t in info.dtypes), min(info.dtypes, key=str)
    )
    drawn = list(info.sample_inputs("cpu", dtype, requires_grad=False))
    random.Random(0).shuffle(drawn)
    for sample in drawn[:SAMPLES]:
        leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def call(*tensors: Tensor, leaves=leaves, spec=spec, places=places):
            filled = list(leaves)
            for i, t in zip(places, tensors, strict=True):
                filled[i] = t.clone()
            given, args, kwargs = pytree.tree_unflatten(filled, spec)
            return info.op(given, *args, **kwargs)

        inputs = [leaves[i] for i in places]
        if any(t.numel() > 1 for t in inputs) and all(t.layout is torch.strided for t in inputs):
            yield call, inputs


def is_random(call: Callable, inputs: list[Tensor]) -> bool:
    drawn = []
    for seed in range(4):
        torch.manual_seed(seed)
        drawn.append([t for t in pytree.tree_leaves(call(*inputs)) if isinstance(t, Tensor)])
    return any(not torch.allclose(t, other, equal_nan=True) for of in drawn[1:] for t, other in zip(drawn[0], of))


def looked_at(call: Callable, inputs: list[Tensor]) -> tuple[str, int]:
    """What came of one call, and how many of its axes may be permuted."""
    try:
        if is_random(call, inputs):
            return "random", 0
        return "right", check_function(call, inputs)
    except AssertionError as error:
        print(str(error).strip().splitlines()[0], flush=True)
        return "wrong", 0
    except Exception:
        return "unrecorded", 0


def main(names: list[str]) -> None:
    warnings.filterwarnings("ignore")
    torchs_own.wrapper_set_seed = lambda op, *args, **kwargs: op(*args, **kwargs)  # the same noise at every call
    counts, wrong, blunt = Counter(), [], []
    for info in torchs_own.op_db:
        if not info.dtypes or info.name.startswith(SKIPPED) or names and info.name not in names:
            continue
        name = " ".join(filter(None, (info.name, info.variant_test_name)))
        results = [looked_at(call, inputs) for call, inputs in samples(info)]
        came = Counter(outcome for outcome, _ in results)
        counts += came + Counter(operators=1)
        wrong += [name] * bool(came["wrong"])
        blunt += [name] * (came["right"] > 0 and not sum(free for _, free in results))
        if came["wrong"]:
            print(f"{name}: wrong", flush=True)
    summary = {**versions(), **counts, "wrong": wrong, "blunt": blunt}
    print(json.dumps(summary, indent=1))
    if not names:
        (RESULTS / "operators.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
