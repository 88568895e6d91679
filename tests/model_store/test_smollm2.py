"""The real demo model: our reading of its GGUF file against transformers' reading of the same file."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from scone.model_store.checkpoint import Checkpoint, open_checkpoint
from scone.model_store.decoder import CausalAttention, Decoder
from scone.model_store.perplexity import measure_perplexity
from scone.model_store.token_stream import TokenStream
from scone.model_store.tokenizer import Tokenizer

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea,",
    "Q: What is 17 + 25?\nA:",
    "import numpy as np\n\nx = np.",
    "The mitochondria is",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "SELECT name, COUNT(*) FROM",
    "In 1969, humans first",
    "To install the package, run",
    "La ville de Paris est",
    '{"name": "Alice", "age":',
    "The difference between a list and a tuple in Python is",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 1, 2, 3, 5, 8,",
    "Water boils at",
    "class Stack:\n    def __init__(self):\n",
    "The quick brown fox",
    "git commit -m",
    "According to the documentation, the function returns",
]


@pytest.fixture(scope="module")
def checkpoint(smollm2_path: Path) -> Checkpoint:
    return open_checkpoint(smollm2_path)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return checkpoint.tokenizer()


@pytest.fixture(scope="module")
def decoder(checkpoint: Checkpoint) -> Decoder:
    return checkpoint.decoder()


@pytest.fixture(scope="module")
def reference(smollm2_path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    ).eval()


def logits_of(decoder: Decoder, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        embeddings = decoder.embed(torch.tensor([ids]))
        hidden = decoder(embeddings, torch.arange(len(ids)).unsqueeze(0), CausalAttention())
        return decoder.logits(hidden)[0]


def test_shape_and_identity(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    config = checkpoint.config
    assert (config.vocab_size, config.dim, config.num_layers) == (49152, 576, 30)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert config.tied_head
    assert tokenizer.eos_ids == (tokenizer.backend.token_to_id("<|im_end|>"),)
    assert tokenizer.chat_template is not None
    assert "<|im_start|>" in tokenizer.chat_template


def test_logits_equal_transformers(decoder: Decoder, tokenizer: Tokenizer, reference: Any) -> None:
    for prompt in PROMPTS[:6]:
        ids = tokenizer.encode(prompt)
        with torch.inference_mode():
            expected = reference(torch.tensor([ids])).logits[0]
        assert torch.allclose(logits_of(decoder, ids), expected, atol=1e-4, rtol=0)


def test_perplexity_equals_transformers(decoder: Decoder, tokenizer: Tokenizer, reference: Any) -> None:
    stream = TokenStream(np.array(tokenizer.encode(Path(random.__file__).read_text()), np.int32))

    def embed(input_ids: NDArray[np.int32]) -> torch.Tensor:
        return decoder.embed(torch.from_numpy(input_ids.astype(np.int64)))

    (measured,) = measure_perplexity(decoder, stream, [embed], seq_len=192, max_tokens=768)
    windows = torch.from_numpy(stream.spread_windows(192, 768).astype(np.int64))
    with torch.inference_mode():
        logits = reference(windows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert measured.num_tokens == windows[:, 1:].numel()
    assert measured.value == pytest.approx(float(loss.exp()), rel=1e-4)
    assert measured.value == pytest.approx(float(loss.exp()), abs=1e-3)


def test_states_within_equal_transformers(decoder: Decoder, tokenizer: Tokenizer, reference: Any) -> None:
    ids = torch.tensor([tokenizer.encode(PROMPTS[1])])
    with torch.inference_mode():
        expected = reference.model(ids, output_hidden_states=True).hidden_states
        for num_layers in (0, 1, 15, 29, 30, None):
            positions = torch.arange(ids.shape[1]).unsqueeze(0)
            states = decoder(decoder.embed(ids), positions, CausalAttention(), num_layers)
            wanted = expected[30 if num_layers is None else num_layers]
            # States within reach the thousands: the error is relative to the largest.
            assert (states - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_greedy_tokens_equal_transformers(decoder: Decoder, tokenizer: Tokenizer, reference: Any) -> None:
    """64 tokens on 20 prompts; one forward over what transformers wrote must choose every token it chose."""
    encoded = [tokenizer.encode(prompt) for prompt in PROMPTS]
    longest = max(map(len, encoded))
    padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in encoded])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in encoded])
    with torch.inference_mode():
        out = reference.generate(
            padded, attention_mask=mask, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    for ids, generated in zip(encoded, out[:, longest:].tolist(), strict=True):
        assert len(generated) == 64
        chosen = logits_of(decoder, ids + generated[:-1])[len(ids) - 1 :].argmax(-1).tolist()
        assert chosen == generated


def varied_strings() -> list[str]:
    """200 strings: code, prose, Unicode, emoji, whitespace runs, digits, broken mixtures."""
    source = Path(json.__file__).parent
    code = "".join((source / name).read_text() for name in ("decoder.py", "encoder.py", "scanner.py"))
    rng = random.Random(7)
    strings = [code[i : i + rng.randint(1, 300)] for i in rng.sample(range(len(code)), 80)]
    alphabet = (
        "aZé ß日本語한국어العربيةहिन्दी🎉👩‍👩‍👧‍👦\t\n\r \u00a0\u200b'’s12345.,;()[]{}<>|_-=+*/\\\"#@$%^&~`ﬁЖ"
    )
    strings += ["".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(80)]
    strings += [" " * k + "x" + "\n" * (k % 5) + "\t" * (k % 3) for k in range(1, 21)]
    strings += [
        f"{'9' * k} it's we'll THEY'RE {k}.{k}e-{k} <|im_start|>user{k}<|im_end|>" for k in range(1, 21)
    ]
    return strings


def test_token_ids_equal_transformers(tokenizer: Tokenizer, smollm2_path: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    # transformers does not read `tokenizer.ggml.pre`: it leaves out SmolLM2's splitting of digits, which
    # decides whether a run of spaces before a digit is one token
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    expected.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    strings = varied_strings()
    assert len(strings) == 200
    for text in strings:
        assert (
            tokenizer.encode(text, add_special_tokens=False)
            == expected(text, add_special_tokens=False).input_ids
        )


def test_token_bytes_rebuild_any_text(tokenizer: Tokenizer) -> None:
    for text in varied_strings():
        ids = tokenizer.encode(text)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_tokenizer_hash_is_the_same_from_a_json_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from scone.model_store.tokenizer import tokenizer_from_file

    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer_from_file(tmp_path / "tokenizer.json").hash == tokenizer.hash


def test_gguf_fields_equal_the_librarys_own(smollm2_path: Path) -> None:
    from gguf import GGUFReader

    from scone.model_store.gguf_file import GGUFFile

    ours, theirs = GGUFFile(smollm2_path)._reader, GGUFReader(smollm2_path)
    assert ours.fields.keys() == theirs.fields.keys()
    for name, field in theirs.fields.items():
        assert ours.fields[name].contents() == field.contents()
    assert [t.data_offset for t in ours.tensors] == [t.data_offset for t in theirs.tensors]


def test_weights_equal_the_librarys_own(smollm2_path: Path) -> None:
    from gguf.quants import dequantize

    from scone.model_store.gguf_file import GGUFFile

    file = GGUFFile(smollm2_path)
    for name, kind in (
        ("token_embd.weight", "Q8_0"),
        ("blk.3.attn_v.weight", "Q4_1"),
        ("blk.7.ffn_down.weight", "Q4_1"),
        ("blk.29.attn_output.weight", "Q4_1"),
    ):
        stored = file._tensors[name]
        assert stored.tensor_type.name == kind
        expected = torch.from_numpy(dequantize(stored.data, stored.tensor_type))
        assert torch.equal(file._read(name), expected)
