"""The server with the official client: answers of mixed adapters are those of each alone; what is refused is clear."""

import asyncio
import concurrent.futures
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import cache

import pytest
import torch
import transformers as t
from small import LLAMA, hf
from test_data import tiny_tokenizer
from typer.testing import CliRunner

import s2ft_compile as s2ft
from s2ft_compile.adapters.fingerprint import combined, samples_of
from s2ft_compile.adapters.format import Adapter, describe_base, hash_of_block, write_adapter
from s2ft_compile.exporters import load_adapter

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
uvicorn = pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx2")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from s2ft_compile.cli.app import app  # noqa: E402
from s2ft_compile.cli.serve import loaded  # noqa: E402
from s2ft_compile.errors import AdapterError, ConfigError, ExportError  # noqa: E402
from s2ft_compile.serve.engine import Engine, Limits, Request, Unavailable  # noqa: E402
from s2ft_compile.serve.server import Options, build  # noqa: E402
from s2ft_compile.serve.text import Text  # noqa: E402

KEY = "secret"
SLICES = {  # the ends of parameters' names -> the dimension and how many indices
    "law": {"down_proj.weight": (1, 5), "o_proj.weight": (1, 4)},
    "chat": {"up_proj.weight": (0, 4), "gate_proj.weight": (0, 4), "v_proj.weight": (0, 4), "norm.weight": (0, 9)},
    "code": {"down_proj.weight": (1, 9), "norm.weight": (0, 16)},
}
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
LIMITS = dict(length=48, requests=80, batch=16, step=64, cache=256, page=16)


def base_model() -> torch.nn.Module:
    return hf("llama", vocab_size=300, eos_token_id=0, max_position_embeddings=64, use_cache=True)


def random_adapter(base, slices, seed) -> Adapter:
    """As if it had been trained: numbers that change what the model says."""
    random, drawn = torch.Generator().manual_seed(seed), []
    for name, W in base.named_parameters():
        for end, (dim, n) in slices.items():
            if name.endswith(end):
                indices = torch.randperm(W.shape[dim], generator=random)[:n].sort().values
                shape = [n if d == dim else size for d, size in enumerate(W.shape)]
                drawn.append(s2ft.Slice(name, dim, indices, tuple(W.shape), (), torch.randn(shape, generator=random)))
    held, samples = dict(base.named_parameters()), samples_of(base)
    blocks = {s.parameter_name: hash_of_block(held[s.parameter_name], s) for s in drawn}
    plan = s2ft.Plan(s2ft.S2FTConfig(), combined(samples), tuple(drawn))
    return Adapter(plan, describe_base(type(base).__name__, "float32", samples, blocks))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model with its tokenizer, and three adapters of it."""
    root, tokenizer = tmp_path_factory.mktemp("served"), tiny_tokenizer()
    tokenizer.chat_template = CHAT
    base_model().save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    base = base_model()
    for seed, (name, slices) in enumerate(SLICES.items()):
        (root / name).mkdir()
        write_adapter(root / name, random_adapter(base, slices, seed))
    return root


@contextlib.contextmanager
def serving(folder, adapters=("law", "chat"), **limits):
    """The server on a port of its own, and its engine."""
    engine, tokenizer = loaded(folder / "base", {n: folder / n for n in adapters}, {**LIMITS, **limits})
    server = uvicorn.Server(uvicorn.Config(build(engine, tokenizer, Options("base", KEY, folder)), log_level="error"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", engine
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive() and not engine.alive()


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder) as (url, engine):
        yield url, engine


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def alone(folder):
    """The greedy tokens that follow a prompt, of an adapter merged into a model of its own."""
    models = {"base": base_model()}
    for name in SLICES:
        models[name] = base_model()
        load_adapter(models[name], folder / name)

    def generate(name: str, prompt: list[int], new: int) -> list[int]:
        generated = models[name].generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=new, pad_token_id=0)
        return generated[0, len(prompt) :].tolist()

    return generate


def raw(client, **body):
    return httpx.post(
        f"{client.base_url}completions", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60
    )


def idle(engine) -> bool:
    """Nothing runs, and the cache is free. Within some steps of the engine's thread."""
    scheduler = engine._manager.batch_processor.scheduler
    for _ in range(200):
        cache = scheduler.cache
        cache.pool.try_to_free_sectors()
        if not engine.running and not scheduler.has_pending_requests():
            return cache.pool.num_free_sectors == cache.num_sectors
        time.sleep(0.02)
    return False


