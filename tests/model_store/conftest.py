"""A tiny checkpoint with an f-gram model, and f-grams for it."""

import json
import os
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from scone.model_store.checkpoint import Checkpoint, open_checkpoint, save_scone_folder
from scone.model_store.count import count_fgrams
from scone.model_store.decoder import Decoder
from scone.model_store.fgram_model import FGramModel
from scone.model_store.fgram_set import FGramSet
from scone.model_store.token_corpus import TokenCorpus


@pytest.fixture(scope="session")
def main_path(tiny_decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny decoder as a Hugging Face folder, with a tokenizer that knows bytes and nothing else."""
    folder = tmp_path_factory.mktemp("main")
    config = tiny_decoder.config
    description = {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.ffn_dim,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(description))
    weights = {f"model.{name}": t for name, t in tiny_decoder.state_dict().items() if "lm_head" not in name}
    save_file(weights, folder / "model.safetensors")
    alphabet = sorted(ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def checkpoint(main_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The tiny model with an f-gram model whose output projection is no longer zero."""
    base = open_checkpoint(main_path)
    model = FGramModel.from_decoder(base.decoder(), num_layers=1, max_n=3)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.output.weight, std=0.02)
    torch.nn.init.normal_(model.position_embedding, std=0.02)
    folder = tmp_path_factory.mktemp("checkpoint")
    save_scone_folder(folder, model, main_path=main_path, main_hash=base.model_hash)
    return open_checkpoint(folder)


@pytest.fixture(scope="session")
def fgrams(checkpoint: Checkpoint) -> FGramSet:
    tokenizer = checkpoint.tokenizer()
    text = Path(os.__file__).read_text()
    corpus = TokenCorpus.from_documents([tokenizer.encode(text, add_special_tokens=False)])
    return count_fgrams(corpus, max_n=3, min_count=2, top=1200, tokenizer_hash=tokenizer.hash, progress=False)
