"""Settings of one training run; `scone train` takes each as a flag."""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("linear", "cosine")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One run. The defaults are those of the published f-gram model of the demo.

    Attributes:
        freeze_main: the main model stays as it is; else everything is trained together.
        main_learning_rate: peak rate of the main model, its token embedding and its head.
        output_learning_rate: of the f-gram model's output projection, which starts at zero; the rest of it
            uses learning_rate.
        warmup_steps: linear warm-up; then to zero at `steps`, along a line or half a cosine.
        weight_decay: of matrices, not of norms and embeddings.
        save_every: steps between held-out evaluations and saved states.
        last_token_only: train the control that sees no n-gram.
    """

    freeze_main: bool = True
    steps: int = 400
    batch_size: int = 6
    seq_len: int = 192
    main_learning_rate: float = 1e-3
    learning_rate: float = 2e-4
    output_learning_rate: float = 4e-4
    schedule: str = "linear"
    warmup_steps: int = 20
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    num_layers: int = 2
    seed: int = 0
    save_every: int = 25
    heldout_tokens: int = 12_288
    last_token_only: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}, wanted one of {', '.join(SCHEDULES)}")

    def learning_rate_scale(self, step: int) -> float:
        """Factor of all learning rates at `step` (0-based)."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        done = min(1.0, step / self.steps)
        left = 1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return warmup * left
