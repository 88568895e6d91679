"""A documentation corpus from Debian packages: plain text, de-duplicated, split into training and held-out.

    python -m scone.model_store.debian_docs --out data/debian-docs

writes `train.jsonl`, `heldout.jsonl` ({"text", "source"} lines) and `stats.json`. Needs a Debian 12
(bookworm) machine or its .deb files: `apt-get download` fetches what `--debs` lacks, `dpkg-deb` unpacks it.

One document per page. Near-duplicates (Jaccard >= 0.5 over 8-word shingles) are reduced to their longest
member; about 2 % of the rest is held out by a stable hash, less what still shares more than 20 % of its
13-word shingles with the training text. So a held-out figure measures text that training has not seen.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scone.model_store.errors import CorpusError
from scone.model_store.near_duplicates import (
    OVERLAP_WORDS,
    SHINGLE_WORDS,
    ShingleHasher,
    cluster,
    overlap,
    stable_hash,
)
from scone.model_store.plain_text import html_text, man_text, pod_text, tidy

HELD_OUT_SHARE = 0.02
MAX_HELD_OUT_OVERLAP = 0.2
MAX_PACKAGE_SHARE = 0.5
MIN_CHARACTERS = 500
# zlib shrinks prose and code to 0.25-0.45 of their size; register tables and generated lists fall below this
MIN_COMPRESSED_SHARE = 0.12


@dataclass(frozen=True, slots=True)
class Document:
    """One page: its text, and `package/path` it came from."""

    text: str
    source: str

    @property
    def package(self) -> str:
        return self.source.split("/")[0]


Converter = Callable[[str], str]

# Package -> patterns of its pages, first match wins; a page that exists in two forms is read in one of them.
PACKAGES: dict[str, Sequence[tuple[str, Converter]]] = {
    "python3.11-doc": [(r"usr/share/doc/python3\.11/html/.*\.html", html_text)],
    "postgresql-doc-15": [(r"usr/share/doc/postgresql-doc-15/html/.*\.html", html_text)],
    "linux-doc-6.1": [
        (r"usr/share/doc/linux-doc-6\.1/html/.*\.html", html_text),
        (r"usr/share/doc/linux-doc-6\.1/Documentation/.*\.txt\.gz", tidy),
    ],
    "git-doc": [
        (r"usr/share/doc/git-doc/.*\.html", html_text),
        (r"usr/share/doc/git-doc/RelNotes/.*\.txt(\.gz)?", tidy),
    ],
    "sqlite3-doc": [(r"usr/share/doc/sqlite3/.*\.html", html_text)],
    "perl-doc": [
        (r"usr/share/perl/.*/pod/.*\.pod", pod_text),
        (r"usr/share/man/man3/.*\.3perl\.gz", man_text),
    ],
}
_NO_PAGES = re.compile(
    r"/(genindex[^/]*|bookindex|py-modindex|search[^/]*|contents|index|toctree|download|requirements|capi3ref|doc_[a-z_]*crossref|keyword_index|doclist"
    r"|_sources/.*|_static/.*|search\.d/.*|perltoc|perluniprops|perlcn|perljp|perlko|perltw|licen[cs]e|copyright)\.(html|pod)$"
)
_BOILERPLATE = re.compile(
    r"^(This page last modified on .*|Last updated\n.*UTC|GIT\n\nPart of the git.*)$", re.M
)


def read_package(package: str, deb: Path) -> Iterator[tuple[str, str, Converter]]:
    """(source, raw page, converter) for each page of a .deb file; raises CorpusError."""
    patterns = [(re.compile(pattern), converter) for pattern, converter in PACKAGES[package]]
    if shutil.which("dpkg-deb") is None:
        raise CorpusError("dpkg-deb is not on the PATH: run this on Debian, or install dpkg")
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                path = member.name.removeprefix("./")
                if not member.isfile() or _NO_PAGES.search(path):
                    continue
                converter = next((c for pattern, c in patterns if pattern.fullmatch(path)), None)
                if converter is not None:
                    content = archive.extractfile(member)
                    assert content is not None
                    yield f"{package}/{path}", _decode(path, content.read()), converter
    if process.returncode:
        raise CorpusError(f"dpkg-deb cannot unpack {deb} (exit code {process.returncode}): download it again")


def _decode(path: str, content: bytes) -> str:
    if path.endswith(".gz"):
        content = gzip.decompress(content)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")  # older Perl pages; Latin-1 cannot fail


def convert_page(page: tuple[str, str, Converter]) -> Document:
    """Runs in a worker process."""
    source, raw, converter = page
    return Document(tidy(_BOILERPLATE.sub("", converter(raw))), source)


def is_prose(document: Document) -> bool:
    """Long enough, and neither a register dump nor a generated list."""
    content = document.text.encode()
    return len(document.text) >= MIN_CHARACTERS and len(
        zlib.compress(content, 6)
    ) >= MIN_COMPRESSED_SHARE * len(content)


def without_near_duplicates(documents: Sequence[Document]) -> list[Document]:
    """The longest document of each cluster of near-duplicates (ties: the first source by name)."""
    hasher = ShingleHasher()
    progress = tqdm(documents, desc="shingles", unit="doc", leave=False)
    clusters = cluster([hasher.shingles(d.text, SHINGLE_WORDS) for d in progress])
    best: dict[int, Document] = {}
    for document, key in zip(documents, clusters.tolist(), strict=True):
        other = best.get(key)
        if other is None or (-len(document.text), document.source) < (-len(other.text), other.source):
            best[key] = document
    return list(best.values())


def capped(documents: Sequence[Document], max_share: float = MAX_PACKAGE_SHARE) -> list[Document]:
    """Drops documents of the largest package (by stable hash) until it holds `max_share` of the text."""
    sizes = Counter[str]()
    for document in documents:
        sizes[document.package] += len(document.text)
    largest, size = sizes.most_common(1)[0]
    budget = (sizes.total() - size) * max_share / (1 - max_share)
    kept, used = [], 0
    for document in sorted(documents, key=lambda d: stable_hash("cap " + d.source)):
        if document.package == largest:
            if used + len(document.text) > budget:
                continue
            used += len(document.text)
        kept.append(document)
    return kept


def split(
    documents: Sequence[Document], held_out_share: float = HELD_OUT_SHARE
) -> tuple[list[Document], list[Document], list[Document]]:
    """(training, held-out, dropped), each in the order of a stable hash of the source.

    Dropped are documents chosen as held out that share too many shingles with the training text. The input
    must be free of near-duplicates (`without_near_duplicates`).
    """
    ordered = sorted(documents, key=lambda d: stable_hash(d.source))
    border = held_out_share * 2**64
    train = [d for d in ordered if stable_hash(d.source) >= border]
    chosen = [d for d in ordered if stable_hash(d.source) < border]
    hasher = ShingleHasher()
    overlaps = overlap(
        (hasher.shingles(d.text, OVERLAP_WORDS) for d in chosen),
        (hasher.shingles(d.text, OVERLAP_WORDS) for d in train),
    )
    held_out = [d for d, share in zip(chosen, overlaps, strict=True) if share <= MAX_HELD_OUT_OVERLAP]
    dropped = [d for d, share in zip(chosen, overlaps, strict=True) if share > MAX_HELD_OUT_OVERLAP]
    return train, held_out, dropped


def find_deb(package: str, folder: Path) -> Path:
    """The package's .deb in `folder`, downloaded with apt-get if it is not there; raises CorpusError."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (found := sorted(folder.glob(f"{package}_*.deb"))):
        command = ["apt-get", "download", package]
        try:
            subprocess.run(command, cwd=folder, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CorpusError(
                f"`{' '.join(command)}` failed ({error}): run `apt-get update` on a Debian 12 machine,"
                " or give the folder of the .deb files with --debs"
            ) from None
        found = sorted(folder.glob(f"{package}_*.deb"))
    return found[-1]


def build_corpus(debs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Writes the corpus of the given package files into `out`; returns what stats.json holds."""
    documents: list[Document] = []
    with ProcessPoolExecutor() as pool:
        for package, deb in debs.items():
            pages = list(read_package(package, deb))
            results = pool.map(convert_page, pages, chunksize=16)
            documents += tqdm(results, desc=package, total=len(pages), unit="page")
    documents.sort(key=lambda d: d.source)
    prose = [d for d in documents if is_prose(d)]
    unique = without_near_duplicates(prose)
    kept = capped(unique)
    train, held_out, dropped = split(kept)
    out.mkdir(parents=True, exist_ok=True)
    stats = {
        "packages": {p: {"file": deb.name, "sha256": _file_hash(deb)} for p, deb in debs.items()},
        "pages_read": len(documents),
        "dropped_short_or_repetitive": len(documents) - len(prose),
        "dropped_near_duplicates": len(prose) - len(unique),
        "dropped_by_package_share": len(unique) - len(kept),
        "dropped_held_out_overlap": len(dropped),
        "train": _summary(train) | {"sha256": _write(out / "train.jsonl", train)},
        "heldout": _summary(held_out) | {"sha256": _write(out / "heldout.jsonl", held_out)},
    }
    (out / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
    return stats


def _summary(documents: Sequence[Document]) -> dict[str, Any]:
    by_package = {
        package: {
            "documents": sum(d.package == package for d in documents),
            "characters": sum(len(d.text) for d in documents if d.package == package),
        }
        for package in sorted({d.package for d in documents})
    }
    return {
        "documents": len(documents),
        "characters": sum(len(d.text) for d in documents),
        "by_package": by_package,
    }


def _write(path: Path, documents: Sequence[Document]) -> str:
    """Writes JSON lines; returns the file's hex SHA-256."""
    lines = [json.dumps({"text": d.text, "source": d.source}, ensure_ascii=False) + "\n" for d in documents]
    path.write_text("".join(lines), encoding="utf-8")
    return _file_hash(path)


def _file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scone.model_store.debian_docs",
        description="Make a documentation corpus from Debian's doc packages.",
    )
    parser.add_argument("--out", type=Path, default=Path("data/debian-docs"), help="folder to write")
    parser.add_argument(
        "--debs", type=Path, help="folder of .deb files (default: OUT/debs; missing ones are fetched)"
    )
    arguments = parser.parse_args(argv)
    try:
        debs = {package: find_deb(package, arguments.debs or arguments.out / "debs") for package in PACKAGES}
        stats = build_corpus(debs, arguments.out)
    except CorpusError as error:
        print(f"debian_docs: {error}", file=sys.stderr)
        return 1
    print(json.dumps(stats))
    return 0


if __name__ == "__main__":
    sys.exit(main())
