"""Our decoder against transformers, over every family and shape that is claimed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from scone.model_store.checkpoint import open_checkpoint
from scone.model_store.decoder import CausalAttention, Decoder
from scone.model_store.errors import CheckpointError
from scone.model_store.hf_folder import save_hf_folder
from scone.model_store.tokenizer import Tokenizer

SMALL = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, grouped queries, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, untied, biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, head_dim apart from dim": ("Llama", {"head_dim": 16}),
    "llama 3 rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "linear rope": ("Llama", {"rope_parameters": LINEAR_ROPE}),
    "yarn rope": ("Qwen2", {"rope_parameters": YARN_ROPE}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2, biased q k v": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3, qk-norm": ("Qwen3", {"head_dim": 16}),
}


def make_folder(path: Path, family: str, changes: dict[str, Any], **save: Any) -> Any:
    """A random Hugging Face model of that shape, saved to `path`."""
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    for name, parameter in model.named_parameters():
        # biases and norms start at 0 and 1, where a mistake in them would not show
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    model.save_pretrained(path, **save)
    return model


def logits_of(decoder: Decoder, input_ids: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
    return decoder.logits(decoder(decoder.embed(input_ids), positions, CausalAttention()))


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape: str, tmp_path: Path) -> None:
    reference = make_folder(tmp_path, *SHAPES[shape])
    decoder = open_checkpoint(tmp_path).decoder()
    input_ids = torch.randint(0, 120, (2, 100), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = reference(input_ids).logits
        assert torch.allclose(logits_of(decoder, input_ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_reads_what_is_saved(shape: str, tmp_path: Path) -> None:
    reference = make_folder(tmp_path / "theirs", *SHAPES[shape])
    checkpoint = open_checkpoint(tmp_path / "theirs")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    tokenizer = Tokenizer(backend, bos_id=1, eos_ids=(2,), chat_template="{{ messages }}")
    save_hf_folder(tmp_path / "ours", checkpoint.decoder(), tokenizer)
    again = open_checkpoint(tmp_path / "ours")
    assert again.config == checkpoint.config
    assert again.tokenizer().bos_id == 1
    assert again.tokenizer().chat_template == "{{ messages }}"
    input_ids = torch.randint(0, 120, (1, 80), generator=torch.Generator().manual_seed(3))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    with torch.inference_mode():
        expected = reference(input_ids).logits
        assert torch.allclose(theirs(input_ids).logits, expected, atol=1e-5, rtol=0)
        assert torch.allclose(logits_of(again.decoder(), input_ids), expected, atol=1e-4, rtol=0)


def test_sharded_weights_load(tmp_path: Path) -> None:
    reference = make_folder(tmp_path, "Llama", {}, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert (tmp_path / "model.safetensors.index.json").exists()
    decoder = open_checkpoint(tmp_path).decoder()
    input_ids = torch.arange(50).unsqueeze(0)
    with torch.inference_mode():
        assert torch.allclose(logits_of(decoder, input_ids), reference(input_ids).logits, atol=1e-4, rtol=0)


def test_sliding_window_limits_the_context(tmp_path: Path) -> None:
    make_folder(tmp_path, "Mistral", {"sliding_window": 64})
    assert open_checkpoint(tmp_path).config.max_position == 64


def test_tied_head_is_held_once(tiny_decoder: Decoder) -> None:
    assert isinstance(tiny_decoder.embed_tokens, torch.nn.Embedding)
    assert tiny_decoder.lm_head.weight.data_ptr() == tiny_decoder.embed_tokens.weight.data_ptr()


def test_a_changed_weight_changes_the_hash(tmp_path: Path) -> None:
    model = make_folder(tmp_path, "Llama", {})
    before = open_checkpoint(tmp_path).model_hash
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(tmp_path)
    assert open_checkpoint(tmp_path).model_hash != before


def test_each_damage_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(tmp_path)
    make_folder(tmp_path, "Llama", {})
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        open_checkpoint(tmp_path)
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        open_checkpoint(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        open_checkpoint(tmp_path)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="not a readable GGUF"):
        open_checkpoint(gguf)


def test_other_families_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match="'gpt2', wanted one of llama"):
        open_checkpoint(tmp_path)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_folder(tmp_path, "Llama", {})
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.up_proj\.weight is missing"):
        open_checkpoint(tmp_path).decoder()
