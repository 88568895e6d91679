"""The demo model in float32, served, against transformers; and the clients that people use.

lm-eval and LangChain bring many packages, so they have an environment of their own: `make test-clients` makes
that and runs them.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from scone.model_store.checkpoint import open_checkpoint
from scone.model_store.tokenizer import Tokenizer

from . import langchain_client
from .process import Process

pytestmark = pytest.mark.heavy

TEXTS = ["The capital of France is", "def add(a, b):\n    return a + b", "añ €😀"]
QUESTIONS = [
    {
        "question": "The capital of France is",
        "choices": ["Paris", "London", "a town in the south"],
        "gold": 0,
    },
    {"question": "Water is made of hydrogen and", "choices": ["oxygen", "iron", "añ €😀"], "gold": 0},
    {"question": "def add(a, b):\n    return", "choices": ["a + b", "a - b", "None"], "gold": 0},
    {"question": "1, 1, 2, 3, 5, 8,", "choices": ["13", "12", "21, 34"], "gold": 0},
]
TASK = """
task: questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def url(smollm2_path: Path) -> Iterator[str]:
    process = Process("--model", str(smollm2_path), "--quantization", "none", "--max-model-len", "512")
    process.wait_for("ready after")
    yield process.url
    process.close()


@pytest.fixture(scope="module")
def reference(smollm2_path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def real_tokenizer(smollm2_path: Path) -> Tokenizer:
    return open_checkpoint(smollm2_path).tokenizer()


@pytest.fixture(scope="module")
def clients() -> Path:
    folder = os.environ.get("SCONE_CLIENTS")
    if folder is None:
        pytest.skip("SCONE_CLIENTS does not name the clients' environment; `make test-clients` does")
    return Path(folder).absolute()


def post(url: str, path: str, **body: Any) -> Any:
    response = httpx.post(url + path, json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def test_embeddings_equal_transformers(url: str, reference: Any, real_tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = torch.tensor([real_tokenizer.encode(text)])
        with torch.inference_mode():
            states = reference.model(ids, output_hidden_states=True).hidden_states
        for layer in (None, 0, 7, 29, 30):
            hidden = states[-1 if layer is None else layer][0]
            for pooling, expected in (("mean", hidden.mean(0)), ("last", hidden[-1])):
                answer = post(url, "/v1/embeddings", input=text, pooling=pooling, layer=layer)
                vector = np.array(answer["data"][0]["embedding"])
                # Some dimensions of the inner layers are in the thousands: relative to the vector's size.
                error = np.abs(vector - expected.numpy()).max() / np.abs(expected.numpy()).max()
                assert error < 1e-4, (text, layer, pooling)


@pytest.mark.timeout(900)
def test_lm_eval_scores_equal_transformers(
    url: str, clients: Path, reference: Any, real_tokenizer: Tokenizer, smollm2_path: Path, tmp_path: Path
) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "questions.yaml").write_text(TASK.format(file=questions))
    model = f"model={smollm2_path.stem},base_url={url}/v1/completions,tokenizer_backend=remote"
    command = (
        f"{clients}/lm_eval --model local-completions --model_args {model},num_concurrent=2,max_length=512"
        f" --batch_size 4 --tasks questions --include_path {tmp_path} --output_path {tmp_path}/out"
        " --log_samples"
    )
    done = subprocess.run(
        command.split(),
        env=os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [samples] = (tmp_path / "out").glob("*/samples_questions_*.jsonl")
    num_scored = 0
    for sample in map(json.loads, samples.read_text().splitlines()):
        for arguments, score in zip(sample["arguments"].values(), sample["filtered_resps"], strict=True):
            expected, is_greedy = score_of(reference, real_tokenizer, arguments["arg_0"], arguments["arg_1"])
            assert float(score[0]) == pytest.approx(expected, abs=1e-3)
            assert (score[1] == "True") is is_greedy
            num_scored += 1
    assert num_scored == 12
    [results] = (tmp_path / "out").glob("*/results_*.json")
    assert json.loads(results.read_text())["results"]["questions"]["acc,none"] >= 0.75


def score_of(reference: Any, tokenizer: Tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    """The log-probability of the continuation, and whether a greedy decoder would have written it."""
    ids = tokenizer.encode(context + continuation)
    num_context = len(tokenizer.encode(context))
    with torch.inference_mode():
        logprobs = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    positions = range(num_context, len(ids))
    is_greedy = all(int(logprobs[i - 1].argmax()) == ids[i] for i in positions)
    return sum(float(logprobs[i - 1, ids[i]]) for i in positions), is_greedy


@pytest.mark.timeout(900)
def test_langchain(url: str, clients: Path, smollm2_path: Path) -> None:
    done = subprocess.run(
        [clients / "python", langchain_client.__file__, url, smollm2_path.stem],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    chat = post(
        url,
        "/v1/chat/completions",
        messages=[{"role": "user", "content": langchain_client.QUESTION}],
        max_completion_tokens=12,
        temperature=0,
    )
    text = chat["choices"][0]["message"]["content"]
    assert text
    assert [said["chat"], said["chat_stream"], *said["chat_batch"]] == [text] * 5
    assert said["chat_usage"] == said["chat_stream_usage"] == chat["usage"]["completion_tokens"]
    plain = post(url, "/v1/completions", prompt=langchain_client.PROMPT, max_tokens=12, temperature=0)
    assert said["completion"] == said["completion_stream"] == plain["choices"][0]["text"]
    embedded = post(url, "/v1/embeddings", input=langchain_client.TEXTS)["data"]
    for vector, item in zip(said["embeddings"], embedded, strict=True):
        np.testing.assert_array_equal(np.float32(vector), np.float32(item["embedding"]))
    assert said["embedding"] == said["embeddings"][0]
