"""The HTTP server: OpenAI's completions and chats, models, adapters at run time, health and metrics."""

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException as NotRouted
from starlette.requests import ClientDisconnect

from s2ft_compile.errors import AdapterError, ConfigError, S2FTError

from .engine import Busy, Engine, Unavailable
from .engine import Request as Tokens
from .protocol import Answer, Asked, Chat, Completion, NewAdapter, event, parsed, problem, usage
from .text import Text

log = logging.getLogger(__name__)
BODY = 8 << 20  # bytes of a request at most
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Unauthorized(S2FTError):
    pass


@dataclass(frozen=True)
class Options:
    """name: of the base model, as requests ask for it. key: that they have to bring. adapters: the folder under which
    adapters may be added at run time; none: they may not."""

    name: str
    key: str | None = None
    adapters: Path | None = None


def build(engine: Engine, tokenizer: Any, options: Options) -> FastAPI:
    """The application, which starts and stops the engine. tokenizer: of transformers."""

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        with engine:
            yield

    app = FastAPI(title="s2ft serve", lifespan=running, openapi_url=None)
    server = Server(engine, tokenizer, options)
    app.add_exception_handler(S2FTError, _refused)
    app.add_exception_handler(NotRouted, _not_routed)
    app.add_exception_handler(ClientDisconnect, _unread)
    app.add_exception_handler(Exception, _failed)
    for path, method, call in (
        ("/v1/completions", "POST", server.completion),
        ("/v1/chat/completions", "POST", server.chat),
        ("/v1/models", "GET", server.models),
        ("/v1/models/{name:path}", "GET", server.model),
        ("/v1/adapters", "POST", server.add_adapter),
        ("/v1/adapters/{name:path}", "DELETE", server.remove_adapter),
        ("/health", "GET", server.health),
        ("/metrics", "GET", server.metrics),
    ):
        app.add_api_route(path, call, methods=[method], response_model=None)
    return app


STATUS = {Busy: 429, Unavailable: 503, Unauthorized: 401, AdapterError: 404, ConfigError: 400}


async def _refused(_: Request, error: S2FTError) -> JSONResponse:
    status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 400)
    kind = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error"}.get(
        status, "invalid_request_error"
    )
    code = {404: "model_not_found", 401: "invalid_api_key"}.get(status)
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse(problem(str(error), kind, code), status, headers)


async def _not_routed(_: Request, error: NotRouted) -> JSONResponse:
    return JSONResponse(problem(str(error.detail), "invalid_request_error"), error.status_code)


