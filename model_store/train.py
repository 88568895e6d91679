"""Training of the f-gram model on a frozen main model.

Each step embeds the batch's f-grams with the f-gram model (no table exists in training), runs the frozen
main model on them, and lowers its next-token loss. Source: SCONE, arXiv 2502.01637, section 3.1; the
paper trains the main model too, which here stays as it was published.

A run is resumable: batches are drawn from (seed, step), and the optimiser's state lies beside the weights.
"""

from __future__ import annotations

import csv
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from scone.model_store.decoder import CausalAttention, Decoder
from scone.model_store.errors import CheckpointError
from scone.model_store.fgram_inputs import FGramInputs
from scone.model_store.fgram_model import FGramModel
from scone.model_store.fgram_set import FGramSet
from scone.model_store.head_loss import frozen_head_loss, token_losses
from scone.model_store.token_stream import TokenStream

STATE = "training_state.pt"
CURVE = "curve.csv"
CURVE_FIELDS = ["step", "tokens", "train_loss", "heldout_loss", "match_rate", "learning_rate", "seconds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One run. The defaults are those of the published f-gram model of the demo.

    Attributes:
        output_learning_rate: of the output projection, which starts at zero; the rest uses learning_rate.
        warmup_steps: linear warm-up, then linear decay to zero at `steps`.
        save_every: steps between held-out evaluations and saved states.
        last_token_only: train the control that sees no n-gram.
    """

    steps: int = 400
    batch_size: int = 6
    seq_len: int = 192
    learning_rate: float = 2e-4
    output_learning_rate: float = 4e-4
    warmup_steps: int = 20
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    num_layers: int = 2
    seed: int = 0
    save_every: int = 25
    heldout_tokens: int = 12_288
    last_token_only: bool = False

    def learning_rate_scale(self, step: int) -> float:
        """Factor of both learning rates at `step` (0-based)."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        return warmup * max(0.0, 1 - step / self.steps)


def train(
    config: TrainConfig,
    decoder: Decoder,
    fgrams: FGramSet,
    corpus: TokenStream,
    heldout: TokenStream,
    out: Path,
) -> FGramModel:
    """Trains (or goes on training) an f-gram model, its state and curve kept in `out`.

    A SIGTERM saves and returns early; the same call resumes, also towards another number of steps.
    Raises CheckpointError if `out` holds another run.
    """
    out.mkdir(parents=True, exist_ok=True)
    decoder.requires_grad_(False)
    run = _Run(config, decoder, fgrams, out)
    with _stop_on_sigterm() as stopping, tqdm(total=config.steps, initial=run.step, unit="step") as progress:
        if run.step == 0:
            run.record(heldout, train_loss=float("nan"), match_rate=float("nan"))
        losses: list[float] = []
        while run.step < config.steps and not stopping():
            loss, match_rate = run.advance(corpus)
            losses.append(loss)
            progress.update()
            progress.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}")
            if run.step % config.save_every == 0 or run.step == config.steps:
                run.record(heldout, train_loss=float(np.mean(losses)), match_rate=match_rate)
                losses = []
        if losses:
            run.save()
    return run.model


class _Run:
    """The moving parts of one training: weights, optimiser, step, curve."""

    def __init__(self, config: TrainConfig, decoder: Decoder, fgrams: FGramSet, out: Path) -> None:
        self.config, self.decoder, self.out = config, decoder, out
        self.model = FGramModel.from_decoder(
            decoder, config.num_layers, fgrams.max_n, last_token_only=config.last_token_only
        )
        self.inputs = FGramInputs(fgrams, self.model)
        rest = [p for name, p in self.model.named_parameters() if not name.startswith("output.")]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.model.output.parameters()), "peak": config.output_learning_rate},
                {"params": rest, "peak": config.learning_rate},
            ],
            weight_decay=config.weight_decay,
            betas=(0.9, 0.98),
        )
        self.step, self.seconds = 0, 0.0
        self._load()

    def advance(self, corpus: TokenStream) -> tuple[float, float]:
        """One optimiser step; gives the batch's loss and match rate."""
        started = time.monotonic()
        config = self.config
        scale = config.learning_rate_scale(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * scale
        windows = corpus.sample_windows(config.batch_size, config.seq_len, (config.seed, self.step))
        hidden, match_rate = self._hidden(windows[:, :-1])
        targets = torch.from_numpy(windows[:, 1:].astype(np.int64)).flatten()
        loss = frozen_head_loss(hidden, self.decoder.lm_head.weight, targets)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.max_gradient_norm)
        self.optimizer.step()
        self.step += 1
        self.seconds += time.monotonic() - started
        return float(loss.detach()), match_rate

    def _hidden(self, input_ids: NDArray[np.int32]) -> tuple[Tensor, float]:
        embeddings, match_rate = self.inputs.embed(self.decoder, input_ids)
        positions = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
        return self.decoder(embeddings, positions, CausalAttention()).flatten(0, 1), match_rate

    @torch.no_grad()
    def heldout_loss(self, heldout: TokenStream) -> float:
        """Mean loss in nats per token over evenly spread held-out windows."""
        total, count = 0.0, 0
        for window in heldout.spread_windows(self.config.seq_len, self.config.heldout_tokens):
            hidden, _ = self._hidden(window[None, :-1])
            targets = torch.from_numpy(window[1:].astype(np.int64))
            total += float(token_losses(hidden, self.decoder.lm_head.weight, targets).sum())
            count += len(targets)
        return total / count

    def record(self, heldout: TokenStream, *, train_loss: float, match_rate: float) -> None:
        """Evaluates, adds a line to the curve, saves everything."""
        loss = self.heldout_loss(heldout)
        row = {
            "step": self.step,
            "tokens": self.step * self.config.batch_size * self.config.seq_len,
            "train_loss": round(train_loss, 4),
            "heldout_loss": round(loss, 4),
            "match_rate": round(match_rate, 3),
            "learning_rate": self.config.learning_rate * self.config.learning_rate_scale(self.step),
            "seconds": round(self.seconds),
        }
        path = self.out / CURVE
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, CURVE_FIELDS)
            if is_new:
                writer.writeheader()
            writer.writerow(row)
        tqdm.write(f"step {self.step}: held-out loss {loss:.4f} (perplexity {math.exp(loss):.3f})")
        self.save()

    def save(self) -> None:
        """Writes the state so that a kill leaves the old one or the new one."""
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        partial = self.out / (STATE + ".partial")
        torch.save(state, partial)
        partial.replace(self.out / STATE)

    def _load(self) -> None:
        path = self.out / STATE
        if not path.exists():
            return
        state: dict[str, Any] = torch.load(path, weights_only=True)
        changed = sorted(k for k, v in asdict(self.config).items() if state["config"].get(k) != v)
        if changed not in ([], ["steps"]):  # a run may be made longer, or be cooled down sooner
            raise CheckpointError(
                f"{self.out} holds a run with another {', '.join(changed)}; "
                "resume with the same settings, or choose another --out"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]


@contextmanager
def _stop_on_sigterm() -> Iterator[Any]:
    """Gives a function that tells whether SIGTERM has come."""
    arrived: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    previous = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: bool(arrived)
    finally:
        signal.signal(signal.SIGTERM, previous)
