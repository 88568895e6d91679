"""Sampling by native kernels against the oracle: the same tokens, bit for bit, for each instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scone.kernels.extension import native
from scone.kernels.packed_linear import INSTRUCTION_SETS, Workspace
from scone.kernels.token_draw import (
    Draw,
    draw_reference,
    draw_tokens,
    log_probabilities,
    log_probabilities_reference,
    weights_reference,
)

needs_native = pytest.mark.skipif(native is None, reason="the native extension was not built")


@pytest.fixture(scope="module")
def workspaces() -> list[Workspace]:
    return [Workspace(2, instruction_set=name) for name in INSTRUCTION_SETS]


def row_of(seed: int, size: int, kind: str, scale: float) -> Tensor:
    """One row of logits of some kind."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(size, generator=generator) * scale
    if kind == "ties":
        row = row.round()
    elif kind == "flat":
        row = torch.full((size,), scale)
    elif kind == "few":  # as of allowed_token_ids
        allowed = torch.randperm(size, generator=generator)[: 1 + seed % 7]
        row = torch.full((size,), -torch.inf).index_copy(0, allowed, row[allowed])
    elif kind == "spike":
        row[seed % size] = 50.0 * scale
    return row


DRAWS = st.builds(
    Draw,
    temperature=st.sampled_from([0.0, 1e-5, 0.3, 0.8, 1.0, 2.0, 50.0]),
    top_k=st.sampled_from([0, 1, 2, 7, 50, 100, 499, 10_000]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.95, 1 - 1e-12, 1.0]),
    min_p=st.sampled_from([0.0, 1e-6, 0.05, 0.5, 1.0]),
    number=st.one_of(
        st.sampled_from([0.0, 1 - 2**-53]), st.integers(0, 2**53 - 1).map(lambda k: math.ldexp(k, -53))
    ),
)
ROWS = st.builds(
    row_of,
    seed=st.integers(0, 2**32),
    size=st.sampled_from([1, 2, 63, 64, 65, 500, 1000]),
    kind=st.sampled_from(["normal", "ties", "flat", "few", "spike"]),
    scale=st.sampled_from([0.01, 1.0, 4.0, 30.0]),
)


@needs_native
@settings(deadline=None, max_examples=400)
@given(row=ROWS, draws=st.lists(DRAWS, min_size=1, max_size=5))
def test_draws_what_the_reference_draws(workspaces: list[Workspace], row: Tensor, draws: list[Draw]) -> None:
    expected = [draw_reference(row, draw) for draw in draws]
    logits = row.expand(len(draws), -1)
    for workspace in workspaces:
        assert draw_tokens(workspace, logits, draws) == expected
        assert draw_tokens(workspace, logits[:1], draws[:1]) == expected[:1]
    assert draw_tokens(None, logits, draws) == expected


@needs_native
@pytest.mark.parametrize("scale", [0.0, 1e-3, 3.0])
def test_a_whole_vocabulary_is_drawn_from_alike(workspaces: list[Workspace], scale: float) -> None:
    """As large as SmolLM2's, down to distributions so flat that every token is a candidate."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 49_152, generator=generator) * scale
    numbers = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    for draw in (Draw(1.0), Draw(0.8, top_p=0.95), Draw(0.8, top_k=900, min_p=0.1), Draw(1.0, min_p=0.01)):
        draws = [draw._replace(number=number) for number in numbers]
        expected = draw_tokens(None, logits, draws)
        for workspace in workspaces:
            assert draw_tokens(workspace, logits, draws) == expected


@needs_native
def test_a_row_draws_alone_what_it_draws_with_others_on_any_threads() -> None:
    logits = torch.stack([row_of(i, 5000, "normal", 3.0) for i in range(40)])
    draws = [
        Draw(0.9, (0, 40)[i % 2], (1.0, 0.9, 0.5)[i % 3], (0.0, 0.01)[i // 7 % 2], i / 64) for i in range(40)
    ]
    together = draw_tokens(Workspace(1), logits, draws)
    assert draw_tokens(Workspace(4), logits, draws) == together
    alone = [draw_tokens(Workspace(3), logits[i : i + 1], draws[i : i + 1])[0] for i in range(40)]
    assert alone == together


@needs_native
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_finite_draw_nothing(
    workspaces: list[Workspace], bad: float, temperature: float
) -> None:
    for size in (64, 200):
        for place in (0, 13, size - 1):
            logits = torch.randn(3, size)
            logits[1, place] = bad
            draws = [Draw(temperature, number=0.5)] * 3
            expected = draw_tokens(None, logits, draws)
            assert [token is None for token in expected] == [False, True, False]
            for workspace in workspaces:
                assert draw_tokens(workspace, logits, draws) == expected
                logprobs, top, _ = log_probabilities(workspace, logits, [0, 0, 0], 2)
                assert logprobs.isnan().tolist() == [False, True, False]
                assert (top[1] == -torch.inf).all()
    nothing = torch.full((2, 70), -torch.inf)
    assert draw_tokens(workspaces[0], nothing, draws[:2]) == [None, None]
    assert draw_tokens(None, nothing, draws[:2]) == [None, None]


def test_weights_are_exponentials() -> None:
    values = torch.linspace(-40, 0, 1000)
    weights = weights_reference(values).double() / 2**44
    torch.testing.assert_close(weights, values.double().exp(), rtol=4e-7, atol=2**-45)


@needs_native
@settings(deadline=None, max_examples=100)
@given(row=ROWS, num_top=st.sampled_from([0, 1, 5, 20]))
def test_logprobs_are_those_of_the_reference(workspaces: list[Workspace], row: Tensor, num_top: int) -> None:
    logits = torch.stack([row, row.flip(0)])
    token_ids = [0, len(row) - 1]
    expected = log_probabilities_reference(logits, token_ids, num_top)
    exact = logits.double().log_softmax(-1)
    torch.testing.assert_close(expected[0].double(), exact[torch.arange(2), token_ids], rtol=1e-6, atol=2e-6)
    for workspace in workspaces:
        logprobs, top_logprobs, top_ids = log_probabilities(workspace, logits, token_ids, num_top)
        assert torch.equal(logprobs, expected[0])
        assert torch.equal(top_logprobs, expected[1])
        is_possible = top_logprobs > -torch.inf
        assert torch.equal(top_ids[is_possible], expected[2][is_possible])


@needs_native
def test_shapes_are_checked() -> None:
    workspace = Workspace(1)
    with pytest.raises(ValueError, match="draws are not"):
        draw_tokens(workspace, torch.zeros(2, 5), [Draw()])
    with pytest.raises(ValueError, match="not in the vocabulary"):
        log_probabilities(workspace, torch.zeros(1, 5), [5], 0)
