"""`scone verify`: reads a whole table, compares every checksum, and embeds sampled rows again."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from scone.cache import FGramTable
from scone.model_store.build_table import embed
from scone.model_store.checkpoint import open_checkpoint
from scone.model_store.errors import CheckpointError, TableError
from scone.model_store.fgram_set import FGramSet
from scone.model_store.table_files import open_table_files, verify_table_files
from scone.model_store.table_writer import FGRAMS_NAME
from scone.server.settings import Command, Resolved, Setting

_TOLERANCE = 0.02
"""Of a row's largest value: another processor's sums differ by less, another model's rows by far more."""


def run(settings: Resolved) -> int:
    files = open_table_files(settings.table)
    num_bytes = sum(entry.num_bytes for entry in files.manifest.files.values())
    with tqdm(desc="verify", total=num_bytes, unit="B", unit_scale=True) as bar:
        verify_table_files(files, bar.update)
    print(f"{settings.table}: all {len(files.manifest.files)} files fit their checksums")
    if settings.model is not None:
        num_equal, num_sampled = embed_again(settings.table, settings.model, settings.sample)
        print(f"{num_sampled} rows embedded again, {num_equal} of them equal bit for bit")
    return 0


def embed_again(table_path: Path, model_path: Path, num_rows: int) -> tuple[int, int]:
    """How many of how many sampled rows are equal; raises TableError if one is another row altogether."""
    checkpoint = open_checkpoint(model_path)
    decoder = checkpoint.decoder()
    model = checkpoint.fgram_model(decoder)
    if model is None:
        raise CheckpointError(
            f"{model_path} has no f-gram model: give the checkpoint the table was built from"
        )
    with FGramTable.open(table_path) as table:
        table.check_model(checkpoint.model_hash, checkpoint.tokenizer().hash)
        fgrams = FGramSet.load(table_path / FGRAMS_NAME)
        codec = table.manifest.row_codec
        row_ids = torch.linspace(0, table.num_fgrams - 1, min(num_rows, table.num_fgrams)).long().tolist()
        stored = table.rows(row_ids)
        made = torch.cat([embed(model, fgrams, slice(row_id, row_id + 1)) for row_id in row_ids])
        made = codec.decode_reference(codec.encode(made))
    error = (made.float() - stored.float()).abs().amax(dim=1)
    wrong = error > _TOLERANCE * made.float().abs().amax(dim=1)
    if wrong.any():
        row_id = row_ids[int(wrong.int().argmax())]
        raise TableError(f"row {row_id} of {table_path} is not what the f-gram model of {model_path} gives")
    return int((error == 0).sum()), len(row_ids)


COMMAND = Command(
    name="verify",
    help="read a whole table and compare its checksums; with --model, embed sampled rows again",
    settings=(
        Setting(name="table", kind=Path, positional=True, required=True, help="folder of the table"),
        Setting(name="model", kind=Path, help="checkpoint the table was built from"),
        Setting(name="sample", kind=int, default=64, help="rows to embed again"),
    ),
    run=run,
)
