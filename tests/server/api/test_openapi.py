"""The OpenAPI document says what the server does: schemathesis sends what it allows and what it forbids.

schemathesis brings many packages, so it has an environment of its own: `make test-openapi` makes that and
runs this.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

CONFIG = Path(__file__).parent / "schemathesis.toml"


def test_every_error_is_described(server: Any) -> None:
    document = server.client.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for status, response in operation["responses"].items():
                if int(status) < 400:
                    continue
                assert status != "422", "bad bodies are answered 400"
                schema = response["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorBody"}, (path, method, status)


def test_null_is_allowed_where_there_is_a_default(server: Any) -> None:
    schemas = server.client.get("/openapi.json").json()["components"]["schemas"]
    fields = schemas["CompletionRequest"]["properties"]
    assert {"type": "null"} in fields["temperature"]["anyOf"]
    assert {"type": "null"} not in fields["prompt"].get("anyOf", [])
    assert schemas["CompletionRequest"]["required"] == ["prompt"]


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_schemathesis_finds_nothing(server: Any) -> None:
    program = os.environ.get("SCONE_SCHEMATHESIS")
    if program is None:
        pytest.skip("SCONE_SCHEMATHESIS does not name the program; `make test-openapi` does")
    done = subprocess.run(
        [program, "--config-file", str(CONFIG), "run", server.url + "/openapi.json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert server.client.get("/ready").status_code == 200
