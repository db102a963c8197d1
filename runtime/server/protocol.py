"""Bodies that requests may have: OpenAI's and vLLM's names, and what each may hold.

A parameter is served, or has no say in the answer (`user`, `metadata`, ...), or is refused by name.
null is as good as absent, and so is a value that asks for nothing, as `tools: []`.  Ranges are
stated here where the description of the API should show them; `SamplingParams` checks the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from compress.core.errors import nearest, shown
from compress.runtime.sampling_params import SamplingParams

LONGEST_NAME = 100  # characters that an error quotes
MOST_STOPS = 16  # each is looked for at every token
LONGEST_STOP = 1000  # characters
MOST_ENTRIES = 10_000  # of a list or table but a prompt: each costs time before any work begins
MOST_PROMPTS = 2048  # of one request
MOST_OUTPUTS = 128  # n, as OpenAI's

UNSUPPORTED_CODE = "unsupported_parameter"
# Parameters that are not served, and the values of them that ask for nothing (null always does).
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # vLLM's
    "allowed_token_ids": (),
    "bad_words": ([],),
    "cache_salt": (),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": ({},),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "priority": (0,),
    "prompt_embeds": ([],),
    "prompt_logprobs": (),
    "request_id": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}
UNSUPPORTED_IN_COMPLETIONS = UNSUPPORTED | {"suffix": ("",)}
UNSUPPORTED_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "mm_processor_kwargs": ({},),
    "tools": ([],),
}
UNSUPPORTED_IN_CHAT = (
    UNSUPPORTED
    | UNSUPPORTED_IN_MESSAGES
    | {
        "add_special_tokens": (False,),
        "audio": (),
        "best_of": (1,),
        "echo": (False,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "include_reasoning": (True, False),
        "modalities": (["text"],),
        "moderation": (),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "prompt_cache_options": ({},),
        "reasoning_effort": ("none",),
        "thinking_token_budget": (),
        "tool_choice": ("none", "auto"),
        "verbosity": ("medium",),
        "web_search_options": (),
    }
)

# What a request names and `SamplingParams` takes as it is.
SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "seed", "n", "min_tokens", "ignore_eos",
    "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


def utf8(text: str) -> str:
    """`text`, which JSON lets hold half a character (a lone surrogate); refused."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("text", "allowed is text that UTF-8 can encode") from None
    return text


def _not_too_many(table: Any) -> Any:
    """Refuse a long table before its entries are looked at, and an error is kept for each."""
    if isinstance(table, dict) and len(table) > MOST_ENTRIES:
        raise PydanticCustomError("table", "allowed are {count} entries", {"count": MOST_ENTRIES})
    return table


Text = Annotated[str, AfterValidator(utf8)]
TokenId = Annotated[int, Field(ge=0)]
TokenKey = Annotated[str, Field(pattern="^[0-9]{1,9}$")]  # a token id, as JSON's objects have it
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Biases = Annotated[
    dict[TokenKey, Bias], Field(max_length=MOST_ENTRIES), BeforeValidator(_not_too_many)
]
Metadata = Annotated[
    dict[str, Text], Field(max_length=MOST_ENTRIES), BeforeValidator(_not_too_many)
]


class Body(BaseModel):
    """A JSON object that holds nothing unknown."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        """Leave out what is null or asks for nothing; refuse what is not served, by name."""
        if not isinstance(given, dict):
            return given
        fields = {field.alias or name: field for name, field in cls.model_fields.items()}
        kept = {}
        for name, value in given.items():
            if name in fields:
                if value is not None or fields[name].is_required():
                    kept[name] = value
            elif name not in cls.unsupported:
                hint = nearest(name[:LONGEST_NAME], fields)
                raise _mistake("unknown_parameter", name, f"there is no such parameter{hint}")
            elif value is not None and not _among(value, cls.unsupported[name]):
                why = f"{shown(value)} is not supported; {_remedy(cls.unsupported[name])}"
                raise _mistake(UNSUPPORTED_CODE, name, why)
        return kept


def _mistake(kind: str, name: str, why: str) -> PydanticCustomError:
    """What is wrong with the parameter `name` of a body."""
    name = name[:LONGEST_NAME].encode(errors="backslashreplace").decode()
    return PydanticCustomError(kind, "{why}", {"name": name, "why": why})  # type: ignore[arg-type]


def _among(value: Any, harmless: Iterable[Any]) -> bool:
    """Whether `value` is one of `harmless`; true is not 1 here."""
    return any(
        value == one and isinstance(value, bool) == isinstance(one, bool) for one in harmless
    )


def _remedy(harmless: tuple[Any, ...]) -> str:
    if not harmless:
        return "leave it out"
    return f"leave it out, or give {' or '.join(json.dumps(value) for value in harmless)}"


def _stops(value: Any) -> tuple[str, ...]:
    several = (value,) if isinstance(value, str) else value
    if (
        not isinstance(several, list | tuple)
        or len(several) > MOST_STOPS
        or any(not isinstance(stop, str) or not 0 < len(stop) <= LONGEST_STOP for stop in several)
    ):
        raise PydanticCustomError(
            "stop",
            "allowed is a string, or a list of at most {count}, each of 1 to {length} characters",
            {"count": MOST_STOPS, "length": LONGEST_STOP},
        )
    return tuple(utf8(stop) for stop in several)


_STOP = {"type": "string", "minLength": 1, "maxLength": LONGEST_STOP}
_STOPS = {"type": "array", "items": _STOP, "maxItems": MOST_STOPS}
Stops = Annotated[
    tuple[str, ...] | None,
    PlainValidator(_stops),
    WithJsonSchema({"anyOf": [_STOP, _STOPS, {"type": "null"}]}),
]


class StreamOptions(Body):
    """What a stream holds besides the answer."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(
        None, description="With include_usage: the counts so far in every chunk."
    )
    include_obfuscation: bool | None = Field(None, description="Has no effect.")


