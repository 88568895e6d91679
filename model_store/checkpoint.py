"""One door to every kind of checkpoint: GGUF file, Hugging Face folder, SCONE folder.

A SCONE folder holds `scone.json`, `fgram_model.safetensors` (the f-gram model without the embedding it
shares) and either the main model by value (`main/`, a Hugging Face folder, or `main.gguf`) or its path
and hash by reference. `scone.json`:

    {"format": 1, "main": {"path": "main", "hash": "<sha256>"},
     "fgram_model": {"num_layers": 2, "max_n": 4, "last_token_only": false}}

An f-gram model with residuals (fgram_residuals.py) has them in the same file (residual_tensors.py); where
they are coded, `scone.json` has `"residuals": {"codec": "int4"}` too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scone.model_store.decoder import Decoder
from scone.model_store.errors import CheckpointError
from scone.model_store.fgram_model import FGramModel
from scone.model_store.fgram_residuals import FGramResiduals
from scone.model_store.gguf_file import GGUFFile
from scone.model_store.hf_folder import HFFolder
from scone.model_store.kronecker import KroneckerEmbedding, bytes_of_tokens, log_audit
from scone.model_store.model_config import ModelConfig
from scone.model_store.residual_tensors import residual_tensors, take_residuals
from scone.model_store.tokenizer import Tokenizer

FORMAT = 1
DESCRIPTION, WEIGHTS = "scone.json", "fgram_model.safetensors"


class MainModel(Protocol):
    """What a GGUF file and a Hugging Face folder have in common."""

    @property
    def config(self) -> ModelConfig: ...
    def tensors(self) -> Iterator[tuple[str, Tensor]]: ...
    def content_hash(self) -> str: ...
    def tokenizer(self) -> Tokenizer: ...


class Checkpoint:
    """A main model, and the f-gram model beside it if the checkpoint has one."""

    def __init__(
        self, path: Path, main: MainModel, main_path: Path, folder: SconeFolder | None = None
    ) -> None:
        self.path = path
        self.main_path = main_path
        self._main = main
        self._folder = folder
        self.config = main.config

    @cached_property
    def model_hash(self) -> str:
        """SHA-256 of the main model's weights: what a table must have been built for."""
        return self._main.content_hash()

    @cached_property
    def fgram_model_hash(self) -> str | None:
        """SHA-256 of the f-gram model's weights file, or None if there is none."""
        return None if self._folder is None else self._folder.content_hash()

    def tokenizer(self) -> Tokenizer:
        """The model's own tokenizer; raises TokenizerError."""
        return self._main.tokenizer()

    def decoder(self, dtype: torch.dtype = torch.float32) -> Decoder:
        """The main model, its weights in `dtype`; raises CheckpointError."""
        decoder = Decoder.from_tensors(self.config, self._main.tensors(), dtype)
        if isinstance(decoder.embed_tokens, KroneckerEmbedding):
            token_bytes = bytes_of_tokens(self.tokenizer(), self.config.vocab_size)
            log_audit(decoder.embed_tokens.read_tokens(token_bytes))
        return decoder

    def fgram_model(self, decoder: Decoder) -> FGramModel | None:
        """The f-gram model over `decoder`'s token embedding, or None if the checkpoint has none."""
        return None if self._folder is None else self._folder.fgram_model(decoder)

    def save_with_residuals(self, path: Path, residuals: FGramResiduals, codec: str) -> None:
        """Writes a SCONE folder with the same f-gram model and main model, by reference, and these residuals.

        Raises:
            CheckpointError: there is no f-gram model, or its file is damaged.
            ValueError: the codec does not fit the model's width.
        """
        if self._folder is None:
            raise CheckpointError(f"{self.path} has no f-gram model")
        weights = self._folder.weights()
        take_residuals(weights, self._folder.residual_codec, self.config.dim)
        weights |= residual_tensors(residuals, codec)
        description = self._folder.description | {
            "main": {"path": os.path.relpath(self.main_path, path), "hash": self.model_hash},
            "residuals": {"codec": codec},
        }
        _write_folder(path, weights, description)


