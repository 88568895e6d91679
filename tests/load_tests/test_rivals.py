"""What the comparison with other servers makes of its rounds."""

from __future__ import annotations

from load_tests.contestants import ours
from load_tests.rivals import bests, medians, ratios, table

ROUNDS = {
    "scone auto": [
        {"prefill": 900.0, "8": 300.0, "first_token_ms": 500.0, "stolen_percent": 9.0},
        {"prefill": 100.0, "8": 310.0, "first_token_ms": 540.0, "stolen_percent": 0.0},
        {"prefill": 1000.0, "8": 290.0, "first_token_ms": 520.0, "stolen_percent": 1.0},
    ],
    "slow": [{"prefill": 300.0, "8": 30.0, "first_token_ms": 1040.0, "stolen_percent": 0.0}],
    "fast": [{"prefill": 250.0, "8": 150.0, "first_token_ms": 2000.0, "stolen_percent": 0.0}],
}


def test_medians_are_those_of_the_rounds() -> None:
    assert medians(ROUNDS)["scone auto"] == {
        "prefill": 900.0,
        "8": 300.0,
        "first_token_ms": 520.0,
        "stolen_percent": 1.0,
    }


def test_the_best_round_is_the_fastest() -> None:
    assert bests(ROUNDS)["scone auto"] == {
        "prefill": 1000.0,
        "8": 310.0,
        "first_token_ms": 500.0,
        "stolen_percent": 0.0,
    }


def test_ratios_are_to_the_best_rival_of_each_test() -> None:
    assert ratios(medians(ROUNDS)) == {"scone auto": {"prefill": 3.0, "8": 2.0, "first_token_ms": 2.0}}
    assert ratios(medians({"scone auto": ROUNDS["scone auto"]})) == {}


def test_the_table_has_a_line_a_contestant() -> None:
    lines = table("median", {"a": {"1": 1.5, "8": 20.0}, "b": {"1": 3.0, "8": 4.0}}).splitlines()
    assert lines == ["| median | 1 | 8 |", "|---|---|---|", "| a | 1.5 | 20 |", "| b | 3 | 4 |"]


def test_ours_is_served_with_the_table_where_one_is_given() -> None:
    command = ours("scone", "none", "m.gguf", "t").command
    assert command[command.index("--table") + 1] == "t"
    assert "--table" not in ours("scone", "none", "m.gguf").command
