"""docs/api.md: every route is on it, and each of its examples works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

PAGE = (Path(__file__).parents[3] / "docs/api.md").read_text()


def commands() -> list[list[str]]:
    """The words of each curl command."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("curl ")]


def test_every_route_has_an_example(server: Any) -> None:
    paths = set(server.client.get("/openapi.json").json()["paths"])
    examples = {next(w for w in words if w.startswith("http")).split(":8000")[1] for words in commands()}
    assert examples == {path.replace("{model_id}", "$MODEL") for path in paths}


def test_every_example_works(server: Any) -> None:
    for words in commands():
        [url] = [word for word in words if word.startswith("http://127.0.0.1:8000/")]
        path = url.removeprefix("http://127.0.0.1:8000").replace("$MODEL", "tiny")
        if "-d" in words:
            headers = dict([words[words.index("-H") + 1].split(": ")])
            answer = server.client.post(path, content=words[words.index("-d") + 1], headers=headers)
        else:
            answer = server.client.request("POST" if "POST" in words else "GET", path)
        assert answer.status_code == 200, (words, answer.text)


def test_every_error_code_is_listed() -> None:
    folder = Path(__file__).parents[3] / "server"
    sources = [path.read_text() for path in (*folder.glob("api/*.py"), *folder.glob("engine/*.py"))]
    codes = {code for source in sources for code in re.findall(r'\bcode="(\w+)"', source)}
    assert len(codes) > 15
    assert sorted(code for code in codes if f"`{code}`" not in PAGE) == []
