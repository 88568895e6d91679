"""Kronecker embeddings against the published package, as a module, as a checkpoint, and below SCONE."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from kronecker_embeddings import KroneckerEmbedding as Published
from kronecker_embeddings import build_byte_buffer, utf8_safe_truncate
from transformers import PreTrainedTokenizerFast

from scone.cache import FGramTable
from scone.model_store.build_table import build_table
from scone.model_store.checkpoint import open_checkpoint, save_scone_folder
from scone.model_store.count import count_fgrams
from scone.model_store.decoder import CausalAttention, Decoder
from scone.model_store.errors import CheckpointError
from scone.model_store.fgram_inputs import FGramInputs
from scone.model_store.fgram_model import FGramModel
from scone.model_store.hf_folder import save_hf_folder
from scone.model_store.kronecker import (
    KroneckerEmbedding,
    audit_tokens,
    bytes_of_tokens,
    cut_bytes,
    pack_bytes,
)
from scone.model_store.token_corpus import TokenCorpus
from scone.model_store.tokenizer import Tokenizer
from scone.server.table_perplexity import TableInputs

DIM = 24
SCRIPTS = {
    "Latin": "naïve",
    "Cyrillic": "привет",
    "Devanagari": "नमस्ते",
    "Han": "漢字変換",
    "Arabic": "مرحبا",
}
PIECES = [
    *(text.encode() for text in SCRIPTS.values()),
    *(text.encode() * 9 for text in SCRIPTS.values()),  # over-long: cut inside a character, or it would be
    *(bytes([value]) for value in range(0, 256, 5)),  # byte tokens
    b"<|endoftext|>",
    b"<s>",
    b"",
    b"x" * 31,
    b"x" * 32,
    b"x" * 33,
    b"  a",
]


def both(pieces: list[bytes], num_positions: int) -> tuple[KroneckerEmbedding, Published]:
    """Ours and the published module with one projection."""
    ours = KroneckerEmbedding(len(pieces), DIM, num_positions).eval()
    torch.manual_seed(0)
    ours.reset_parameters()
    ours.read_tokens(pieces)
    values, lengths = pack_bytes(pieces, len(pieces), num_positions)
    theirs = Published(
        len(pieces),
        DIM,
        pos_dim=num_positions,
        byte_buffer=torch.from_numpy(values),
        length_buffer=torch.from_numpy(lengths),
    )
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@torch.no_grad()
def relative_error(ours: KroneckerEmbedding, theirs: Published, ids: torch.Tensor) -> float:
    found, wanted = ours(ids), theirs(ids)
    norms = wanted.norm(dim=-1).clamp(min=1e-9)
    return float(((found - wanted).norm(dim=-1) / norms).max())


@pytest.mark.parametrize("num_positions", [16, 32])
def test_vectors_are_the_published_ones(num_positions: int) -> None:
    """Five scripts, byte tokens, specials, an empty token, over-long ones."""
    ours, theirs = both(PIECES, num_positions)
    assert relative_error(ours, theirs, torch.arange(len(PIECES))) <= 1e-5
    assert not ours(torch.tensor([PIECES.index(b"")])).any()
    shaped = torch.arange(12).reshape(2, 3, 2)
    assert ours(shaped).shape == theirs(shaped).shape == (2, 3, 2, DIM)


def test_long_tokens_are_cut_as_published() -> None:
    rng = np.random.default_rng(0)
    letters = "".join(SCRIPTS.values()) + "abc 😀𐍈"
    for _ in range(500):
        text = "".join(rng.choice(list(letters), rng.integers(1, 20)))
        for num_positions in (1, 2, 3, 4, 7, 16, 32):
            assert cut_bytes(text.encode(), num_positions) == utf8_safe_truncate(text.encode(), num_positions)


def test_a_real_vocabulary(smollm2_path: Path) -> None:
    """Of SmolLM2: our bytes are the published ones but for parts of characters, which those confuse."""
    tokenizer = open_checkpoint(smollm2_path).tokenizer()
    pieces = bytes_of_tokens(tokenizer, tokenizer.vocab_size)
    ours, _ = both(pieces, 32)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)
    wrapped.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]})
    values, lengths = build_byte_buffer(wrapped, pos_dim=32)
    theirs = Published(len(pieces), DIM, byte_buffer=values, length_buffer=lengths)
    theirs.load_state_dict(ours.state_dict())
    parts = np.array([b"\xef\xbf\xbd" in bytes(row) for row in values.numpy()])
    assert parts.sum() > 200
    whole = torch.from_numpy(np.flatnonzero(~parts))
    for ids in torch.split(whole[::8], 1024):
        assert relative_error(ours, theirs, ids) <= 1e-5
    audit = audit_tokens(pieces, 32)
    assert audit.num_collided < len(values) - len(np.unique(values.numpy(), axis=0)) + 2
    of_parts = [pieces[i] for i in np.flatnonzero(parts)]
    assert len({cut_bytes(piece, 32) for piece in of_parts}) == len(of_parts)
    assert len({bytes(row) for row in values.numpy()[parts]}) < len(of_parts) / 2
    assert audit.saving == pytest.approx(1 - 8192 / 49152)


def test_the_audit_counts() -> None:
    audit = audit_tokens([b"abcd", b"abce", b"ab", b"", b"xyz"], num_positions=3)
    assert (audit.num_cut, audit.num_collided, audit.num_empty) == (2, 2, 1)
    assert audit.saving == 1 - 768 / 5


def test_a_dense_table_has_the_same_bits_in_any_company() -> None:
    ours, _ = both(PIECES, 32)
    table = ours.dense()
    for ids in (torch.tensor([3]), torch.tensor([7, 3, 3, 60]), torch.arange(len(PIECES)).flip(0)):
        assert torch.equal(ours(ids), table[ids])


def test_gradients_are_those_of_the_dense_product() -> None:
    ours, theirs = both(PIECES, 16)
    ids = torch.tensor([0, 1, 1, 12, 5])
    weights = torch.randn(5, DIM, generator=torch.Generator().manual_seed(1))
    ours.train()
    for module in (ours, theirs):
        (module(ids) * weights).sum().backward()
    found, wanted = ours.projection.weight.grad, theirs.projection.weight.grad
    assert found is not None
    assert wanted is not None
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    before = ours(ids).detach()
    with torch.no_grad():
        ours.projection.weight.mul_(2)
    torch.testing.assert_close(ours(ids).detach(), 2 * before)  # nothing is kept while training


@pytest.fixture(scope="module")
def kronecker_path(
    main_path: Path, random_decoder: Callable[..., Decoder], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A random model with Kronecker embeddings in a Hugging Face folder, its tokenizer that of bytes."""
    tokenizer = open_checkpoint(main_path).tokenizer()
    # its 300 ids are more than the tokenizer has
    decoder = random_decoder(
        num_layers=2, max_position=256, byte_positions=8, tied_head=False, eos_ids=(256,)
    )
    path = tmp_path_factory.mktemp("kronecker")
    save_hf_folder(path, decoder, tokenizer)
    return path


