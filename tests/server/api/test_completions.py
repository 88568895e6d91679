"""POST /v1/completions over a real socket."""

from __future__ import annotations

import json
from typing import Any

import pytest


def test_text_prompt(server: Any) -> None:
    answer = server.complete(prompt="abc", max_tokens=5, temperature=0, ignore_eos=True)
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    assert answer["id"].startswith("cmpl-")
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 5, 8)
    assert usage["fgram"]["matched_tokens"] >= 2, "b ends ab, c ends abc"
    assert usage["fgram"]["rows_by_tier"]["disk"] == usage["fgram"]["matched_tokens"]


def test_all_prompt_forms_agree(server: Any, tokenizer: Any) -> None:
    texts = ["abc", "xyz"]
    ids = [tokenizer.encode(text) for text in texts]
    fields = {"max_tokens": 8, "temperature": 0, "return_token_ids": True}
    by_text = server.complete(prompt=texts, **fields)["choices"]
    by_ids = server.complete(prompt=ids, **fields)["choices"]
    assert [c["prompt_token_ids"] for c in by_text] == ids
    assert by_ids == by_text
    assert by_text[0]["token_ids"] != by_text[1]["token_ids"]
    for i in range(2):
        for prompt in (texts[i], ids[i]):
            [choice] = server.complete(prompt=prompt, **fields)["choices"]
            assert choice == by_text[i] | {"index": 0}


def test_choices_are_ordered_by_prompt_then_answer(server: Any) -> None:
    choices = server.complete(prompt=["ab", "cd"], n=2, max_tokens=2, echo=True)["choices"]
    assert [(c["index"], c["text"][:2]) for c in choices] == [(0, "ab"), (1, "ab"), (2, "cd"), (3, "cd")]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("n", [1, 2])
def test_stream_says_the_same(server: Any, echo: bool, logprobs: int | None, n: int) -> None:
    body = {
        "prompt": ["abc", "añ€😀"],
        "max_tokens": 6,
        "seed": 3,
        "echo": echo,
        "logprobs": logprobs,
        "n": n,
    }
    body["return_token_ids"] = True
    whole = server.complete(**body)
    *chunks, done = server.stream(**body)
    assert done == "[DONE]"
    joined: dict[int, dict[str, Any]] = {}
    for chunk in map(json.loads, chunks):
        assert "usage" not in chunk
        [piece] = chunk["choices"]
        choice = joined.setdefault(piece["index"], {"text": "", "token_ids": [], "logprobs": None})
        choice["text"] += piece["text"]
        choice["token_ids"] += piece["token_ids"]
        if piece["logprobs"] is not None:
            choice["logprobs"] = choice["logprobs"] or {}
            for key, part in piece["logprobs"].items():
                if part is None:
                    choice["logprobs"][key] = None
                else:
                    choice["logprobs"].setdefault(key, []).extend(part)
        if piece["finish_reason"] is not None:
            assert "finish_reason" not in choice, "the finish reason comes once a choice"
            choice["finish_reason"] = piece["finish_reason"]
    for choice in whole["choices"]:
        assert joined[choice["index"]] == {key: choice[key] for key in joined[choice["index"]]}


def test_seed_repeats_alone_and_in_a_batch(server: Any) -> None:
    fields = {"max_tokens": 12, "seed": 7, "temperature": 1.3}
    [alone] = server.complete(prompt="abc", **fields)["choices"]
    among = server.complete(prompt=["xyz", "abc", "q"], **fields)["choices"]
    assert among[1]["text"] == alone["text"]
    assert server.complete(prompt="abc", **fields | {"seed": 8})["choices"][0]["text"] != alone["text"]


