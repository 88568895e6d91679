from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from scone.kernels.extension import native
from scone.kernels.packed_linear import Workspace
from scone.kernels.token_draw import draw_tokens
from scone.server.engine.batch_draw import draw_together
from scone.server.engine.logit_edits import EditedLogits
from scone.server.engine.sampler import SamplerState, sample, sample_on_device, token_logprobs
from scone.server.sequence import SamplingParams

VOCAB = 600


def state(prompt: tuple[int, ...] = (), **params: Any) -> SamplerState:
    return SamplerState(SamplingParams(**params), 0, prompt, eos_ids=(2,))


def row(seed: int, scale: float = 2.0) -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def draw_many(logits: Tensor, num: int, **params: Any) -> Counter[int]:
    one = state(seed=1, **params)
    drawn: Counter[int] = Counter()
    for _ in range(num):
        token = sample(logits[None], [one])()[0].token_id
        assert token is not None
        drawn[token] += 1
    return drawn


def reference_distribution(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """Truncation by definition: sort everything, in double."""
    probs = (logits.double() / temperature).softmax(-1)
    order = probs.argsort(descending=True)
    kept = order[:top_k] if top_k else order
    within = probs[kept] / probs[kept].sum()
    kept = kept[: int((within.cumsum(0) - within < top_p).sum())] if top_p < 1 else kept
    kept = kept[probs[kept] >= min_p * probs[kept].max()]
    result = torch.zeros_like(probs)
    result[kept] = probs[kept] / probs[kept].sum()
    return result


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 0.7, "top_k": 5, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 1.0, "top_k": 0, "top_p": 0.5, "min_p": 0.0},
        {"temperature": 3.0, "top_k": 0, "top_p": 0.95, "min_p": 0.0},  # flat: all candidates needed
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.2},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
    ],
)
def test_draws_follow_the_truncated_distribution(params: dict[str, Any]) -> None:
    logits = row(1)
    num = 4000
    drawn = draw_many(logits, num, **params)
    expected = reference_distribution(logits, **params)
    assert all(expected[token] > 0 for token in drawn)
    for token in expected.topk(5).indices.tolist():
        p = float(expected[token])
        assert drawn[token] / num == pytest.approx(p, abs=5 * (p * (1 - p) / num) ** 0.5 + 1e-9)


def test_seeded_draws_do_not_depend_on_the_batch() -> None:
    rows = torch.stack([row(i) for i in range(8)])
    params: list[dict[str, Any]] = [
        {"seed": i, "temperature": 1.2, "top_p": 0.9, "logprobs": 2, "presence_penalty": 0.5 * (i % 2)}
        for i in range(8)
    ]
    together = [state(**p) for p in params]
    alone = [state(**p) for p in params]
    for _ in range(5):
        batch = sample(rows, together)()
        for i in range(8):
            assert sample(rows[i : i + 1], [alone[i]])()[0] == batch[i]
            token_id = batch[i].token_id
            assert token_id is not None
            together[i].append(token_id)
            alone[i].append(token_id)


def test_sequences_of_one_request_draw_differently() -> None:
    logits = torch.zeros(1, VOCAB)
    states = [SamplerState(SamplingParams(seed=7), index, (), ()) for index in range(4)]
    assert len({sample(logits, [s])()[0].token_id for s in states}) == 4
    again = SamplerState(SamplingParams(seed=9), 0, (), ())
    other = SamplerState(SamplingParams(seed=7), 2, (), ())
    assert sample(logits, [again])()[0] == sample(logits, [other])()[0]


def test_penalties_by_their_formulas() -> None:
    logits = row(2)
    one = state((5, 6), presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0)
    for token in (7, 7, 8):
        one.append(token)
    adjusted = logits.clone()
    edited = EditedLogits(adjusted[None], [one.edits])
    expected = logits.clone()
    for token in (5, 6, 7, 8):
        expected[token] = expected[token] / 2 if expected[token] > 0 else expected[token] * 2
    expected[7] -= 0.5 + 2 * 0.25
    expected[8] -= 0.5 + 0.25
    torch.testing.assert_close(adjusted, expected)
    edited.restore()
    assert torch.equal(adjusted, logits)


