"""Random weights in another model's shape: `python -m load_tests.random_model --like MODEL --out FOLDER`

For measurements that depend on a shape alone, of which no checkpoint is at hand; `--set num_kv_heads=9`
changes it. The weights are rounded to a format that a quantised checkpoint would have, so that the kernels
run as on one; the folder is a Hugging Face one with float32 weights and the other model's tokenizer.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from scone.kernels.packed_linear import rounded_weight_reference
from scone.model_store.checkpoint import open_checkpoint
from scone.model_store.hf_folder import save_hf_folder
from scone.model_store.initialize import new_decoder

KINDS = ("f32", "bf16", "int8", "int4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--like", required=True, help="model whose shape and tokenizer it gets")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="fields of ModelConfig")
    parser.add_argument("--kind", choices=KINDS, default="int4", help="format that the weights fit")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.like)
    changes: dict[str, Any] = {
        name: int(number) for name, number in (pair.split("=") for pair in options.set)
    }
    decoder = new_decoder(replace(checkpoint.config, **changes), checkpoint.tokenizer(), seed=0)
    with torch.no_grad():
        for module in decoder.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(rounded_weight_reference(module.weight, options.kind))
    save_hf_folder(options.out, decoder, checkpoint.tokenizer())


if __name__ == "__main__":
    main()
