"""From token ids to text, one token at a time, never showing what might still change.

Two things are held back: the bytes of an unfinished UTF-8 character, and the longest end of the text
that could be the beginning of a stop string. Concatenated, the pieces are the decoded completion, cut
at the stop string; how tokens fall into steps makes no difference.
"""

from __future__ import annotations

import codecs

from scone.model_store.errors import TokenizerError
from scone.model_store.tokenizer import Tokenizer


class TokenBytes:
    """Bytes that tokens add to a text: a memo over the tokenizer, which is slow to ask."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._memo: dict[int, bytes] = {}
        self._texts: dict[tuple[int, bool], str | None] = {}

    def __call__(self, token_id: int, skip_special_tokens: bool = True) -> bytes:
        """Empty for special tokens, if they are skipped, and for ids that only the model's head knows."""
        if skip_special_tokens and token_id in self._tokenizer.special_ids:
            return b""
        known = self._memo.get(token_id)
        if known is None:
            try:
                known = self._tokenizer.token_bytes(token_id)
            except TokenizerError:  # heads are often padded past the vocabulary
                known = b""
            self._memo[token_id] = known
        return known

    def text(self, token_id: int, skip_special_tokens: bool) -> str | None:
        """The same as text; None if the bytes are not whole characters."""
        key = (token_id, skip_special_tokens)
        if key not in self._texts:
            try:
                self._texts[key] = self(*key).decode()
            except UnicodeDecodeError:
                self._texts[key] = None
        return self._texts[key]


class Detokenizer:
    """Text of one sequence.

    Attributes:
        stop_string: the stop string that was found, or None.
    """

    def __init__(
        self,
        token_bytes: TokenBytes,
        *,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        assert all(stop), "an empty stop string would stop everything"
        self._token_bytes = token_bytes
        self._stop = stop
        self._include_stop = include_stop
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_between_characters = True
        self._held = ""
        self.stop_string: str | None = None

    def append(self, token_id: int, *, may_stop: bool = True) -> str:
        """Text that is now certain. With `may_stop` false, stop strings that end here do not count."""
        text = None
        if self._is_between_characters:
            text = self._token_bytes.text(token_id, self._skip_special_tokens)
        if text is None:
            text = self._utf8.decode(self._token_bytes(token_id, self._skip_special_tokens))
            self._is_between_characters = not self._utf8.getstate()[0]
        return self._push(text, may_stop) if self._stop else text

    def finish(self) -> str:
        """What was held back; an unfinished character becomes U+FFFD."""
        text = self._push(self._utf8.decode(b"", final=True), may_stop=True)
        text, self._held = text + self._held, ""
        return text

    def _push(self, text: str, may_stop: bool) -> str:
        if self.stop_string is not None:
            return ""
        if not self._stop:
            return text
        num_old = len(self._held)
        self._held += text
        if may_stop:
            found = self._first_stop(num_old)
            if found is not None:
                start, self.stop_string = found
                end = start + len(self.stop_string) if self._include_stop else start
                certain, self._held = self._held[:end], ""
                return certain
        num_held = self._num_possible_stop()
        certain, self._held = (
            self._held[: len(self._held) - num_held],
            self._held[len(self._held) - num_held :],
        )
        return certain

    def _first_stop(self, num_old: int) -> tuple[int, str] | None:
        """The stop string that is complete first (the longest of several), among those ending in new text."""
        best: tuple[int, int, str] | None = None
        for stop in self._stop:
            start = self._held.find(stop, max(0, num_old - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return None if best is None else best[1:]

    def _num_possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        for length in range(min(len(self._held), max(map(len, self._stop)) - 1), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) and stop != end for stop in self._stop):
                return length
        return 0
