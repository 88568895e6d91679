"""Packed linear maps against plain torch on the rounded weights, for each instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scone.kernels.extension import native
from scone.kernels.packed_linear import (
    INSTRUCTION_SETS,
    PackedLinear,
    WeightKind,
    Workspace,
    packed_linear_reference,
    rounded_weight_reference,
)

pytestmark = pytest.mark.skipif(native is None, reason="the native extension was not built")

KINDS: list[WeightKind] = ["f32", "bf16", "int8", "int4"]


@pytest.fixture(params=["avx512_bf16", "avx512", "avx2", "portable"])
def workspace(request: pytest.FixtureRequest) -> Workspace:
    if request.param not in INSTRUCTION_SETS:
        pytest.skip(f"this processor has no {request.param}")
    return Workspace(2, instruction_set=request.param)


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="no instruction set 'mmx'"):
        Workspace(1, instruction_set="mmx")
    assert Workspace(1).instruction_set == INSTRUCTION_SETS[0]
    assert INSTRUCTION_SETS[-1] == "portable"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (17, 31), (100, 96), (40, 600)])
def test_equals_the_reference(workspace: Workspace, kind: WeightKind, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    linear = PackedLinear(weight, kind, bias)
    assert torch.equal(linear.weight(), rounded_weight_reference(weight, kind))
    for rows in (1, 2, 5, 6, 7, 64, 65, 130):
        x = torch.randn(rows, shape[1])
        result = linear(workspace, x)
        expected = packed_linear_reference(x, weight, kind, bias)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_bits_in_any_batch(workspace: Workspace, kind: WeightKind) -> None:
    torch.manual_seed(1)
    linear = PackedLinear(torch.randn(70, 300), kind)
    x = torch.randn(131, 300)
    together = linear(workspace, x)
    for begin, end in ((0, 1), (3, 5), (60, 70), (128, 131)):
        assert torch.equal(linear(workspace, x[begin:end]), together[begin:end])
    assert torch.equal(linear(Workspace(1), x), linear(Workspace(3), x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_inputs", [31, 300, 576])
def test_float_inputs_give_the_bits_of_float_weights(
    workspace: Workspace, kind: WeightKind, num_inputs: int
) -> None:
    torch.manual_seed(7)
    weight, bias = torch.randn(40, num_inputs), torch.randn(40)
    packed = PackedLinear(weight, kind, bias, round_inputs=False)
    plain = PackedLinear(packed.weight(), "f32", bias)
    for rows in (*range(1, 15), 48, 53):
        x = torch.randn(rows, num_inputs)
        result = packed(workspace, x)
        assert torch.equal(result, plain(workspace, x))
        expected = packed_linear_reference(x, weight, kind, bias, round_inputs=False)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_knows_whether_it_kept_its_weights(kind: WeightKind) -> None:
    torch.manual_seed(8)
    weight = torch.randn(70, 300)
    assert PackedLinear(weight, kind).is_exact == (kind == "f32")
    rounded = {"f32": weight, "bf16": weight.bfloat16().float()}.get(kind, torch.zeros(70, 300))
    if kind in ("int8", "int4"):  # a scale that is a power of two, and both ends of its range in each group
        low, high = (-127, 127) if kind == "int8" else (0, 15)
        rounded = torch.randint(low, high + 1, (70, 300)).float()
        rounded[:, ::32], rounded[:, 1::32] = low, high
        rounded = rounded / 64
    assert PackedLinear(rounded, kind).is_exact
    rounded[69, 299] += 1e-3
    assert PackedLinear(rounded, kind).is_exact == (kind == "f32")


@pytest.mark.skipif("avx512" not in INSTRUCTION_SETS, reason="this processor has no avx512")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_inputs", [31, 300, 576, 600])
def test_avx512_gives_the_bits_of_avx2(kind: WeightKind, num_inputs: int) -> None:
    """With and without its bfloat16 products."""
    torch.manual_seed(6)
    linear = PackedLinear(torch.randn(70, num_inputs), kind)
    for rows in (1, 5, 8, 12, 17, 77):
        x = torch.randn(rows, num_inputs)
        first, *others = (linear(Workspace(1, instruction_set=name), x) for name in INSTRUCTION_SETS[:-1])
        assert all(torch.equal(bits(first), bits(other)) for other in others)


@pytest.mark.parametrize("num_inputs", [31, 300, 600])
def test_bfloat16_products_are_float32_ones_of_rounded_values(workspace: Workspace, num_inputs: int) -> None:
    """vdpbf16ps takes inputs in pairs; each sum is rounded by itself all the same, front to back."""
    torch.manual_seed(10)
    weight = torch.randn(70, num_inputs) * torch.randn(70, num_inputs).exp()
    x = torch.randn(53, num_inputs) * torch.randn(53, num_inputs).exp()
    ours = PackedLinear(weight, "bf16")(workspace, x)
    plain = PackedLinear(weight, "bf16", round_inputs=False)(workspace, x.bfloat16().float())
    assert torch.equal(ours, plain)
    assert not torch.equal(ours, PackedLinear(weight, "bf16", round_inputs=False)(workspace, x))


@pytest.mark.skipif("avx2" not in INSTRUCTION_SETS, reason="this processor has no avx2")
@pytest.mark.parametrize("exponents", [(-63, -63), (-128, 2), (2, -128)])
def test_bfloat16_products_flush_denormals_with_every_instruction_set(exponents: tuple[int, int]) -> None:
    """As vdpbf16ps does, which asks no control register: weights, inputs, products and sums near 2^-126."""
    torch.manual_seed(11)
    weight, x = (
        torch.randn(rows, 64) * (torch.randint(-3, 4, (rows, 64)) + exponent).double().exp2()
        for rows, exponent in zip((40, 13), exponents, strict=True)
    )
    weight, x = weight.float(), x.float()
    linear = PackedLinear(weight, "bf16")
    first, *others = (linear(Workspace(1, instruction_set=name), x) for name in INSTRUCTION_SETS[:-1])
    assert all(torch.equal(bits(first), bits(other)) for other in others)
    assert ((first == 0) | (first.abs() >= torch.finfo(torch.float32).tiny)).all()
    kept = PackedLinear(weight, "bf16", round_inputs=False)(Workspace(1), x.bfloat16().float())
    assert not torch.equal(kept, first)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def test_rounding_errors_are_as_small_as_the_formats_allow() -> None:
    torch.manual_seed(2)
    weight = torch.randn(64, 256)
    errors = {
        kind: float((PackedLinear(weight, kind).weight() - weight).norm() / weight.norm()) for kind in KINDS
    }
    assert errors["f32"] == 0
    assert errors["bf16"] < 0.003
    assert errors["int8"] < 0.007
    assert errors["int4"] < 0.09


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_were_rounded_before_are_kept(kind: WeightKind) -> None:
    torch.manual_seed(3)
    rounded = PackedLinear(torch.randn(64, 256), kind).weight()
    again = PackedLinear(rounded, kind).weight()
    assert float((again - rounded).abs().max()) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(workspace: Workspace, kind: WeightKind, bad: float) -> None:
    torch.manual_seed(4)
    linear = PackedLinear(torch.randn(20, 64), kind)
    x = torch.randn(3, 64)
    good = linear(workspace, x)
    x[1, 40] = bad
    result = linear(workspace, x)
    assert not torch.isfinite(result[1]).any()
    assert torch.equal(result[[0, 2]], good[[0, 2]])


def test_extreme_weights_and_inputs(workspace: Workspace) -> None:
    for weight in (torch.zeros(16, 32), torch.full((16, 32), 3.0), torch.full((16, 32), 1e-9)):
        for kind in KINDS:
            linear = PackedLinear(weight, kind)
            torch.testing.assert_close(linear.weight(), rounded_weight_reference(weight, kind))
            assert linear(workspace, torch.zeros(2, 32)).abs().max() == 0
    largest = PackedLinear(torch.full((16, 32), 100.0), "int8")
    x = torch.full((1, 32), -7.0)
    torch.testing.assert_close(largest(workspace, x), torch.full((1, 16), -22400.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_outputs", [1, 16, 17, 500])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_best_output_is_that_of_all_outputs(
    workspace: Workspace, kind: WeightKind, num_outputs: int, with_bias: bool
) -> None:
    torch.manual_seed(8)
    # Every output has twins, some of them in other panels: the first of the greatest is wanted.
    weight, bias = torch.randn(num_outputs, 64).repeat(3, 1), torch.randn(num_outputs).repeat(3)
    linear = PackedLinear(weight, kind, bias if with_bias else None)
    for rows in (1, 7, 50):
        x = torch.randn(rows, 64)
        values, outputs = linear(workspace, x).max(dim=-1)
        found_outputs, found_values = linear.best(workspace, x)
        assert torch.equal(found_outputs, outputs)
        assert torch.equal(found_values, values)
        assert found_outputs.max() < num_outputs


@pytest.mark.parametrize("round_inputs", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 4, 13, 33, 100, 200])
def test_screening_outputs_changes_none_of_the_best(
    workspace: Workspace, rows: int, round_inputs: bool
) -> None:
    """8-bit weights without bias: panels are passed over that cannot hold a row's greatest output."""
    torch.manual_seed(rows)
    # Outputs that differ by less than inputs rounded to 8 bits can tell, in all panels; all are negative, and
    # less than the padding of the last panel.
    base = -torch.rand(1, 576) - 0.1
    near = base * (1 + 1e-2 * torch.randn(3000, 576))
    linear = PackedLinear(torch.cat([near, -torch.rand(801, 576) * 4]), "int8", round_inputs=round_inputs)
    x = torch.rand(rows, 576) + 0.01
    x[::2] *= torch.randn(1, 576).exp()  # some inputs are far greater than others
    x[::3, 32:96] = 0
    x[::5] *= 1e-20
    values, outputs = linear(workspace, x).max(dim=-1)
    assert (values < 0).all()
    found_outputs, found_values = linear.best(workspace, x)
    assert torch.equal(found_values, values)
    assert torch.equal(found_outputs, outputs)


