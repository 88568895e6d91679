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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
from scone.model_store.fgram_inputs import FGramInputs, MatchedBatch
from scone.model_store.fgram_model import FGramModel
from scone.model_store.fgram_residuals import FGramResiduals
from scone.model_store.fgram_set import FGramSet
from scone.model_store.head_loss import head_loss, token_losses
from scone.model_store.lora import add_lora, merge_lora
from scone.model_store.row_adagrad import RowAdagrad
from scone.model_store.token_stream import TokenStream
from scone.model_store.train_config import TrainConfig
from scone.model_store.training_curve import CurvePoint, append_point, draw_run

STATE = "training_state.pt"
_BETAS = (0.9, 0.98)
_SHOW_EVERY = 20
"""Steps: reading a loss waits for the device."""


def train(
    config: TrainConfig,
    decoder: Decoder,
    fgrams: FGramSet | None,
    corpus: TokenStream,
    heldout: TokenStream,
    out: Path,
) -> FGramModel | None:
    """Trains (or goes on training) where the decoder is; gives the f-gram model, if there is one.

    State and curve are kept in `out`. The decoder is changed in place unless it is frozen and gets no
    adaptations. Without f-grams it is trained alone. A SIGTERM saves and returns early; the same call
    resumes, also towards another number of steps.

    Raises:
        CheckpointError: `out` holds another run, or more layers are to be trained than there are.
        ValueError: nothing is to be trained.
    """
    if fgrams is None and not config.changes_main:
        raise ValueError("freeze_main is true and there are no f-grams: nothing is left to be trained")
    out.mkdir(parents=True, exist_ok=True)
    run = _Run(config, decoder, fgrams, out)
    with _stop_on_sigterm() as stopping, tqdm(total=config.steps, initial=run.step, unit="step") as progress:
        if run.step == 0:
            run.record(heldout)
        for batch in run.batches(corpus):
            run.advance(batch)
            progress.update()
            if run.step % _SHOW_EVERY == 0:
                progress.set_postfix(loss=f"{run.train_loss:.3f}")
            if run.step % config.save_every == 0 or run.step == config.steps:
                run.record(heldout)
            if stopping():
                break
        if run.losses:
            run.save()
    draw_run(out)
    if run.model is not None and run.model.residuals is not None:
        run.model.residuals = run.model.residuals.trained()
    if config.lora_rank:
        merge_lora(decoder)
    decoder.requires_grad_(False).eval()
    return run.model


@dataclass(frozen=True, slots=True)
class _Batch:
    """Input ids with the f-grams in them, and targets (batch * seq,) int64."""

    inputs: MatchedBatch
    targets: Tensor


