"""Text as it streams: whole characters only, no part of a stop string, and nothing lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scone.model_store.tokenizer import Tokenizer
from scone.server.engine.detokenizer import Detokenizer, TokenBytes

from .conftest import NUM_SPECIALS


def ids_of(data: bytes) -> list[int]:
    return [NUM_SPECIALS + byte for byte in data]


@given(data=st.one_of(st.binary(max_size=40), st.text(max_size=20).map(str.encode)))
def test_pieces_add_up_and_are_whole_characters(byte_tokenizer: Tokenizer, data: bytes) -> None:
    detokenizer = Detokenizer(TokenBytes(byte_tokenizer))
    pieces = [detokenizer.append(token_id) for token_id in ids_of(data)]
    shown = b""
    for piece, byte in zip(pieces, data, strict=True):
        shown += bytes([byte])
        if piece and "\ufffd" not in shown.decode(errors="replace"):
            assert "\ufffd" not in piece
    assert "".join(pieces) + detokenizer.finish() == data.decode(errors="replace")


@given(
    text=st.text(alphabet="abé", max_size=25),
    stops=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_text_ends_at_the_first_stop_string(
    byte_tokenizer: Tokenizer, text: str, stops: list[str], include: bool
) -> None:
    detokenizer = Detokenizer(TokenBytes(byte_tokenizer), stop=tuple(stops), include_stop=include)
    ends = [text.find(s) + len(s) for s in stops if s in text]
    shown = ""
    for token_id in ids_of(text.encode()):
        shown += detokenizer.append(token_id)
        if detokenizer.stop_string is not None:
            break
    shown += detokenizer.finish()
    if not ends:
        assert (shown, detokenizer.stop_string) == (text, None)
        return
    end = min(ends)
    longest = max((s for s in stops if text[:end].endswith(s)), key=len)
    assert detokenizer.stop_string == longest
    assert shown == (text[:end] if include else text[: end - len(longest)])


def test_what_might_become_a_stop_string_is_held(byte_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(TokenBytes(byte_tokenizer), stop=("END",))
    assert [detokenizer.append(i) for i in ids_of(b"xEEN")] == ["x", "", "E", ""]
    assert detokenizer.append(ids_of(b"x")[0]) == "ENx"
    assert detokenizer.append(ids_of(b"E")[0]) == ""
    assert detokenizer.finish() == "E"


def test_a_stop_string_may_be_too_early(byte_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(TokenBytes(byte_tokenizer), stop=("ab",))
    shown = "".join(detokenizer.append(i, may_stop=False) for i in ids_of(b"abab"))
    assert shown == "abab"
    assert detokenizer.append(ids_of(b"a")[0]) == ""
    assert detokenizer.append(ids_of(b"b")[0]) == ""
    assert detokenizer.stop_string == "ab"


@pytest.mark.parametrize(("skip", "text"), [(True, "a"), (False, "</s>a")])
def test_special_and_unknown_tokens(byte_tokenizer: Tokenizer, skip: bool, text: str) -> None:
    detokenizer = Detokenizer(TokenBytes(byte_tokenizer), skip_special_tokens=skip)
    assert detokenizer.append(2) + detokenizer.append(ids_of(b"a")[0]) + detokenizer.append(299) == text
