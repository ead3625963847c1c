"""The first step and the later ones, compiled by layer and as a whole, by depth: cold caches, a process each.

    python benchmarks/layers.py [--quick] [--depths 8,16,32] [--rounds 1]

A Llama shape of hidden size 256 and 512 tokens a step, on two cores; CPU seconds of the process, so that what else runs
on the machine counts less. Later steps are taken in turn in one process at the middle depth: the ratio of medians.
Writes benchmarks/results/layers.json.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from statistics import median

import torch
import transformers
from turns import facts, parser, save

import s2ft_compile as s2ft

TOKENS = (4, 128)
STEPS = 30


def llama(depth: int, hidden: int):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=depth,
        num_attention_heads=16,
        num_key_value_heads=4,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).train()
    ids = torch.randint(0, 1024, TOKENS)
    s2ft.prepare(model, (ids,))  # the default: in each layer other heads share groups
    return model, ids


def compiled(model, how: str):
    if how == "layers":
        s2ft.compile_layers(model)
    else:
        model.compile(backend="s2ft")
    return model


def stepper(model, ids):
    optimizer = torch.optim.AdamW(s2ft.parameters(model), lr=1e-3)

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def first(how: str, depth: int, hidden: int) -> float:
    """CPU seconds of the first step."""
    model, ids = llama(depth, hidden)
    step = stepper(compiled(model, how), ids)
    start = time.process_time()
    step()
    return time.process_time() - start


def later(depth: int, hidden: int) -> float:
    """layers / whole, medians of steps taken in turn."""
    steps = {
        how: stepper(compiled(*llama(depth, hidden)[:1], how), llama(depth, hidden)[1]) for how in ("layers", "whole")
    }
    seconds = {how: [] for how in steps}
    for _ in range(3 + STEPS):
        for how, step in steps.items():
            start = time.process_time()
            step()
            seconds[how].append(time.process_time() - start)
    return median(seconds["layers"][3:]) / median(seconds["whole"][3:])


def in_a_process(*arguments: str) -> float:
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",  # threads that spin while they wait would count as work
        }
        run = subprocess.run(
            [sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True, check=True
        )
    return json.loads(run.stdout.splitlines()[-1])


def main():
    options = parser(__doc__)
    options.add_argument("--depths", default="8,16,32")
    options.add_argument("--one", nargs=2, help="HOW and DEPTH of one measurement, printed as JSON")
    arguments = options.parse_args()
    hidden = 64 if arguments.quick else 256
    torch.set_num_threads(2)
    quick = ["--quick"] * arguments.quick
    if arguments.one:
        how, depth = arguments.one
        print(json.dumps(later(int(depth), hidden) if how == "later" else first(how, int(depth), hidden)))
        return
    depths = [int(d) for d in arguments.depths.split(",")]
    rows = {d: {how: in_a_process("--one", how, str(d), *quick) for how in ("layers", "whole")} for d in depths}
    measured = {
        **facts("cpu", arguments.quick),
        "tokens": TOKENS[0] * TOKENS[1],
        "hidden": hidden,
        "first_step_cpu_seconds": rows,
        "ratio": {d: row["layers"] / row["whole"] for d, row in rows.items()},
        "layers_deepest_to_shallowest": rows[depths[-1]]["layers"] / rows[depths[0]]["layers"],
        "step_layers_to_whole": in_a_process("--one", "later", str(depths[len(depths) // 2]), *quick),
    }
    print(json.dumps(measured, indent=1))
    save(measured, "layers", arguments.output)


if __name__ == "__main__":
    main()
