"""`scone count` on Python's own standard library with the demo model's tokenizer."""

import sysconfig
from pathlib import Path

import pytest

from scone.model_store.checkpoint import open_checkpoint
from scone.model_store.corpus import read_documents
from scone.model_store.count import count_fgrams
from scone.model_store.fgram_set import FGramSet
from scone.model_store.token_corpus import TokenCorpus
from scone.server.cli import main

CORPUS = f"{sysconfig.get_path('stdlib')}/json/*.py"


def test_the_file_holds_the_counted_set(
    smollm2_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = open_checkpoint(smollm2_path).tokenizer()
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    out = tmp_path / "json.fgrams"
    arguments = ["--max-n", "4", "--min-count", "3", "--top", "700", "--out", str(out)]
    assert main(["count", CORPUS, "--tokenizer", str(tmp_path), *arguments]) == 0
    documents = [tokenizer.encode(text, add_special_tokens=False) for text in read_documents([CORPUS])]
    corpus = TokenCorpus.from_documents(documents)
    expected = count_fgrams(
        corpus, max_n=4, min_count=3, top=700, tokenizer_hash=tokenizer.hash, progress=False
    )
    assert FGramSet.load(out).hash == expected.hash
    assert len(expected) == 700
    assert (
        f"counted {sum(map(len, documents)):,} tokens of {len(documents)} documents"
        in capsys.readouterr().out
    )
    first = out.read_bytes()
    for same in (tmp_path / "tokenizer.json", smollm2_path):
        assert main(["count", CORPUS, "--tokenizer", str(same), *arguments]) == 0
        assert out.read_bytes() == first
    # 0.1 MiB do not hold the keys: the count goes over the disk
    on_disk = ["--tokenizer", str(tmp_path), "--memory", "0.0001"]
    assert main(["count", CORPUS, *on_disk, *arguments]) == 0
    assert out.read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["json.fgrams", "tokenizer.json"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--top", "0"], 2, "top is 0, wanted >= 1"),
        (["--max-n", "1"], 2, "max_n is 1, wanted >= 2"),
        (["--memory", "nan"], 2, "memory is nan, wanted > 0 GiB"),
        (["--max-n", "many"], 2, "bad value for max_n"),
        ([], 1, "nowhere.json is missing"),
    ],
)
def test_a_bad_setting_is_one_line(
    arguments: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        "count",
        CORPUS,
        "--tokenizer",
        str(tmp_path / "nowhere.json"),
        "--out",
        str(tmp_path / "x.fgrams"),
    ]
    assert main([*given, *arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
