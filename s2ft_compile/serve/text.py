"""Tokens to text as they come, up to a stop."""

from collections.abc import Sequence
from typing import Any


class Text:
    """The text of the tokens so far, in parts that never end within a character or within what may become a stop."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self.tokenizer, self.stops, self.tokens, self.stopped = tokenizer, stops, [], False
        self._settled = self._seen = 0  # tokens whose text is told, and that were decoded with what follows
        self._held = ""  # text that may be the beginning of a stop

    def add(self, tokens: Sequence[int]) -> str:
        """What can be told now. After a stop that is nothing, and `stopped` is set."""
        self.tokens.extend(tokens)
        # a token's text depends on the one before (spaces), so decode from a token whose text is told already
        before = self._decoded(self._settled, self._seen)
        text = self._decoded(self._settled, len(self.tokens))
        if len(text) <= len(before) or text.endswith("\ufffd"):
            return ""  # within a character
        self._settled, self._seen = self._seen, len(self.tokens)
        return self._streamable(text[len(before) :])

    def end(self) -> str:
        """What was held back."""
        if self.stopped:
            return ""
        before = self._decoded(self._settled, self._seen)
        rest = self._streamable(self._decoded(self._settled, len(self.tokens))[len(before) :])
        held, self._held = self._held, ""
        return rest if self.stopped else rest + held

    def _decoded(self, start: int, stop: int) -> str:
        return self.tokenizer.decode(
            self.tokens[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _streamable(self, fresh: str) -> str:
        if self.stopped:
            return ""
        text, self._held = self._held + fresh, ""
        ends = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return text[: min(ends)]
        keep = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
