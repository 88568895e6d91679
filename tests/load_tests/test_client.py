"""The client's measurements against a server that answers by script, at times known to the test."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import pytest

from load_tests.client import RequestRecord, complete, post_json
from load_tests.http_response import ResponseError

T = TypeVar("T")

TEXT = b'data: {"choices":[{"index":0,"text":"a"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def ask(script: Sequence[bytes | float], timeout_seconds: float = 30) -> tuple[RequestRecord, bytes]:
    """One completion from a server that sends the bytes of `script` and sleeps its numbers; its request."""

    async def complete_one(url: str) -> RequestRecord:
        body = {"prompt": "x", "max_tokens": 2}
        return await complete(url, body, api_key="secret", timeout_seconds=timeout_seconds)

    return talk(script, complete_one)


def talk(script: Sequence[bytes | float], client: Callable[[str], Awaitable[T]]) -> tuple[T, bytes]:
    received = b""
    answered = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        received = await reader.readuntil(b"\r\n\r\n")
        for part in script:
            if isinstance(part, float):
                await asyncio.sleep(part)
            else:
                writer.write(part)
                await writer.drain()
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        answered.set()

    async def main() -> T:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            result = await client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            await answered.wait()
            return result

    return asyncio.run(main()), received


def test_times_and_usage_of_a_chunked_stream() -> None:
    head = OK + b"Transfer-Encoding: chunked\r\n\r\n"
    script: list[bytes | float] = [
        head,
        0.1,
        chunk(TEXT),
        1.0,
        chunk(TEXT),
        chunk(USAGE + DONE),
        b"0\r\n\r\n",
    ]
    record, request = ask(script)
    assert record.error is None
    assert (record.num_prompt_tokens, record.num_generated_tokens) == (7, 2)
    first, second = record.token_times
    assert first - record.start > 0.09
    assert second - first > 0.2  # of the second that lies between, also if this process was kept waiting
    assert record.end >= second
    assert request.startswith(b"POST /v1/completions HTTP/1.1\r\n")
    assert b"Authorization: Bearer secret\r\n" in request


def test_post_json() -> None:
    async def post(url: str) -> Any:
        return await post_json(url, "/v1/embeddings", {"input": "x"})

    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer, request = talk([head, chunk(b'{"data":'), chunk(b"[]}"), b"0\r\n\r\n"], post)
    assert answer == {"data": []}
    assert request.startswith(b"POST /v1/embeddings HTTP/1.1\r\n")
    with pytest.raises(ResponseError, match="HTTP 409: b'no'"):
        talk([b"HTTP/1.1 409 Conflict\r\nContent-Length: 2\r\n\r\nno"], post)


def test_events_split_anywhere_and_keep_alives() -> None:
    stream = b": ping\n\n" + TEXT + TEXT + USAGE + DONE
    script: list[bytes | float] = [OK + b"\r\n"]
    script += [stream[i : i + 5] for i in range(0, len(stream), 5)]
    record, _ = ask(script)
    assert record.error is None
    assert len(record.token_times) == 2


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ([b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nfull"], "HTTP 503: b'full'"),
        ([OK + b"\r\n" + TEXT], "the stream ended without [DONE]"),
        ([OK + b"\r\n" + b'data: {"error":{"message":"row lost"}}\n\n' + DONE], "row lost"),
        ([OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"ff\r\nda"], "cut short"),
        ([OK + b"\r\n", 2.5], "no complete answer within 2 s"),
    ],
)
def test_every_failure_is_an_error_of_the_record(script: list[bytes | float], error: str) -> None:
    record, _ = ask(script, timeout_seconds=2)
    assert record.error is not None
    assert error in record.error


def test_a_closed_port_is_an_error_of_the_record() -> None:
    record = asyncio.run(complete("http://127.0.0.1:9", {"prompt": "x"}))
    assert record.error is not None
    assert "ConnectionRefusedError" in record.error
