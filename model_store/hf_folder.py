"""A Hugging Face model folder as a checkpoint: config.json, *.safetensors, tokenizer.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from scone.model_store.decoder import Decoder
from scone.model_store.errors import CheckpointError
from scone.model_store.hf_config import config_of, description_of, eos_ids_of, family_of
from scone.model_store.model_config import ModelConfig
from scone.model_store.tokenizer import Tokenizer, tokenizer_from_file

RENAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
_HF_PARTS = (
    {ours: theirs for theirs, ours in RENAMES.items()}
    | {name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
    | {name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
)


class HFFolder:
    """One model folder. Raises CheckpointError, naming the file, if a part is missing or damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._raw = self._read_json("config.json")
        self.family = family_of(self._raw, path / "config.json")
        self._weight_files = self._find_weight_files()
        self._names = {name for file in self._weight_files for name in self._open(file).keys()}  # noqa: SIM118

    def _read_json(self, name: str, required: bool = True) -> dict[str, Any]:
        file = self.path / name
        if not file.exists() and not required:
            return {}
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error.strerror}") from None
        except ValueError as error:
            raise CheckpointError(f"{file} is not JSON: {error}") from None
        if not isinstance(content, dict):
            raise CheckpointError(f"{file} holds a {type(content).__name__}, wanted an object")
        return content

    def _find_weight_files(self) -> list[Path]:
        index = self._read_json("model.safetensors.index.json", required=False)
        if index:
            files = [self.path / name for name in sorted(set(index.get("weight_map", {}).values()))]
        else:
            files = sorted(self.path.glob("*.safetensors"))
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise CheckpointError(f"{self.path} lacks the weight files {missing} that its index names")
        if not files:
            raise CheckpointError(f"{self.path} holds no *.safetensors file")
        return files

    def _open(self, file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(
                f"{file} ({file.stat().st_size} bytes) is not a whole safetensors file: {error}; "
                "is it a Git LFS pointer or a download that was cut?"
            ) from None

    @property
    def config(self) -> ModelConfig:
        return config_of(self._raw, self.path / "config.json", self._names, self._eos_ids())

    def _eos_ids(self) -> tuple[int, ...]:
        generation = self._read_json("generation_config.json", required=False)
        return eos_ids_of(generation) or eos_ids_of(self._raw)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight as stored, under the decoder's own names, one at a time."""
        tied = self.config.tied_head
        for file in self._weight_files:
            with self._open(file) as opened:
                for name in opened.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                    if (name == "lm_head.weight" and tied) or name.endswith("rotary_emb.inv_freq"):
                        continue
                    yield _decoder_name(name), opened.get_tensor(name)

    def content_hash(self) -> str:
        """SHA-256 over config.json and the weight files."""
        total = hashlib.sha256()
        for file in [self.path / "config.json", *self._weight_files]:
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            total.update(f"{file.name} {digest}\n".encode())
        return total.hexdigest()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of tokenizer.json and tokenizer_config.json."""
        settings = self._read_json("tokenizer_config.json", required=False)
        template_file = self.path / "chat_template.jinja"
        template = template_file.read_text() if template_file.exists() else settings.get("chat_template")
        return tokenizer_from_file(
            self.path / "tokenizer.json",
            bos_token=_token_text(settings.get("bos_token")),
            eos_ids=self._eos_ids(),
            chat_template=template if isinstance(template, str) else None,
        )


def save_hf_folder(path: Path, decoder: Decoder, tokenizer: Tokenizer) -> None:
    """Writes a model that `HFFolder` reads, its weights as they are. config.json comes last."""
    path.mkdir(parents=True, exist_ok=True)
    tied = decoder.config.tied_head
    weights = {
        hf_name(name): tensor.detach().contiguous()
        for name, tensor in decoder.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    partial = path / "model.safetensors.partial"
    save_file(weights, partial)
    partial.replace(path / "model.safetensors")
    tokenizer.backend.save(str(path / "tokenizer.json"))
    bos = None if tokenizer.bos_id is None else tokenizer.backend.id_to_token(tokenizer.bos_id)
    settings = {"bos_token": bos, "chat_template": tokenizer.chat_template}
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (path / "config.json").write_text(json.dumps(description_of(decoder.config), indent=2) + "\n")


def hf_name(name: str) -> str:
    """`layers.3.q_proj.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    if name.startswith("lm_head."):
        return name
    parts = [_HF_PARTS.get(part, part) for part in name.split(".")]
    return ".".join(["model", *parts])


def _token_text(declared: Any) -> str | None:
    """`bos_token` is stored as text or as an object with the text in `content`."""
    return declared.get("content") if isinstance(declared, dict) else declared


def _decoder_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `layers.3.q_proj.weight`."""
    parts = [RENAMES.get(p, p) for p in name.split(".") if p not in {"model", "self_attn", "mlp"}]
    return ".".join(parts)
