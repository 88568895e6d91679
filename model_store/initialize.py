"""A main model to train from scratch: random weights of a given shape."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from scone.model_store.decoder import Decoder
from scone.model_store.errors import CheckpointError
from scone.model_store.hf_config import config_of, declared_names, eos_ids_of
from scone.model_store.kronecker import KroneckerEmbedding, bytes_of_tokens, log_audit
from scone.model_store.model_config import ModelConfig
from scone.model_store.tokenizer import Tokenizer

_DEVIATION = 0.02


def read_config(path: Path) -> ModelConfig:
    """The shape of a model without weights, from its config.json; raises CheckpointError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the model's shape from {path}: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}, wanted an object")
    return config_of(raw, path, declared_names(raw), eos_ids_of(raw))


def draw_weights(module: nn.Module, num_layers: int) -> None:
    """Random weights for layers that are part of so many: normal, narrower where they add to the residual
    stream (GPT-2)."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            adds = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=_DEVIATION / (2 * num_layers) ** 0.5 if adds else _DEVIATION)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def new_decoder(config: ModelConfig, tokenizer: Tokenizer, seed: int) -> Decoder:
    """A decoder of random weights.

    Raises:
        CheckpointError: the tokenizer has ids that the model has not.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} ids, vocab_size is {config.vocab_size}: raise it"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = Decoder(config)
        draw_weights(decoder, config.num_layers)
        if isinstance(decoder.embed_tokens, KroneckerEmbedding):
            decoder.embed_tokens.reset_parameters()
            log_audit(decoder.embed_tokens.read_tokens(bytes_of_tokens(tokenizer, config.vocab_size)))
    return decoder
