"""Linear maps whose weights are packed for the processor: float32, or rounded to 16, 8 or 4 bits.

Native (native/packed_linear.cpp, native/linear_*.inl). `bf16` rounds each weight; the others do in groups of
32 inputs: `int8` symmetrically with a half-precision scale, as ggml's Q8_0; `int4` to 16 levels between the
least and the largest, as its Q4_1. A tensor that was stored in those formats is kept exactly. With rounded
weights inputs may be rounded too: each to bfloat16 for `bf16` weights, in groups to 16 bits for `int8` (which
costs nothing measurable) and to 8 bits for `int4`. Sums are then float32, or exact integers within a group
and float32 over groups, in an order that does not depend on the number of rows: results are the same alone
and in any batch. With inputs in float32 weights are expanded on the way, and results are those of float32
weights, bit for bit.

The `*_reference` functions are the oracle.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from scone.kernels.extension import native

WeightKind = Literal["f32", "bf16", "int8", "int4"]

GROUP = 32
INSTRUCTION_SETS: tuple[str, ...] = () if native is None else tuple(native.instruction_sets())
"""What the native maps can run on here, best first; the last one, `portable`, runs anywhere."""


class Workspace:
    """The threads and scratch memory that the native maps of one model share; one caller at a time."""

    def __init__(self, num_threads: int, *, instruction_set: str | None = None) -> None:
        """`instruction_set`: one of INSTRUCTION_SETS, the best if None; ValueError if it is another."""
        assert native is not None, "needs the native extension"
        self.native: Any = native.Workspace(num_threads, instruction_set or "")

    @property
    def instruction_set(self) -> str:
        """Which one runs."""
        return str(self.native.instruction_set)


class PackedLinear:
    """A linear map (num_outputs, num_inputs) with packed weights.

    Attributes:
        rounds_inputs: whether inputs are rounded to the kind's, so that products are not those of float32.
    """

    def __init__(
        self, weight: Tensor, kind: WeightKind, bias: Tensor | None = None, *, round_inputs: bool = True
    ) -> None:
        """weight and bias of any float dtype; neither is kept.

        `round_inputs=False` multiplies rounded weights with the float32 inputs: the same bits as
        `f32` on the rounded weights, from as little memory as they take.
        """
        assert native is not None, "needs the native extension"
        self.num_outputs, self.num_inputs = weight.shape
        self.kind = kind
        self.rounds_inputs = round_inputs and kind != "f32"
        self.native: Any = native.PackedLinear(
            _float32(weight), kind, round_inputs, None if bias is None else _float32(bias)
        )

    @property
    def num_bytes(self) -> int:
        return int(self.native.num_bytes)

    @property
    def is_exact(self) -> bool:
        """Whether no weight was changed by rounding."""
        return bool(self.native.is_exact)

    def weight(self) -> Tensor:
        """The weights (num_outputs, num_inputs) float32 as they are used, rounding included."""
        out = torch.empty(self.num_outputs, self.num_inputs)
        self.native.unpack(out)
        return out

    def __call__(self, workspace: Workspace, x: Tensor) -> Tensor:
        """x (rows, num_inputs) float32 -> (rows, num_outputs) float32."""
        out = torch.empty(len(x), self.num_outputs)
        self.native.apply(workspace.native, x.contiguous(), out)
        return out

    def best(self, workspace: Workspace, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of each row the first greatest output, int64 (rows,), and its value, float32 (rows,): `max(dim=-1)`
        of the outputs, which are not kept. NaN is greater than any number.
        """
        outputs, values = torch.empty(len(x), dtype=torch.int64), torch.empty(len(x))
        self.native.best(workspace.native, x.contiguous(), outputs, values)
        return outputs, values


def rounded_weight_reference(weight: Tensor, kind: WeightKind) -> Tensor:
    """What `PackedLinear(weight, kind).weight()` gives."""
    if kind == "f32":
        return weight.float()
    if kind == "bf16":
        return weight.bfloat16().float()
    groups = _groups(weight.float())
    if kind == "int8":
        scale = (groups.abs().amax(-1, keepdim=True) / 127).half().float()
        levels = (groups / scale).nan_to_num(0).round().clamp(-127, 127)
        rounded = levels * scale
    else:
        least, largest = groups.aminmax(dim=-1, keepdim=True)
        scale, minimum = ((largest - least) / 15).half().float(), least.half().float()
        levels = ((groups - minimum) / scale).nan_to_num(0, 0, 0).round().clamp(0, 15)
        rounded = levels * scale + minimum
    return rounded.flatten(-2)[..., : weight.shape[-1]]


def rounded_input_reference(x: Tensor, kind: WeightKind) -> Tensor:
    """The inputs as a map of that kind uses them."""
    if kind == "f32":
        return x
    if kind == "bf16":
        return x.bfloat16().float()
    limit = torch.tensor(32767.0 if kind == "int8" else 127.0)
    groups = _groups(x)
    largest = groups.abs().amax(-1, keepdim=True)
    levels = (groups * (limit / largest)).nan_to_num(0, 0, 0).round()
    return (levels * (largest / limit)).flatten(-2)[..., : x.shape[-1]]


def packed_linear_reference(
    x: Tensor, weight: Tensor, kind: WeightKind, bias: Tensor | None = None, *, round_inputs: bool = True
) -> Tensor:
    """The map by plain float32 arithmetic on rounded weights and inputs."""
    if round_inputs:
        x = rounded_input_reference(x, kind)
    return torch.nn.functional.linear(x, rounded_weight_reference(weight, kind), bias)


def _groups(x: Tensor) -> Tensor:
    """(..., n) -> (..., groups, 32), padded with zeros."""
    padding = -x.shape[-1] % GROUP
    return torch.nn.functional.pad(x, (0, padding)).view(*x.shape[:-1], -1, GROUP)


def _float32(x: Tensor) -> Tensor:
    return x.detach().float().cpu().contiguous()