def test_screening_where_everything_is_zero(workspace: Workspace) -> None:
    for weight, x in ((torch.zeros(40, 64), torch.randn(8, 64)), (torch.randn(40, 64), torch.zeros(8, 64))):
        outputs, values = PackedLinear(weight, "int8").best(workspace, x)
        assert not outputs.any()
        assert not values.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_best_output_shows_what_is_not_finite(
    workspace: Workspace, kind: WeightKind, bad: float, with_bias: bool
) -> None:
    torch.manual_seed(9)
    bias = torch.full((90,), -1.0) if with_bias else None
    linear = PackedLinear(torch.randn(90, 64), kind, bias)
    x = torch.randn(9, 64)
    x[4, 10] = bad
    values, outputs = linear(workspace, x).max(dim=-1)
    found_outputs, found = linear.best(workspace, x)
    assert not found[4].isfinite()
    others = torch.arange(9) != 4
    assert torch.equal(found[others], values[others])
    assert torch.equal(found_outputs[others], outputs[others])


def test_wrong_shapes_are_refused(workspace: Workspace) -> None:
    with pytest.raises(ValueError, match="x is not"):
        PackedLinear(torch.zeros(16, 32), "f32").best(workspace, torch.zeros(2, 31))
    with pytest.raises(ValueError, match="x is not"):
        PackedLinear(torch.randn(4, 8), "f32")(workspace, torch.randn(2, 9))
    with pytest.raises(ValueError, match="bias is not"):
        PackedLinear(torch.randn(4, 8), "f32", torch.randn(5))
