"""What a codec costs, measured before a build, is what built tables cost; too much builds nothing."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from scone.cache import FGramTable
from scone.kernels.row_codec import RowCodec
from scone.model_store.build_table import build_table
from scone.model_store.checkpoint import Checkpoint
from scone.model_store.codec_cost import CodecCost, measure_codec_cost
from scone.model_store.fgram_set import FGramSet
from scone.model_store.perplexity import SEQ_LEN, measure_perplexity
from scone.model_store.token_corpus import TokenCorpus
from scone.model_store.token_stream import TokenStream
from scone.server.cli import main
from scone.server.table_perplexity import TableInputs

NUM_TOKENS = 6 * SEQ_LEN


@pytest.fixture(scope="module")
def heldout(checkpoint: Checkpoint) -> TokenStream:
    tokenizer = checkpoint.tokenizer()
    text = Path(re.__file__).read_text()
    return TokenStream.from_corpus(TokenCorpus.from_documents([tokenizer.encode(text)]), tokenizer)


def cost_of(codec: str, checkpoint: Checkpoint, fgrams: FGramSet, heldout: TokenStream) -> CodecCost:
    row_codec = RowCodec(codec, "bfloat16", checkpoint.config.dim)
    return measure_codec_cost(checkpoint, fgrams, row_codec, heldout, NUM_TOKENS)


def test_it_is_what_the_tables_cost(
    checkpoint: Checkpoint, fgrams: FGramSet, heldout: TokenStream, tmp_path: Path
) -> None:
    cost = cost_of("int4", checkpoint, fgrams, heldout)
    decoder = checkpoint.decoder()
    values = []
    for codec in ("raw", "int4"):
        build_table(checkpoint, fgrams, tmp_path / codec, codec=codec, progress=False)
        with FGramTable.open(tmp_path / codec) as table:
            inputs = TableInputs(decoder, table)
            (measured,) = measure_perplexity(decoder, heldout, [inputs], SEQ_LEN, NUM_TOKENS)
        values.append(measured.value)
    assert cost.raw.value == pytest.approx(values[0], rel=1e-6)
    assert cost.coded.perplexity.value == pytest.approx(values[1], rel=1e-6)
    assert cost.coded.delta == pytest.approx(values[1] - values[0], abs=1e-6 * values[0])
    assert abs(cost.coded.delta) > 1e-5 * values[0]


def test_fewer_bits_move_the_predictions_further(
    checkpoint: Checkpoint, fgrams: FGramSet, heldout: TokenStream
) -> None:
    kls = [cost_of(codec, checkpoint, fgrams, heldout).coded.kl for codec in ("raw", "int8", "fp8", "int4")]
    assert kls == sorted(kls)
    assert kls[0] == 0.0
    assert kls[1] > 0.0


def test_the_command_refuses_what_costs_too_much(
    checkpoint: Checkpoint, fgrams: FGramSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fgrams.save(tmp_path / "set.fgrams")
    out = tmp_path / "table"
    build = ["build", "--model", str(checkpoint.path), "--fgrams", str(tmp_path / "set.fgrams")]
    build += ["--out", str(out), "--codec", "int4"]
    heldout = ["--heldout", os.__file__, "--max-tokens", "400"]
    assert main([*build, "--max-dppl", "0.1"]) == 2
    assert "max_dppl is given without heldout" in capsys.readouterr().err
    # any change of perplexity is above this one
    assert main([*build, *heldout, "--max-dppl=-1000"]) == 1
    printed = capsys.readouterr()
    assert re.search(
        r"perplexity [\d.]+ with raw rows, [\d.]+ with int4 \([+-][\d.]+\), KL 0\.\d+", printed.out
    )
    assert "max_dppl is -1000.0: nothing was built" in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["set.fgrams"]
    assert main([*build, *heldout, "--max-dppl", "1000"]) == 0
    with FGramTable.open(out) as table:
        error = table.manifest.row_error
    assert f"{error.rms:.3%} (root mean square), {error.max:.3%} at most" in capsys.readouterr().out
