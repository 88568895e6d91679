"""Residuals as tensors of a model's file: `residuals.values`, `residuals.tokens`, `residuals.lengths`.

Values are numbers, or rows of a codec (kernels/row_codec.py): (num_residuals, row_bytes) uint8. Which codec
that is the model's description says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scone.kernels.row_codec import RowCodec
from scone.model_store.fgram_residuals import FGramResiduals

_PREFIX = "residuals."


def residual_tensors(residuals: FGramResiduals, codec: str) -> dict[str, Tensor]:
    """What a file holds of them, by name, values in `codec`; raises ValueError if it does not fit."""
    tensors = residuals.state_dict(prefix=_PREFIX)
    values = residuals.values
    coded = RowCodec(codec, "float32", values.shape[1]).encode(values.cpu())
    return tensors | {f"{_PREFIX}values": coded}


def take_residuals(tensors: dict[str, Tensor], codec: str | None, dim: int) -> FGramResiduals | None:
    """Takes a file's residuals out of its tensors; None if it has none.

    Raises:
        ValueError, TypeError: they are not what a model of this width with this codec has.
    """
    names = [name for name in tensors if name.startswith(_PREFIX)]
    parts = {name.removeprefix(_PREFIX): tensors.pop(name) for name in names}
    if not parts:
        return None
    residuals = FGramResiduals(**parts)
    if codec is not None:
        residuals.values = _decoded(residuals.values, RowCodec(codec, "float32", dim))
    residuals.check(dim)
    return residuals


def _decoded(stored: Tensor, codec: RowCodec) -> Tensor:
    if stored.dtype != torch.uint8 or stored.shape[1:] != (codec.row_bytes,):
        raise ValueError(
            f"residuals have values {tuple(stored.shape)} of {stored.dtype},"
            f" wanted rows of {codec.row_bytes} bytes for codec {codec.codec}"
        )
    return codec.decode_reference(stored)
