"""What routes answer, for the description of the API.

Answers are made as plain dictionaries, which costs a tenth of a model's construction and matters
for each chunk of 500 streams; tests hold them to these.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from compress.runtime.server.errors import ErrorBody

FinishReason = Literal["stop", "length"]


class Answer(BaseModel):
    """An object with nothing beyond what is listed."""

    model_config = ConfigDict(extra="forbid")


class PromptTokensDetails(Answer):
    """Of the prompt's tokens, those that the prefix cache held."""

    cached_tokens: int


class Usage(Answer):
    """Tokens; those of a prompt count once, however many outputs it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TextLogprobs(Answer):
    """One entry a token.  The first token of a prompt has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Answer):
    """One output."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class Completion(Answer):
    """What POST /v1/completions answers, and each event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class TopLogprob(Answer):
    """A token and how likely it was."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The token of the text, and those that were likeliest."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """One entry a token."""

    content: list[TokenLogprob]
    refusal: None


class AssistantMessage(Answer):
    """The answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Answer):
    """One output."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Answer):
    """What POST /v1/chat/completions answers."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(Answer):
    """What is new of a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Answer):
    """What is new of one output."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(Answer):
    """Each event of a stream of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ModelCard(Answer):
    """The model, under one of its names."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Answer):
    """Every name of the model."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokens(Answer):
    """What POST /tokenize answers."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Answer):
    """What POST /detokenize answers."""

    prompt: str


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is wrong, or too much at this time."},
    "5XX": {"model": ErrorBody, "description": "The server cannot answer now."},
}


def streamed(whole: type[Answer], chunk: type[Answer]) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that answers with `whole`, or with events that hold `chunk`."""
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_without_references(chunk), _without_references(ErrorBody)]},
    }
    event = {
        "type": "object",
        "properties": {"data": {"anyOf": [{"type": "string", "const": "[DONE]"}, data]}},
        "required": ["data"],
    }
    return {
        200: {
            "model": whole,
            "description": "The answer; with `stream`, server-sent events up to [DONE].",
            "content": {"text/event-stream": {"itemSchema": event}},
        },
        **ERRORS,
    }


def _without_references(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema of a model in one piece, as FastAPI lists no definitions for events."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolved(node: Any) -> Any:
        if isinstance(node, list):
            return [resolved(each) for each in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return resolved(definitions[node["$ref"].rpartition("/")[2]])
        return {name: resolved(value) for name, value in node.items()}

    return resolved(schema)
