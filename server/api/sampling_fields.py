"""The fields that completions and chat completions share, and what becomes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from scone.server.api.json_types import JsonBool, JsonFloat, JsonInt, JsonModel, TokenIds, text_or_list
from scone.server.errors import InvalidRequestError
from scone.server.sequence import SamplingParams

MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_N = 128
INT64_MAX = 2**63 - 1

StopText = Annotated[str, Field(min_length=1)]
Stop = Annotated[
    Annotated[StopText, Tag("<text>")]
    | Annotated[Annotated[list[StopText], Field(max_length=MAX_STOPS)], Tag("<list>")],
    Discriminator(text_or_list),
]

# Known from OpenAI's API or from other servers, and not done here: an answer that silently ignored
# them would be wrong. The values listed ask for nothing and are accepted.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "json_schema": (),
    "grammar": (),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "bad_words": ([],),
    "truncate_prompt_tokens": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "typical_p": (1, 1.0),
    "logits_processors": ([],),
    "lora_path": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "return_tokens_as_token_ids": (False,),
    # Fields of completions, to which chat has nothing that corresponds.
    "echo": (False,),
    "add_special_tokens": (False,),
}


def _check_logit_bias(value: object) -> object:
    if isinstance(value, dict):
        for key in value:
            if not key.isascii() or not key.isdigit() or len(key) > 10:
                raise PydanticCustomError("token_id", "Keys should be token ids")
    return value


LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Annotated[JsonFloat, Field(ge=-100, le=100)]],
    BeforeValidator(_check_logit_bias),
]


class StreamOptions(JsonModel):
    """Only allowed together with `stream: true`."""

    include_usage: JsonBool = Field(False, description="Send one more chunk, with the usage, before [DONE].")


class SamplingFields(JsonModel):
    """How to choose tokens and when to stop."""

    model: str | None = Field(None, description="Name from /v1/models; the served model if left out.")
    temperature: Annotated[JsonFloat, Field(ge=0, le=2)] = Field(1.0, description="0 is greedy.")
    top_p: Annotated[JsonFloat, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[JsonInt, Field(ge=-1, le=INT64_MAX)] = Field(0, description="0 and -1 are off.")
    min_p: Annotated[JsonFloat, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[JsonFloat, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[JsonFloat, Field(ge=-2, le=2)] = 0.0
    # Logits are divided by it: with much less they would overflow float32.
    repetition_penalty: Annotated[JsonFloat, Field(ge=0.01, le=100)] = 1.0
    logit_bias: LogitBias = Field(default_factory=dict, description="Token id to bias, -100 to 100.")
    seed: Annotated[JsonInt, Field(ge=-INT64_MAX - 1, le=INT64_MAX)] | None = Field(
        None, description="The same seed gives the same tokens, alone or in any batch."
    )
    n: Annotated[JsonInt, Field(ge=1, le=MAX_N)] = Field(1, description="Answers per prompt.")
    stop: Stop = Field(default_factory=list, description="The answer ends before the first of these.")
    stop_token_ids: Annotated[TokenIds, Field(max_length=1024)] = Field(default_factory=list)
    include_stop_str_in_output: JsonBool = False
    min_tokens: Annotated[JsonInt, Field(ge=0, le=INT64_MAX)] = Field(
        0, description="No end of text nor stop before so many tokens."
    )
    ignore_eos: JsonBool = False
    skip_special_tokens: JsonBool = True
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    return_token_ids: JsonBool = Field(
        False, description="Add `token_ids` and `prompt_token_ids` to choices."
    )
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None, description="Only requests with the same salt share cached prefixes."
    )
    stream: JsonBool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Accepted and not used.")

    def refuse_unsupported(self) -> list[str]:
        """Names of unknown fields, for a warning; raises InvalidRequestError for known ones not done here."""
        unknown = unknown_fields(self.model_extra or {}, UNSUPPORTED)
        options = {} if self.stream_options is None else self.stream_options.model_extra or {}
        return unknown + [f"stream_options.{name}" for name in options]

    def sampling_params(
        self, vocab_size: int, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        """The engine's form; raises InvalidRequestError where fields do not go together."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options needs stream: true.", param="stream_options")
        logit_bias = {int(token_id): bias for token_id, bias in self.logit_bias.items()}
        check_token_ids(list(logit_bias), vocab_size, "logit_bias")
        check_token_ids(self.stop_token_ids, vocab_size, "stop_token_ids")
        check_token_ids(self.allowed_token_ids or [], vocab_size, "allowed_token_ids")
        # Each once: a long list of the same would take as many rows of the head.
        allowed_ids = None if self.allowed_token_ids is None else tuple(dict.fromkeys(self.allowed_token_ids))
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=logit_bias,
            allowed_token_ids=allowed_ids,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            include_stop_str_in_output=self.include_stop_str_in_output,
            min_tokens=min(self.min_tokens, max_tokens),
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


def unknown_fields(extra: Mapping[str, Any], unsupported: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """Names not in `unsupported`; raises InvalidRequestError for those in it that ask for something."""
    unknown = []
    for name, value in extra.items():
        if name not in unsupported:
            unknown.append(name)
        elif value is not None and not any(value == v for v in unsupported[name]):
            raise InvalidRequestError(
                f"This server does not support {name}.", param=name, code="unsupported_parameter"
            )
    return unknown


def check_token_ids(token_ids: list[int], vocab_size: int, param: str) -> None:
    """Raises InvalidRequestError unless 0 <= id < vocab_size for all."""
    if token_ids and (max(token_ids) >= vocab_size or min(token_ids) < 0):
        wrong = next(i for i in token_ids if not 0 <= i < vocab_size)
        raise InvalidRequestError(
            f"{param} holds token id {wrong}, wanted 0 to {vocab_size - 1}.",
            param=param,
            code="invalid_token_id",
        )