def test_mixed_requests_get_the_tokens_of_their_adapter_alone(server, client, alone):
    """More clients than a batch holds, prompts of several lengths, and some the same: what a cache has of a prompt with
    one adapter is not what it is with another."""
    url, engine = server
    random = torch.Generator().manual_seed(0)
    asked = []
    for i in range(60):
        length = int(torch.randint(1, 30, (), generator=random))
        prompt = torch.randint(1, 300, (length,), generator=random).tolist() if i % 2 else list(range(1, 30))
        asked.append((("base", "law", "chat")[i % 3], prompt, 1 + i % 17))
    before = engine.steps

    def ask(one):
        name, prompt, new = one
        stream = new % 2 == 0
        completion = client.completions.create(
            model=name,
            prompt=prompt,
            max_tokens=new,
            temperature=0,
            stream=stream,
            extra_body={"return_token_ids": True},
        )
        parts = list(completion) if stream else [completion]
        assert {part.model for part in parts} == {name} and len({part.id for part in parts}) == 1
        assert "".join(p.choices[0].text for p in parts) == tiny_tokenizer().decode(
            alone(name, prompt, new), skip_special_tokens=True
        )
        answer = [token for part in parts for token in part.choices[0].token_ids]
        return answer, parts[-1].choices[0].finish_reason

    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(ask, asked))
    for (name, prompt, new), (answer, finish) in zip(asked, answers, strict=True):
        assert answer == alone(name, prompt, new)
        assert finish == ("stop" if answer[-1] == 0 else "length")
    total = sum(new + len(prompt) for _, prompt, new in asked)
    assert engine.steps - before < total / 4  # they did run together
    assert idle(engine)


