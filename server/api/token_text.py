"""Tokens as the strings and character offsets that logprobs are reported with."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scone.model_store.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """The token's text; `bytes:\\xe2\\x80` for part of a character, so that no two tokens look alike."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def json_logprob(logprob: float) -> float:
    """`logprob` as a number that JSON has."""
    return max(logprob, MIN_LOGPROB)


class TextOffsets:
    """Where each token begins in the text that the tokens make."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def next(self, token_id: int) -> int:
        """Offset of `token_id`, in characters; a token within a character has that character's offset."""
        offset = self._offset
        if token_id not in self._skipped:
            self._offset += len(self._utf8.decode(self._tokenizer.token_bytes(token_id)))
        return offset
