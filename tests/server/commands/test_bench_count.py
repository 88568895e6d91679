"""`scone bench count` ends with the benchmark's JSON object."""

import json

import pytest

from scone.server.cli import main


def test_the_last_line_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "count", "--corpus-tokens", "20000", "--rows", "300"]) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (measured["benchmark"], measured["num_tokens"], measured["num_fgrams"]) == ("count", 20000, 300)
    assert measured["np_unique"]["cpu_seconds"] >= 0
