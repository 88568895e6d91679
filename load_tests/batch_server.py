"""A library without a batching server of its own behind one HTTP route, for `load_tests.rivals`.

    python load_tests/batch_server.py transformers FOLDER --port 8001 [--device cuda]
    python load_tests/batch_server.py transformers-batches FOLDER --port 8001 [--device cuda]
    python load_tests/batch_server.py llama.cpp FILE.gguf --port 8001

Answers `POST /v1/completions` with a list of prompts as one batch, greedily, without stopping at an end
token, and returns counts alone: no text is made, nothing is streamed, nothing is queued. Whatever that
leaves out of the measured time is in the library's favour. Runs in the library's own environment, so it
imports nothing of this project.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, Protocol


class BatchEngine(Protocol):
    """Generates `max_tokens` tokens for each prompt; returns the number of prompt tokens."""

    def generate(self, prompts: list[str], max_tokens: int) -> int: ...


class Transformers:
    """`generate`, prompts padded on the left; float32 on a CPU, bfloat16 on a GPU."""

    def __init__(self, folder: str, device: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(os.cpu_count() or 1)
        self._torch, self._device = torch, device
        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self._tokenizer.pad_token = self._tokenizer.pad_token or self._tokenizer.eos_token
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)

    def generate(self, prompts: list[str], max_tokens: int) -> int:
        inputs = self._tokenizer(prompts, return_tensors="pt", padding=True).to(self._device)
        with self._torch.inference_mode():
            made = self._model.generate(
                **inputs, max_new_tokens=max_tokens, min_new_tokens=max_tokens, do_sample=False
            )
            made.cpu()  # waits for the device
        return int(inputs["attention_mask"].sum())


class TransformersBatches(Transformers):
    """`generate_batch`: transformers' own continuous batching over a paged cache, kept from call to call."""

    def __init__(self, folder: str, device: str) -> None:
        super().__init__(folder, device)
        self.generate(["a b c d " * 200] * 32, 64)  # its memory is sized for the first call

    def generate(self, prompts: list[str], max_tokens: int) -> int:
        from transformers import GenerationConfig

        config = GenerationConfig(max_new_tokens=max_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        sequences = self._tokenizer(prompts)["input_ids"]
        made = self._model.generate_batch(sequences, generation_config=config, persistent_manager=True)
        lengths = {len(output.generated_tokens) for output in made.values()}
        if len(made) != len(prompts) or lengths != {max_tokens}:
            raise RuntimeError(
                f"{len(made)} answers of {lengths} tokens, wanted {len(prompts)} of {max_tokens}"
            )
        return sum(map(len, sequences))


class LlamaCpp:
    """llama.cpp's own batches: each sequence prefilled, then all of them decoded in one batch a step."""

    MAX_SEQS = 32
    MAX_BATCH = 512
    CONTEXT_OF_A_SEQUENCE = 1024

    def __init__(self, path: str) -> None:
        import llama_cpp

        self._lib: Any = llama_cpp
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(self._vocab)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = self.MAX_SEQS * self.CONTEXT_OF_A_SEQUENCE
        params.n_batch = params.n_ubatch = self.MAX_BATCH
        params.n_seq_max = self.MAX_SEQS
        params.n_threads = params.n_threads_batch = os.cpu_count() or 1
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._batch = llama_cpp.llama_batch_init(self.MAX_BATCH, 0, 1)

    def generate(self, prompts: list[str], max_tokens: int) -> int:
        lib = self._lib
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        sequences = [self._tokenize(prompt) for prompt in prompts]
        newest = []
        for seq, token_ids in enumerate(sequences):
            for first in range(0, len(token_ids), self.MAX_BATCH):
                part = token_ids[first : first + self.MAX_BATCH]
                is_last = first + len(part) == len(token_ids)
                rows = [(t, first + i, seq, is_last and i == len(part) - 1) for i, t in enumerate(part)]
                best = self._decode(rows)
            newest += best
        for step in range(1, max_tokens):
            newest = self._decode([(t, len(sequences[s]) + step - 1, s, True) for s, t in enumerate(newest)])
        return sum(map(len, sequences))

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Runs (token, position, sequence, wants logits) rows; returns the best token of each that wants."""
        import numpy as np

        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, seq, wants) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq
            batch.logits[i] = wants
        status = self._lib.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        best = []
        for i, row in enumerate(rows):
            if row[3]:
                logits = self._lib.llama_get_logits_ith(self._context, i)
                best.append(int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax()))
        return best

    def _tokenize(self, text: str) -> list[int]:
        data = text.encode()
        tokens = (ctypes.c_int32 * (len(data) + 8))()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), tokens, len(tokens), True, False)
        return list(tokens[:count])


class Handler(BaseHTTPRequestHandler):
    """One batch a request."""

    engine: BatchEngine

    def do_GET(self) -> None:
        self._answer({"status": "ready"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        num_prompt_tokens = self.engine.generate(prompts, body["max_tokens"])
        num_generated = len(prompts) * body["max_tokens"]
        self._answer({"usage": {"prompt_tokens": num_prompt_tokens, "completion_tokens": num_generated}})

    def _answer(self, result: dict[str, Any]) -> None:
        data = json.dumps(result).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Keeps silent."""


def main() -> None:
    parser = argparse.ArgumentParser(description="One library behind one HTTP route.")
    parser.add_argument("library", choices=["transformers", "transformers-batches", "llama.cpp"])
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--device", default="cpu", help="of transformers")
    options = parser.parse_args()
    if options.library == "llama.cpp":
        Handler.engine = LlamaCpp(options.model)
    else:
        kind = TransformersBatches if options.library == "transformers-batches" else Transformers
        Handler.engine = kind(options.model, options.device)
    HTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