def test_edits_of_many_sequences_are_laid_over_their_own_rows() -> None:
    """Against the definition, token by token: bias, then minimum length, then penalties."""
    params: list[dict[str, Any]] = [
        {},
        {"logit_bias": {2: 5.0, 7: -3.0}, "min_tokens": 3},
        {"repetition_penalty": 1.3, "logit_bias": {i: 0.1 * i for i in range(40)}},
        {"presence_penalty": -0.7, "min_tokens": 2, "stop_token_ids": (9, 11)},
        {"repetition_penalty": 0.8, "frequency_penalty": 0.3, "ignore_eos": True, "min_tokens": 4},
    ]
    prompts = [tuple(range(10 * i, 10 * i + 25)) for i in range(len(params))]
    states = [state(prompt, **p) for prompt, p in zip(prompts, params, strict=True)]
    generated: list[list[int]] = [[] for _ in states]
    for step in range(6):
        raw = torch.stack([row(step * 10 + i) for i in range(len(states))])
        expected = raw.clone()
        for i, one in enumerate(states):
            p = one.params
            for token, bias in p.logit_bias.items():
                expected[i, token] += bias
            if step < p.min_tokens:
                for token in (*(() if p.ignore_eos else (2,)), *p.stop_token_ids):
                    expected[i, token] = -torch.inf
            for token in {*prompts[i], *generated[i]} if p.repetition_penalty != 1.0 else ():
                value = float(expected[i, token])
                rate = p.repetition_penalty
                expected[i, token] = value / rate if value > 0 else value * rate
            for token, count in Counter(generated[i]).items():
                expected[i, token] -= p.presence_penalty + p.frequency_penalty * count
        logits = raw.clone()
        edited = EditedLogits(logits, [one.edits for one in states])
        torch.testing.assert_close(logits, expected)
        edited.restore()
        assert torch.equal(logits, raw)
        for i, one in enumerate(states):
            generated[i].append((step * 7 + i) % 30)
            one.append(generated[i][-1])
    assert [len(one.edits) == 0 for one in states] == [True, False, False, False, False]


def test_a_sequence_that_may_end_takes_the_best_again() -> None:
    one = state(temperature=0.0, min_tokens=2)
    for expected in (False, False, True):
        assert one.takes_the_best is expected
        one.append(5)


def test_bias_and_minimum_length() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 2] = 10
    assert sample(logits, [state(temperature=0.0)])()[0].token_id == 2
    assert sample(logits, [state(temperature=0.0, logit_bias={9: 20.0})])()[0].token_id == 9
    waiting = state(temperature=0.0, min_tokens=1)
    assert sample(logits, [waiting])()[0].token_id != 2
    waiting.append(0)
    assert sample(logits, [waiting])()[0].token_id == 2


def test_rows_that_are_not_finite_are_told_apart() -> None:
    rows = torch.stack([row(1), row(2), row(3)])
    rows[1, 17] = torch.nan
    rows[2, 3] = torch.inf
    tokens = [s.token_id for s in sample(rows, [state(temperature=0.0) for _ in range(3)])()]
    assert tokens == [int(rows[0].argmax()), None, None]
    rows[1, 17], rows[1, 2] = 0.0, torch.nan  # where the end is forbidden
    waiting = state(temperature=0.0, min_tokens=1)
    assert sample(rows[1:2], [waiting])()[0].token_id is None