class _Run:
    """The moving parts of one training: weights, optimiser, step, curve."""

    def __init__(self, config: TrainConfig, decoder: Decoder, fgrams: FGramSet | None, out: Path) -> None:
        self.config, self.decoder, self.out, self.device = config, decoder, out, decoder.device
        decoder.requires_grad_(not config.freeze_main).train(not config.freeze_main)
        self.first_layers = _first_layers(decoder, config.main_layers)
        self.model: FGramModel | None = None
        self.inputs: FGramInputs | None = None
        self.adaptations: nn.ModuleList | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)  # of layers beyond those of the main model, and of adaptations
            if fgrams is not None:
                self.model = FGramModel.from_decoder(
                    decoder,
                    config.num_layers,
                    fgrams.max_n,
                    last_token_only=config.last_token_only,
                    random_start=config.random_start,
                    residuals=_new_residuals(config, decoder, fgrams),
                ).to(self.device)
                self.inputs = FGramInputs(fgrams, self.model)
            if config.lora_rank:
                self.adaptations = add_lora(decoder, config.lora_rank)
        if self.device.type == "cuda":
            _compile(decoder, self.model)
        groups = _parameter_groups(config, self._trained())
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, betas=_BETAS, fused=self.device.type != "cpu")
        self.row_optimizer: RowAdagrad | None = None
        if self.model is not None and self.model.residuals is not None:
            self.row_optimizer = RowAdagrad(self.model.residuals.values, config.residual_learning_rate)
        self.step, self.seconds, self.losses, self.match_rate = 0, 0.0, list[Tensor](), math.nan
        self._load()
        self._resumed = time.monotonic()

    @property
    def train_loss(self) -> float:
        """Of the last steps; waits for the device."""
        return float(torch.stack(self.losses[-_SHOW_EVERY:]).mean())

    def batches(self, corpus: TokenStream) -> Iterator[_Batch]:
        """Those of the steps that are left, each prepared while the one before is trained on."""
        config = self.config

        def prepared(step: int) -> _Batch:
            return self._batch(corpus.sample_windows(config.batch_size, config.seq_len, (config.seed, step)))

        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(prepared, self.step)
            for step in range(self.step, config.steps):
                batch, ahead = ahead.result(), pool.submit(prepared, step + 1)
                yield batch

    def _batch(self, windows: NDArray[np.int32]) -> _Batch:
        """Windows (batch, seq + 1) on the device."""
        targets = torch.from_numpy(windows[:, 1:].astype(np.int64)).flatten()
        inputs = _unmatched(windows[:, :-1]) if self.inputs is None else self.inputs.match(windows[:, :-1])
        return _Batch(inputs.to(self.device), targets.to(self.device))

    def advance(self, batch: _Batch) -> None:
        """One optimiser step."""
        scale = self.config.learning_rate_scale(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * scale
        residuals = None if self.inputs is None else self.inputs.gather_residuals(batch.inputs)
        with self._autocast():
            hidden = self._hidden(batch.inputs, residuals)
            loss = head_loss(hidden, self.decoder.lm_head.weight, batch.targets)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_gradient_norm)
        self.optimizer.step()
        if self.row_optimizer and residuals is not None and residuals.grad is not None:
            self.row_optimizer.step(batch.inputs.residual_ids, residuals.grad, scale)
        self.step += 1
        self.losses.append(loss.detach())
        self.match_rate = batch.inputs.match_rate

    def _hidden(self, inputs: MatchedBatch, residuals: Tensor | None = None) -> Tensor:
        """(batch * seq, dim)."""
        if self.inputs is None:
            embeddings = self.decoder.embed(inputs.input_ids)
        else:
            embeddings = self.inputs.embed(self.decoder, inputs, residuals)
        positions = torch.arange(inputs.input_ids.shape[1], device=self.device)
        hidden: Tensor = self.decoder(embeddings, positions.expand(inputs.input_ids.shape), CausalAttention())
        return hidden.flatten(0, 1)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    @torch.no_grad()
    def heldout_loss(self, heldout: TokenStream) -> float:
        """Mean loss in nats per token over evenly spread held-out windows."""
        windows = heldout.spread_windows(self.config.seq_len, self.config.heldout_tokens)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for start in range(0, len(windows), self.config.batch_size):
            batch = self._batch(windows[start : start + self.config.batch_size])
            with self._autocast():
                hidden = self._hidden(batch.inputs)
                losses = token_losses(hidden, self.decoder.lm_head.weight, batch.targets)
            total += losses.sum(dtype=torch.float64)
        return float(total) / (len(windows) * self.config.seq_len)

    def record(self, heldout: TokenStream) -> None:
        """Evaluates, adds a line to the curve, saves everything."""
        config = self.config
        train_loss = float(torch.stack(self.losses).mean()) if self.losses else math.nan
        self.losses = []
        self.seconds += time.monotonic() - self._resumed
        loss = self.heldout_loss(heldout)
        peak = config.main_learning_rate if config.changes_main else config.learning_rate
        append_point(
            self.out,
            CurvePoint(
                step=self.step,
                tokens=self.step * config.batch_size * config.seq_len,
                train_loss=round(train_loss, 4),
                heldout_loss=round(loss, 4),
                match_rate=round(self.match_rate, 3),
                learning_rate=peak * config.learning_rate_scale(self.step),
                seconds=round(self.seconds),
            ),
        )
        tqdm.write(f"step {self.step}: held-out loss {loss:.4f} (perplexity {math.exp(loss):.3f})")
        if self.step:  # a run that has not begun begins again as cheaply
            self.save()
        self._resumed = time.monotonic()

    def _trained(self) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module | None] = {
            "model": self.model,
            "lora": self.adaptations,
            "main": None if self.config.freeze_main else self.decoder,
            "first_layers": self.first_layers,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def save(self) -> None:
        """Writes the state so that a kill leaves the old one or the new one."""
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "seconds": self.seconds,
            "optimizer": self.optimizer.state_dict(),
        }
        state |= {name: part.state_dict() for name, part in self._trained().items()}
        if self.row_optimizer is not None:
            state["row_optimizer"] = self.row_optimizer.state_dict()
        partial = self.out / (STATE + ".partial")
        torch.save(state, partial)
        partial.replace(self.out / STATE)

    def _load(self) -> None:
        path = self.out / STATE
        if not path.exists():
            return
        state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        saved = (
            asdict(TrainConfig()) | state["config"]
        )  # a state from before a setting was there has its default
        changed = sorted(k for k, v in asdict(self.config).items() if saved[k] != v)
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
        if self.row_optimizer is not None:
            self.row_optimizer.load_state_dict(state["row_optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]


def _first_layers(decoder: Decoder, num_layers: int) -> nn.ModuleList | None:
    """Layers of a frozen decoder that are trained all the same; None for none."""
    if num_layers > len(decoder.layers):
        raise CheckpointError(
            f"main_layers is {num_layers}, wanted at most the model's {len(decoder.layers)}"
        )
    return nn.ModuleList(decoder.layers[:num_layers]).requires_grad_(True) if num_layers else None


def _new_residuals(config: TrainConfig, decoder: Decoder, fgrams: FGramSet) -> FGramResiduals | None:
    """Zeros where residuals are to be trained."""
    if not config.residual_learning_rate:
        return None
    return FGramResiduals.zeros(fgrams, decoder.config.dim, last_token_only=config.last_token_only)


def _compile(decoder: Decoder, model: FGramModel | None) -> None:
    """Fuses what a layer does beside its matrix products; all layers of one shape share the code."""
    torch.compiler.reset()  # that of an earlier run, with other shapes
    for block in (*decoder.layers, *(() if model is None else model.layers)):
        block.compile()


def _unmatched(input_ids: NDArray[np.int32]) -> MatchedBatch:
    """A batch for a model without f-grams."""
    none = torch.empty(0, dtype=torch.int64)
    return MatchedBatch(torch.from_numpy(input_ids.astype(np.int64)), (), none, none, none, none)


def _parameter_groups(config: TrainConfig, trained: dict[str, nn.Module]) -> list[dict[str, Any]]:
    """What is trained, by peak learning rate and by whether its weights decay."""
    parts: list[tuple[float, list[tuple[str, nn.Parameter]]]] = []
    for name, module in trained.items():
        named = list(module.named_parameters())
        if name != "model":
            parts.append((config.main_learning_rate, named))
            continue
        parts.append((config.output_learning_rate, [p for p in named if p[0].startswith("output.")]))
        parts.append((config.learning_rate, [p for p in named if not p[0].startswith("output.")]))
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