class JsonSchema(Body):
    """A JSON Schema and its name."""

    name: Text
    description: Text | None = Field(None, description="Has no effect.")
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="Has no effect: a schema is always kept to.")


class ResponseFormat(Body):
    """What the text must be: anything, a JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Generation(Body):
    """What completions and chat have in common."""

    model: Text | None = Field(None, description="One of GET /v1/models; the first if left out.")
    temperature: float | None = Field(None, ge=0, description="1 if left out; 0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1 switch it off.")
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1, le=MOST_OUTPUTS)
    stop: Stops = None
    stop_token_ids: TokenIds | None = Field(None, max_length=MOST_ENTRIES)
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: Biases | None = Field(
        None, description="From token ids to what is added to their logits."
    )
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = Field(None, description="Has no effect.")
    metadata: Metadata | None = Field(None, description="Has no effect.")
    store: bool | None = Field(None, description="Only false: nothing is stored.")
    service_tier: str | None = Field(None, description="Only auto and default.")
    safety_identifier: Text | None = Field(None, description="Has no effect.")
    prompt_cache_key: Text | None = Field(None, description="Has no effect: prefixes are found.")
    prompt_cache_retention: Text | None = Field(None, description="Has no effect.")

    @model_validator(mode="after")
    def _fits_together(self) -> Generation:
        if self.stream_options and not self.stream:
            raise _mistake("wrong", "stream_options", "is allowed only where stream is true")
        if self.store:
            raise _mistake(UNSUPPORTED_CODE, "store", "storing is not supported; leave it out")
        if self.service_tier not in (None, "auto", "default"):
            raise _mistake(UNSUPPORTED_CODE, "service_tier", "only auto and default are supported")
        kind = self.response_format
        if kind and (kind.type == "json_schema") != (kind.json_schema is not None):
            raise _mistake(
                "wrong", "response_format", "json_schema goes with type json_schema, and only there"
            )
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether each chunk of a stream has the usage so far."""
        options = self.stream_options
        return bool(options and options.include_usage and options.continuous_usage_stats)

    def sampling(self, max_tokens: int | None, **more: Any) -> SamplingParams:
        """The runtime's settings; but for `max_tokens`, None leaves one to its default.

        InputError for what they do not allow.
        """
        given = {name: getattr(self, name) for name in SAMPLING} | more
        given["stop"] = self.stop
        given["stop_token_ids"] = self.stop_token_ids and tuple(self.stop_token_ids)
        if self.logit_bias:
            given["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        if self.response_format and self.response_format.type != "text":
            given["grammar"] = _grammar(self.response_format)
        given = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(max_tokens=max_tokens, **given)


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """One prompt or several as a list.  By hand: a union of types takes seconds for long lists."""
    several = [value] if isinstance(value, str) or _is_tokens(value) else value
    if isinstance(several, list) and 0 < len(several) <= MOST_PROMPTS:
        if all(isinstance(prompt, str) for prompt in several):
            return [utf8(prompt) for prompt in several]
        if all(_is_tokens(prompt) for prompt in several):
            return several
    raise PydanticCustomError(
        "prompt",
        "allowed is text, a list of token ids, or a list of up to {count} of either",
        {"count": MOST_PROMPTS},
    )


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXT = {"type": "string"}
Prompts = Annotated[
    list[str] | list[list[int]],
    PlainValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT,
                _TOKENS,
                {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": MOST_PROMPTS},
                {"type": "array", "items": _TOKENS, "minItems": 1, "maxItems": MOST_PROMPTS},
            ]
        }
    ),
]


