"""The benchmark runs, compares answers, and ends in one JSON object."""

import json

import pytest

from scone.server.cli import main


def test_a_small_run_ends_in_one_json_object(
    capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    sizes = {"rows": 3000, "dim": 64, "corpus-tokens": 60_000, "tokens": 300, "batch": 4, "repeats": 2}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    assert main(["bench", "lookup", *flags, "--work", str(tmp_path_factory.mktemp("bench"))]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["num_rows"] > 500
    assert 0 < result["matched_share"] <= 1
    assert all(entry["ours"] > 0 for entry in result["us_per_token"].values())
    assert set(result["rows_per_second_cold"]) == {
        "direct",
        "bare_direct_loop",
        "mmap",
        "lmdb_get_per_probe",
    }
