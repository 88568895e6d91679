"""Settings of one training run; `scone train` takes each as a flag."""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("linear", "cosine")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One run. The defaults are a first try on a CPU: under an hour for a main model of 135M parameters.

    Attributes:
        freeze_main: the main model stays as it is; else everything is trained together.
        main_layers: so many first layers of a frozen main model are trained all the same.
        main_learning_rate: peak rate of the main model, its token embedding and its head.
        output_learning_rate: of the f-gram model's output projection, which starts at zero; the rest of it
            uses learning_rate.
        residual_learning_rate: of residuals beside the f-gram model (fgram_residuals.py, row_adagrad.py), as
            large as token embeddings are in root-mean-square; 0 for none.
        warmup_steps: linear warm-up; then to zero at `steps`, along a line or half a cosine.
        weight_decay: of matrices, not of norms and embeddings.
        save_every: steps between held-out evaluations and saved states.
        random_start: blocks of the f-gram model start with new weights, not with the main model's first ones.
        last_token_only: train the control that sees no n-gram.
        lora_rank: a frozen main model gets adaptations of this rank (lora.py), merged at the end; 0 for none.
        precision: of matrix products; weights, norms and optimiser are float32 either way.
    """

    freeze_main: bool = True
    main_layers: int = 0
    steps: int = 400
    batch_size: int = 6
    seq_len: int = 192
    main_learning_rate: float = 1e-3
    learning_rate: float = 2e-4
    output_learning_rate: float = 4e-4
    residual_learning_rate: float = 0.0
    schedule: str = "linear"
    warmup_steps: int = 20
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    num_layers: int = 2
    seed: int = 0
    save_every: int = 25
    heldout_tokens: int = 12_288
    random_start: bool = False
    last_token_only: bool = False
    lora_rank: int = 0
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}, wanted one of {', '.join(SCHEDULES)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}, wanted one of {', '.join(PRECISIONS)}")
        if self.lora_rank and not self.freeze_main:
            raise ValueError(
                f"lora_rank is {self.lora_rank} and freeze_main is false: adaptations are for a frozen model"
            )
        if self.main_layers and (self.lora_rank or not self.freeze_main):
            raise ValueError(
                f"main_layers is {self.main_layers}, which is for a frozen model without adaptations:"
                " set it to 0, or freeze_main to true and lora_rank to 0"
            )

    @property
    def changes_main(self) -> bool:
        """Whether the main model is another one after the training."""
        return not self.freeze_main or self.lora_rank > 0 or self.main_layers > 0

    def learning_rate_scale(self, step: int) -> float:
        """Factor of all learning rates at `step` (0-based)."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        done = min(1.0, step / max(1, self.steps))
        left = 1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return warmup * left
