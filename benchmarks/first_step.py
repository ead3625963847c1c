"""How long the first step of a method takes in this process, as one line of JSON. `cpu.py` starts it.

python benchmarks/first_step.py METHOD [--quick] [--threads N]
"""

import argparse
import json
from functools import partial
from statistics import median

import torch
from methods import FULL_SIZE, METHODS, QUICK_SIZE, batch
from torch._dynamo.utils import counters
from turns import wall_ms

LATER_STEPS = 3


def measure(method: str, quick: bool) -> dict:
    """compile_s: the first step without what a step takes afterwards. aot_cache_hits: of AOTAutograd's cache."""
    setting = QUICK_SIZE if quick else FULL_SIZE
    trial, inputs = METHODS[method](setting), batch(setting)
    seconds = [wall_ms(partial(trial.step, inputs)) / 1e3 for _ in range(1 + LATER_STEPS)]
    hits = counters["aot_autograd"]["autograd_cache_hit"]
    return {"method": method, "compile_s": seconds[0] - median(seconds[1:]), "aot_cache_hits": hits}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(json.dumps(measure(arguments.method, arguments.quick)))
