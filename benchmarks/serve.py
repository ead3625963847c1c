"""The server under load: 64 clients over the loopback, each with an adapter of 16, against the base model alone.

    python benchmarks/serve.py [--quick] [--output benchmarks/results/serve.json] [--rounds 5] [--dtype float32]

A model of 32M parameters of Llama's shape with random weights, and adapters of 4.2% of the FFN channels of each layer.
Both kinds of load run in turn on one server, and ask for as many tokens after the same prompts; a figure is the median
over the rounds. Every answer is compared with a model that has the adapter merged into it and runs alone. `wrong`: how
many have a token that is not the likeliest after those before it; `ties`: how many one that is but for rounding;
`lost`: how many are not whole. `--quick` is a rehearsal on a tiny model: its figures mean nothing.
"""

import asyncio
import socket
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import openai
import torch
import uvicorn
from adapters import ADAPTERS, TARGETS, model_of, our_adapters
from methods import Setting
from rich.table import Table
from turns import DEVICE, console, facts, goal_table, parser, save

from s2ft_compile.serve.engine import Engine, Limits
from s2ft_compile.serve.server import Options, build

CLIENTS = 64
FULL_SIZE = Setting(
    hidden=512, layers=8, ffn=1792, heads=8, kv_heads=2, vocabulary=8192, batch=ADAPTERS, length=128, tied=True
)
QUICK_SIZE = Setting(
    hidden=64, layers=2, ffn=256, heads=4, kv_heads=2, vocabulary=512, batch=ADAPTERS, length=128, tied=True
)
GOALS = {
    "adapters_over_base": (">=", 0.85),
    "adapters_over_base_cpu": (">=", 0.85),
    "wrong": ("<=", 0),
    "lost": ("<=", 0),
}
Asked = tuple[str, list[int], int]  # model, prompt, new tokens


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    setting = replace(QUICK_SIZE if arguments.quick else FULL_SIZE, dtype=arguments.dtype, device=DEVICE)
    rounds, requests = (1, CLIENTS) if arguments.quick else (arguments.rounds, arguments.requests)
    with torch.no_grad(), console.status("a model, and its adapters"):
        model = model_of(setting)
        adapters = {f"adapter{i}": adapter for i, adapter in enumerate(our_adapters(model, setting))}
    engine = Engine(model, Limits(requests=4 * CLIENTS, batch=CLIENTS))
    for name, adapter in adapters.items():
        engine.add(name, adapter)
    mixed = load(list(adapters), requests, setting.vocabulary)
    base = [("base", prompt, new) for _, prompt, new in mixed]
    spent: dict[str, list[float]] = {"base": [], "adapters": []}
    cpu: dict[str, list[float]] = {"base": [], "adapters": []}  # what others on the machine take is not in it
    correct: list[list[int]] = []
    with tempfile.TemporaryDirectory() as folder, running(engine, setting.vocabulary, Path(folder)) as url:
        for turn in range(rounds + 1):
            for kind in ("base", "adapters") if turn % 2 else ("adapters", "base"):
                with console.status(f"round {turn} of {rounds}, {kind}"):
                    began = time.process_time()
                    seconds, answers = asyncio.run(ask(url, mixed if kind == "adapters" else base))
                correct = answers if kind == "adapters" else correct
                if turn:  # the first warms up
                    spent[kind].append(seconds)
                    cpu[kind].append(time.process_time() - began)
    with console.status("each adapter alone"):
        wrong = compare(engine, mixed, correct)
    tokens = sum(new for _, _, new in mixed)
    speed = {kind: tokens / median(seconds) for kind, seconds in spent.items()}
    ratios = {"adapters_over_base": speed["adapters"] / speed["base"], **wrong}
    ratios["adapters_over_base_cpu"] = median(cpu["base"]) / median(cpu["adapters"])
    result = {
        **facts(DEVICE, arguments.quick),
        "model": {**setting.__dict__, "targets": TARGETS},
        "clients": CLIENTS,
        "adapters": ADAPTERS,
        "requests": len(mixed),
        "tokens": tokens,
        "seconds": spent,
        "cpu_seconds": cpu,
        "tokens_per_second": speed,
        "ratios": ratios,
    }
    console.print(table(result))
    save(result, "serve", arguments.output)


