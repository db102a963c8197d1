"""What goes wrong, as OpenAI's error objects: {"error": {"message", "type", "param", "code"}}.

Every error that leaves the server is made here, so that a client sees one shape, whatever failed:
a route's own `ApiError`, a body that does not validate, a setting that the runtime refuses, a full
queue, a path that does not exist.  What nobody foresaw is a 500 whose message says nothing of the
inside; the log has it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from compress.core.errors import InputError, shown
from compress.runtime.engine import PromptTooLongError
from compress.runtime.sampling_params import SettingError

logger = logging.getLogger("compress.server")

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
NAMES = {"grammar": "response_format", "prompt_logprobs": "logprobs"}  # of settings in the API
CODES = ("unknown_parameter", "unsupported_parameter")  # of mistakes in a body
LONGEST_PARAM = 200  # characters; it may hold names that a client made up
MOST_SHOWN = 20  # entries of a list or table that a message quotes
MOST_REPORTED = 3  # mistakes of one body that its message names


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None  # the parameter that is wrong, as a dotted path
    code: str | None


class ErrorBody(BaseModel):
    """An error, as every route answers it."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer that is an error.

    `type` follows from the status unless given.  `retry_after` is in seconds and becomes the
    Retry-After header.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        by_status = "server_error" if status >= 500 else "invalid_request_error"
        self.status = status
        self.message = message
        self.type = type or TYPES.get(status, by_status)
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, round(retry_after)))

    def body(self) -> bytes:
        """JSON of the error object.  ASCII, since messages quote what no encoding can hold."""
        detail = {name: getattr(self, name) for name in ("message", "type", "param", "code")}
        return json.dumps({"error": detail}).encode()

    def response(self) -> Response:
        """The whole answer."""
        return Response(self.body(), self.status, self.headers, "application/json")


def error_of(error: BaseException) -> ApiError:
    """The answer that an exception calls for."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _of_validation(error.errors())
    if isinstance(error, PromptTooLongError):
        return ApiError(413, str(error), code="context_length_exceeded")
    if isinstance(error, SettingError):
        return ApiError(400, str(error), param=NAMES.get(error.name, error.name))
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    if isinstance(error, HTTPException):
        return _of_http(error)
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed at this request; its log says why")


def install_handlers(app: FastAPI) -> None:
    """Have `app` answer every exception with an error object.

    To be called before any middleware is added: `_LastResort` has to be the innermost, so that the
    others see the answer and not the exception.
    """

    async def handle(_: Request, error: Exception) -> Response:
        return error_of(error).response()

    for kind in (ApiError, RequestValidationError, InputError, HTTPException):
        app.add_exception_handler(kind, handle)
    app.add_middleware(_LastResort)


class _LastResort:
    """Answers what no handler is for."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def note_and_send(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, note_and_send)
        except Exception as error:
            if begun:  # the connection breaks, which tells the client that this was not all
                raise
            await error_of(error).response()(scope, receive, send)


def _of_http(error: HTTPException) -> ApiError:
    """Of what the framework raises: no such path or method, a body that is no JSON."""
    message = str(error.detail)
    if error.status_code == 404:
        message = "there is no such path; GET /openapi.json lists what there is"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another")
        message = f"this path does not take that method; allowed is {allowed}"
    return ApiError(error.status_code, message, headers=error.headers)


def _of_validation(errors: Iterable[Mapping[str, Any]]) -> ApiError:
    """Of a body that does not fit its model: the first few mistakes, and where the first is."""
    found = list(errors)
    if any(error["type"] == "json_invalid" for error in found):
        reason = found[0].get("ctx", {}).get("error", "it cannot be read")
        place = found[0]["loc"][-1]
        return ApiError(400, f"the body is not JSON: {reason}, at character {place}")
    lines = [_line(error) for error in found[:MOST_REPORTED]]
    if len(found) > MOST_REPORTED:
        lines.append(f"and {len(found) - MOST_REPORTED} more mistakes")
    code = found[0]["type"] if found[0]["type"] in CODES else None
    param = _path(found[0])[:LONGEST_PARAM] or None
    return ApiError(400, str(InputError("; ".join(lines))), param=param, code=code)


def _path(error: Mapping[str, Any]) -> str:
    """`messages.0.content` for ("body", "messages", 0, "content").

    A mistake that a whole object was found to have names its field in "ctx".  Parts in parentheses
    say what pydantic took a value for, and are not in the path, nor is its `[key]`.
    """
    loc = [str(part) for part in error["loc"] if not str(part).startswith(("(", "[key]"))]
    if loc[:1] == ["body"]:
        del loc[0]
    if name := error.get("ctx", {}).get("name"):
        loc.append(name)
    return ".".join(loc)


def _line(error: Mapping[str, Any]) -> str:
    """One mistake: where, the value, what is allowed."""
    path = _path(error)
    if not path and error["type"] in ("missing", "model_attributes_type"):
        return "the body must be a JSON object, sent with Content-Type: application/json"
    if error["type"] == "missing":
        return f"{path} is missing"
    message = error["msg"][:1].lower() + error["msg"][1:]
    if "name" in error.get("ctx", {}):  # the value is the object around it
        return f"{path}: {message}"
    return f"{path or 'the body'} = {_shown(error['input'])}: {message}"


def _shown(value: Any) -> str:
    if isinstance(value, list | dict) and len(value) > MOST_SHOWN:
        return f"({len(value)} entries)"
    return shown(value)