def test_chats_choices_stops_and_usage(server, client, alone):
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": "the cat"}]
    prompt = tokenizer("user: the cat ")["input_ids"]
    want = alone("law", prompt, 12)
    text = tokenizer.decode(want, skip_special_tokens=True)
    completion = client.chat.completions.create(
        model="law", messages=messages, max_completion_tokens=12, temperature=0, n=2
    )
    assert [c.message.content for c in completion.choices] == [text, text] and [
        c.index for c in completion.choices
    ] == [0, 1]
    assert completion.usage.prompt_tokens == len(prompt) and completion.usage.completion_tokens == 2 * len(want)
    chunks = list(
        client.chat.completions.create(
            model="law",
            messages=messages,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant" and not chunks[-1].choices
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage.completion_tokens == len(want)
    stop = text[2:4]
    for stream in (False, True):
        completion = client.completions.create(
            model="law", prompt=prompt, max_tokens=12, temperature=0, stop=["\u0000", stop], stream=stream
        )
        parts = list(completion) if stream else [completion]
        assert "".join(p.choices[0].text for p in parts) == text[: text.index(stop)]
        assert parts[-1].choices[0].finish_reason == "stop"
    completion = client.completions.create(model="base", prompt=[[5, 7], [9]], max_tokens=3, temperature=0)
    assert [c.text for c in completion.choices] == [tokenizer.decode(alone("base", p, 3)) for p in ([5, 7], [9])]
    assert idle(server[1])


def test_a_seed_is_of_the_request_and_a_draw_is_of_the_distribution(server, client):
    def draw(seed):
        completion = client.completions.create(
            model="chat", prompt=[5, 7], max_tokens=8, temperature=1.5, top_p=0.9, seed=seed, n=2
        )
        return [c.text for c in completion.choices]

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        first, again, other = (list(pool.map(draw, seeds)) for seeds in ([1] * 4, [1] * 2, [2]))
    assert len({tuple(texts) for texts in first + again}) == 1 and first[0] != other[0] and first[0][0] != first[0][1]
    # by itself: as often as softmax says, to five standard deviations
    scores, request = torch.tensor([0.0, 1.0, 2.0, -1.0]), Request([1], temperature=0.7, seed=0)
    drawn = torch.tensor([int(request.sampled(scores).argmax()) for _ in range(4000)])
    p = (scores / 0.7).softmax(0)
    assert ((drawn.bincount(minlength=4) / 4000 - p).abs() <= 5 * (p * (1 - p) / 4000).sqrt()).all()
    for more, left in (({"top_k": 2}, {1, 2}), ({"top_p": 0.5}, {2}), ({"top_p": 0.9}, {1, 2})):
        request = Request([1], temperature=0.7, seed=0, **more)
        assert {int(request.sampled(scores).argmax()) for _ in range(200)} == left


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_temperature_next_to_zero_is_greedy(temperature, dtype):
    scores = torch.randn(500).to(dtype)
    for more in ({}, {"top_p": 0.5}, {"top_k": 3}):
        assert Request([1], temperature=temperature, seed=0, **more).sampled(scores).argmax() == scores.argmax()


def test_adapters_come_and_go_while_others_run(server, client, alone):
    url, engine = server
    headers = {"Authorization": f"Bearer {KEY}"}
    prompt, done = [5, 7, 9, 11], threading.Event()

    def load():
        while not done.is_set():
            completion = client.completions.create(
                model="law", prompt=prompt, max_tokens=9, temperature=0, extra_body={"return_token_ids": True}
            )
            assert completion.choices[0].token_ids == alone("law", prompt, 9)
        return True

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        running = [pool.submit(load) for _ in range(3)]
        try:
            for _ in range(3):
                response = httpx.post(f"{url}/v1/adapters", json={"name": "code", "path": "code"}, headers=headers)
                assert response.status_code == 200 and response.json()["parent"] == "base"
                assert [m.id for m in client.models.list()] == ["base", "law", "chat", "code"]
                completion = client.completions.create(
                    model="code", prompt=prompt, max_tokens=9, temperature=0, extra_body={"return_token_ids": True}
                )
                assert completion.choices[0].token_ids == alone("code", prompt, 9)
                stream = client.completions.create(model="code", prompt=prompt, max_tokens=30, stream=True, seed=1)
                next(iter(stream))
                gone = httpx.delete(f"{url}/v1/adapters/code", headers=headers, timeout=60)
                assert gone.json() == {"id": "code", "object": "model", "deleted": True}
                assert list(stream)[-1].choices[0].finish_reason  # it ended first, whole
                with pytest.raises(openai.NotFoundError, match="no model 'code'; there are: base, law, chat"):
                    client.completions.create(model="code", prompt=prompt)
        finally:
            done.set()
        assert all(one.result() for one in running)
    assert engine.bank.names == ("law", "chat") and idle(engine)


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_whose_client_left_is_freed(folder, stream):
    """Without end it would generate for longer than the test waits."""
    with serving(folder, length=60, cache=1024, requests=1) as (url, engine):
        engine.ends = engine._manager.generation_config.eos_token_id = ()
        engine._hooks.append(engine.bank.model.register_forward_pre_hook(lambda *_: time.sleep(0.1)))
        body = {"model": "law", "prompt": [5, 7], "max_tokens": 50, "temperature": 0, "stream": stream}
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            text = json.dumps(body).encode()
            lines = ["POST /v1/completions HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}"]
            head = "\r\n".join([*lines, f"Content-Length: {len(text)}", "", ""])
            connection.sendall(head.encode() + text)
            while not engine.running or engine.steps < 3:
                time.sleep(0.01)
            busy = httpx.post(f"{url}/v1/completions", json=body, headers={"Authorization": f"Bearer {KEY}"})
            assert busy.status_code == 429 and busy.headers["retry-after"] and "the limit" in busy.text
        begun = engine.steps
        assert idle(engine) and engine.steps - begun < 20
        metrics = httpx.get(f"{url}/metrics").text
        assert re.search(r's2ft_requests_total\{end="cancelled",model="law"\} 1.0', metrics)


@pytest.mark.parametrize(
    "more, status, match",
    [
        ({"model": "tax"}, 404, "no model 'tax'; there are: base, law, chat"),
        ({"max_tokens": 46}, 400, "48 tokens at most, and this one has 3 of a prompt and up to 46 new ones"),
        ({"prompt": [5] * 49}, 400, "48 tokens at most"),
        ({"prompt": []}, 400, "the prompt is empty"),
        ({"prompt": ""}, 400, "the prompt is empty"),
        ({"prompt": [300]}, 400, "300 is no token; valid: 0 to 299"),
        ({"prompt": [1.5]}, 400, "prompt"),
        ({"temperature": 3}, 400, "temperature: Input should be less than or equal to 2"),
        ({"temperature": "warm"}, 400, "temperature: Input should be a valid number"),
        ({"logprobs": 3}, 400, "not supported: logprobs; supported: model, "),
        ({"suffix": "x", "best_of": 2}, 400, "not supported: best_of, suffix"),
        ({"stop": [""]}, 400, "a stop is a text that is not empty"),
        ({"stream_options": {"x": True}}, 400, "not supported in stream_options: x"),
        ({"n": 64, "prompt": [[5], [6]]}, 400, "128 answers in one request; valid: up to 80"),
        ({"model": "x" * 100_000}, 404, "no model 'xxx"),
        ({"logprobs": 0, "user": "me", "presence_penalty": 0.0, "echo": False}, 200, "text_completion"),
    ],
)
def test_what_is_refused_is_said_as_openai_says_it(server, client, more, status, match):
    response = raw(client, **{"model": "law", "prompt": [5, 7, 9], "max_tokens": 2, **more})
    assert response.status_code == status and match in response.text, response.text
    if status != 200:
        assert response.json()["error"].keys() == {"message", "type", "param", "code"} and len(response.content) < 3000
    assert "retry-after" not in response.headers


def test_bodies_keys_paths_and_routes_that_are_refused(server, client, folder, tmp_path):
    url, engine = server
    headers = {"Authorization": f"Bearer {KEY}"}
    post = f"{url}/v1/completions"
    for body, match in (
        (b"{", "no JSON"),
        (b"[]", "no JSON object"),
        (b"\xff", "no JSON"),
        (rb'{"model": "\ud800"}', "no JSON"),
        (b'{"top_p": NaN}', "no JSON"),
        (b"[" * 10**5, "no JSON"),
    ):
        response = httpx.post(post, content=body, headers=headers)
        assert response.status_code == 400 and match in response.json()["error"]["message"], response.text
    response = httpx.post(post, content=b" " * (9 << 20), headers=headers)
    assert response.status_code == 400 and "more than 8 MiB" in response.text
    for route in ("models", "models/law"):
        assert httpx.get(f"{url}/v1/{route}").status_code == 401
    assert httpx.post(post, json={}, headers={"Authorization": "Bearer x"}).json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{url}/v1/nothing").json()["error"]["message"] == "Not Found"
    assert httpx.get(post).status_code == 405
    (tmp_path / "outside").mkdir()
    for path in ("..", str(tmp_path / "outside"), "nothing", "x" * 5000, "a\0b"):
        response = httpx.post(f"{url}/v1/adapters", json={"name": "n", "path": path}, headers=headers)
        assert response.status_code == 400 and "no adapter folder under" in response.text
    response = httpx.post(f"{url}/v1/adapters", json={"name": "n", "path": "base"}, headers=headers)
    assert response.status_code == 400 and "not an adapter" in response.text
    response = httpx.post(f"{url}/v1/adapters", json={"name": "law", "path": "code"}, headers=headers)
    assert response.status_code == 400 and "'law' already" in response.text
    assert httpx.delete(f"{url}/v1/adapters/n", headers=headers).status_code == 404
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    numbers = httpx.get(f"{url}/metrics").text
    assert "s2ft_adapters 2.0" in numbers and "s2ft_requests_running 0.0" in numbers
    assert engine.bank.names == ("law", "chat")


def test_an_engine_that_fails_says_so_and_its_requests_end(folder):
    with serving(folder) as (url, engine):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        fail = engine.bank.model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="the request failed"):
            client.completions.create(model="law", prompt=[5])
        fail.remove()
        with pytest.raises(openai.InternalServerError, match="the engine has stopped"):
            client.completions.create(model="law", prompt=[5])
        assert httpx.get(f"{url}/health").status_code == 503
        assert not engine.running


def test_a_request_that_comes_while_the_engine_fails_ends_too(folder, monkeypatch):
    """It is taken before the engine begins to stop, and reaches the queue after the queue's requests have failed."""
    with serving(folder) as (url, engine):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60)
        engine.bank.model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        put = engine._manager.input_queue.put

        def late(state, **how):
            monkeypatch.undo()
            with pytest.raises(openai.InternalServerError, match="the request failed"):
                client.completions.create(model="law", prompt=[5])
            engine._manager._generation_thread.join()
            put(state, **how)

        monkeypatch.setattr(engine._manager.input_queue, "put", late)
        with pytest.raises(Unavailable, match="the engine has stopped: division by zero"):
            asyncio.run(engine.answer(Request([5], "law", 2)))


