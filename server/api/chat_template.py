"""The model's own chat template: from messages to the text that the model was trained on.

Templates come with checkpoints, so they are run in Jinja's sandbox. The names they expect are those of
Hugging Face's `apply_chat_template`.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from scone.server.api.token_text import token_text
from scone.server.errors import InvalidRequestError

if TYPE_CHECKING:
    from scone.model_store.tokenizer import Tokenizer


def render_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> str:
    """The prompt text, ready for the assistant's turn.

    Raises InvalidRequestError if the model has no template, or its template refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise InvalidRequestError(
            "This model has no chat template: it is a base model. Use /v1/completions.",
            param="messages",
            code="no_chat_template",
        )
    try:
        template = _environment().from_string(tokenizer.chat_template)
        return template.render(
            messages=messages,
            add_generation_prompt=True,
            bos_token="" if tokenizer.bos_id is None else token_text(tokenizer, tokenizer.bos_id),
            eos_token=token_text(tokenizer, tokenizer.eos_ids[0]) if tokenizer.eos_ids else "",
            tools=None,
        )
    # Templates index, call and add whatever messages hold: anything may come out of one.
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise InvalidRequestError(
            f"The model's chat template does not take these messages: {error}.", param="messages"
        ) from None


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda text: datetime.datetime.now().strftime(text)
    return environment


def _to_json(value: object, indent: int | None = None) -> str:
    # Jinja's own filter escapes HTML, which models were not trained on.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
