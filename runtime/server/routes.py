"""Every route of the API."""

from compress.runtime.server import openai_chat, openai_models, openai_text, tokens

ROUTERS = (openai_models.router, openai_text.router, openai_chat.router, tokens.router)
