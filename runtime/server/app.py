"""The ASGI application: OpenAI's routes, the state of the server, the page, and the guards."""

from __future__ import annotations

import asyncio
import mimetypes
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.responses import HTMLResponse, JSONResponse, Response

from compress.runtime.server.docs_page import docs_page
from compress.runtime.server.errors import ErrorBody, install_handlers
from compress.runtime.server.guard import BodyLimit, HostCheck, KeyCheck
from compress.runtime.server.metrics import CONTENT_TYPE
from compress.runtime.server.request_log import RequestLog
from compress.runtime.server.routes import ROUTERS
from compress.runtime.server.service import SECONDS_TO_LOAD, Service

PROBES = ("/health", "/ready")  # asked by machines that know an address and nothing else
PAGE = Path(__file__).parent / "page"
SUMMARY = "OpenAI's API for completions and chat, on the runtime of `compress`."
# What the guards may answer in place of any route.
REFUSALS = {
    401: "The API key is missing or wrong.",
    403: "The Host is not served here.",
    408: "The body came too slowly.",
    413: "The body is too large.",
}


class State(BaseModel):
    """The state of the server."""

    status: str
    reason: str | None = None


def make_app(service: Service) -> FastAPI:
    """The application; `app.state.service` is `service`, which routes ask for the model."""
    settings = service.settings
    app = FastAPI(
        title="compress serve",
        summary=SUMMARY,
        version="1",
        docs_url=None,
        redoc_url=None,
        lifespan=_watched(service),
        responses={
            status: {"model": ErrorBody, "description": text} for status, text in REFUSALS.items()
        },
    )
    app.state.service = service
    install_handlers(app)
    app.router.routes[:0] = service.first_routes()
    for router in ROUTERS:
        app.include_router(router)
    _add_state(app, service)
    if settings.metrics:
        _add_metrics(app, service)
    _add_docs(app)
    open_paths = ["/", *PROBES, *_add_page(app)]
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, most_bytes=settings.max_body_bytes, seconds=settings.body_seconds)
    if settings.api_keys:
        app.add_middleware(KeyCheck, keys=settings.api_keys, open_paths=open_paths)
    if settings.allowed_hosts is not None:
        app.add_middleware(HostCheck, allowed=settings.allowed_hosts, open_paths=PROBES)
    app.add_middleware(RequestLog, service=service)
    return app


def _watched(service: Service):
    """A lifespan in which faults of the engine are looked for."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(service.watch())
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    return lifespan


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get(
        "/health",
        response_model=State,
        responses={503: {"model": State, "description": "The engine is broken."}},
    )
    async def health() -> State | Response:
        """Whether the engine works, or is still being loaded; 503 calls for a new process."""
        ok, reason = service.health()
        if ok:
            return State(status="ok")
        return _unavailable(State(status="fault", reason=reason))

    @app.get(
        "/ready",
        response_model=State,
        responses={503: {"model": State, "description": "Not now."}},
    )
    async def ready() -> State | Response:
        """Whether requests are taken: not while the model is loaded, nor at the end."""
        state = State(status=service.state)
        return state if service.ready else _unavailable(state)


def _unavailable(state: State) -> JSONResponse:
    return JSONResponse(state.model_dump(), 503, {"Retry-After": str(SECONDS_TO_LOAD)})


def _add_metrics(app: FastAPI, service: Service) -> None:
    content = {"text/plain": {"schema": {"type": "string"}}}

    @app.get("/metrics", response_class=Response, responses={200: {"content": content}})
    async def metrics() -> Response:
        """Counts and times in Prometheus' text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)


def _add_docs(app: FastAPI) -> None:
    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()))


def _add_page(app: FastAPI) -> list[str]:
    """Serve the files of the page, index.html at /; their paths."""
    paths = []
    for file in sorted(PAGE.iterdir()) if PAGE.is_dir() else []:
        path = "/" if file.name == "index.html" else f"/{file.name}"
        media_type = mimetypes.guess_type(file.name)[0]
        app.add_api_route(path, _sender(file.read_bytes(), media_type), include_in_schema=False)
        paths.append(path)
    return paths


def _sender(content: bytes, media_type: str | None):
    async def send() -> Response:
        return Response(content, media_type=media_type, headers={"Cache-Control": "no-cache"})

    return send
