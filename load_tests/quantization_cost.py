"""What quantisation costs: `python -m load_tests.quantization_cost --model MODEL TEXT...`

Runs each text's first tokens through every setting, with keys and values in float32 and in bfloat16, and
through the torch backend in float32, the reference. Prints for each: perplexity, mean KL divergence from the
reference in nats, how often the best token is the same, and the largest difference of a log-probability.
`--stored-as bfloat16` rounds the weights first, also the reference's, as those of a checkpoint in that type
are. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scone.model_store.checkpoint import open_checkpoint
from scone.model_store.decoder import Decoder
from scone.server.engine.engine_config import EngineConfig, KvCacheDtype, Quantization
from scone.server.engine.model_runner import ModelRunner
from scone.server.engine.scheduler import Chunk, Sequence

QUANTIZATIONS: tuple[Quantization, ...] = ("none", "bfloat16", "auto", "int8", "int4")
KV_DTYPES: tuple[KvCacheDtype, ...] = ("float32", "bfloat16")


def log_probabilities(decoder: Decoder, config: EngineConfig, texts: list[list[int]]) -> list[Tensor]:
    """(num_tokens, vocab_size) of each text."""
    runner = ModelRunner(decoder, config)
    results = []
    for input_ids in texts:
        seq = Sequence(0, 0, input_ids, block_ids=list(range(runner.num_blocks)))
        chunk = Chunk(seq, 0, len(input_ids))
        with torch.inference_mode():
            hidden = runner.forward([chunk], runner.embed([chunk]))
            results.append(
                torch.cat([runner.logits(part).log_softmax(-1) for part in torch.split(hidden, 64)])
            )
    return results


def compare(ours: list[Tensor], reference: list[Tensor], texts: list[list[int]]) -> dict[str, float]:
    """The figures of one setting over all texts."""
    num_predicted = sum(len(ids) - 1 for ids in texts)
    loss = sum(
        -float(p[:-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1)).sum())
        for p, ids in zip(ours, texts, strict=True)
    )
    pairs = list(zip(reference, ours, strict=True))
    return {
        "perplexity": float(torch.tensor(loss / num_predicted).exp()),
        "kl_nats": float(torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).mean()),
        "same_best_token": float(
            torch.cat([(p.argmax(-1) == q.argmax(-1)).float() for p, q in pairs]).mean()
        ),
        "largest_difference": max(float((p - q).abs().max()) for p, q in pairs),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="What quantisation costs in quality.")
    parser.add_argument("texts", nargs="+", type=Path, metavar="TEXT")
    parser.add_argument("--model", required=True)
    parser.add_argument("--stored-as", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quantization", nargs="+", default=QUANTIZATIONS)
    parser.add_argument("--num-tokens", type=int, default=512, help="of each text (default: 512)")
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.model)
    tokenizer = checkpoint.tokenizer()
    decoder = checkpoint.decoder(getattr(torch, arguments.stored_as)).float()
    texts = [tokenizer.encode(path.read_text())[: arguments.num_tokens] for path in arguments.texts]
    length = max(map(len, texts))
    limits: dict[str, Any] = {"max_model_len": length, "max_num_seqs": 1, "max_num_batched_tokens": length}
    reference = log_probabilities(decoder, EngineConfig(backend="torch", **limits), texts)
    results = {"torch none": compare(reference, reference, texts)}
    for quantization, kv_dtype in itertools.product(arguments.quantization, KV_DTYPES):
        config = EngineConfig(backend="native", quantization=quantization, kv_cache_dtype=kv_dtype, **limits)
        name = f"native {quantization}, keys and values {kv_dtype}"
        results[name] = compare(log_probabilities(decoder, config, texts), reference, texts)
        print(name, *(f"{key} {value:.6g}" for key, value in results[name].items()), flush=True)
    print(
        json.dumps(
            {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "machine": platform.platform(),
                "model": Path(arguments.model).name,
                "stored_as": arguments.stored_as,
                "num_tokens": sum(map(len, texts)),
                "results": results,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