def test_a_checkpoint_round_trip(kronecker_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = open_checkpoint(kronecker_path)
    assert checkpoint.config.byte_positions == 8
    with caplog.at_level(logging.INFO):
        decoder = checkpoint.decoder()
    assert "300 tokens, 1 cut, 0 share a code with another, 43 without bytes" in caplog.text
    assert isinstance(decoder.embed_tokens, KroneckerEmbedding)
    names = {name for name, _ in checkpoint._main.tensors()}
    assert "embed_tokens.projection.weight" in names
    assert "embed_tokens.weight" not in names
    ids = torch.arange(300)
    embeddings = decoder.embed(ids)
    assert not embeddings[257:].any()
    decoder.precompute_embeddings()
    assert not isinstance(decoder.embed_tokens, KroneckerEmbedding)
    assert torch.equal(decoder.embed(ids), embeddings)
    assert open_checkpoint(kronecker_path).tokenizer().hash == checkpoint.tokenizer().hash


def test_bad_checkpoints_are_refused(kronecker_path: Path, tmp_path: Path) -> None:
    for name in os.listdir(kronecker_path):
        (tmp_path / name).symlink_to(kronecker_path / name)
    described = json.loads((kronecker_path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(described | {"token_embedding": {"kind": "hash"}}))
    with pytest.raises(CheckpointError, match="wanted one of kind kronecker"):
        open_checkpoint(tmp_path)
    described["token_embedding"]["num_positions"] = 16
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=r"projection\.weight has shape"):
        open_checkpoint(tmp_path).decoder()


def test_scone_on_top(kronecker_path: Path, tmp_path: Path) -> None:
    """An f-gram model over Kronecker embeddings: its table gives the inputs that it computes."""
    main = open_checkpoint(kronecker_path)
    decoder, tokenizer = main.decoder(), main.tokenizer()
    model = FGramModel.from_decoder(decoder, num_layers=1, max_n=3)
    torch.nn.init.normal_(model.output.weight, std=0.05)
    save_scone_folder(
        tmp_path / "scone", model, main_path=kronecker_path, main_hash=main.model_hash, dtype=torch.float32
    )
    checkpoint = open_checkpoint(tmp_path / "scone")
    text = tokenizer.encode(Path(os.__file__).read_text())
    fgrams = count_fgrams(
        TokenCorpus.from_documents([text]), max_n=3, min_count=2, top=500, tokenizer_hash=tokenizer.hash,
        progress=False,
    )  # fmt: skip
    build_table(checkpoint, fgrams, tmp_path / "table", dtype="float32", progress=False)
    ids = np.array(text[:200], np.int32)
    with torch.no_grad(), FGramTable.open(tmp_path / "table") as table:
        looked_up = TableInputs(decoder, table)(ids[None])[0]
        matcher = FGramInputs(fgrams, model)
        batch = matcher.match(ids[None])
        computed = matcher.embed(decoder, batch)
    assert batch.match_rate > 0.3
    torch.testing.assert_close(looked_up, computed[0], atol=1e-5, rtol=1e-5)
    positions = torch.arange(200)
    hidden = decoder(looked_up, positions, CausalAttention())
    assert not torch.allclose(
        hidden, decoder(decoder.embed(torch.from_numpy(ids).long()), positions, CausalAttention())
    )


def test_byte_fallback_vocabularies() -> None:
    """Pieces of SentencePiece: <0xNN> is that byte, an underline a space; specials are their own text."""
    import tokenizers
    from tokenizers.models import BPE

    pieces = ["<s>", *(f"<0x{value:02X}>" for value in range(256)), "▁a", "é"]
    backend = tokenizers.Tokenizer(
        BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<s>")
    )
    backend.decoder = tokenizers.decoders.ByteFallback()
    backend.add_special_tokens(["<s>"])
    tokenizer = Tokenizer(backend, bos_id=0, eos_ids=(), chat_template=None)
    found = bytes_of_tokens(tokenizer, 261)
    assert found[0] == b"<s>"
    assert found[1:257] == [bytes([value]) for value in range(256)]
    assert found[257:] == [b" a", "é".encode(), b"", b""]
