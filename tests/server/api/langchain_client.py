"""Asks a server through LangChain, in every way it has; prints the answers as JSON. Run with its own Python:

python langchain_client.py URL MODEL
"""

from __future__ import annotations

import json
import sys
from typing import Any

QUESTION = "Name a colour of the sky."
PROMPT = "The capital of France is"
TEXTS = ["for example, the", "of the"]


def main(url: str, model: str) -> dict[str, Any]:
    from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings  # not in the tests' environment

    server: dict[str, Any] = {"base_url": url + "/v1", "api_key": "any", "model": model, "max_retries": 0}
    chat = ChatOpenAI(**server, temperature=0, max_completion_tokens=12)
    whole = chat.invoke(QUESTION)
    chunks = list(chat.stream(QUESTION, stream_usage=True))
    llm = OpenAI(**server, temperature=0, max_tokens=12)
    # Without this it sends token ids of OpenAI's own tokenizer.
    embeddings = OpenAIEmbeddings(**server, check_embedding_ctx_length=False)
    return {
        "chat": whole.content,
        "chat_usage": whole.usage_metadata["output_tokens"],
        "chat_stream": "".join(chunk.content for chunk in chunks),
        "chat_stream_usage": sum(c.usage_metadata["output_tokens"] for c in chunks if c.usage_metadata),
        "chat_batch": [answer.content for answer in chat.batch([QUESTION] * 3)],
        "completion": llm.invoke(PROMPT),
        "completion_stream": "".join(llm.stream(PROMPT)),
        "embeddings": embeddings.embed_documents(TEXTS),
        "embedding": embeddings.embed_query(TEXTS[0]),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2])))
