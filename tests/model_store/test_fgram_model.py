"""The f-gram model: the identity before training, a pure function of its f-gram, saved and loaded whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from scone.model_store.checkpoint import open_checkpoint, save_scone_folder
from scone.model_store.decoder import CausalAttention, Decoder
from scone.model_store.errors import CheckpointError
from scone.model_store.fgram_inputs import FGramInputs
from scone.model_store.fgram_model import EMBED_BLOCK_ROWS, FGramModel, ShortAttention
from scone.model_store.fgram_set import FGramSet


def shaken(model: FGramModel) -> FGramModel:
    """Every weight moved, as after a training."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def random_fgrams(count: int, max_n: int = 4, vocab: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(2, max_n + 1, (count,), generator=generator)
    tokens = torch.randint(0, vocab, (count, max_n), generator=generator)
    tokens[torch.arange(max_n).expand(count, max_n) >= lengths.unsqueeze(1)] = -1
    return tokens, lengths


def test_untrained_is_exactly_the_last_token(tiny_decoder: Decoder) -> None:
    tokens, lengths = random_fgrams(50)
    rows = FGramModel.from_decoder(tiny_decoder, num_layers=2, max_n=4).embed(tokens, lengths)
    last = tokens.gather(1, (lengths - 1).unsqueeze(1)).squeeze(1)
    assert torch.equal(rows, tiny_decoder.embed(last))


def test_blocks_start_from_the_main_models_first_ones_or_at_random(tiny_decoder: Decoder) -> None:
    first = tiny_decoder.layers[0].state_dict()
    started = FGramModel.from_decoder(tiny_decoder, num_layers=1, max_n=4).layers[0].state_dict()
    assert all(torch.equal(started[name], value.float()) for name, value in first.items())
    drawn = FGramModel.from_decoder(tiny_decoder, num_layers=1, max_n=4, random_start=True)
    matrices = [name for name, value in first.items() if value.dim() > 1]
    assert matrices
    assert not any(torch.equal(drawn.layers[0].state_dict()[name], first[name].float()) for name in matrices)
    tokens, lengths = random_fgrams(20)
    last = tokens.gather(1, (lengths - 1).unsqueeze(1)).squeeze(1)
    assert torch.equal(drawn.embed(tokens, lengths), tiny_decoder.embed(last))


@pytest.mark.parametrize(("n", "num_heads", "num_kv_heads"), [(1, 4, 4), (2, 4, 2), (5, 6, 2)])
def test_short_attention_is_causal_attention(n: int, num_heads: int, num_kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(n)
    q = torch.randn(7, n, num_heads, 16, generator=generator)
    k, v = (torch.randn(7, n, num_kv_heads, 16, generator=generator) for _ in range(2))
    found = ShortAttention()(0, q, k, v)
    torch.testing.assert_close(found, CausalAttention()(0, q, k, v), atol=1e-6, rtol=1e-5)


def test_row_depends_on_every_token_and_their_order(tiny_decoder: Decoder) -> None:
    model = shaken(FGramModel.from_decoder(tiny_decoder, num_layers=2, max_n=4))
    fgrams = torch.tensor([[5, 6, 7, 8], [9, 6, 7, 8], [6, 5, 7, 8], [5, 6, 7, 9]])
    rows = model(fgrams)
    for i in range(4):
        for j in range(i):
            assert (rows[i] - rows[j]).abs().max() > 1e-3


def test_the_control_sees_the_last_token_only(tiny_decoder: Decoder) -> None:
    model = shaken(FGramModel.from_decoder(tiny_decoder, num_layers=2, max_n=4, last_token_only=True))
    of_four, of_two = model(torch.tensor([[5, 6, 7, 8]])), model(torch.tensor([[9, 8]]))
    assert torch.equal(of_four, of_two)


def test_embed_gives_a_row_the_same_bits_in_any_company(tiny_decoder: Decoder) -> None:
    model = shaken(FGramModel.from_decoder(tiny_decoder, num_layers=2, max_n=4))
    tokens, lengths = random_fgrams(2 * EMBED_BLOCK_ROWS + 77)
    together = model.embed(tokens, lengths)
    for n in range(2, 5):
        of_length = lengths == n
        assert torch.allclose(together[of_length], model(tokens[of_length, :n]), atol=1e-5)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.embed(tokens[order], lengths[order]), together[order])
    for i in range(0, len(lengths), 61):
        assert torch.equal(model.embed(tokens[i : i + 1], lengths[i : i + 1])[0], together[i])


