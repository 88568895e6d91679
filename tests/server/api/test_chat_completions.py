"""POST /v1/chat/completions through the model's own template."""

from __future__ import annotations

import json
from typing import Any

import pytest

from scone.model_store.tokenizer import Tokenizer
from scone.server.api.chat_template import render_chat
from scone.server.api.state import ServedModel
from scone.server.errors import InvalidRequestError

HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def with_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    return Tokenizer(
        tokenizer.backend, bos_id=tokenizer.bos_id, eos_ids=tokenizer.eos_ids, chat_template=template
    )


def test_answer(server: Any, tokenizer: Any) -> None:
    response = server.post(
        "/v1/chat/completions", messages=HELLO, max_completion_tokens=5, temperature=0, ignore_eos=True
    )
    answer = response.json()
    assert answer["object"] == "chat.completion"
    [choice] = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    prompt = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    [plain] = server.complete(prompt=ids, max_tokens=5, temperature=0, ignore_eos=True)["choices"]
    assert choice["message"]["content"] == plain["text"]


def test_default_length_is_the_rest_of_the_context(server: Any) -> None:
    answer = server.post("/v1/chat/completions", messages=HELLO, temperature=0, ignore_eos=True).json()
    assert answer["usage"]["total_tokens"] == 256


@pytest.mark.parametrize("n", [1, 2])
def test_stream_says_the_same(server: Any, n: int) -> None:
    fields = {"messages": HELLO, "max_tokens": 6, "seed": 5, "n": n, "logprobs": True, "top_logprobs": 2}
    whole = server.post("/v1/chat/completions", **fields).json()
    *chunks, last, done = server.stream(
        "/v1/chat/completions", stream_options={"include_usage": True}, **fields
    )
    assert done == "[DONE]"
    usage = json.loads(last)["usage"]
    assert usage["completion_tokens"] == whole["usage"]["completion_tokens"]
    for choice in whole["choices"]:
        pieces = [json.loads(c)["choices"][0] for c in chunks]
        pieces = [piece for piece in pieces if piece["index"] == choice["index"]]
        assert pieces[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(p["delta"].get("content", "") for p in pieces) == choice["message"]["content"]
        logprobs = [entry for p in pieces if p["logprobs"] for entry in p["logprobs"]["content"]]
        assert logprobs == choice["logprobs"]["content"]
        assert all(len(entry["top_logprobs"]) == 2 for entry in logprobs)
        assert [p["finish_reason"] for p in pieces if p["finish_reason"]] == [choice["finish_reason"]]


def test_content_parts(server: Any) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    fields = {"max_tokens": 4, "temperature": 0}
    split = server.post(
        "/v1/chat/completions", messages=[{"role": "user", "content": parts}], **fields
    ).json()
    plain = server.post("/v1/chat/completions", messages=HELLO[1:], **fields).json()
    assert split["choices"] == plain["choices"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages.0.content.0.type",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": HELLO, "echo": True}, "echo"),
        ({"messages": HELLO, "add_special_tokens": True}, "add_special_tokens"),
        ({"messages": HELLO, "add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": HELLO, "continue_final_message": True}, "continue_final_message"),
        ({"messages": HELLO, "chat_template": "{{ messages }}"}, "chat_template"),
        ({"messages": HELLO, "chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
        ({"messages": HELLO, "documents": [{"title": "x"}]}, "documents"),
        ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": HELLO, "logprobs": 2}, "logprobs"),
        ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "messages"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens"),
        ({"messages": HELLO, "max_tokens": 2, "min_tokens": 3}, "min_tokens"),
    ],
)
def test_bad_field(server: Any, fields: dict[str, Any], param: str) -> None:
    response = server.post("/v1/chat/completions", **fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_base_model_says_so(serve: Any, scripted: Any, tokenizer: Any) -> None:
    base = with_template(tokenizer, None)
    model = ServedModel(
        name="base", engine=scripted, tokenizer=base, table=None, max_model_len=256, dim=64, num_layers=3
    )
    with serve(model) as server:
        response = server.post("/v1/chat/completions", messages=HELLO)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "no_chat_template"


def test_template_names(tokenizer: Any) -> None:
    """What Hugging Face's templates rely on."""
    template = (
        "{{ bos_token }}{{ eos_token }}{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}"
        "{{ m | tojson }}{% endfor %}{{ strftime_now('%Y') | length }}"
    )
    rendered = render_chat(with_template(tokenizer, template), [{"role": "user", "content": "<é>"}, {}])
    assert rendered == '<s></s>{"role": "user", "content": "<é>"}4'


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('Roles must alternate') }}",
        "{{ messages[9]['content'] + 1 }}",
        "{% for %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_template_that_refuses_or_breaks_out(tokenizer: Any, template: str) -> None:
    with pytest.raises(InvalidRequestError, match="template"):
        render_chat(with_template(tokenizer, template), HELLO)
