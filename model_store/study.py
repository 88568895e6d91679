"""The paper's comparison in miniature: do f-grams let a small model reach a larger one, from scratch?

One tokenizer, one corpus, equal training tokens for all: a small base model, the same with f-grams (set sizes
and f-gram model sizes), a control whose f-gram model sees only the last token, a larger base model, and
Kronecker embeddings instead of a dense table. Source: SCONE, arXiv 2502.01637, Table 3 and section 4.1.

The runs are study_runs.py's: finished ones stay, an interrupted one goes on. Figures are study_report.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tokenizers
import torch
from tokenizers.models import BPE

from scone.model_store.corpus import read_documents
from scone.model_store.count import count_fgrams
from scone.model_store.decoder import Decoder
from scone.model_store.fgram_model import FGramModel
from scone.model_store.fgram_set import FGramSet
from scone.model_store.initialize import new_decoder
from scone.model_store.model_config import ModelConfig
from scone.model_store.study_runs import StudyRun
from scone.model_store.token_stream import TokenStream
from scone.model_store.tokenize_corpus import tokenize_files
from scone.model_store.tokenizer import Tokenizer, tokenizer_from_file
from scone.model_store.train_config import TrainConfig

_END = "<|endoftext|>"
_HEAD_DIM = 32
_NUM_POSITIONS = 16
_EVALUATIONS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyConfig:
    """How large the study is. The defaults are meant for about 12 hours on two cores.

    Attributes:
        small_set, large_set: f-grams; the most frequent ones.
        thin_layers, deep_layers: layers of the two f-gram models, of the small model's width.
        num_tokens: training tokens of each run.
        fgram_learning_rate: of f-gram models: the main model has to follow where their rows move.
        residual_learning_rate: of residuals beside them; as large as token embeddings are at the start.
        num_seeds: of the main rows; the others are trained once.
    """

    vocab_size: int = 8192
    max_n: int = 4
    small_set: int = 20_000
    large_set: int = 100_000
    thin_layers: int = 2
    deep_layers: int = 4
    small_dim: int = 256
    small_layers: int = 4
    large_dim: int = 320
    large_layers: int = 7
    num_tokens: int = 5_000_000
    batch_size: int = 16
    seq_len: int = 192
    learning_rate: float = 1.5e-3
    fgram_learning_rate: float = 3e-4
    residual_learning_rate: float = 0.02
    precision: str = "float32"
    heldout_tokens: int = 49_152
    num_seeds: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One row of the study.

    Attributes:
        num_fgrams: 0 without f-grams.
        fgram_layers: of the f-gram model; 0 also for one that is no more than a linear map.
        has_residuals: f-grams have residuals beside it.
        embedding: `dense` or `kronecker`, each beside a head of its own.
        is_main: trained with every seed.
    """

    name: str
    dim: int
    num_layers: int
    num_fgrams: int = 0
    fgram_layers: int = 0
    has_residuals: bool = False
    last_token_only: bool = False
    embedding: str = "dense"
    is_main: bool = False


def arms_of(config: StudyConfig) -> list[Arm]:
    """All rows, the main ones first."""
    base = Arm(name="S", dim=config.small_dim, num_layers=config.small_layers, is_main=True)
    best = replace(
        base, name="S-large-set-deep", num_fgrams=config.large_set, fgram_layers=config.deep_layers
    )
    thin = replace(best, name="S-large-set-thin", fgram_layers=config.thin_layers)
    return [
        base,
        best,
        replace(best, name="S-control", last_token_only=True),
        replace(base, name="M", dim=config.large_dim, num_layers=config.large_layers),
        thin,
        replace(thin, name="S-large-set-residuals", has_residuals=True),
        replace(thin, name="S-control-residuals", has_residuals=True, last_token_only=True),
        replace(best, name="S-small-set-deep", num_fgrams=config.small_set, is_main=False),
        replace(thin, name="S-small-set-thin", num_fgrams=config.small_set, is_main=False),
        replace(
            thin,
            name="S-small-set-residuals",
            num_fgrams=config.small_set,
            has_residuals=True,
            is_main=False,
        ),
        replace(thin, name="S-large-set-residuals-alone", fgram_layers=0, has_residuals=True, is_main=False),
        replace(base, name="S-kronecker", embedding="kronecker", is_main=False),
    ]


