"""Requests for one model and its adapters, in one batch.

Scheduler, paged cache and steps are those of transformers' continuous batching, which packs the tokens of all requests
into one row. Added is what it knows nothing of: before a forward, which tokens are of which adapter
(`AdapterBank.batch` with lengths); after it, how each request samples. Its prefix cache is off, since keys and values
of one adapter are not another's. So are CUDA graphs and asynchronous steps, which do not call the model each time.
"""

import asyncio
import itertools
import logging
import os
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, aclosing, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from s2ft_compile.adapters.bank import AdapterBank, check_batched
from s2ft_compile.adapters.format import Adapter, read_adapter
from s2ft_compile.errors import AdapterError, ConfigError, S2FTError

log = logging.getLogger(__name__)


class Busy(S2FTError):
    """As many requests as may be are under way."""


class Unavailable(S2FTError):
    """The engine has stopped."""


@dataclass(frozen=True)
class Limits:
    """length: tokens of a request, prompt and answer (none: the model's). requests: under way at once, running and
    waiting. batch: running at once. step: tokens of a forward. cache: tokens of all that run. page: tokens of one page.
    The last three are a CPU's; on a GPU transformers fills the memory that is free."""

    length: int | None = None
    requests: int = 256
    batch: int = 64
    step: int = 512
    cache: int = 1 << 15
    page: int = 64

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ConfigError(f"a server's limit of {name} is a positive number, got {value}")


@dataclass(eq=False)
class Request:
    """tokens: the prompt. adapter: a name, or none for the base model. temperature 0: greedy. seed: of its sampling.
    each: whether it wants every token as it comes."""

    tokens: Sequence[int]
    adapter: str | None = None
    new: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    each: bool = True
    random: torch.Generator = field(init=False)

    def __post_init__(self):
        self.random = torch.Generator()
        self.random.manual_seed(self.seed % (1 << 63)) if self.seed is not None else self.random.seed()

    def sampled(self, scores: Tensor) -> Tensor:
        """Scores (vocabulary,) whose largest is a draw from what temperature, top_k and top_p leave (the exponential
        race). The draws are the request's own: the same with the same seed, whatever else is in the batch."""
        # below the largest, and in float32: next to 0 the temperature leaves the likeliest, as 0 does
        scores = (scores.float() - scores.max()) / max(self.temperature, torch.finfo(torch.float32).tiny)
        if self.top_k and self.top_k < scores.shape[0]:
            scores = scores.masked_fill(scores < scores.topk(self.top_k).values[-1], -torch.inf)
        if self.top_p < 1:
            ordered, order = scores.softmax(0).sort(descending=True)
            scores = scores.index_fill(0, order[ordered.cumsum(0) - ordered >= self.top_p], -torch.inf)
        race = torch.empty(scores.shape).exponential_(generator=self.random).to(scores.device)
        return scores - race.log()


