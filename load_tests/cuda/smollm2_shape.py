"""SmolLM2-135M by its shape alone: weights that cost the same time, where no checkpoint is given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from scone.model_store.decoder import Decoder
from scone.model_store.model_config import ModelConfig
from scone.model_store.tokenizer import Tokenizer, tokenizer_from_vocabulary

SMOLLM2_135M = ModelConfig(
    architecture="llama",
    vocab_size=49_152,
    dim=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    ffn_dim=1536,
    norm_eps=1e-5,
    rope_theta=100_000.0,
    max_position=8192,
    tied_head=True,
    eos_ids=(2,),
)


def load_model(path: str | None, device: torch.device, num_layers: int) -> tuple[Decoder, Tokenizer, str]:
    """The decoder in bfloat16 (float32 on a CPU), its tokenizer, and what the weights are."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if path is not None:
        from scone.model_store.checkpoint import open_checkpoint  # needs gguf, which a GPU host may lack

        checkpoint = open_checkpoint(path)
        return checkpoint.decoder(dtype).to(device), checkpoint.tokenizer(), Path(path).name
    config = replace(SMOLLM2_135M, num_layers=num_layers)
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder = decoder.to(dtype).to_empty(device=device)
    torch.manual_seed(0)
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            torch.nn.init.ones_(parameter)
    tokenizer = tokenizer_from_vocabulary(
        pieces=["<unk>", "<s>", "</s>", "a"],
        piece_types=[3, 3, 3, 1],
        merges=[],
        pre_tokenizer="gpt-2",
        bos_id=1,
        add_bos=False,
        eos_ids=(2,),
        chat_template=None,
    )
    return (
        decoder.requires_grad_(False).eval(),
        tokenizer,
        f"random, {num_layers} layers of SmolLM2-135M's shape",
    )
