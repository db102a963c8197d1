"""The ASGI application: OpenAI's routes, the state of the server, the page, and the guards."""

from __future__ import annotations

from fastapi import FastAPI

from compress.runtime.server.service import Service


def make_app(service: Service) -> FastAPI:
    """The application; `app.state.service` is `service`, which routes ask for the model."""
    app = FastAPI(title="compress", docs_url=None, redoc_url=None)
    app.state.service = service
    return app
