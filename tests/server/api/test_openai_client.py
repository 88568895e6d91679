"""The official Python client over a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "scone-serve"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt=["ab", "xy"], max_tokens=4, logprobs=2, temperature=0, n=2, user="someone"
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens is not None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer._request_id


def test_completion_stream(client: openai.OpenAI) -> None:
    fields: Any = {"model": "tiny", "prompt": "ab", "max_tokens": 6, "seed": 3}
    whole = client.completions.create(**fields)
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_chat(client: openai.OpenAI) -> None:
    fields: Any = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 6,
        "seed": 3,
    }
    whole = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.content is not None
    stream = client.chat.completions.create(**fields, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a", temperature=3)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="a")
    assert missing.value.code == "model_not_found"


def test_error_in_a_stream_raises(scripted_server: Any, scripted: Any) -> None:
    scripted.fail_after = 2
    with openai.OpenAI(base_url=scripted_server.url + "/v1", api_key="any", max_retries=0) as client:
        stream = client.completions.create(model="tiny", prompt="abcd", max_tokens=9, stream=True)
        with pytest.raises(openai.APIError, match="could not be read"):
            list(stream)


def test_key(serve: Any, scripted_model: Any) -> None:
    with serve(scripted_model, api_keys=("right",)) as server:
        with openai.OpenAI(base_url=server.url + "/v1", api_key="right") as client:
            assert client.models.list().data
        with (
            openai.OpenAI(base_url=server.url + "/v1", api_key="wrong") as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


def test_full_queue_is_retried(scripted_server: Any, scripted: Any) -> None:
    scripted.room = 0
    with (
        openai.OpenAI(base_url=scripted_server.url + "/v1", api_key="any", max_retries=1) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.completions.create(model="tiny", prompt="a")
    assert caught.value.status_code == 503
    assert scripted_server.metric("scone_admission_rejections_total", reason="queue_full") == 2
