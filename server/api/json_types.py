"""JSON's own types for pydantic: no coercion between them, null means "the default".

Pydantic's lax mode reads `false` as 0 and `"3"` as 3; its strict mode refuses 1.0, which JSON Schema
calls an integer. Neither is what an OpenAPI document promises.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StrictBool,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError


def _only_number(value: object) -> object:
    if isinstance(value, bool | str):
        raise PydanticCustomError("number_type", "Input should be a number")
    return value


def _only_int_list(value: object) -> object:
    """Checks a list of token ids in one pass: a batch for evaluation holds hundreds of thousands."""
    if isinstance(value, list):
        for item in value:
            if type(item) is not int and not (isinstance(item, float) and item.is_integer()):
                raise PydanticCustomError("int_list", "Input should be a list of integers")
            if item < 0:
                raise PydanticCustomError("int_list", "Token ids should not be negative")
    return value


def text_or_list(value: object) -> str:
    """The tag of a field that is a text or a list, in angle brackets, so that errors leave it out."""
    return "<list>" if isinstance(value, list) else "<text>"


JsonInt = Annotated[int, BeforeValidator(_only_number)]
JsonFloat = Annotated[float, BeforeValidator(_only_number), Field(allow_inf_nan=False)]
JsonBool = StrictBool
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(_only_int_list)]


class JsonModel(BaseModel):
    """A request body: null for a field with a default means that default, and the schema says so."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: object) -> object:
        if not isinstance(data, Mapping):
            return data
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {k: v for k, v in data.items() if v is not None or k not in optional}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema: dict[str, Any] = handler.resolve_ref_schema(handler(core))
        for name, described in schema.get("properties", {}).items():
            if name not in schema.get("required", []) and not _admits_null(described):
                kept = {k: described.pop(k) for k in ("title", "description", "default") if k in described}
                options = described.pop("anyOf", None) or [dict(described)]
                described.clear()
                described.update(kept, anyOf=[*options, {"type": "null"}])
        return schema


def _admits_null(described: Mapping[str, Any]) -> bool:
    return any(option.get("type") == "null" for option in described.get("anyOf", []))
