"""How much memory of its own a process takes at most while it loads a quantized model, and while it prepares it; JSON.

python load_quantized.py FOLDER SMALL_FOLDER KIND [SELECTION]: bytes {"before", "loading", "loaded", "preparing",
"prepared"}. On Linux: what files are mapped to is not counted, and what is freed is given back at once.
"""

import ctypes
import gc
import json
import sys
import threading
import time
from contextlib import contextmanager

import torch

import s2ft_compile as s2ft
from s2ft_compile.cli.data import load_model

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def anonymous() -> int:
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))


@contextmanager
def peak():
    """Context in whose end a list holds what a process took at most."""
    seen, done = [anonymous()], threading.Event()

    def watch():
        while not done.is_set():
            seen[0] = max(seen[0], anonymous())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def main(folder: str, warm_up: str, kind: str, selection: str = "random") -> None:
    for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        ctypes.CDLL(None).mallopt(option, 1 << 16)
    prepare(load_model(warm_up, quantize=kind), selection)  # imports, compiled regular expressions, ...
    gc.collect()
    before = anonymous()
    with peak() as loading:
        model = load_model(folder, quantize=kind)
    gc.collect()
    loaded = anonymous()
    with peak() as preparing:
        prepare(model, selection)
    gc.collect()
    taken = (before, loading[0], loaded, preparing[0], anonymous())
    print(json.dumps(dict(zip(("before", "loading", "loaded", "preparing", "prepared"), taken))))
    assert s2ft.is_prepared(model)


def prepare(model: torch.nn.Module, selection: str) -> None:
    ids = torch.zeros(2, 12, dtype=torch.int64)
    batches = [{"input_ids": ids, "labels": ids}]
    config = s2ft.S2FTConfig({"ffn.in": 0.02, "ffn.out": 0.02}, selection)
    s2ft.prepare(model, {"input_ids": ids}, config, None if selection == "random" else batches)


if __name__ == "__main__":
    main(*sys.argv[1:])