def test_more_requests_than_the_cache_holds_wait_and_none_is_lost(folder, alone):
    """A cache of two of the longest requests: the engine puts some off, and takes them up again where they were."""
    with serving(folder, cache=96, batch=8) as (url, engine):

        async def ask():
            requests = [Request([k + 1] * 20, ("law", "chat", None)[k % 3], 28, each=k % 2 == 0) for k in range(12)]
            return requests, await asyncio.gather(*(engine.answer(request) for request in requests))

        for request, answer in zip(*asyncio.run(ask())):
            assert answer == alone(request.adapter or "base", list(request.tokens), 28)
        assert idle(engine)


def gemma3() -> torch.nn.Module:
    """A window of three tokens in one layer, and all of them in the other."""
    layers = ["sliding_attention", "full_attention"]
    fields = {**LLAMA, "sliding_window": 3, "layer_types": layers}
    torch.manual_seed(0)
    return t.Gemma3ForCausalLM(t.Gemma3TextConfig(**fields)).eval()


OTHERS = {
    "gpt2": (
        lambda: hf("gpt2"),
        {
            "mlp.c_proj.weight": (0, 5),
            "mlp.c_fc.weight": (1, 4),
            "attn.c_proj.weight": (0, 4),
            "ln_1.weight": (0, 16),
            "ln_f.bias": (0, 7),
            "c_fc.bias": (0, 5),
        },
    ),
    "gemma3": (gemma3, {"down_proj.weight": (1, 5), "up_proj.weight": (0, 4), "norm.weight": (0, 3)}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_shapes_of_models(tmp_path, kind):
    """Weights stored the other way, fused projections, learned positions; windows."""
    make, slices = OTHERS[kind]
    write_adapter(folder := tmp_path, random_adapter(make(), slices, 0))
    merged, engine = make(), Engine(make(), Limits(cache=128, page=16, step=32, batch=4))
    load_adapter(merged, folder)
    engine.add("a", folder)

    async def ask():
        prompts = [[5, 7, 9], [3], [8, 1, 2, 4, 9, 9, 1], [8, 1, 2, 4, 9, 9, 1]]
        requests = [Request(prompt, "a" if i != 2 else None, 9) for i, prompt in enumerate(prompts)]
        return requests, await asyncio.gather(*(engine.answer(request) for request in requests))

    with engine:
        for request, answer in zip(*asyncio.run(ask())):
            model = merged if request.adapter else make()
            model.generation_config.eos_token_id = None
            generated = model.generate(
                torch.tensor([request.tokens]), do_sample=False, max_new_tokens=9, pad_token_id=0, use_cache=True
            )
            assert answer == generated[0, len(request.tokens) :].tolist()


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: hf("bert"), "BertForMaskedLM is not served: valid are causal language models"),
        (lambda: torch.nn.Linear(2, 2), "Linear is not served"),
        (
            lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=4)),
            "BloomForCausalLM is not served: its attention",
        ),
        (
            lambda: t.MambaForCausalLM(t.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1)),
            "MambaForCausalLM",
        ),
    ],
)
def test_models_that_the_engine_does_not_run_are_refused(make, match):
    with pytest.raises(ConfigError, match=match):
        Engine(make())


