"""The forward pass on a CPU: a decoder's weights packed, all layers in one native call."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor, nn

from scone.kernels.native_decoder import ATTENTION_SPAN, LayerWeights, NativeDecoder
from scone.kernels.packed_linear import PackedLinear, WeightKind, Workspace
from scone.kernels.paged_attention import PagedBatch
from scone.model_store.decoder import Block, Decoder
from scone.server.engine.engine_config import Quantization

logger = logging.getLogger(__name__)

NUM_SAMPLED_ROWS = 32
"""Rows of a weight that are tried when its format is to be found out."""


class NativeForward:
    """Keeps nothing of the decoder but its embedding and head, so that the rest can be freed.

    Attributes:
        workspace: the threads of all its kernels; for the engine's thread alone.
        kinds: format of each layer's q, k, v, o, gate, up and down maps, layer after layer.
        layer_bytes, head_bytes: size of the packed weights of all layers, and of the head.
        rounds_inputs: whether some maps of the layers take rounded inputs, so that not all is float32.
        arithmetic: names all that the bits of its results depend on besides weights and inputs.
    """

    def __init__(
        self,
        decoder: Decoder,
        quantization: Quantization,
        num_threads: int,
        max_model_len: int,
        *,
        instruction_set: str | None = None,
    ) -> None:
        config = decoder.config
        with ThreadPoolExecutor(num_threads) as pool:
            layers = list(pool.map(partial(_pack, quantization=quantization), decoder.layers))
        # The head decides among all tokens at once: 4 bits would cost more quality than they save time.
        head_quantization: Quantization = "int8" if quantization == "int4" else quantization
        self.workspace = Workspace(num_threads, instruction_set=instruction_set)
        self._embed_tokens = decoder.embed_tokens
        self._head_weight = decoder.lm_head.weight
        (self._head,) = _pack_maps([decoder.lm_head], head_quantization)
        cos, sin = (x[:, 0, : config.head_dim // 2] for x in decoder.rope(torch.arange(max_model_len)))
        self._decoder = NativeDecoder(
            self.workspace,
            layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            norm_eps=config.norm_eps,
            final_norm=decoder.norm.weight,
            cos=cos,
            sin=sin,
        )
        maps = [linear for layer in layers for linear in layer.maps]
        self.kinds = [linear.kind for linear in maps]
        self.rounds_inputs = any(linear.rounds_inputs for linear in maps)
        self.layer_bytes = sum(linear.num_bytes for linear in maps)
        self.head_bytes = self._head.num_bytes
        formats = " ".join(f"{linear.kind}:{linear.rounds_inputs}" for linear in (*maps, self._head))
        digest = hashlib.sha256(formats.encode()).hexdigest()[:16]
        self.arithmetic = f"native {self.workspace.instruction_set}, maps {digest}, spans of {ATTENTION_SPAN}"
        logger.info(
            "native %s kernels, %d thread(s), %d MB of weights; maps of the layers: %s; head: %s",
            self.workspace.instruction_set,
            num_threads,
            (self.layer_bytes + self.head_bytes) >> 20,
            ", ".join(f"{number} {kind}" for kind, number in Counter(self.kinds).most_common()),
            self._head.kind,
        )

    def embed(self, input_ids: Tensor) -> Tensor:
        """(n,) -> (n, dim) float32."""
        return self._embed_tokens(input_ids).float()  # type: ignore[no-any-return]

    def forward(
        self,
        embeddings: Tensor,
        positions: Tensor,
        batch: PagedBatch,
        k_cache: Tensor,
        v_cache: Tensor,
        num_layers: int | None = None,
        first_layer: int = 0,
    ) -> Tensor:
        """Hidden states (num_tokens, dim), in the memory of the embeddings; as `TorchForward.forward`."""
        return self._decoder.forward(embeddings, positions, batch, k_cache, v_cache, num_layers, first_layer)

    def restore_blocks(
        self,
        states: Tensor,
        slots: Tensor,
        block_ids: Tensor,
        first_positions: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> None:
        """Keys and values of whole blocks from what went into the layers; as `NativeDecoder.restore`."""
        self._decoder.restore(states, slots, block_ids, first_positions, k_cache, v_cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, vocab_size) float32."""
        return self._head(self.workspace, hidden)

    def best_tokens(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (n,) with the highest logits, and these (n,); no other logit leaves the processor."""
        return self._head.best(self.workspace, hidden)

    def logits_of(self, hidden: Tensor, token_ids: Sequence[int]) -> Tensor:
        """(n, len(token_ids)) float32; no other row of the head is read."""
        return torch.nn.functional.linear(hidden, self._head_weight[list(token_ids)].float())


def _pack(block: nn.Module, quantization: Quantization) -> LayerWeights:
    assert isinstance(block, Block)
    # Maps that read the same inputs share their kind, so that these are prepared once.
    groups = (
        [block.q_proj, block.k_proj, block.v_proj],
        [block.o_proj],
        [block.gate_proj, block.up_proj],
        [block.down_proj],
    )
    maps = [packed for group in groups for packed in _pack_maps(group, quantization)]
    return LayerWeights(
        attention_norm=block.attention_norm.weight,
        ffn_norm=block.ffn_norm.weight,
        q_norm=None if block.q_norm is None else block.q_norm.weight,
        k_norm=None if block.k_norm is None else block.k_norm.weight,
        maps=tuple(maps),
    )


def _pack_maps(linears: Sequence[nn.Linear], quantization: Quantization) -> list[PackedLinear]:
    """Maps that read the same inputs; these are rounded for all of them or for none."""
    kind = _rounded_kind(linears, quantization)
    if kind is not None:
        return [PackedLinear(linear.weight, kind, linear.bias) for linear in linears]
    return [_pack_exactly(linear) for linear in linears]


def _rounded_kind(linears: Sequence[nn.Linear], quantization: Quantization) -> WeightKind | None:
    """The kind that a setting means for these maps; None if they are to be computed in float32."""
    if quantization in ("int8", "int4"):
        return quantization
    if quantization == "bfloat16":
        return "bf16"
    if quantization == "auto":
        kinds: tuple[WeightKind, ...] = ("int4", "int8", "bf16")
        for kind in kinds:
            if all(_keeps(linear.weight, kind) for linear in linears):
                return kind
    return None


def _pack_exactly(linear: nn.Linear) -> PackedLinear:
    """A map in float32, its weights held in the smallest format that keeps every bit of them."""
    kinds: tuple[WeightKind, ...] = ("int4", "int8", "bf16")
    for kind in kinds:
        # Some rows tell most of the time, and spare the packing of all.
        if PackedLinear(linear.weight[:NUM_SAMPLED_ROWS], kind).is_exact:
            packed = PackedLinear(linear.weight, kind, linear.bias, round_inputs=False)
            if packed.is_exact:
                return packed
    return PackedLinear(linear.weight, "f32", linear.bias)


def _keeps(weight: Tensor, kind: WeightKind) -> bool:
    """Whether rounding changes nothing; some rows tell, since values never rounded do not fit by chance."""
    sample = weight[:NUM_SAMPLED_ROWS].float()
    error = (PackedLinear(sample, kind).weight() - sample).abs().max()
    return bool(error <= 1e-6 * sample.abs().max())
