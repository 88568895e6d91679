"""A table that was expanded or pruned has the bytes of one that was built of the same f-grams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scone.cache import FGramTable
from scone.model_store.build_table import build_table
from scone.model_store.change_table import SourceTable, append_fgrams, keep_fgrams
from scone.model_store.checkpoint import Checkpoint, open_checkpoint, save_scone_folder
from scone.model_store.count import count_fgrams
from scone.model_store.errors import TableError
from scone.model_store.fgram_model import FGramModel
from scone.model_store.fgram_selection import keep_most_used, unite
from scone.model_store.fgram_set import FGramSet
from scone.model_store.token_corpus import TokenCorpus
from scone.server.cli import main

KINDS: list[dict[str, Any]] = [{"backend": "mmap", "codec": "raw"}, {"backend": "lmdb", "codec": "int8"}]


@pytest.fixture(scope="module")
def added(checkpoint: Checkpoint) -> FGramSet:
    """F-grams of another text: some that the first set has, some that it has not."""
    tokenizer = checkpoint.tokenizer()
    text = Path(pytest.__file__).read_text() + Path(np.__file__).read_text()
    corpus = TokenCorpus.from_documents([tokenizer.encode(text, add_special_tokens=False)])
    return count_fgrams(corpus, max_n=3, min_count=2, top=600, tokenizer_hash=tokenizer.hash, progress=False)


def content(table: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in table.iterdir()}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind['backend']}-{kind['codec']}")
def test_appended_equals_built(
    kind: dict[str, Any],
    checkpoint: Checkpoint,
    fgrams: FGramSet,
    added: FGramSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build_table(checkpoint, fgrams, tmp_path / "before", progress=False, **kind)
    united = unite(fgrams, added)
    build_table(checkpoint, united, tmp_path / "built", progress=False, **kind)
    embedded: list[int] = []
    embed = FGramModel.embed

    def counting(model: FGramModel, token_ids: Tensor, lengths: Tensor) -> Tensor:
        embedded.append(len(lengths))
        return embed(model, token_ids, lengths)

    monkeypatch.setattr(FGramModel, "embed", counting)
    num_new = append_fgrams(
        SourceTable(tmp_path / "before"), added, checkpoint, tmp_path / "after", progress=False
    )
    assert 0 < num_new < len(added)
    assert sum(embedded) == num_new == len(united) - len(fgrams)
    assert content(tmp_path / "after") == content(tmp_path / "built")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind['backend']}-{kind['codec']}")
def test_pruned_equals_built(
    kind: dict[str, Any], checkpoint: Checkpoint, fgrams: FGramSet, tmp_path: Path
) -> None:
    build_table(checkpoint, fgrams, tmp_path / "before", progress=False, **kind)
    num_uses = np.random.default_rng(0).zipf(1.5, len(fgrams))
    kept = keep_most_used(fgrams, num_uses, 500)
    keep_fgrams(SourceTable(tmp_path / "before"), kept, tmp_path / "after", progress=False)
    build_table(checkpoint, kept, tmp_path / "built", progress=False, **kind)
    assert content(tmp_path / "after") == content(tmp_path / "built")


def test_rows_of_another_fgram_model_are_not_mixed(
    checkpoint: Checkpoint, main_path: Path, fgrams: FGramSet, added: FGramSet, tmp_path: Path
) -> None:
    build_table(checkpoint, fgrams, tmp_path / "before", progress=False)
    other = FGramModel.from_decoder(checkpoint.decoder(), num_layers=1, max_n=3)
    torch.nn.init.normal_(other.output.weight, std=0.5)
    save_scone_folder(
        tmp_path / "other", other, main_path=main_path, main_hash=open_checkpoint(main_path).model_hash
    )
    with pytest.raises(TableError, match="were made by f-gram model"):
        append_fgrams(
            SourceTable(tmp_path / "before"), added, open_checkpoint(tmp_path / "other"), tmp_path / "after"
        )
    assert not (tmp_path / "after").exists()


def test_the_commands(
    checkpoint: Checkpoint,
    fgrams: FGramSet,
    added: FGramSet,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    build_table(checkpoint, fgrams, tmp_path / "t", progress=False)
    added.save(tmp_path / "added.fgrams")
    model, table, text = str(checkpoint.path), str(tmp_path / "t"), str(Path(pytest.__file__))
    grown, cut, used = (str(tmp_path / name) for name in ("grown", "cut", "used"))
    heldout = ["--heldout", text, "--max-tokens", "400"]
    append = ["append", table, "--model", model, "--fgrams", str(tmp_path / "added.fgrams"), "--out", grown]
    assert main([*append, *heldout]) == 0
    out = capsys.readouterr().out
    assert "new f-grams" in out
    assert "perplexity" in out
    assert main(["prune", grown, "--out", cut, "--top", "700", "--min-count", "4"]) == 0
    with FGramTable.open(cut) as pruned:
        assert pruned.manifest.closed
        assert pruned.num_fgrams <= 700
        assert pruned.manifest.min_count >= 4
    row_bytes = SourceTable(Path(table)).manifest.row_bytes
    by_uses = ["prune", grown, "--out", used, "--max-row-bytes", str(300 * row_bytes), "--uses", text]
    assert main(by_uses) == 2
    assert "model is missing" in capsys.readouterr().err
    assert main([*by_uses, "--model", model, *heldout]) == 0
    assert "with 300 of" in capsys.readouterr().out
    for wrong, code, message in (
        ([], 2, "nothing says what to drop"),
        (["--top", "0"], 2, "no f-gram would be left"),
        (["--top", "5"], 1, "exists"),
    ):
        assert main(["prune", grown, "--out", used, *wrong]) == code
        assert message in capsys.readouterr().err
