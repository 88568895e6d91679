"""A GGUF file as a checkpoint: shape, tensors (dequantised) and the vocabulary inside it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, read with the `gguf` library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf.quants import dequantize
from numpy.typing import NDArray
from torch import Tensor

from scone.model_store.errors import CheckpointError
from scone.model_store.model_config import ModelConfig
from scone.model_store.tokenizer import Tokenizer, tokenizer_from_vocabulary

# Whether q and k rows are stored for interleaved rotary pairs, as ggml's llama graph wants them.
ARCHITECTURES = {"llama": True, "qwen2": False, "qwen3": False}

LAYER_TENSORS = {
    "attn_norm": "attention_norm",
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "o_proj",
    "attn_q_norm": "q_norm",
    "attn_k_norm": "k_norm",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
}
TOP_TENSORS = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}


class _Reader(GGUFReader):  # type: ignore[misc]
    """The library's reader with arrays read at once: value by value, a vocabulary takes it 5 seconds."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        item_type = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        start, types = orig_offs + 12, [GGUFValueType.ARRAY, item_type]
        if item_type == GGUFValueType.STRING:
            strings, end = _read_strings(self.data, start, count)
            return end - orig_offs, strings, list(range(count)), types
        if item_type not in self.gguf_scalar_to_np:
            return super()._get_field_parts(orig_offs, raw_type)
        values = self._get(start, self.gguf_scalar_to_np[item_type], count)
        return 12 + int(values.nbytes), [values], [0], types


def _read_strings(data: NDArray[np.uint8], start: int, count: int) -> tuple[list[memoryview], int]:
    """`count` strings, each a little-endian u64 length and that many bytes; and where they end."""
    view, offset = data.data, start
    strings = []
    for _ in range(count):
        begin = offset + 8
        offset = begin + int.from_bytes(view[offset:begin], "little")
        if offset > len(view):
            raise ValueError("a string reaches past the end of the file")
        strings.append(view[begin:offset])
    return strings, offset


def _dequantize_q4_1(data: NDArray[np.uint8]) -> Tensor:
    """The library's result, several times as fast: blocks of float16 scale and minimum, then 32 nibbles."""
    rows = torch.from_numpy(np.array(data))
    blocks = rows.view(len(rows), -1, 20)
    scale, minimum = blocks[..., :4].contiguous().view(torch.float16).float().chunk(2, dim=-1)
    nibbles = torch.cat((blocks[..., 4:] & 15, blocks[..., 4:] >> 4), dim=-1)
    return nibbles.float().mul_(scale).add_(minimum).flatten(1)


def _dequantize_q8_0(data: NDArray[np.uint8]) -> Tensor:
    """The library's result, several times as fast: blocks of a float16 scale, then 32 signed bytes."""
    rows = torch.from_numpy(np.array(data))
    blocks = rows.view(len(rows), -1, 34)
    scale = blocks[..., :2].contiguous().view(torch.float16).float()
    return blocks[..., 2:].view(torch.int8).float().mul_(scale).flatten(1)


DEQUANTIZE = {GGMLQuantizationType.Q4_1: _dequantize_q4_1, GGMLQuantizationType.Q8_0: _dequantize_q8_0}
"""The formats of the demo model; all others are left to the library."""


