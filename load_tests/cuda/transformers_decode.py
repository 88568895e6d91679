"""What transformers' `generate` takes for a token, with weights of the same shape."""

from __future__ import annotations

import time

import torch

from load_tests.cuda.smollm2_shape import SMOLLM2_135M


def transformers_decode(num_seqs: int, prompt_tokens: int, num_tokens: int) -> dict[str, float]:
    """`generate`, greedy, bfloat16, in process; weights of the same shape, random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = SMOLLM2_135M
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.dim,
        intermediate_size=c.ffn_dim,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        max_position_embeddings=c.max_position,
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16).cuda().eval()
    ids = torch.randint(3, c.vocab_size, (num_seqs, prompt_tokens), device="cuda")
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    seconds = []
    with torch.inference_mode():
        for tokens in (4, 1, num_tokens):
            torch.cuda.synchronize()
            began = time.perf_counter()
            model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **options)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    decode = seconds[2] - seconds[1]
    return {
        "period_ms": round(1e3 * decode / (num_tokens - 1), 3),
        "tokens_per_second": round(num_seqs * (num_tokens - 1) / decode),
    }
