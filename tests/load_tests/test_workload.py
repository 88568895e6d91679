"""Prompts: real text, reproducible, within the asked lengths."""

from itertools import islice

import pytest

from load_tests.workload import prompts, read_library


def test_prompts_are_reproducible_stretches_of_the_library() -> None:
    text = read_library(max_chars=200_000)
    first, again, other = (list(islice(prompts(text, 10, 50, seed), 20)) for seed in (1, 1, 2))
    assert first == again != other
    assert all(10 <= len(prompt) <= 50 and prompt in text for prompt in first)


def test_lengths_must_fit_the_text() -> None:
    with pytest.raises(ValueError, match="prompt lengths 5 to 11 do not fit"):
        next(prompts("0123456789", 5, 11, 0))