def _arguments() -> Namespace:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5, help="rounds that count (default 5)")
    options.add_argument("--requests", type=int, default=2 * CLIENTS, help="of a load")
    options.add_argument("--dtype", default="float32", help="of the weights (default float32)")
    options.add_argument("--threads", type=int, default=2)
    return options.parse_args()


def load(names: Sequence[str], count: int, vocabulary: int) -> list[Asked]:
    """Prompts of 8 to 64 tokens, 16 to 48 new ones."""
    random, asked = torch.Generator().manual_seed(0), []
    for i in range(count):
        length, new = (int(torch.randint(a, b, (), generator=random)) for a, b in ((8, 65), (16, 49)))
        prompt = torch.randint(1, vocabulary, (length,), generator=random).tolist()
        asked.append((names[i % len(names)], prompt, new))
    return asked


class Numbers:
    """A tokenizer of a vocabulary of numbers."""

    chat_template = None

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return "".join(f" {token}" for token in tokens)


class running:
    """Context in which the engine is served; gives its address."""

    def __init__(self, engine: Engine, vocabulary: int, folder: Path):
        app = build(engine, Numbers(), Options("base"))
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=4 * CLIENTS)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listening]})

    def __enter__(self) -> str:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{self.listening.getsockname()[1]}/v1"

    def __exit__(self, *_: Any) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.listening.close()


async def ask(url: str, asked: Sequence[Asked]) -> tuple[float, list[list[int]]]:
    """Seconds, and the tokens of each; half of them are streamed."""
    clients = asyncio.Semaphore(CLIENTS)
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:

        async def one(i: int, model: str, prompt: list[int], new: int) -> list[int]:
            how = dict(model=model, prompt=prompt, max_tokens=new, temperature=0, extra_body={"return_token_ids": True})
            async with clients:
                if i % 2:
                    return (await client.completions.create(**how)).choices[0].token_ids
                stream = await client.completions.create(**how, stream=True)
                return [token async for part in stream for token in part.choices[0].token_ids]

        began = time.perf_counter()
        answers = await asyncio.gather(*(one(i, *request) for i, request in enumerate(asked)), return_exceptions=True)
        seconds = time.perf_counter() - began
    for error in {str(answer) for answer in answers if isinstance(answer, BaseException)}:
        console.print(f"[red]{error}")
    return seconds, [[] if isinstance(answer, BaseException) else answer for answer in answers]


def compare(engine: Engine, asked: Sequence[Asked], outputs: Sequence[Sequence[int]]) -> Mapping[str, int]:
    """How many answers are lost, or are not those of a model with the adapter in its weights."""
    model, count = engine.bank.model, {"lost": 0, "wrong": 0, "ties": 0}
    for (name, prompt, new), tokens in zip(asked, outputs, strict=True):
        if len(tokens) != new:
            count["lost"] += 1
            continue
        with engine.bank.using(name), torch.no_grad():
            ids = torch.tensor([[*prompt, *tokens]], device=DEVICE)
            logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
        # greedy, so that each token is the likeliest after those before it
        chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
        gap = (logits.max(1).values - chosen).max() / logits.abs().max()
        tie = gap <= 64 * torch.finfo(model.dtype).eps
        count["wrong"] += bool(gap > 0) and not bool(tie)
        count["ties"] += bool(gap > 0) and bool(tie)
    return count


def table(result: Mapping[str, Any]) -> Table:
    table = goal_table(GOALS, result["ratios"])
    for kind, speed in result["tokens_per_second"].items():
        console.print(f"{kind}: {speed:.1f} tokens a second")
    return table


if __name__ == "__main__":
    main()
