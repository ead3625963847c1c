"""How much memory of its own a process takes at most while it loads a quantized model and prepares it; as JSON.

python load_quantized.py FOLDER SMALL_FOLDER KIND: {"before", "most", "after": bytes}. On Linux: what maps a file is not
counted, and what is freed is given back at once.
"""

import ctypes
import gc
import json
import sys
import threading
import time

import torch

import s2ft_compile as s2ft
from s2ft_compile.cli.data import load_model

CONFIG = s2ft.S2FTConfig({"ffn.in": 0.02, "ffn.out": 0.02})
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def anonymous() -> int:
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def main(folder: str, warm_up: str, kind: str) -> None:
    for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        ctypes.CDLL(None).mallopt(option, 1 << 16)
    prepared(warm_up, kind)  # imports, compiled regular expressions, ...
    gc.collect()
    before, seen, done = anonymous(), [], threading.Event()

    def watch():
        while not done.is_set():
            seen.append(anonymous())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = prepared(folder, kind)
    done.set()
    watcher.join()
    gc.collect()
    print(json.dumps({"before": before, "most": max(seen), "after": anonymous()}))
    assert s2ft.is_prepared(model)


def prepared(folder: str, kind: str) -> torch.nn.Module:
    model = load_model(folder, quantize=kind)
    s2ft.prepare(model, {"input_ids": torch.zeros(2, 12, dtype=torch.int64)}, CONFIG)
    return model


if __name__ == "__main__":
    main(*sys.argv[1:])