class SconeFolder:
    """The folder of a main model (by value or by reference) and its f-gram model."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.description: dict[str, Any] = json.loads((path / DESCRIPTION).read_text())
            self._main_path = str(self.description["main"]["path"])
            self._main_hash = str(self.description["main"]["hash"])
            self._shape = dict(self.description["fgram_model"])
            self.residual_codec = self.description.get("residuals", {}).get("codec")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path / DESCRIPTION} is not a SCONE checkpoint: {error!r}") from None
        if self.description.get("format") != FORMAT:
            raise CheckpointError(
                f"{path / DESCRIPTION}: format is {self.description.get('format')!r}, wanted {FORMAT}"
            )

    def main_path(self, override: Path | None) -> Path:
        """Where the main model lies: `override`, or what scone.json says, relative to the folder."""
        return override or (self.path / self._main_path)

    def check_main(self, found_hash: str, where: Path) -> None:
        """Raises CheckpointError if the main model is not the one the f-gram model was trained on."""
        if found_hash != self._main_hash:
            raise CheckpointError(
                f"{where} has hash {found_hash[:16]}, wanted {self._main_hash[:16]}, the main model that "
                f"{self.path} was trained on; point SCONE_MAIN_MODEL at that one"
            )

    def content_hash(self) -> str:
        with (self.path / WEIGHTS).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def weights(self) -> dict[str, Tensor]:
        """Tensors of the f-gram model's file, by name; raises CheckpointError."""
        try:
            return load_file(self.path / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path / WEIGHTS} cannot be read: {error}") from None

    def fgram_model(self, decoder: Decoder) -> FGramModel:
        """The f-gram model in float32, ready to embed, where the decoder is."""
        try:
            weights = self.weights()
            residuals = take_residuals(weights, self.residual_codec, decoder.config.dim)
            model = FGramModel(decoder, **self._shape)
            model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
            model.residuals = residuals
        except (RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path / WEIGHTS} does not fit its description: {error}") from None
        return model.requires_grad_(False).eval().to(decoder.device)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a GGUF file, a Hugging Face folder or a SCONE folder; raises CheckpointError.

    The environment variable SCONE_MAIN_MODEL overrides where a SCONE folder's main model is looked for.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; wanted a GGUF file or a model folder (setting: model)")
    if not (path / DESCRIPTION).exists():
        return Checkpoint(path, _open_main(path), path)
    folder = SconeFolder(path)
    override = os.environ.get("SCONE_MAIN_MODEL")
    main_path = folder.main_path(Path(override) if override else None)
    if not main_path.exists():
        raise CheckpointError(
            f"{path} refers to the main model {main_path}, which does not exist; "
            "fetch it, or set SCONE_MAIN_MODEL to where it is"
        )
    checkpoint = Checkpoint(path, _open_main(main_path), main_path, folder)
    folder.check_main(checkpoint.model_hash, main_path)
    return checkpoint


def _open_main(path: Path) -> MainModel:
    if path.is_dir():
        return HFFolder(path)
    if path.suffix == ".gguf":
        return GGUFFile(path)
    raise CheckpointError(f"{path} is neither a folder nor a .gguf file")


def save_scone_folder(
    path: Path, model: FGramModel, *, main_path: Path, main_hash: str, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Writes a SCONE folder that refers to the main model by path relative to the folder."""
    weights = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    description = {
        "format": FORMAT,
        "main": {"path": os.path.relpath(main_path, path), "hash": main_hash},
        "fgram_model": {
            "num_layers": len(model.layers),
            "max_n": model.max_n,
            "last_token_only": model.last_token_only,
        },
    }
    _write_folder(path, weights, description)


def _write_folder(path: Path, weights: dict[str, Tensor], description: dict[str, Any]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    partial = path / (WEIGHTS + ".partial")
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial)
    partial.replace(path / WEIGHTS)
    partial = path / (DESCRIPTION + ".partial")
    partial.write_text(json.dumps(description, indent=2) + "\n")
    partial.replace(path / DESCRIPTION)
