"""config.json of a Hugging Face model: read as a decoder's shape, and written from one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from scone.model_store.errors import CheckpointError
from scone.model_store.model_config import ModelConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm2")


def family_of(raw: Mapping[str, Any], where: Path) -> str:
    """`model_type`; raises CheckpointError if it is none of FAMILIES."""
    family = str(raw.get("model_type"))
    if family not in FAMILIES:
        raise CheckpointError(f"{where}: model_type is {family!r}, wanted one of {', '.join(FAMILIES)}")
    return family


def config_of(
    raw: Mapping[str, Any], where: Path, names: Collection[str], eos_ids: tuple[int, ...]
) -> ModelConfig:
    """A decoder's shape.

    Args:
        where: the file, for errors.
        names: of the weights, as Hugging Face names them; what is there decides biases, norms and head.

    Raises:
        CheckpointError: a key is missing or has a bad value.
    """
    family = family_of(raw, where)

    def require(key: str) -> Any:
        if key not in raw:
            raise CheckpointError(f"{where} lacks the key {key!r}")
        return raw[key]

    heads = int(require("num_attention_heads"))
    rope = raw.get("rope_parameters") or {}  # transformers >= 5 keeps all rope settings here
    scaling = rope if rope.get("rope_type", "default") != "default" else raw.get("rope_scaling")
    max_position = int(require("max_position_embeddings"))
    if raw.get("sliding_window") and raw.get("use_sliding_window", family == "mistral"):
        # Full attention equals windowed attention up to the window's length, and only there.
        max_position = min(max_position, int(raw["sliding_window"]))
    return ModelConfig(
        architecture=family,
        vocab_size=int(require("vocab_size")),
        dim=int(require("hidden_size")),
        num_layers=int(require("num_hidden_layers")),
        num_heads=heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or int(require("hidden_size")) // heads),
        ffn_dim=int(require("intermediate_size")),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        rope_scaling=scaling,
        max_position=max_position,
        byte_positions=_byte_positions(raw, where, names),
        tied_head="lm_head.weight" not in names or bool(raw.get("tie_word_embeddings", False)),
        attention_bias="model.layers.0.self_attn.q_proj.bias" in names,
        output_bias="model.layers.0.self_attn.o_proj.bias" in names,
        mlp_bias="model.layers.0.mlp.up_proj.bias" in names,
        qk_norm="model.layers.0.self_attn.q_norm.weight" in names,
        eos_ids=eos_ids,
    )


def eos_ids_of(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """`eos_token_id`, one or several; none if it is not there."""
    declared = raw.get("eos_token_id")
    if declared is None:
        return ()
    return tuple(declared) if isinstance(declared, list) else (int(declared),)


def declared_names(raw: Mapping[str, Any]) -> set[str]:
    """Those names that `config_of` looks for, of a model that has no weights yet."""
    family, attention = raw.get("model_type"), "model.layers.0.self_attn"
    names = set()
    if not raw.get("tie_word_embeddings", False):
        names.add("lm_head.weight")
    if raw.get("attention_bias", family == "qwen2"):
        names.add(f"{attention}.q_proj.bias")
        if family == "llama":
            names.add(f"{attention}.o_proj.bias")
    if raw.get("mlp_bias"):
        names.add("model.layers.0.mlp.up_proj.bias")
    if family == "qwen3":
        names.add(f"{attention}.q_norm.weight")
    return names


def description_of(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a decoder."""
    description: dict[str, Any] = {
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else dict(config.rope_scaling),
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tied_head,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "eos_token_id": list(config.eos_ids),
    }
    if config.byte_positions is not None:
        description["token_embedding"] = {"kind": "kronecker", "num_positions": config.byte_positions}
    return description


def _byte_positions(raw: Mapping[str, Any], where: Path, names: Collection[str]) -> int | None:
    """Of `"token_embedding": {"kind": "kronecker", "num_positions": 32}`; None for an ordinary table."""
    declared = raw.get("token_embedding")
    if declared is None:
        return None
    if not isinstance(declared, dict) or declared.get("kind") != "kronecker":
        raise CheckpointError(f"{where}: token_embedding is {declared!r}, wanted one of kind kronecker")
    if "lm_head.weight" not in names or raw.get("tie_word_embeddings"):
        raise CheckpointError(
            f"{where} has Kronecker embeddings and no head of its own: they cannot be the output head"
        )
    return int(declared["num_positions"])