class GGUFFile:
    """One GGUF file, memory-mapped. Raises CheckpointError if it is none or of an unknown family."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = _Reader(path)
        except (ValueError, OSError, IndexError, KeyError) as error:
            raise CheckpointError(
                f"{path} is not a readable GGUF file ({error}); is the download whole?"
            ) from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture = str(self._field("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{path} holds a {self.architecture!r} model, wanted one of {', '.join(ARCHITECTURES)}"
            )

    def _field(self, key: str, default: Any = None) -> Any:
        found = self._reader.fields.get(key)
        return default if found is None else found.contents()

    def _own(self, key: str, default: Any = None) -> Any:
        value = self._field(f"{self.architecture}.{key}", default)
        if value is None:
            raise CheckpointError(f"{self.path} lacks the key {self.architecture}.{key}")
        return value

    @cached_property
    def config(self) -> ModelConfig:
        heads, dim = self._own("attention.head_count"), self._own("embedding_length")
        return ModelConfig(
            architecture=self.architecture,
            vocab_size=len(self._field("tokenizer.ggml.tokens", [])),
            dim=dim,
            num_layers=self._own("block_count"),
            num_heads=heads,
            num_kv_heads=self._own("attention.head_count_kv", heads),
            head_dim=self._own("attention.key_length", dim // heads),
            ffn_dim=self._own("feed_forward_length"),
            norm_eps=float(self._own("attention.layer_norm_rms_epsilon")),
            rope_theta=float(self._own("rope.freq_base", 10000.0)),
            rope_scaling=self._rope_scaling(),
            max_position=self._own("context_length"),
            tied_head="output.weight" not in self._tensors,
            attention_bias="blk.0.attn_q.bias" in self._tensors,
            output_bias="blk.0.attn_output.bias" in self._tensors,
            mlp_bias="blk.0.ffn_up.bias" in self._tensors,
            qk_norm="blk.0.attn_q_norm.weight" in self._tensors,
            eos_ids=tuple(i for i in (self._field("tokenizer.ggml.eos_token_id"),) if i is not None),
        )

    def _rope_scaling(self) -> dict[str, Any] | None:
        if "rope_freqs.weight" in self._tensors:  # Llama 3.1: the scaling is stored as divisors
            divisors = self._read("rope_freqs.weight")
            return {"rope_type": "divisors", "divisors": divisors.tolist()}
        kind = self._field(f"{self.architecture}.rope.scaling.type", "none")
        if kind == "none":
            return None
        return {
            "rope_type": kind,
            "factor": self._own("rope.scaling.factor"),
            "original_max_position_embeddings": self._field(
                f"{self.architecture}.rope.scaling.original_context_length"
            ),
        }

    def _read(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if tensor.tensor_type in DEQUANTIZE:
            return DEQUANTIZE[tensor.tensor_type](tensor.data)
        values = dequantize(tensor.data, tensor.tensor_type)
        shape = [int(n) for n in reversed(tensor.shape)]
        # a copy where the values are still the file's own mapping: torch wants writable memory
        values = np.require(values, dtype=np.float32, requirements=["C", "W"])
        return torch.from_numpy(values.reshape(shape))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight as float32 under the decoder's own names, one at a time."""
        config = self.config
        for name in self._tensors:
            if name == "rope_freqs.weight":
                continue
            yield self._decoder_name(name), self._unpermute(name, self._read(name), config)

    def _decoder_name(self, name: str) -> str:
        stem, _, kind = name.rpartition(".")
        if stem in TOP_TENSORS:
            return f"{TOP_TENSORS[stem]}.{kind}"
        prefix, _, rest = stem.partition(".")
        layer_id, _, part = rest.partition(".")
        if prefix != "blk" or part not in LAYER_TENSORS:
            raise CheckpointError(f"{self.path} holds a tensor of unknown meaning: {name}")
        return f"layers.{layer_id}.{LAYER_TENSORS[part]}.{kind}"

    def _unpermute(self, name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
        """Rotary pairs from ggml's neighbouring rows back to the two halves of a head."""
        if not ARCHITECTURES[self.architecture]:
            return tensor
        part = name.split(".")[-2]
        heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(part)
        if heads is None:
            return tensor
        shape = tensor.shape
        return tensor.reshape(heads, config.head_dim // 2, 2, -1).transpose(1, 2).reshape(shape)

    def content_hash(self) -> str:
        """SHA-256 of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer rebuilt from the file's own vocabulary, merges and pre-tokenizer name."""
        kind = self._field("tokenizer.ggml.model")
        if kind != "gpt2":
            raise CheckpointError(
                f"{self.path}: its tokenizer is of kind {kind!r}, wanted gpt2 (byte-level BPE); "
                "use the model's Hugging Face folder with its tokenizer.json"
            )
        return tokenizer_from_vocabulary(
            pieces=self._field("tokenizer.ggml.tokens"),
            piece_types=self._field("tokenizer.ggml.token_type"),
            merges=self._field("tokenizer.ggml.merges"),
            pre_tokenizer=self._field("tokenizer.ggml.pre", "default"),
            bos_id=self._field("tokenizer.ggml.bos_token_id"),
            add_bos=bool(self._field("tokenizer.ggml.add_bos_token", False)),
            eos_ids=self.config.eos_ids,
            chat_template=self._field("tokenizer.chat_template"),
        )
