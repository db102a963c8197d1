"""GET /v1/models: the one model, under each of its names."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from compress.runtime.server import answering
from compress.runtime.server.answers import ERRORS, ModelCard, ModelList
from compress.runtime.server.service import Service

router = APIRouter(responses=ERRORS)


@router.get("/v1/models", response_model=ModelList)
async def models(request: Request) -> dict[str, Any]:
    """List the names that requests may use."""
    service = answering.service_of(request)
    cards = [_card(service, name) for name in service.settings.model_names]
    return {"object": "list", "data": cards}


@router.get("/v1/models/{name:path}", response_model=ModelCard)
async def model(request: Request, name: str) -> dict[str, Any]:
    """Describe the model."""
    service = answering.service_of(request)
    return _card(service, answering.model_name(service, name))


def _card(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "compress",
        "max_model_len": service.llm.engine.model.max_context,
    }
