"""From the engine's deltas to OpenAI's choices: one piece a delta, whether streamed or joined.

An answer that is not streamed is the same pieces joined, so both ways say the same by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from scone.server.api.completion_schema import CompletionRequest
from scone.server.api.token_text import TextOffsets, json_logprob, token_text
from scone.server.sequence import Delta, TokenLogprob

if TYPE_CHECKING:
    from scone.model_store.tokenizer import Tokenizer

Piece = dict[str, Any]


class CompletionPieces:
    """Makes the pieces of one choice."""

    def __init__(
        self,
        choice_index: int,
        prompt_ids: Sequence[int],
        prompt_text: str,
        body: CompletionRequest,
        tokenizer: Tokenizer,
    ) -> None:
        self._index = choice_index
        self._prompt_ids = prompt_ids
        self._prompt_text = prompt_text
        self._body = body
        self._tokenizer = tokenizer
        self._offsets = TextOffsets(tokenizer, body.skip_special_tokens)
        self._is_first = True

    def piece(self, delta: Delta) -> Piece | None:
        """The choice object for `delta`; None if there is nothing to show yet."""
        body = self._body
        text, token_ids = delta.text, delta.token_ids
        shown_logprobs: list[tuple[int, TokenLogprob | None]] = []
        if delta.logprobs:
            shown_logprobs = [(token.token_id, token) for token in delta.logprobs]
        is_first, self._is_first = self._is_first, False
        if is_first and body.echo:
            text = self._prompt_text + text
            shown_logprobs = [
                *zip(self._prompt_ids, delta.prompt_logprobs or (), strict=False),
                *shown_logprobs,
            ]
        wants_tokens = body.return_token_ids and (token_ids or is_first)
        if not (text or shown_logprobs or wants_tokens or delta.finish_reason):
            return None
        piece: Piece = {
            "index": self._index,
            "text": text,
            "logprobs": None if body.logprobs is None else self._logprobs(shown_logprobs, body.logprobs),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if body.return_token_ids:
            piece["token_ids"] = list(token_ids)
            if is_first:
                piece["prompt_token_ids"] = list(self._prompt_ids)
        return piece

    def _logprobs(self, tokens: Sequence[tuple[int, TokenLogprob | None]], num_top: int) -> dict[str, Any]:
        return {
            "text_offset": [self._offsets.next(token_id) for token_id, _ in tokens],
            "token_logprobs": [None if t is None else json_logprob(t.logprob) for _, t in tokens],
            "tokens": [token_text(self._tokenizer, token_id) for token_id, _ in tokens],
            "top_logprobs": [self._top(t, num_top) for _, t in tokens] if num_top else None,
        }

    def _top(self, token: TokenLogprob | None, num_top: int) -> dict[str, float] | None:
        if token is None:
            return None
        top: dict[str, float] = {}
        for token_id, logprob in token.top[:num_top]:
            # Two ids can have one text: the likelier, which comes first, stays.
            top.setdefault(token_text(self._tokenizer, token_id), json_logprob(logprob))
        # The chosen token is always shown, as OpenAI does, even where that makes one more entry.
        top.setdefault(token_text(self._tokenizer, token.token_id), json_logprob(token.logprob))
        return top


def join_pieces(pieces: Sequence[Piece]) -> Piece:
    """The whole choice of its pieces."""
    joined = dict(pieces[-1])
    joined["text"] = "".join(piece["text"] for piece in pieces)
    if joined["logprobs"] is not None:
        joined["logprobs"] = {
            key: None if part is None else [entry for piece in pieces for entry in piece["logprobs"][key]]
            for key, part in joined["logprobs"].items()
        }
    if "token_ids" in joined:
        joined["token_ids"] = [token_id for piece in pieces for token_id in piece["token_ids"]]
        joined["prompt_token_ids"] = pieces[0]["prompt_token_ids"]
    return joined
