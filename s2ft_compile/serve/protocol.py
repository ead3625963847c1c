"""OpenAI's JSON: what a request may hold, and what is answered.

What is not supported is refused by name, never ignored, but for fields that only label a request and for values that
ask for nothing.
"""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from s2ft_compile.errors import ConfigError

# fields that ask for nothing with these values, as clients fill them in
NEUTRAL: Mapping[str, Sequence[Any]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
}
MESSAGE = 2000  # characters of an error: it repeats what a request held, which may be megabytes
LABELS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}


class Asked(BaseModel):
    """What completions and chats share."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    seed: int | None = None
    n: int | None = Field(None, ge=1, le=64)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: dict[str, bool] | None = None
    return_token_ids: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {n: v for n, v in values.items() if v is not None and n not in LABELS and v not in NEUTRAL.get(n, ())}
        if unknown := sorted(kept.keys() - cls.model_fields.keys()):
            raise ValueError(f"not supported: {', '.join(unknown)}; supported: {', '.join(cls.model_fields)}")
        return kept

    @model_validator(mode="after")
    def _sound(self) -> "Asked":
        if any(not text for text in self.stops):
            raise ValueError("a stop is a text that is not empty")
        if unknown := sorted((self.stream_options or {}).keys() - {"include_usage"}):
            raise ValueError(f"not supported in stream_options: {', '.join(unknown)}; supported: include_usage")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def new(self) -> int | None:
        """The largest number of new tokens, where it says one."""
        return self.max_tokens


class Completion(Asked):
    prompt: str | list[str] | list[int] | list[list[int]]

    @property
    def new(self) -> int:
        return self.max_tokens or 16

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class Chat(Asked):
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def new(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class NewAdapter(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=200)
    path: str = Field(min_length=1)


def parsed(kind: type[BaseModel], body: bytes) -> Any:
    """Raises `ConfigError` with what is wrong in one line."""
    try:
        values = json.loads(body)
        json.dumps(values, ensure_ascii=False, allow_nan=False).encode()  # half of a character, or no number
        if not isinstance(values, dict):
            raise ConfigError("the body is no JSON object")
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"][:2]))
        raise ConfigError(
            f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, ")
        ) from error
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the body is no JSON: {error}") from error


# --- answers -------------------------------------------------------------------------------------------------


def usage(prompt: int, new: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


class Answer:
    """Builds what is answered to one request. chat: as a chat."""

    def __init__(self, model: str, chat: bool):
        self.chat = chat
        name, kind = ("chatcmpl", "chat.completion") if chat else ("cmpl", "text_completion")
        self.common = {"id": f"{name}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[dict], used: dict) -> dict:
        return {**self.common, "choices": list(choices), "usage": used}

    def choice(self, index: int, text: str, finish: str, tokens: Sequence[int] | None) -> dict:
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        more = {} if tokens is None else {"token_ids": list(tokens)}
        return {"index": index, **content, "logprobs": None, "finish_reason": finish, **more}

    def part(self, index: int, text: str, finish: str | None, tokens: Sequence[int] | None, first: bool) -> dict:
        delta = {"role": "assistant", "content": text} if first else {"content": text}
        content = {"delta": delta} if self.chat else {"text": text}
        more = {} if tokens is None else {"token_ids": list(tokens)}
        choice = {"index": index, **content, "logprobs": None, "finish_reason": finish, **more}
        return self._chunk([choice])

    def last(self, used: dict) -> dict:
        """What a stream says of its tokens."""
        return {**self._chunk([]), "usage": used}

    def _chunk(self, choices: list[dict]) -> dict:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self.common, "object": kind, "choices": choices}


def problem(message: str, kind: str, code: str | None = None) -> dict:
    message = message if len(message) <= MESSAGE else f"{message[:MESSAGE]}..."
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def event(data: dict | str) -> str:
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"
