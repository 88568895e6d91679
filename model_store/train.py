"""Training: of the f-gram model on a frozen main model, or of both together.

Each step embeds the batch's f-grams with the f-gram model (no table exists in training), runs the main
model on them, and lowers its next-token loss. Source: SCONE, arXiv 2502.01637, section 3.1, which trains
main model, f-gram model and the token embedding they share together. Matches are not kept from a scan before:
the server's matcher finds a batch's in less than a thousandth of a step, and a window's first tokens match
as they do in a request that begins there.

A run is resumable: batches are drawn from (seed, step), and the optimiser's state lies beside the weights.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from scone.model_store.decoder import CausalAttention, Decoder
from scone.model_store.errors import CheckpointError
from scone.model_store.fgram_inputs import FGramInputs
from scone.model_store.fgram_model import FGramModel
from scone.model_store.fgram_set import FGramSet
from scone.model_store.head_loss import head_loss, token_losses
from scone.model_store.token_stream import TokenStream
from scone.model_store.train_config import TrainConfig
from scone.model_store.training_curve import CurvePoint, append_point, draw_run

STATE = "training_state.pt"
_BETAS = (0.9, 0.98)


def train(
    config: TrainConfig,
    decoder: Decoder,
    fgrams: FGramSet | None,
    corpus: TokenStream,
    heldout: TokenStream,
    out: Path,
) -> FGramModel | None:
    """Trains (or goes on training), state and curve kept in `out`; gives the f-gram model, if there is one.

    The decoder is changed in place unless it is frozen. Without f-grams it is trained alone. A SIGTERM saves
    and returns early; the same call resumes, also towards another number of steps.

    Raises:
        CheckpointError: `out` holds another run.
        ValueError: nothing is to be trained.
    """
    if fgrams is None and config.freeze_main:
        raise ValueError("freeze_main is true and there are no f-grams: nothing is left to be trained")
    out.mkdir(parents=True, exist_ok=True)
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
    draw_run(out)
    decoder.requires_grad_(False).eval()
    return run.model


class _Run:
    """The moving parts of one training: weights, optimiser, step, curve."""

    def __init__(self, config: TrainConfig, decoder: Decoder, fgrams: FGramSet | None, out: Path) -> None:
        self.config, self.decoder, self.out = config, decoder, out
        decoder.requires_grad_(not config.freeze_main).train(not config.freeze_main)
        self.model: FGramModel | None = None
        self.inputs: FGramInputs | None = None
        if fgrams is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)  # of layers beyond those of the main model
                self.model = FGramModel.from_decoder(
                    decoder, config.num_layers, fgrams.max_n, last_token_only=config.last_token_only
                )
            self.inputs = FGramInputs(fgrams, self.model)
        groups = _parameter_groups(config, decoder, self.model)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, betas=_BETAS)
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
        loss = head_loss(hidden, self.decoder.lm_head.weight, targets)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, config.max_gradient_norm)
        self.optimizer.step()
        self.step += 1
        self.seconds += time.monotonic() - started
        return float(loss.detach()), match_rate

    def _hidden(self, input_ids: NDArray[np.int32]) -> tuple[Tensor, float]:
        match_rate = 0.0
        if self.inputs is None:
            embeddings = self.decoder.embed(torch.from_numpy(input_ids.astype(np.int64)))
        else:
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
        config, loss = self.config, self.heldout_loss(heldout)
        peak = config.learning_rate if config.freeze_main else config.main_learning_rate
        append_point(
            self.out,
            CurvePoint(
                step=self.step,
                tokens=self.step * config.batch_size * config.seq_len,
                train_loss=round(train_loss, 4),
                heldout_loss=round(loss, 4),
                match_rate=round(match_rate, 3),
                learning_rate=peak * config.learning_rate_scale(self.step),
                seconds=round(self.seconds),
            ),
        )
        tqdm.write(f"step {self.step}: held-out loss {loss:.4f} (perplexity {math.exp(loss):.3f})")
        self.save()

    def _trained(self) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {} if self.model is None else {"model": self.model}
        return parts if self.config.freeze_main else parts | {"main": self.decoder}

    def save(self) -> None:
        """Writes the state so that a kill leaves the old one or the new one."""
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "seconds": self.seconds,
            "optimizer": self.optimizer.state_dict(),
        }
        state |= {name: part.state_dict() for name, part in self._trained().items()}
        partial = self.out / (STATE + ".partial")
        torch.save(state, partial)
        partial.replace(self.out / STATE)

    def _load(self) -> None:
        path = self.out / STATE
        if not path.exists():
            return
        state: dict[str, Any] = torch.load(path, weights_only=True)
        changed = sorted(k for k, v in asdict(self.config).items() if state["config"].get(k) != v)
        if ("model" in state) != (self.model is not None):
            changed.append("fgrams")
        if changed not in ([], ["steps"]):  # a run may be made longer, or be cooled down sooner
            raise CheckpointError(
                f"{self.out} holds a run with another {', '.join(changed)}; "
                "resume with the same settings, or choose another --out"
            )
        for name, part in self._trained().items():
            part.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]


def _parameter_groups(
    config: TrainConfig, decoder: Decoder, model: FGramModel | None
) -> list[dict[str, Any]]:
    """What is trained, by peak learning rate and by whether its weights decay."""
    parts: list[tuple[float, list[tuple[str, nn.Parameter]]]] = []
    if model is not None:
        named = list(model.named_parameters())
        parts.append((config.output_learning_rate, [p for p in named if p[0].startswith("output.")]))
        parts.append((config.learning_rate, [p for p in named if not p[0].startswith("output.")]))
    if not config.freeze_main:
        parts.append((config.main_learning_rate, list(decoder.named_parameters())))
    groups = []
    for peak, named in parts:
        for decays in (True, False):
            chosen = [p for name, p in named if (p.dim() > 1 and "embed" not in name) == decays]
            if chosen:
                decay = config.weight_decay if decays else 0.0
                groups.append({"params": chosen, "peak": peak, "weight_decay": decay})
    return groups


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