class Engine:
    """A plain causal language model, its adapters by name, and the thread that runs its requests.

    Use as a context: inside, `generate` answers from the event loop that calls it, and adapters come and go. Raises
    `ConfigError` for a model or a version of transformers that has no continuous batching.
    """

    def __init__(self, model: nn.Module, limits: Limits = Limits(), ends: Sequence[int] = ()):
        self.bank, self.limits, self.ends = AdapterBank(model), limits, tuple(ends)
        self.steps = 0  # forwards
        self._requests: dict[str, Request] = {}
        self._leaving: set[str] = set()
        self._changing = threading.Lock()
        self._ids = itertools.count()
        self._sampling: list[Request | None] = []
        self._batch: AbstractContextManager | None = None
        _check_served(model)
        self.bank.learn_token_axes(lambda n: model(torch.zeros(1, n, dtype=torch.long, device=model.device)))
        self._manager = _manager(model, limits, self.ends)
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        self._manager.logit_processor = _sampler(self)
        self._hooks = [
            self.bank.model.register_forward_pre_hook(self._before),
            self.bank.model.register_forward_hook(self._after, always_call=True),
        ]
        try:
            self._manager.warmup()  # makes the cache, whose size is then known
            self.length = _length(self.bank.model, self._manager.batch_processor.cache, limits)
        except BaseException:
            self._unhook()
            raise

    def __enter__(self) -> "Engine":
        self._manager.start()
        return self

    def __exit__(self, *_) -> None:
        self._manager.stop(block=True, timeout=30, hard_stop=True)
        self._unhook()

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()

    # --- adapters ---

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters that requests may ask for."""
        return tuple(name for name in self.bank.names if name not in self._leaving)

    @property
    def running(self) -> int:
        """Requests under way."""
        return len(self._requests)

    def alive(self) -> bool:
        """That it takes requests: not from the moment on where it begins to stop."""
        return self._manager.is_running() and self._manager.background_thread_status.can_accept_new_requests() is None

    def add(self, name: str, adapter: Adapter | str | os.PathLike) -> None:
        """Between two steps of what runs. Raises `AdapterError` or `ExportError`; nothing is then changed."""
        read = self._checked(name, adapter)
        with self._changing, self._paused():
            self.bank.add(name, read)
        log.info("adapter %s added", name)

    def _checked(self, name: str, adapter: Adapter | str | os.PathLike) -> Adapter:
        """That a batch can hold it, which the bank would say only in a batch."""
        adapter = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
        model = self.bank.model
        here = dict(model.named_parameters())
        if absent := [s.parameter_name for s in adapter.slices if s.parameter_name not in here]:
            raise AdapterError(f"adapter {name!r} is of another model: this one has no {absent[0]}")
        check_batched(model, adapter.slices)
        head = model.get_output_embeddings()
        for s in adapter.slices:
            if head is not None and here[s.parameter_name] is head.weight:
                raise AdapterError(
                    f"adapter {name!r} changes the head, {s.parameter_name}, which all requests share here"
                )
        return adapter

    async def remove(self, name: str) -> None:
        """No request may ask for it from now on, and those under way end first. Raises `AdapterError` for a name that
        is not there."""
        if name not in self.names:
            raise AdapterError(f"no adapter {name!r}; there are: {', '.join(map(repr, self.names)) or 'none'}")
        self._leaving.add(name)
        try:
            while any(request.adapter == name for request in list(self._requests.values())):
                await asyncio.sleep(0.01)
            await asyncio.to_thread(self._remove, name)
        finally:
            self._leaving.discard(name)
        log.info("adapter %s removed", name)

    def _remove(self, name: str) -> None:
        with self._changing, self._paused():
            self.bank.remove(name)

    def _paused(self) -> AbstractContextManager:
        return self._manager.pause() if self.alive() else nullcontext()

    # --- requests ---

    def check(self, request: Request) -> None:
        """Raises `Unavailable`, `Busy`, `AdapterError` for an adapter that is not there, `ConfigError` for a length."""
        if not self.alive():
            raise self._stopped()
        if request.adapter is not None and request.adapter not in self.names:
            raise AdapterError(f"no adapter {request.adapter!r}; there are: {', '.join(self.names) or 'none'}")
        if not request.tokens:
            raise ConfigError("the prompt is empty, and there is no token to begin with")
        if len(request.tokens) + request.new > self.length:
            raise ConfigError(
                f"a request has {self.length} tokens at most, and this one has {len(request.tokens)} of a prompt and "
                f"up to {request.new} new ones"
            )
        if self.running >= self.limits.requests:
            raise Busy(f"{self.running} requests are under way, which is the limit; try again later")

    def _stopped(self) -> Unavailable:
        why = self._manager.background_thread_status.fatal_error  # known only after its requests have failed
        return Unavailable("the engine has stopped" + (f": {why}" if why else ""))

    async def generate(self, request: Request) -> AsyncIterator[list[int]]:
        """The new tokens, in parts, as they come; closing it cancels the request and frees its cache. Raises as
        `check` does, and `Unavailable` where the engine stops meanwhile."""
        self.check(request)
        name, queue = f"request-{next(self._ids)}", asyncio.Queue()
        self._requests[name] = request
        done, sent = False, 0
        try:
            self._manager.register_result_handler(name, queue.put_nowait)
            self._manager.add_request(list(request.tokens), name, max_new_tokens=request.new, streaming=request.each)
            if not self.alive():  # nothing may be left that would answer it
                raise self._stopped()
            while not done:
                output = await queue.get()
                done = output.is_finished()
                if output.error:
                    raise Unavailable(f"the request failed: {output.error}")
                fresh, sent = output.generated_tokens[sent:], len(output.generated_tokens)
                yield fresh
        finally:
            if not done:
                self._manager.cancel_request(name)
                with self._manager.output_router._lock:
                    self._manager.output_router.result_handlers.pop(name, None)
            del self._requests[name]

    async def answer(self, request: Request) -> list[int]:
        """All new tokens."""
        async with aclosing(self.generate(request)) as parts:
            return [token async for part in parts for token in part]

    # --- where the model is called, in the engine's thread ---

    def _before(self, module: nn.Module, args: tuple) -> None:
        packed = self._manager.batch_processor.inputs_and_outputs.requests_in_batch
        requests = [self._requests.get(one.state.request_id) for one in packed]  # None: cancelled since
        self._sampling = [request for request, one in zip(requests, packed) if one.has_new_token]
        self.steps += 1
        names = [request and request.adapter for request in requests]
        if any(name is not None for name in names):
            batch = self.bank.batch(names, [one.query_length for one in packed])
            batch.__enter__()
            self._batch = batch

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._batch is not None:
            batch, self._batch = self._batch, None
            batch.__exit__(None, None, None)

    def sample(self, scores: Tensor) -> Tensor:
        """Scores (requests with a new token, vocabulary), of which the largest of each row is taken."""
        for row, request in enumerate(self._sampling):
            if request is not None and request.temperature > 0:
                scores[row] = request.sampled(scores[row])
        return scores


# --- transformers' continuous batching -----------------------------------------------------------------------


def _check_served(model: nn.Module) -> None:
    """Raises `ConfigError` for a model, or a version of transformers, that has no continuous batching."""
    import transformers

    try:
        from transformers.generation.continuous_batching import ContinuousBatchingManager

        assert hasattr(transformers, "ContinuousBatchingConfig") and hasattr(ContinuousBatchingManager, "pause")
    except (ImportError, AssertionError) as error:
        raise ConfigError(
            f"serving needs transformers 5.23 or later, and this is {transformers.__version__}"
        ) from error
    if not getattr(model, "can_generate", bool)() or not hasattr(model, "init_continuous_batching"):
        raise ConfigError(f"{type(model).__name__} is not served: valid are causal language models of transformers")
    if not getattr(model, "_supports_attention_backend", False):  # it would run, and attend to nothing of its past
        raise ConfigError(
            f"{type(model).__name__} is not served: its attention is its own, not of transformers' interface, so the "
            f"engine's cache does not reach it; merged, it runs with `generate`"
        )


def _manager(model: nn.Module, limits: Limits, ends: Sequence[int]) -> Any:
    """Of a model that was checked. Raises `ConfigError`."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    on_cpu = next(model.parameters()).device.type == "cpu"
    config = ContinuousBatchingConfig(
        page_size=limits.page,
        num_blocks=-(-limits.cache // limits.page) if on_cpu else None,
        max_batch_tokens=max(limits.step, limits.batch) if on_cpu else None,
        max_requests_per_batch=limits.batch,
        allow_block_sharing=False,
        use_async_batching=False,
        use_cuda_graph=False,
    )
    how = GenerationConfig(do_sample=False, eos_token_id=list(ends) or -1, pad_token_id=0)
    try:
        return model.init_continuous_batching(generation_config=how, continuous_batching_config=config)
    except (ValueError, NotImplementedError, AttributeError, KeyError) as error:
        raise ConfigError(f"{type(model).__name__} has no continuous batching: {error}") from error


def _sampler(engine: Engine) -> Any:
    from transformers import LogitsProcessor, LogitsProcessorList
    from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList

    class Sampler(LogitsProcessor):
        supports_continuous_batching = True

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return engine.sample(scores)

    return ContinuousBatchingLogitsProcessorList(LogitsProcessorList([Sampler()]))


def _length(model: nn.Module, cache: Any, limits: Limits) -> int:
    """How many tokens a request may have: the cache, empty, has to hold it, or the engine would stop."""
    from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens

    own = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    sizes = [infer_max_single_request_tokens(cache), cache.max_tokens_read, own, limits.length]
    return min(size for size in sizes if size)
