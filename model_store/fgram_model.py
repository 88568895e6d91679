"""The f-gram model A_fgram: a small transformer that turns an f-gram into its embedding row.

Source: SCONE, arXiv 2502.01637, section 3: the main model's architecture without its token embedding,
which it shares; own absolute positions; the output is taken at the last token.

Here the output is added to the last token's own embedding through a projection that starts at zero, so
that an untrained f-gram model is exactly the token embedding and a pretrained main model starts unharmed.
F-grams may have residuals beside it (fgram_residuals.py), which are then part of their rows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from scone.model_store.decoder import Block, Decoder, RMSNorm
from scone.model_store.fgram_residuals import FGramResiduals
from scone.model_store.initialize import draw_weights

# Rows are embedded in blocks of exactly this many f-grams of one length, padded if need be: matrix
# products of one shape give a row the same bits wherever it stands in the block.
EMBED_BLOCK_ROWS = 256


class ShortAttention:
    """Causal attention within rows of a few tokens, written out.

    Kernels for long sequences pad such rows many times over, and on a GPU plan anew for each number of rows.
    """

    def __call__(self, layer_id: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (m, n, num_heads, head_dim), k and v (m, n, num_kv_heads, head_dim), rotated; gives q's shape."""
        n, head_dim = q.shape[1], q.shape[3]
        grouped = q.view(*q.shape[:2], k.shape[2], -1, head_dim).float()  # heads of one kv head together
        keys, values = k.unsqueeze(3).float(), v.unsqueeze(3).float()
        scores = (grouped.unsqueeze(2) * keys.unsqueeze(1)).sum(-1) * head_dim**-0.5
        later = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)[:, :, None, None]
        weights = scores.masked_fill(later, -torch.inf).softmax(2)  # (m, to, from, num_kv_heads, group)
        out: Tensor = (weights.unsqueeze(-1) * values.unsqueeze(1)).sum(2)
        return out.flatten(2, 3).to(v.dtype)


class FGramModel(nn.Module):
    """Blocks of the main model's kind over at most `max_n` tokens.

    The shared token embedding is borrowed from the decoder and is not among the parameters.
    """

    def __init__(
        self,
        decoder: Decoder,
        num_layers: int,
        max_n: int,
        *,
        last_token_only: bool = False,
        residuals: FGramResiduals | None = None,
    ) -> None:
        """`last_token_only` makes the control that sees no n-gram, only the token it replaces."""
        super().__init__()
        config = decoder.config
        self.max_n = max_n
        self.last_token_only = last_token_only
        self._decoder = [decoder]  # in a list, so that its weights are not registered as ours
        self.layers = nn.ModuleList(Block(config) for _ in range(num_layers))
        self.position_embedding = nn.Parameter(torch.zeros(max_n, config.dim))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.dim, bias=False)
        nn.init.zeros_(self.output.weight)
        self.residuals = residuals

    @classmethod
    def from_decoder(
        cls,
        decoder: Decoder,
        num_layers: int,
        max_n: int,
        *,
        last_token_only: bool = False,
        random_start: bool = False,
        residuals: FGramResiduals | None = None,
    ) -> FGramModel:
        """An f-gram model that is the identity; its blocks start as the decoder's first, or at random."""
        model = cls(decoder, num_layers, max_n, last_token_only=last_token_only, residuals=residuals)
        draw_weights(model.layers, num_layers)  # kept by those beyond the decoder's
        for own, theirs in zip(model.layers, () if random_start else decoder.layers, strict=False):
            own.load_state_dict(copy.deepcopy(theirs.state_dict()))
        return model.float().requires_grad_(True)

    @property
    def decoder(self) -> Decoder:
        return self._decoder[0]

    def forward(self, token_ids: Tensor) -> Tensor:
        """Rows (num_fgrams, dim) float32 of token_ids (num_fgrams, n) int64, all of one length n.

        Without their residuals. Differentiable.
        """
        if self.last_token_only:
            token_ids = token_ids[:, -1:]
        n = token_ids.shape[1]
        embeddings = self.decoder.embed(token_ids).float()
        rope = self.decoder.rope(torch.arange(n, device=token_ids.device))
        hidden = embeddings + self.position_embedding[:n]
        for layer_id, block in enumerate(self.layers):
            hidden = block(hidden, rope, layer_id, ShortAttention())
        change: Tensor = self.output(self.norm(hidden[:, -1]))
        return embeddings[:, -1] + change

    @torch.inference_mode()
    def embed(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """Rows (num_fgrams, dim) float32, on the CPU, of token_ids (num_fgrams, max_n) int64, left-aligned.

        `forward` in blocks of one shape: on one machine and device a row's bits depend on its f-gram alone.
        Entries past an f-gram's length (num_fgrams,) are never read.
        """
        device = self.position_embedding.device
        rows = torch.empty(len(lengths), self.position_embedding.shape[1])
        for n, of_length in self._by_length(lengths):
            for selected in torch.split(of_length, EMBED_BLOCK_ROWS):
                block = torch.zeros(EMBED_BLOCK_ROWS, n, dtype=torch.int64)
                block[: len(selected)] = token_ids[selected, :n]
                rows[selected] = self(block.to(device))[: len(selected)].cpu()
        if self.residuals is not None:
            ids = self.residuals.find(token_ids.numpy().astype(np.int32), lengths.numpy().astype(np.uint8))
            for of_suffix in torch.from_numpy(ids).T:
                found = of_suffix >= 0
                rows[found] += self.residuals.gather(of_suffix[found].to(device)).cpu()
        return rows

    def _by_length(self, lengths: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each length that occurs, with the indices of the f-grams that have it."""
        for n in range(1, self.max_n + 1):
            of_length = (lengths == n).nonzero().squeeze(1)
            if len(of_length):
                yield n, of_length