def test_inputs_replace_the_embedding_by_the_longest_match(tiny_decoder: Decoder) -> None:
    model = shaken(FGramModel.from_decoder(tiny_decoder, num_layers=1, max_n=3))
    tokens = np.array([[4, 5, -1], [5, 6, -1], [4, 5, 6]], dtype=np.int32)
    fgrams = FGramSet(
        tokens=tokens,
        lengths=np.array([2, 2, 3], dtype=np.uint8),
        counts=np.array([9, 8, 7]),
        tokenizer_hash="",
        min_count=5,
        num_corpus_tokens=100,
    )
    inputs = FGramInputs(fgrams, model)
    input_ids = np.array([[4, 5, 6, 7], [5, 6, 4, 5]], dtype=np.int32)
    batch = inputs.match(input_ids)
    embeddings = inputs.embed(tiny_decoder, batch)
    assert batch.match_rate == 4 / 8
    rows = model.embed(torch.from_numpy(tokens.astype(np.int64)), torch.tensor([2, 2, 3]))
    plain = tiny_decoder.embed(torch.from_numpy(input_ids.astype(np.int64)))
    expected = plain.clone()
    expected[0, 1], expected[0, 2], expected[1, 1], expected[1, 3] = rows[0], rows[2], rows[1], rows[0]
    assert torch.allclose(embeddings, expected, atol=1e-6)


def save_tiny_main(decoder: Decoder, path: Path) -> None:
    """The tiny decoder as a Hugging Face folder."""
    import json

    config = decoder.config
    path.mkdir()
    (path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "vocab_size": config.vocab_size,
                "hidden_size": config.dim,
                "intermediate_size": config.ffn_dim,
                "num_hidden_layers": config.num_layers,
                "num_attention_heads": config.num_heads,
                "num_key_value_heads": config.num_kv_heads,
                "head_dim": config.head_dim,
                "rms_norm_eps": config.norm_eps,
                "rope_theta": config.rope_theta,
                "max_position_embeddings": config.max_position,
                "tie_word_embeddings": True,
                "eos_token_id": 2,
            }
        )
    )
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    renames = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    renames |= {name: f"self_attn.{name}" for name in attention} | {name: f"mlp.{name}" for name in mlp}
    weights = {}
    for name, tensor in decoder.state_dict().items():
        if name != "lm_head.weight":
            weights["model." + ".".join(renames.get(part, part) for part in name.split("."))] = tensor.clone()
    save_file(weights, path / "model.safetensors")


def test_checkpoint_round_trip_by_reference(tiny_decoder: Decoder, tmp_path: Path) -> None:
    save_tiny_main(tiny_decoder, tmp_path / "main")
    main = open_checkpoint(tmp_path / "main")
    decoder = main.decoder()
    model = shaken(FGramModel.from_decoder(decoder, num_layers=2, max_n=4))
    folder = tmp_path / "scone"
    save_scone_folder(
        folder, model, main_path=tmp_path / "main", main_hash=main.model_hash, dtype=torch.float32
    )
    loaded = open_checkpoint(folder)
    assert loaded.model_hash == main.model_hash
    assert main.fgram_model(decoder) is None
    again = loaded.fgram_model(decoder)
    assert again is not None
    tokens, lengths = random_fgrams(30)
    assert torch.equal(again.embed(tokens, lengths), model.embed(tokens, lengths))


def test_another_main_model_is_refused(tiny_decoder: Decoder, tmp_path: Path) -> None:
    save_tiny_main(tiny_decoder, tmp_path / "main")
    main = open_checkpoint(tmp_path / "main")
    model = FGramModel.from_decoder(main.decoder(), num_layers=1, max_n=4)
    save_scone_folder(tmp_path / "scone", model, main_path=tmp_path / "main", main_hash="0" * 64)
    with pytest.raises(CheckpointError, match="wanted 0000000000000000"):
        open_checkpoint(tmp_path / "scone")


def test_missing_main_model_says_which_setting(tiny_decoder: Decoder, tmp_path: Path) -> None:
    model = FGramModel.from_decoder(tiny_decoder, num_layers=1, max_n=4)
    save_scone_folder(tmp_path / "scone", model, main_path=tmp_path / "gone", main_hash="0" * 64)
    with pytest.raises(CheckpointError, match="SCONE_MAIN_MODEL"):
        open_checkpoint(tmp_path / "scone")