def test_logprobs_are_the_models_own() -> None:
    logits = torch.stack([row(1), row(2)])
    states = [state(temperature=0.0, logit_bias={4: 100.0}, logprobs=3), state(temperature=0.0, logprobs=0)]
    biased, plain = sample(logits, states)()
    expected = logits.log_softmax(-1)
    assert biased.logprob is not None
    assert plain.logprob is not None
    assert biased.token_id == 4
    assert biased.logprob.logprob == pytest.approx(float(expected[0, 4]), abs=1e-5)
    values, ids = expected[0].topk(3)
    assert [t for t, _ in biased.logprob.top] == ids.tolist()
    assert [p for _, p in biased.logprob.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert plain.logprob.top == ()
    assert token_logprobs(logits, [4, 5], [0, 2])[0].top == ()


def test_tiny_temperatures_are_greedy() -> None:
    assert sample(row(1)[None], [state(temperature=1e-30)])()[0].token_id == int(row(1).argmax())


MIXED_PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 3.0, "top_p": 0.95},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
    {"temperature": 0.0, "logit_bias": {7: 100.0}},
    {"temperature": 1.0, "repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"temperature": 0.0, "min_tokens": 500, "stop_token_ids": (11,)},
]


def test_a_batch_is_chosen_as_row_by_row() -> None:
    """`draw_together`, which runs on CUDA, against its slow twin; each row alone as with the others."""

    def states() -> list[SamplerState]:
        return [state((1, 2, 3), seed=i, **params) for i, params in enumerate(MIXED_PARAMS)]

    each = states()
    for step in range(200):
        logits = torch.stack([row(step * len(each) + i) for i in range(len(each))])
        edited = EditedLogits(logits, [one.edits for one in each])
        draws = [one.next_draw() for one in each]
        expected = draw_tokens(None, logits, draws)
        assert draw_together(logits, draws).tolist() == expected
        assert [int(draw_together(logits[i : i + 1], [d])) for i, d in enumerate(draws)] == expected
        edited.restore()
        for token_id, one in zip(expected, each, strict=True):
            assert token_id is not None
            one.append(token_id)


@pytest.mark.skipif(native is None, reason="the native extension was not built")
def test_native_kernels_sample_what_their_oracle_does() -> None:
    workspace = Workspace(2)

    def states() -> list[SamplerState]:
        return [state((1, 2, 3), seed=i, logprobs=i % 4, **params) for i, params in enumerate(MIXED_PARAMS)]

    fast, slow = states(), states()
    for step in range(30):
        logits = torch.stack([row(step * len(fast) + i) for i in range(len(fast))])
        tokens = sample(logits, fast, workspace)()
        assert tokens == sample(logits, slow)()
        for token, *ones in zip(tokens, fast, slow, strict=True):
            assert token.token_id is not None
            for one in ones:
                one.append(token.token_id)


def test_in_a_batch_only_rows_that_are_not_finite_get_no_token() -> None:
    logits = torch.stack([row(1), row(2), row(3)])
    logits[1, 5] = torch.nan
    draws = [state(seed=1, temperature=t).next_draw() for t in (0.0, 0.0, 1.0)]
    tokens = draw_together(logits, draws)
    assert tokens[0] == int(logits[0].argmax())
    assert tokens[1] == -1
    assert tokens[2] >= 0


def test_a_device_scores_what_the_host_does() -> None:
    """`sample_on_device`, which runs on CUDA, against `sample`: rows that are not finite among the others."""

    def states() -> list[SamplerState]:
        return [
            state((1, 2, 3), seed=i, logprobs=(None, 0, 3, VOCAB + 1)[i % 4], **params)
            for i, params in enumerate(MIXED_PARAMS)
        ]

    here, there = states(), states()
    for step in range(20):
        logits = torch.stack([row(step * len(here) + i) for i in range(len(here))])
        logits[step % len(here), 5] = torch.nan
        expected, tokens = sample(logits.clone(), here)(), sample_on_device(logits, there)()
        for token, other, *ones in zip(expected, tokens, here, there, strict=True):
            assert token.token_id == other.token_id
            if token.logprob is None or token.token_id is None:
                assert other.logprob is token.logprob
                continue
            assert other.logprob is not None
            assert other.logprob.logprob == pytest.approx(token.logprob.logprob, abs=1e-5)
            assert [t for t, _ in other.logprob.top] == [t for t, _ in token.logprob.top]
            for one in ones:
                one.append(token.token_id)
