"""What f-grams do for a pretrained model, and how much of it is the n-grams.

At equal training tokens: an f-gram model on the frozen main model, by set size and depth, and with residuals
beside it; the control whose f-gram model sees only the last token of each f-gram, which is a tuned token
embedding; low-rank adaptations; and the main model's first layers, or all of it, trained too, with f-grams
and with the control.
Source: SCONE, arXiv 2502.01637; LoRA, arXiv 2106.09685. The runs are study_runs.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from scone.model_store.checkpoint import open_checkpoint, save_scone_folder
from scone.model_store.decoder import Decoder
from scone.model_store.fgram_model import FGramModel
from scone.model_store.fgram_set import FGramSet
from scone.model_store.study_runs import StudyRun
from scone.model_store.token_stream import TokenStream
from scone.model_store.tokenize_corpus import tokenize_files
from scone.model_store.train_config import TrainConfig

_EVALUATIONS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningConfig:
    """How large the study is.

    Attributes:
        small_set: f-grams of the small set; the large one is the whole set.
        thin_layers, num_layers, deep_layers: of the f-gram model, and of a thinner and a deeper one.
        main_layers: first layers of the main model, where only those are trained.
        learning_rate: peak rate of the f-gram model; its output projection takes twice as much.
        main_learning_rate: of the main model where it, or some of it, is trained.
        residual_learning_rate: of residuals beside the f-gram model.
        lora_learning_rate: of low-rank adaptations.
        num_seeds: of the rows that the claim rests on; the others are trained once.
    """

    small_set: int = 200_000
    thin_layers: int = 2
    num_layers: int = 4
    deep_layers: int = 8
    main_layers: int = 4
    lora_rank: int = 16
    num_tokens: int = 6_000_000
    batch_size: int = 32
    seq_len: int = 256
    learning_rate: float = 5e-4
    main_learning_rate: float = 2e-4
    residual_learning_rate: float = 0.005
    lora_learning_rate: float = 1e-3
    precision: str = "float32"
    heldout_tokens: int = 65_536
    num_seeds: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningArm:
    """One row; without f-grams, adaptations and a trained main model it is the base.

    Attributes:
        fgram_layers: 0 without an f-gram model.
        has_small_set: not the whole set.
        has_random_start: the f-gram model starts with new weights, not with the main model's first layers.
        main_layers: so many first layers of the main model are trained too.
        has_residuals: each f-gram, or each last token in the control, has a residual beside the f-gram model.
        is_main: trained with every seed.
    """

    name: str
    fgram_layers: int = 0
    has_small_set: bool = False
    has_random_start: bool = False
    has_residuals: bool = False
    last_token_only: bool = False
    lora_rank: int = 0
    main_layers: int = 0
    trains_main: bool = False
    is_main: bool = False


def arms_of(config: TuningConfig) -> list[TuningArm]:
    """All rows, the most wanted first."""
    layers = config.num_layers
    return [
        TuningArm(name="fgrams", fgram_layers=layers, is_main=True),
        TuningArm(name="control", fgram_layers=layers, last_token_only=True, is_main=True),
        TuningArm(name="fgrams-residuals", fgram_layers=layers, has_residuals=True, is_main=True),
        TuningArm(
            name="control-residuals",
            fgram_layers=layers,
            has_residuals=True,
            last_token_only=True,
            is_main=True,
        ),
        TuningArm(name="lora", lora_rank=config.lora_rank),
        TuningArm(name="base"),
        TuningArm(name="main-fgrams", fgram_layers=layers, trains_main=True),
        TuningArm(name="main-control", fgram_layers=layers, last_token_only=True, trains_main=True),
        TuningArm(name="main-fgrams-residuals", fgram_layers=layers, has_residuals=True, trains_main=True),
        TuningArm(name="first-layers-fgrams", fgram_layers=layers, main_layers=config.main_layers),
        TuningArm(
            name="first-layers-control",
            fgram_layers=layers,
            last_token_only=True,
            main_layers=config.main_layers,
        ),
        TuningArm(name="fgrams-small-set", fgram_layers=layers, has_small_set=True),
        TuningArm(name="fgrams-deep", fgram_layers=config.deep_layers),
        TuningArm(name="fgrams-thin", fgram_layers=config.thin_layers),
        TuningArm(name="fgrams-random-start", fgram_layers=layers, has_random_start=True),
        TuningArm(name="main", trains_main=True),
    ]


ROWS = tuple(arm.name for arm in arms_of(TuningConfig()))


class TuningStudy:
    """The rows over one pretrained model and one corpus, in one folder."""

    def __init__(
        self,
        config: TuningConfig,
        model: str,
        fgrams: str,
        corpus: list[str],
        heldout: list[str],
        out: Path,
        device: torch.device,
        rows: Sequence[str] = ROWS,
    ) -> None:
        """Opens the model and tokenises, unless an earlier call did; raises SconeError.

        `rows` names the arms that are wanted.
        """
        self.config, self.out, self.device, self._rows = config, out, device, rows
        out.mkdir(parents=True, exist_ok=True)
        self._main_path = Path(model)
        self._checkpoint = open_checkpoint(model)
        tokenizer = self._checkpoint.tokenizer()
        self.fgrams = FGramSet.load(fgrams)
        self.fgrams.check_tokenizer(tokenizer.hash, fgrams)
        tokens = tokenize_files(corpus, tokenizer, out / "corpus")
        held = tokenize_files(heldout, tokenizer, out / "heldout")
        self.corpus, self.heldout = (TokenStream.from_corpus(part, tokenizer) for part in (tokens, held))

    def runs(self) -> list[StudyRun]:
        """One seed of all rows after the other."""
        return [
            self._run(arm, seed)
            for seed in range(self.config.num_seeds)
            for arm in arms_of(self.config)
            if arm.name in self._rows and (seed == 0 or arm.is_main)
        ]

    def keep(self, run: StudyRun, decoder: Decoder, model: FGramModel | None) -> None:
        """An f-gram model that belongs to the main model as it is: `scone build` takes it from its folder."""
        if model is not None and not run.config.changes_main:
            folder = self.out / "runs" / run.name
            save_scone_folder(folder, model, main_path=self._main_path, main_hash=self._checkpoint.model_hash)

    def _run(self, arm: TuningArm, seed: int) -> StudyRun:
        fgrams = None
        if arm.fgram_layers:
            fgrams = self.fgrams.head(self.config.small_set) if arm.has_small_set else self.fgrams
        facts: dict[str, Any] = {"arm": asdict(arm), "seed": seed}
        facts["arm"]["num_fgrams"] = 0 if fgrams is None else len(fgrams)
        return StudyRun(
            name=f"{arm.name}-{seed}",
            config=self._train_config(arm, seed),
            facts=facts,
            fgrams=fgrams,
            new_decoder=lambda: self._checkpoint.decoder().to(self.device),
        )

    def _train_config(self, arm: TuningArm, seed: int) -> TrainConfig:
        config = self.config
        is_base = not (arm.fgram_layers or arm.lora_rank or arm.trains_main)
        steps = 0 if is_base else max(1, config.num_tokens // (config.batch_size * config.seq_len))
        return TrainConfig(
            freeze_main=not (arm.trains_main or is_base),
            main_layers=arm.main_layers,
            steps=steps,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            main_learning_rate=config.lora_learning_rate if arm.lora_rank else config.main_learning_rate,
            learning_rate=config.learning_rate,
            output_learning_rate=2 * config.learning_rate,
            residual_learning_rate=config.residual_learning_rate if arm.has_residuals else 0.0,
            schedule="cosine",
            warmup_steps=max(1, steps // 20),
            num_layers=max(1, arm.fgram_layers),
            seed=seed,
            save_every=max(1, steps // _EVALUATIONS),
            heldout_tokens=config.heldout_tokens,
            random_start=arm.has_random_start,
            last_token_only=arm.last_token_only,
            lora_rank=arm.lora_rank,
            precision=config.precision,
        )