async def _failed(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse(problem(f"the server failed: {type(error).__name__}", "server_error"), 500)


async def _unread(*_: Any) -> Response:
    return Response(status_code=499)


class Server:
    def __init__(self, engine: Engine, tokenizer: Any, options: Options):
        self.engine, self.tokenizer, self.options = engine, tokenizer, options
        self.started = int(time.time())
        self.numbers = Numbers(engine)

    # --- completions ---

    async def completion(self, http: Request) -> Response:
        asked = parsed(Completion, await self._body(http))
        prompts = [self._tokens(prompt) for prompt in asked.prompts()]
        return await self._answer(http, asked, prompts, chat=False)

    async def chat(self, http: Request) -> Response:
        asked = parsed(Chat, await self._body(http))
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ConfigError(f"{self.options.name} has no chat template; valid: /v1/completions")
        try:
            tokens = self.tokenizer.apply_chat_template(
                asked.messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:  # whatever a template raises on messages that it does not know
            raise ConfigError(f"the chat template does not take these messages: {error}") from error
        return await self._answer(http, asked, [tokens], chat=True)

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        size = self.engine.vocabulary
        if odd := [token for token in prompt if not 0 <= token < size]:
            raise ConfigError(f"{odd[0]} is no token; valid: 0 to {size - 1}")
        return prompt

    async def _answer(self, http: Request, asked: Asked, prompts: Sequence[list[int]], chat: bool) -> Response:
        adapter = self._adapter(asked.model)
        jobs = [
            Tokens(
                tokens=tokens,
                adapter=adapter,
                new=asked.new or max(1, self.engine.length - len(tokens)),
                temperature=1.0 if asked.temperature is None else asked.temperature,
                top_p=asked.top_p or 1.0,
                top_k=asked.top_k or 0,
                seed=None if asked.seed is None else asked.seed + k,
                each=bool(asked.stream or asked.stops),
            )
            for tokens in prompts
            for k in range(asked.n or 1)
        ]
        limit = self.engine.limits.requests
        if len(jobs) > limit:
            raise ConfigError(
                f"{len(jobs)} answers in one request; valid: up to {limit}, the limit of what is under way"
            )
        for job in jobs:
            self.engine.check(job)
        if self.engine.running + len(jobs) > limit:
            raise Busy(f"{len(jobs)} requests more are above the limit of {limit} under way")
        answer = Answer(asked.model, chat)
        if asked.stream:
            events = self._events(asked, answer, jobs, prompts)
            return StreamingResponse(events, headers={"Cache-Control": "no-cache"}, media_type="text/event-stream")
        answers = await _unless_gone(http, lambda: self._all(asked, jobs))
        if answers is None:
            return await _unread()
        choices = [
            answer.choice(i, *one, tokens if asked.return_token_ids else None)
            for i, (*one, tokens) in enumerate(answers)
        ]
        used = usage(sum(map(len, prompts)), sum(len(tokens) for *_, tokens in answers))
        return JSONResponse(answer.whole(choices, used))

    async def _all(self, asked: Asked, jobs: Sequence[Tokens]) -> list[tuple[str, str, list[int]]]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._one(asked, job)) for job in jobs]
        return [task.result() for task in tasks]

    async def _one(self, asked: Asked, job: Tokens) -> tuple[str, str, list[int]]:
        """The text, why it ended, and its tokens."""
        async with aclosing(self._parts(asked, job)) as parts:
            received = [part async for part in parts]
        tokens = [token for _, _, fresh in received for token in fresh]
        return "".join(text for text, _, _ in received), received[-1][1] or "length", tokens

    async def _parts(self, asked: Asked, job: Tokens) -> AsyncIterator[tuple[str, str | None, list[int]]]:
        """(text, why it ended or None, new tokens); the last part says why."""
        text, begun = Text(self.tokenizer, asked.stops), time.perf_counter()
        name, finish = job.adapter or self.options.name, "cancelled"
        try:
            sent, fresh = "", []
            async with aclosing(self.engine.generate(job)) as parts:
                async for fresh in parts:
                    if not text.tokens:
                        self.numbers.first.labels(name).observe(time.perf_counter() - begun)
                    sent = text.add(fresh)
                    if text.stopped:
                        break
                    yield sent, None, fresh
                    sent, fresh = "", []
            sent += text.end()
            ended = text.stopped or text.tokens[-1] in self.engine.ends
            finish = "stop" if ended else "length"
            yield sent, finish, fresh
        except Exception:
            finish = "failed"
            raise
        finally:
            self.numbers.took.labels(name).observe(time.perf_counter() - begun)
            self.numbers.requests.labels(name, finish).inc()
            self.numbers.prompt.labels(name).inc(len(job.tokens))
            self.numbers.new.labels(name).inc(len(text.tokens))

    async def _events(
        self, asked: Asked, answer: Answer, jobs: Sequence[Tokens], prompts: Sequence[list[int]]
    ) -> AsyncIterator[str]:
        queue: asyncio.Queue = asyncio.Queue()
        tasks = [asyncio.create_task(self._into(queue, i, asked, job)) for i, job in enumerate(jobs)]
        left, count, begun = len(tasks), 0, set()
        try:
            while left:
                i, part = await queue.get()
                if isinstance(part, Exception):
                    yield event(problem(str(part), "server_error"))
                    return
                text, finish, fresh = part
                left -= finish is not None
                count += len(fresh)
                if text or finish or (fresh and asked.return_token_ids) or i not in begun:
                    ids = fresh if asked.return_token_ids else None
                    yield event(answer.part(i, text, finish, ids, i not in begun))
                    begun.add(i)
            if (asked.stream_options or {}).get("include_usage"):
                yield event(answer.last(usage(sum(map(len, prompts)), count)))
            yield event("[DONE]")
        finally:
            await _ended(tasks)

    async def _into(self, queue: asyncio.Queue, index: int, asked: Asked, job: Tokens) -> None:
        try:
            async with aclosing(self._parts(asked, job)) as parts:
                async for part in parts:
                    queue.put_nowait((index, part))
        except Exception as error:
            queue.put_nowait((index, error))

    # --- models and adapters ---

    def _adapter(self, model: str) -> str | None:
        """Raises `AdapterError` for a name that is neither the base model's nor an adapter's."""
        if model == self.options.name:
            return None
        if model not in self.engine.names:
            known = ", ".join([self.options.name, *self.engine.names])
            raise AdapterError(f"no model {model!r}; there are: {known}")
        return model

    def _described(self, name: str) -> dict:
        parent = {} if name == self.options.name else {"parent": self.options.name}
        return {"id": name, "object": "model", "created": self.started, "owned_by": "s2ft", **parent}

    async def models(self, http: Request) -> dict:
        self._authorize(http)
        return {"object": "list", "data": [self._described(n) for n in (self.options.name, *self.engine.names)]}

    async def model(self, http: Request, name: str) -> dict:
        self._authorize(http)
        self._adapter(name)
        return self._described(name)

    async def add_adapter(self, http: Request) -> dict:
        given = parsed(NewAdapter, await self._body(http))
        root = self._root()
        try:
            folder = (root / given.path).resolve()
            inside = folder.is_relative_to(root) and folder.is_dir()
        except (OSError, ValueError):  # a path that no file has
            inside = False
        if not inside:
            raise ConfigError(f"no adapter folder under the server's root is called {given.path!r}")
        if given.name == self.options.name or given.name in self.engine.bank.names:
            raise ConfigError(f"there is a model {given.name!r} already; remove it first")
        try:
            await asyncio.to_thread(self.engine.add, given.name, folder)
        except Unavailable:
            raise
        except S2FTError as error:  # which is wrong in the request, not in what it asks for
            raise ConfigError(str(error)) from error
        return self._described(given.name)

    async def remove_adapter(self, http: Request, name: str) -> dict:
        self._authorize(http)
        self._root()
        await self.engine.remove(name)
        return {"id": name, "object": "model", "deleted": True}

    def _root(self) -> Path:
        if self.options.adapters is None:
            raise ConfigError("adapters are fixed here; --adapter-root FOLDER lets requests add and remove them")
        return self.options.adapters.resolve()

    # --- the rest ---

    async def health(self) -> Response:
        alive = self.engine.alive()
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    async def metrics(self) -> Response:
        return Response(self.numbers.text(), media_type="text/plain; version=0.0.4")

    def _authorize(self, http: Request) -> None:
        key = self.options.key
        given = http.headers.get("authorization", "").removeprefix("Bearer ")
        if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
            raise Unauthorized("a wrong API key, or none; send it as 'Authorization: Bearer KEY'")

    async def _body(self, http: Request) -> bytes:
        self._authorize(http)
        body = bytearray()
        async for part in http.stream():
            body += part
            if len(body) > BODY:
                raise ConfigError(f"the body has more than {BODY >> 20} MiB")
        return bytes(body)