def test_echo_with_logprobs_as_an_evaluation_asks(server: Any, tokenizer: Any) -> None:
    """lm-eval's loglikelihood request: the last generated token is dropped, the first has no logprob."""
    ids = [tokenizer.encode("añ abcd"), tokenizer.encode("xy")]
    answer = server.complete(
        model="tiny", prompt=ids, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
    )
    for prompt, choice in zip(ids, answer["choices"], strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(prompt) + 1
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        assert all(logprob < 0 for logprob in logprobs["token_logprobs"][1:])
        for i, token in enumerate(logprobs["tokens"][1:], start=1):
            logprob, top = logprobs["token_logprobs"][i], logprobs["top_logprobs"][i]
            assert top[token] == logprob
            assert logprob <= max(top.values())
    first = answer["choices"][0]
    assert first["text"].startswith("añ abcd")
    assert first["logprobs"]["tokens"][:3] == ["a", "bytes:\\xc3", "bytes:\\xb1"]
    assert first["logprobs"]["text_offset"][:5] == [0, 1, 1, 2, 3]


def test_include_usage(server: Any) -> None:
    *chunks, done = server.stream(
        prompt="q", max_tokens=3, ignore_eos=True, stream_options={"include_usage": True}
    )
    *pieces, last = map(json.loads, chunks)
    assert done == "[DONE]"
    assert all(piece["usage"] is None for piece in pieces)
    assert last["choices"] == []
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (1, 3)


def test_null_means_the_default(server: Any) -> None:
    names = ["max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "logprobs", "echo", "model"]
    answer = server.complete(prompt="ab", ignore_eos=True, **dict.fromkeys(names))
    assert answer["usage"]["completion_tokens"] == 16


def test_overflow_is_cut_to_the_context(server: Any) -> None:
    answer = server.complete(prompt=[70] * 250, max_tokens=100, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a", 3]}, "prompt"),
        ({"prompt": [70, "a"]}, "prompt"),
        ({"prompt": [70, True]}, "prompt"),
        ({"prompt": [70, 1.5]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": [70] * 256}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "3"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": False}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"7": 101}}, "logit_bias"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-30}, "repetition_penalty"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"stop_token_ids": [300]}, "stop_token_ids"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"stream": "yes"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
        ({"suffix": "x"}, "suffix"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"return_tokens_as_token_ids": True}, "return_tokens_as_token_ids"),
    ],
)
def test_bad_field(server: Any, fields: dict[str, Any], param: str) -> None:
    response = server.post("/v1/completions", **({"prompt": "a"} if fields else {}) | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"].split(".")[0] == param
    assert server.state.in_flight == set()


@pytest.mark.parametrize(
    ("stop", "param", "sentence"),
    [
        (3, "stop", "stop: Input should be a valid string (got 3)."),
        ([None], "stop.0", "stop.0: Input should be a valid string (got None)."),
        (["a"] * 17, "stop", "stop: List should have at most 16 items after validation, not 17"),
    ],
)
def test_the_form_that_was_meant_is_the_one_that_is_wrong(
    server: Any, stop: Any, param: str, sentence: str
) -> None:
    error = server.post("/v1/completions", prompt="a", stop=stop).json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(sentence)


def test_fields_that_ask_for_nothing_are_accepted(server: Any) -> None:
    server.complete(
        prompt="a", suffix=None, best_of=1, response_format={"type": "text"}, bad_words=[], user="someone"
    )


def test_context_overflow_has_its_code(server: Any) -> None:
    error = server.post("/v1/completions", prompt=[70] * 256).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "256" in error["message"]


def test_unknown_field_is_counted_and_warned_of_once(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    before = server.metric("scone_unknown_parameters_total")
    for _ in range(3):
        server.complete(prompt="a", max_tokens=1, no_such_field=1)
    assert server.metric("scone_unknown_parameters_total") == before + 3
    assert sum("no_such_field" in record.getMessage() for record in caplog.records) == 1


def test_unknown_stream_option_is_counted(server: Any) -> None:
    before = server.metric("scone_unknown_parameters_total")
    server.stream(prompt="a", max_tokens=1, stream_options={"continuous_usage_stats": True})
    assert server.metric("scone_unknown_parameters_total") == before + 1


def test_unknown_model(server: Any) -> None:
    response = server.post("/v1/completions", prompt="a", model="gpt-9")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_same_client_request_id_twice_at_once(server: Any) -> None:
    headers = {"X-Request-Id": "mine"}
    for _ in range(2):
        response = server.client.post("/v1/completions", json={"prompt": "a"}, headers=headers)
        assert response.status_code == 200
        assert response.headers["x-request-id"] == "mine"


def test_sampling_fields_reach_the_engine(scripted_server: Any, scripted: Any) -> None:
    scripted_server.complete(
        prompt="ab", temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, seed=-3, stop="x",
        logit_bias={"7": -100}, presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.5,
        min_tokens=2, ignore_eos=True,
        stop_token_ids=[9], allowed_token_ids=[70, 71, 70], include_stop_str_in_output=True,
        skip_special_tokens=False, max_tokens=4.0,
    )  # fmt: skip
    sampling = scripted.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 0, 0.1)
    assert (sampling.seed, sampling.stop, dict(sampling.logit_bias)) == (-3, ("x",), {7: -100.0})
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (
        1,
        -1,
        1.5,
    )
    assert (sampling.min_tokens, sampling.ignore_eos, sampling.stop_token_ids) == (2, True, (9,))
    assert (sampling.allowed_token_ids, sampling.max_tokens) == ((70, 71), 4)
    assert sampling.include_stop_str_in_output
    assert not sampling.skip_special_tokens


def test_minus_infinity_becomes_a_number(scripted_server: Any) -> None:
    [choice] = scripted_server.complete(prompt="a", max_tokens=1, logprobs=2)["choices"]
    assert sorted(choice["logprobs"]["top_logprobs"][0].values()) == [-9999.0, -0.5]


def test_prompt_can_be_scored_without_an_answer(scripted_server: Any) -> None:
    answer = scripted_server.complete(prompt="abc", max_tokens=0, echo=True, logprobs=0)
    [choice] = answer["choices"]
    assert choice["text"] == "abc"
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert choice["logprobs"]["top_logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 0
