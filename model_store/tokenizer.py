"""Text to token ids and back, on Hugging Face's `tokenizers`, whatever file the vocabulary came from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from scone.model_store.errors import TokenizerError

CONTROL_PIECE, USER_DEFINED_PIECE = 3, 4  # values of `tokenizer.ggml.token_type`

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS_AND_SPACES = (
    r"|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split_then_bytes(digits: str) -> pre_tokenizers.PreTokenizer:
    pattern = Regex(_CONTRACTIONS + _WORDS_AND_SPACES.format(digits=digits))
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer that a GGUF file names in `tokenizer.ggml.pre`."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in {"default", "gpt-2"}:
        return byte_level
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if name in {"llama-bpe", "llama3", "llama-v3"}:
        return _split_then_bytes(r"\p{N}{1,3}")
    if name == "qwen2":
        return _split_then_bytes(r"\p{N}")
    raise TokenizerError(
        f"the GGUF file names the pre-tokenizer {name!r}, wanted one of gpt-2, smollm, llama-bpe, qwen2; "
        "use the model's Hugging Face folder with its tokenizer.json"
    )


class Tokenizer:
    """A tokenizer and the ids that matter to a server.

    Attributes:
        backend: the `tokenizers.Tokenizer` itself.
        bos_id: put before a prompt by `encode` where the model wants it; None if it has none.
        eos_ids: tokens that end a generation.
        chat_template: the model's own Jinja template, or None for a base model.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None,
        eos_ids: Sequence[int],
        chat_template: str | None,
    ) -> None:
        self.backend = backend
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self.chat_template = chat_template
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in the text are recognised."""
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        """Token ids of many texts, on all cores."""
        encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [list(e.ids) for e in encoded]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens (`<|im_start|>` and the like)."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes a token stands for, also where they are only part of a character."""
        added = self.backend.get_added_tokens_decoder().get(token_id)
        if added is not None:
            return added.content.encode()
        piece = self.backend.id_to_token(token_id)
        if piece is None:
            raise TokenizerError(f"token id is {token_id}, wanted 0 <= id < {self.vocab_size}")
        if self._is_byte_level:
            return bytes(_BYTE_OF_CHARACTER[c] for c in piece)
        byte_piece = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
        return bytes([int(byte_piece[1], 16)]) if byte_piece else piece.replace("▁", " ").encode()

    @cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in json.dumps(self._description["decoder"])

    @cached_property
    def _description(self) -> dict[str, object]:
        described: dict[str, object] = json.loads(self.backend.to_str())
        return described

    @cached_property
    def hash(self) -> str:
        """SHA-256 of everything that decides which ids a text gets; the same from GGUF and from JSON."""
        model = self._description["model"]
        assert isinstance(model, dict)
        parts = {
            "vocab": sorted(self.backend.get_vocab(with_added_tokens=True).items()),
            "merges": [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])],
            "added": sorted((i, t.content) for i, t in self.backend.get_added_tokens_decoder().items()),
            "normalizer": self._description["normalizer"],
            "pre_tokenizer": self._description["pre_tokenizer"],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def tokenizer_from_file(
    path: Path, *, bos_token: str | None = None, eos_ids: Sequence[int] = (), chat_template: str | None = None
) -> Tokenizer:
    """The tokenizer of a tokenizer.json; raises TokenizerError."""
    if not path.exists():
        raise TokenizerError(f"{path} is missing; wanted a tokenizer.json beside the weights")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{path} is not a tokenizer.json: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(
        backend,
        bos_id=backend.token_to_id(bos_token) if bos_token else None,
        eos_ids=eos_ids,
        chat_template=chat_template,
    )


def tokenizer_from_vocabulary(
    *,
    pieces: Sequence[str],
    piece_types: Sequence[int],
    merges: Sequence[str],
    pre_tokenizer: str,
    bos_id: int | None,
    add_bos: bool,
    eos_ids: Sequence[int],
    chat_template: str | None,
) -> Tokenizer:
    """A byte-level BPE tokenizer from a GGUF file's vocabulary."""
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    llama3 = pre_tokenizer in {"llama-bpe", "llama3", "llama-v3"}
    backend = tokenizers.Tokenizer(BPE(vocabulary, pairs, ignore_merges=llama3))
    backend.pre_tokenizer = _pre_tokenizer(pre_tokenizer)
    backend.decoder = decoders.ByteLevel()
    if pre_tokenizer == "qwen2":
        backend.normalizer = normalizers.NFC()
    for piece, kind in zip(pieces, piece_types, strict=True):
        if kind in (CONTROL_PIECE, USER_DEFINED_PIECE):
            token = AddedToken(piece, special=kind == CONTROL_PIECE, normalized=False)
            (backend.add_special_tokens if kind == CONTROL_PIECE else backend.add_tokens)([token])
    if add_bos and bos_id is not None:
        bos = pieces[bos_id]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, bos_id)]
        )
    return Tokenizer(backend, bos_id=bos_id, eos_ids=eos_ids, chat_template=chat_template)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, reversed (openai/gpt-2, encoder.py)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    table = {chr(b): b for b in printable}
    table |= {chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in printable)}
    return table


_BYTE_OF_CHARACTER = _byte_of_character()
