"""A built table holds the f-gram model's rows; killed and resumed builds give the same bytes."""

import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from scone.cache import FGramTable
from scone.model_store import build_table as build_table_module
from scone.model_store.build_table import build_table, embed
from scone.model_store.checkpoint import Checkpoint, open_checkpoint, save_scone_folder
from scone.model_store.errors import CheckpointError, FGramSetError, TableError
from scone.model_store.fgram_model import FGramModel
from scone.model_store.fgram_set import FGramSet
from scone.server.cli import main


def digest(table: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(table.iterdir())}


@pytest.fixture(scope="module")
def table(checkpoint: Checkpoint, fgrams: FGramSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tables") / "whole"
    build_table(checkpoint, fgrams, out, progress=False)
    return out


def test_a_row_does_not_depend_on_its_neighbours(checkpoint: Checkpoint, fgrams: FGramSet) -> None:
    model = checkpoint.fgram_model(checkpoint.decoder())
    assert model is not None
    whole = embed(model, fgrams, slice(0, len(fgrams)))
    assert torch.equal(embed(model, fgrams, slice(700, len(fgrams))), whole[700:])
    for row in (0, 1, 317, 1199):
        assert torch.equal(embed(model, fgrams, slice(row, row + 1))[0], whole[row])
    # and it is the model's forward on that f-gram, up to the rounding of another batch shape
    for n in set(fgrams.lengths.tolist()):
        places = np.flatnonzero(fgrams.lengths == n)[:50]
        direct = model(torch.from_numpy(fgrams.tokens[places, :n].astype(np.int64)))
        torch.testing.assert_close(whole[places], direct, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["mmap", "lmdb"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_are_those_of_the_model(
    checkpoint: Checkpoint,
    fgrams: FGramSet,
    backend: str,
    dtype: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Through the command that users type, and the door that the server reads by."""
    fgrams.save(tmp_path / "set.fgrams")
    out = tmp_path / "table"
    arguments = {"model": checkpoint.path, "fgrams": tmp_path / "set.fgrams", "out": out}
    flags = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    assert main(["build", *flags, "--backend", backend, "--dtype", dtype]) == 0
    assert "embedded 1,200 f-grams" in capsys.readouterr().out
    model = checkpoint.fgram_model(checkpoint.decoder())
    assert model is not None
    expected = embed(model, fgrams, slice(0, len(fgrams))).to(getattr(torch, dtype))
    table = FGramTable.open(out)
    try:
        table.check_model(checkpoint.model_hash, checkpoint.tokenizer().hash)
        assert torch.equal(table.rows(torch.arange(len(fgrams))), expected)
        for row, (tokens, n) in enumerate(zip(fgrams.tokens[:100].tolist(), fgrams.lengths, strict=False)):
            row_ids, matched = table.match(np.array(tokens[:n], np.int32))
            assert (row_ids[-1], matched[-1]) == (row, n)
    finally:
        table.close()
    assert main(["verify", str(out), "--model", str(checkpoint.path), "--sample", "20"]) == 0
    assert "20 rows embedded again, 20 of them equal bit for bit" in capsys.readouterr().out
    assert main(["build", *flags]) == 1
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize("rows_per_batch", [256, 300, 5000])
def test_bytes_do_not_depend_on_the_batches(
    checkpoint: Checkpoint,
    fgrams: FGramSet,
    table: Path,
    rows_per_batch: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build_table_module, "ROWS_PER_BATCH", rows_per_batch)
    report = build_table(checkpoint, fgrams, tmp_path / "table", progress=False)
    assert digest(tmp_path / "table") == digest(table)
    assert report.num_embedded == len(fgrams)
    assert report.table_bytes == sum(f.stat().st_size for f in table.iterdir())


BUILD = """
import sys, time
from pathlib import Path
from scone.model_store import build_table as module
from scone.model_store import table_writer
from scone.model_store.checkpoint import open_checkpoint
from scone.model_store.fgram_set import FGramSet
module.ROWS_PER_BATCH = 64
table_writer._BYTES_PER_SYNC = 1  # every batch is durable, so a kill leaves something to resume
embed = module.embed
def slow_embed(*arguments):
    print("batch", flush=True)
    time.sleep(0.05)
    return embed(*arguments)
module.embed = slow_embed
model, fgrams, out = map(Path, sys.argv[1:])
module.build_table(open_checkpoint(model), FGramSet.load(fgrams), out, progress=False)
"""


def test_a_killed_build_goes_on_and_gives_the_same_bytes(
    checkpoint: Checkpoint, fgrams: FGramSet, table: Path, tmp_path: Path
) -> None:
    fgrams.save(tmp_path / "set.fgrams")
    out = tmp_path / "table"
    command = [sys.executable, "-c", BUILD, str(checkpoint.path), str(tmp_path / "set.fgrams"), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(5):
            assert process.stdout.readline() == "batch\n"
        time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    report = build_table(checkpoint, fgrams, out, progress=False)
    assert 0 < report.num_embedded < len(fgrams)
    assert digest(out) == digest(table)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set.fgrams", "table"]


def test_a_set_of_another_tokenizer_is_refused(
    checkpoint: Checkpoint, fgrams: FGramSet, tmp_path: Path
) -> None:
    other = FGramSet(fgrams.tokens, fgrams.lengths, fgrams.counts, "ff" * 32, 2, 9)
    with pytest.raises(TableError, match="tokenizer"):
        build_table(checkpoint, other, tmp_path / "table", progress=False)
    assert not list(tmp_path.iterdir())


def one_fgram(tokens: list[int]) -> FGramSet:
    return FGramSet(
        np.array([tokens], np.int32), np.array([len(tokens)], np.uint8), np.array([9], np.int64), "t", 2, 9
    )


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([1, 2, 3, 4], "f-grams of 4 tokens, the f-gram model takes at most 3"), ([1, 300], "token id 300")],
)
def test_what_the_model_cannot_embed_is_refused(
    checkpoint: Checkpoint, tokens: list[int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FGramSetError, match=message):
        build_table(checkpoint, one_fgram(tokens), tmp_path / "table", progress=False)
    with pytest.raises(FGramSetError, match="empty"):
        build_table(checkpoint, one_fgram([1, 2]).head(0), tmp_path / "table", progress=False)


def test_a_checkpoint_without_an_fgram_model_is_refused(
    main_path: Path, fgrams: FGramSet, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="has no f-gram model"):
        build_table(open_checkpoint(main_path), fgrams, tmp_path / "table", progress=False)


def test_an_unfinished_build_is_not_resumed_with_another_fgram_model(
    checkpoint: Checkpoint, main_path: Path, fgrams: FGramSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> torch.Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_table_module, "embed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_table(checkpoint, fgrams, tmp_path / "table", progress=False)
    retrained = FGramModel.from_decoder(checkpoint.decoder(), num_layers=1, max_n=3)
    save_scone_folder(tmp_path / "other", retrained, main_path=main_path, main_hash=checkpoint.model_hash)
    with pytest.raises(TableError, match="fgram_model_hash was"):
        build_table(open_checkpoint(tmp_path / "other"), fgrams, tmp_path / "table", progress=False)