ROWS = tuple(arm.name for arm in arms_of(StudyConfig()))


class Study:
    """The grid over one corpus, in one folder."""

    def __init__(
        self,
        config: StudyConfig,
        corpus: list[str],
        heldout: list[str],
        out: Path,
        device: torch.device,
        rows: Sequence[str] = ROWS,
    ) -> None:
        """Trains the tokenizer, tokenises and counts, unless an earlier call did.

        `rows` names the arms that are wanted.

        Raises:
            CorpusError: the texts cannot be read, or are too short.
        """
        self.config, self.out, self.device, self._rows = config, out, device, rows
        out.mkdir(parents=True, exist_ok=True)
        self.tokenizer = _tokenizer(config.vocab_size, corpus, out / "tokenizer.json")
        tokens = tokenize_files(corpus, self.tokenizer, out / "corpus")
        held = tokenize_files(heldout, self.tokenizer, out / "heldout")
        self.corpus, self.heldout = (TokenStream.from_corpus(part, self.tokenizer) for part in (tokens, held))
        path = out / "study.fgrams"
        if not path.exists():
            count_fgrams(
                tokens,
                max_n=config.max_n,
                min_count=5,
                top=config.large_set,
                tokenizer_hash=self.tokenizer.hash,
            ).save(path)
        self.fgrams = FGramSet.load(path)

    def runs(self) -> list[StudyRun]:
        """One seed of all rows after the other."""
        return [
            self._run(arm, seed)
            for seed in range(self.config.num_seeds)
            for arm in arms_of(self.config)
            if arm.name in self._rows and (seed == 0 or arm.is_main)
        ]

    def keep(self, run: StudyRun, decoder: Decoder, model: FGramModel | None) -> None:
        """Only the curves are wanted."""

    def _run(self, arm: Arm, seed: int) -> StudyRun:
        shape = self._shape(arm)
        return StudyRun(
            name=f"{arm.name}-{seed}",
            config=self._train_config(arm, seed),
            facts={
                "arm": asdict(arm) | {"num_fgrams": min(arm.num_fgrams, len(self.fgrams))},
                "seed": seed,
            },
            fgrams=self.fgrams.head(arm.num_fgrams) if arm.num_fgrams else None,
            new_decoder=lambda: new_decoder(shape, self.tokenizer, seed).to(self.device),
        )

    def _shape(self, arm: Arm) -> ModelConfig:
        return ModelConfig(
            architecture="llama",
            vocab_size=self.tokenizer.vocab_size,
            dim=arm.dim,
            num_layers=arm.num_layers,
            num_heads=arm.dim // _HEAD_DIM,
            num_kv_heads=arm.dim // _HEAD_DIM,
            head_dim=_HEAD_DIM,
            ffn_dim=arm.dim * 8 // 3 // 32 * 32,
            norm_eps=1e-5,
            rope_theta=10000.0,
            max_position=1024,
            byte_positions=_NUM_POSITIONS if arm.embedding == "kronecker" else None,
            tied_head=False,  # a small model learns much faster so
            eos_ids=self.tokenizer.eos_ids,
        )

    def _train_config(self, arm: Arm, seed: int) -> TrainConfig:
        config = self.config
        steps = max(1, config.num_tokens // (config.batch_size * config.seq_len))
        return TrainConfig(
            freeze_main=False,
            steps=steps,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            main_learning_rate=config.learning_rate,
            learning_rate=config.fgram_learning_rate,
            output_learning_rate=config.fgram_learning_rate,
            residual_learning_rate=config.residual_learning_rate if arm.has_residuals else 0.0,
            schedule="cosine",
            precision=config.precision,
            warmup_steps=max(1, steps // 20),
            weight_decay=0.1,
            num_layers=arm.fgram_layers,
            seed=seed,
            save_every=max(1, steps // _EVALUATIONS),
            heldout_tokens=config.heldout_tokens,
            last_token_only=arm.last_token_only,
        )


def _tokenizer(vocab_size: int, corpus: list[str], path: Path) -> Tokenizer:
    """A byte-level BPE vocabulary of the corpus, kept in `path`."""
    if not path.exists():
        backend = tokenizers.Tokenizer(BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[_END],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(read_documents(corpus), trainer)
        backend.save(str(path))
    # the trainer gives special tokens the first ids
    return tokenizer_from_file(path, eos_ids=(0,))