class Numbers:
    """What /metrics tells, in Prometheus' format."""

    def __init__(self, engine: Engine):
        self.registry = r = CollectorRegistry()
        self.requests = Counter("s2ft_requests", "Answered requests, by how they ended", ["model", "end"], registry=r)
        self.prompt = Counter("s2ft_prompt_tokens", "Tokens of prompts", ["model"], registry=r)
        self.new = Counter("s2ft_generated_tokens", "Tokens of answers", ["model"], registry=r)
        self.first = Histogram("s2ft_first_token_seconds", "To a first token", ["model"], registry=r, buckets=SECONDS)
        self.took = Histogram("s2ft_request_seconds", "Of a request", ["model"], registry=r, buckets=SECONDS)
        for name, what, value in (
            ("s2ft_requests_running", "Requests under way", lambda: engine.running),
            ("s2ft_adapters", "Adapters that are loaded", lambda: len(engine.names)),
            ("s2ft_steps", "Forwards of the model so far", lambda: engine.steps),
        ):
            Gauge(name, what, registry=r).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)


async def _unless_gone(http: Request, call: Callable[[], Awaitable[Any]]) -> Any:
    """The result, or None where the client has left, in which case the call is cancelled."""
    task = asyncio.ensure_future(call())
    gone = asyncio.ensure_future(_left(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return None
        try:
            return task.result()
        except* S2FTError as group:  # of several prompts; the first says enough
            raise group.exceptions[0] from None
    finally:
        await _ended([task, gone])


async def _left(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _ended(tasks: Sequence[asyncio.Future]) -> None:
    for task in tasks:
        task.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)