def test_adapters_that_a_batch_does_not_hold_are_refused_before_it_runs():
    engine = Engine(base_model(), Limits(cache=64, page=16))
    for end, error, match in (
        ("lm_head.weight", AdapterError, "changes the head, lm_head.weight"),
        ("embed_tokens.weight", ExportError, "embed_tokens.weight cannot be in a batch"),
    ):
        with pytest.raises(error, match=match):
            engine.add("a", random_adapter(engine.bank.model, {end: (1, 2)}, 0))
    with pytest.raises(AdapterError, match="of another model: this one has no transformer.h.0"):
        engine.add("a", random_adapter(hf("gpt2"), OTHERS["gpt2"][1], 0))
    assert engine.names == ()


@given(st.text(max_size=30), st.lists(st.text("abc \u00e9", min_size=1, max_size=3), max_size=2), st.data())
def test_text_in_parts_is_the_text_up_to_a_stop(text, stops, data):
    tokenizer = tiny_tokenizer_once()
    ids = tokenizer(text)["input_ids"]
    incremental, streamed, at = Text(tokenizer, stops), "", 0
    while at < len(ids) and not incremental.stopped:
        step = data.draw(st.integers(1, 4))
        streamed += incremental.add(ids[at : at + step])
        at += step
    streamed += incremental.end()
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    ends = [whole.find(stop) for stop in stops if stop in whole]
    assert streamed == (whole[: min(ends)] if ends else whole) and incremental.stopped == bool(ends)


