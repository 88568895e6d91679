"""Fields that are each valid but may not go together: a clear 400 or a right answer, never an error."""

from __future__ import annotations

import random
from typing import Any

import pytest

EOS = 2
VOCAB_SIZE = 300


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": [EOS], "min_tokens": 1},
        {"allowed_token_ids": [EOS, 70, 70], "stop_token_ids": [70], "min_tokens": 3},
        {"allowed_token_ids": [70], "stop_token_ids": [70, 71], "ignore_eos": True, "min_tokens": 1},
        {"stop_token_ids": list(range(VOCAB_SIZE)), "min_tokens": 1},
        {"stop_token_ids": [i for i in range(VOCAB_SIZE) if i != EOS], "min_tokens": 1},
    ],
)
def test_answers_that_may_neither_begin_nor_end_are_refused(
    server: Any, fields: dict[str, Any], stream: bool
) -> None:
    for path, prompt in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        response = server.post(path, **prompt, **fields, max_tokens=4, stream=stream)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == "min_tokens"
        assert "ends the answer" in error["message"]
    assert server.state.in_flight == set()


@pytest.mark.parametrize(
    ("fields", "token_ids"),
    [
        ({"allowed_token_ids": [EOS]}, [EOS]),
        ({"allowed_token_ids": [EOS], "ignore_eos": True, "min_tokens": 4}, [EOS] * 4),
        ({"allowed_token_ids": [EOS, 70], "min_tokens": 4}, [70, 70, 70, 70]),
        ({"allowed_token_ids": [70], "logit_bias": {"70": -100}, "min_tokens": 4}, [70] * 4),
        ({"allowed_token_ids": [70], "stop_token_ids": [70]}, [70]),
        ({"stop_token_ids": [i for i in range(VOCAB_SIZE) if i not in (EOS, 70)], "min_tokens": 4}, [70] * 4),
    ],
)
def test_what_is_left_is_chosen(server: Any, fields: dict[str, Any], token_ids: list[int]) -> None:
    [choice] = server.complete(prompt="a", max_tokens=4, return_token_ids=True, **fields)["choices"]
    assert choice["token_ids"] == token_ids


def test_any_combination_is_answered_or_refused(server: Any) -> None:
    """By a seeded generator: every answer keeps to all of its fields."""
    generator = random.Random(0)
    choices: dict[str, list[Any]] = {
        "allowed_token_ids": [[EOS], [70], [EOS, 70], [70, 71, 71], list(range(VOCAB_SIZE))],
        "logit_bias": [{"70": -100}, {"70": 100, "71": -100}, {str(i): -100 for i in range(VOCAB_SIZE)}],
        "stop_token_ids": [[70], [70, 71], list(range(3, VOCAB_SIZE)), list(range(VOCAB_SIZE))],
        "min_tokens": [1, 3],
        "ignore_eos": [True],
        "temperature": [0, 1e-300, 1e-6, 1e-4, 2],
        "top_p": [1e-300, 0.5],
        "top_k": [-1, 1, 2**63 - 1],
        "min_p": [1e-300, 1],
        "repetition_penalty": [0.01, 100],
        "frequency_penalty": [-2, 2],
        "presence_penalty": [-2, 2],
        "seed": [-(2**63), 2**63 - 1],
        "logprobs": [0, 20],
        "echo": [True],
        "n": [2],
    }
    statuses = set()
    for _ in range(300):
        names = [name for name in choices if generator.random() < 0.35]
        fields = {name: generator.choice(choices[name]) for name in names}
        response = server.post(
            "/v1/completions", prompt=[70, 71, 9], max_tokens=3, return_token_ids=True, **fields
        )
        statuses.add(response.status_code)
        assert response.status_code in (200, 400), (fields, response.text)
        if response.status_code == 400:
            assert response.json()["error"]["param"] == "min_tokens", fields
            continue
        final = {*fields.get("stop_token_ids", [])} | (set() if fields.get("ignore_eos") else {EOS})
        for choice in response.json()["choices"]:
            token_ids = choice["token_ids"]
            assert set(token_ids) <= set(fields.get("allowed_token_ids", range(VOCAB_SIZE))), fields
            assert final.isdisjoint(token_ids[: fields.get("min_tokens", 1) - 1]), fields
            assert choice["finish_reason"] == ("stop" if token_ids[-1] in final else "length"), fields
    assert statuses == {200, 400}