class CompletionRequest(Generation):
    """Text to continue."""

    unsupported: ClassVar = UNSUPPORTED_IN_COMPLETIONS

    prompt: Prompts
    max_tokens: int | None = Field(None, ge=0, description="16 if left out.")
    echo: bool | None = Field(None, description="Begin the answer with the prompt.")
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, description="Only as many as n.")
    add_special_tokens: bool | None = Field(None, description="To a prompt of text; true.")

    @model_validator(mode="after")
    def _best_is_all(self) -> CompletionRequest:
        if self.best_of not in (None, self.n or 1):
            raise _mistake(
                UNSUPPORTED_CODE,
                "best_of",
                "choosing among outputs is not supported; give as many as n",
            )
        return self


def _text_only(kind: Any) -> Any:
    if isinstance(kind, str) and kind != "text":
        raise PydanticCustomError(UNSUPPORTED_CODE, "is not supported; allowed is 'text'")
    return kind


class TextPart(Body):
    """A part of a message; of its kinds only text is served."""

    unsupported: ClassVar = dict.fromkeys(
        ("audio_url", "file", "image_url", "input_audio", "refusal", "video_url"), ()
    )

    type: Annotated[Literal["text"], BeforeValidator(_text_only)]
    text: Text


def _shape(content: Any) -> str | None:
    return {str: "(text)", list: "(parts)"}.get(type(content))


Parts = Annotated[list[TextPart], Field(max_length=MOST_ENTRIES, fail_fast=True)]
Content = Annotated[
    Annotated[Text, Tag("(text)")] | Annotated[Parts, Tag("(parts)")],
    Discriminator(
        _shape,
        custom_error_type="content",
        custom_error_message="allowed is text, or a list of parts of type text",
    ),
]


def _no_tools(role: Any) -> Any:
    if role in ("tool", "function"):
        raise PydanticCustomError(UNSUPPORTED_CODE, "tools are not supported")
    return role


class Message(Body):
    """One turn of a conversation."""

    unsupported: ClassVar = {"audio": (), "function_call": (), "refusal": (), "tool_calls": ([],)}

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_no_tools)]
    content: Content
    name: Text | None = None

    def for_template(self) -> dict[str, str]:
        """What a chat template is given: `developer` is what `system` was called before."""
        content = self.content
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        named = {"name": self.name} if self.name is not None else {}
        return {"role": role, "content": text} | named


TemplateValues = Annotated[
    dict[Text, bool | int | float | Text | None] | None,
    Field(max_length=MOST_ENTRIES, description="Names that the chat template asks for."),
    BeforeValidator(_not_too_many),
]
Messages = Annotated[list[Message], Field(min_length=1, max_length=MOST_ENTRIES, fail_fast=True)]


class ChatRequest(Generation):
    """A conversation to go on with."""

    unsupported: ClassVar = UNSUPPORTED_IN_CHAT

    messages: Messages
    chat_template_kwargs: TemplateValues = None
    max_tokens: int | None = Field(None, ge=1, description="As many as fit if left out.")
    max_completion_tokens: int | None = Field(None, ge=1, description="Goes before max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _top_of_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise _mistake("wrong", "top_logprobs", "is allowed only where logprobs is true")
        return self


class TokenizeRequest(Body):
    """Text or a conversation, to be turned into tokens."""

    unsupported: ClassVar = UNSUPPORTED_IN_MESSAGES

    model: Text | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    chat_template_kwargs: TemplateValues = None
    add_special_tokens: bool | None = Field(None, description="To a prompt; true if left out.")
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise _mistake("wrong", "prompt", "give either prompt or messages")
        if self.messages is not None and self.add_special_tokens:
            raise _mistake(
                UNSUPPORTED_CODE,
                "add_special_tokens",
                "not supported with messages: a chat template writes its own",
            )
        return self


class DetokenizeRequest(Body):
    """Tokens to be turned into text."""

    model: Text | None = None
    tokens: TokenIds


def _grammar(wanted: ResponseFormat) -> Any:
    from compress.runtime.grammar import Grammar

    schema = wanted.json_schema and wanted.json_schema.schema_
    if schema is None:
        return Grammar("json_object", "")
    return Grammar("json_schema", json.dumps(schema))