@cache
def tiny_tokenizer_once():
    return tiny_tokenizer()


# --- the command ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, match",
    [
        (["--adapter", "law"], "--adapter is NAME=FOLDER, such as law=adapters/law; got 'law'"),
        (["--adapter", "a=x", "--adapter", "a=y"], "two adapters are called 'a'"),
        (["--adapter", "base={root}/law"], "both called 'base'"),
        (["--adapter", "law=x"], "adapter folder x does not exist"),
        (["--adapter-root", "nothing"], "--adapter-root nothing is no folder"),
        (["--adapter", "law={root}/base", "--port", "0"], "not an adapter"),
        (["--cache-tokens", "-1", "--port", "0"], "cache"),
    ],
)
def test_what_the_command_refuses_is_one_line(folder, arguments, match):
    given = [argument.format(root=folder) for argument in arguments]
    result = CliRunner().invoke(app, ["serve", str(folder / "base"), *given])
    assert result.exit_code == 1 and match in result.output.replace("\n", " "), result.output


def test_the_command_serves_until_it_is_told_to_stop(folder):
    code = "from s2ft_compile.cli.app import app; app()"
    command = [sys.executable, "-c", code, "serve", str(folder / "base"), "--adapter", f"law={folder / 'law'}"]
    with subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True) as process:
        try:
            line = next(line for line in process.stderr if "http" in line)
            assert line.startswith("base at http") and line.rstrip().endswith("adapters: law")
            client = openai.OpenAI(base_url=f"{line.split()[2].rstrip(',')}/v1", api_key="any", max_retries=20)
            assert [m.id for m in client.models.list()] == ["base", "law"]
        finally:
            process.terminate()
        assert process.wait(30) in (0, -signal.SIGTERM)
