"""What a stream says, joined, is what the answer says that is not streamed: over drawn prompts and settings.

The tiny model's bytes are as good as random, so characters are split over tokens, and broken, all the time.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from typing import Any

import pytest

ALPHABET = "abcdxyz ñ€😀\n"
SEEDS = range(24)


def drawn_body(draw: random.Random) -> dict[str, Any]:
    """A request with some of everything."""
    prompts = ["".join(draw.choices(ALPHABET, k=draw.randint(1, 30))) for _ in range(draw.choice((1, 1, 3)))]
    body: dict[str, Any] = {
        "prompt": prompts,
        "max_tokens": draw.randint(1, 60),
        "seed": draw.randrange(1 << 40),
        "temperature": draw.choice((0, 0.7, 1, 1.5)),
        "n": draw.choice((1, 1, 2)),
        "echo": draw.random() < 0.3,
        "logprobs": draw.choice((None, None, 0, 3)),
        "ignore_eos": draw.random() < 0.5,
        "skip_special_tokens": draw.random() < 0.7,
        "include_stop_str_in_output": draw.random() < 0.3,
        "return_token_ids": True,
    }
    for field, value in (("top_k", 20), ("top_p", 0.9), ("min_p", 0.05), ("frequency_penalty", 0.5)):
        if draw.random() < 0.3:
            body[field] = value
    if draw.random() < 0.5:
        body["stop"] = ["".join(draw.choices("etaoin a", k=draw.randint(1, 2))) for _ in range(3)]
    return body


def joined(events: list[str]) -> dict[int, dict[str, Any]]:
    """The choices that a stream's events make."""
    assert events.count("[DONE]") == 1
    assert events[-1] == "[DONE]"
    choices: dict[int, dict[str, Any]] = defaultdict(lambda: {"text": "", "token_ids": [], "logprobs": None})
    for event in events[:-1]:
        [piece] = json.loads(event)["choices"]
        choice = choices[piece["index"]]
        assert "finish_reason" not in choice, "something came after the finish reason"
        choice["text"] += piece["text"]
        choice["token_ids"] += piece["token_ids"]
        if piece["logprobs"] is not None:
            choice["logprobs"] = choice["logprobs"] or defaultdict(list)
            for key, part in piece["logprobs"].items():
                choice["logprobs"][key] = None if part is None else choice["logprobs"][key] + part
        if piece["finish_reason"] is not None:
            choice |= {"finish_reason": piece["finish_reason"], "stop_reason": piece["stop_reason"]}
    return choices


@pytest.mark.parametrize("seed", SEEDS)
def test_completions(server: Any, seed: int) -> None:
    body = drawn_body(random.Random(seed))
    whole = server.complete(**body)
    choices = joined(server.stream(**body))
    assert len(choices) == len(body["prompt"]) * body["n"]
    for choice in whole["choices"]:
        streamed = choices[choice["index"]]
        assert streamed == {key: choice[key] for key in streamed}


@pytest.mark.parametrize("seed", SEEDS[:12])
def test_chat(server: Any, seed: int) -> None:
    draw = random.Random(seed)
    body = drawn_body(draw)
    text = body.pop("prompt")[0]
    for field in ("echo", "logprobs"):
        body.pop(field)
    body |= {"messages": [{"role": "user", "content": text}], "logprobs": draw.random() < 0.5}
    whole = server.post("/v1/chat/completions", **body).json()
    pieces = [json.loads(e)["choices"][0] for e in server.stream("/v1/chat/completions", **body)[:-1]]
    for choice in whole["choices"]:
        mine = [piece for piece in pieces if piece["index"] == choice["index"]]
        assert "".join(p["delta"].get("content", "") for p in mine) == choice["message"]["content"]
        entries = [entry for p in mine if p["logprobs"] for entry in p["logprobs"]["content"]]
        assert entries == (choice["logprobs"] or {"content": []})["content"]
        assert [p["finish_reason"] for p in mine if p["finish_reason"]] == [choice["finish_reason"]]
        assert mine[-1]["finish_reason"], "the reason comes last"


@pytest.mark.parametrize("seed", SEEDS)
def test_no_part_of_a_stop_string_is_sent(server: Any, seed: int) -> None:
    """A stop string cut from anywhere in the answer, so that it begins and ends within tokens."""
    draw = random.Random(seed)
    body: dict[str, Any] = {
        "prompt": "".join(draw.choices(ALPHABET, k=9)),
        "max_tokens": 80,
        "seed": seed,
        "ignore_eos": True,
        "logit_bias": {str(i): 5 for i in range(200, 300)},  # merged tokens: stop strings end within one
    }
    [free] = server.complete(**body)["choices"]
    text = free["text"]
    clean = [i for i in range(len(text)) if "�" not in text[i : i + 6]]
    begin = draw.choice(clean or [0])
    stop = text[begin : begin + draw.randint(1, 6)]
    end = text.index(stop)
    pieces = [
        json.loads(event)["choices"][0] for event in server.stream(**body, stop=["never in it", stop])[:-1]
    ]
    sent = ""
    for piece in pieces:
        sent += piece["text"]
        assert text[:end].startswith(sent), "text that the stop takes back"
    assert sent == text[:end]
    assert (pieces[-1]["finish_reason"], pieces[-1]["stop_reason"]) == ("stop", stop)
    [kept] = server.complete(**body, stop=stop, include_stop_str_in_output=True)["choices"]
    assert kept["text"] == text[: end + len(stop)]


@pytest.mark.parametrize("text", ["é", "€", "😀", "aé€"])
@pytest.mark.parametrize("seed", range(3))
def test_characters_are_sent_whole(server: Any, tokenizer: Any, text: str, seed: int) -> None:
    """Only bytes of `text`, in any order: whole characters, and broken ones that become U+FFFD."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    body = {"prompt": "q", "max_tokens": 60, "seed": seed, "temperature": 1.5, "allowed_token_ids": ids}
    pieces = [
        json.loads(e)["choices"][0]
        for e in server.stream(**body, return_token_ids=True, ignore_eos=True)[:-1]
    ]
    raw = b"".join(tokenizer.token_bytes(i) for piece in pieces for i in piece["token_ids"])
    assert len(raw) == 60
    assert "".join(piece["text"] for piece in pieces) == raw.decode(errors="replace")
    if len(ids) > 1:
        assert any(not piece["text"] for piece in pieces), "some token was held back"
