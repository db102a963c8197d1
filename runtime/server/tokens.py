"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from compress.core.errors import shown
from compress.runtime.server import answering
from compress.runtime.server.answers import ERRORS, Detokenized, Tokens
from compress.runtime.server.errors import ApiError
from compress.runtime.server.protocol import DetokenizeRequest, TokenizeRequest
from compress.runtime.server.token_text import token_text

router = APIRouter(responses=ERRORS)


@router.post("/tokenize", response_model=Tokens)
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """Count and show the tokens of a text or a conversation."""
    service = answering.service_of(request)
    answering.model_name(service, body.model)
    llm = service.llm
    if body.messages is not None:
        values = body.chat_template_kwargs
        tokens = await answering.tokens_of_chat(llm, body.messages, values)
    else:
        (tokens,) = await answering.tokens_of(llm, [body.prompt or ""], body.add_special_tokens)

    def answer() -> Response:
        texts = token_text(llm.tokenizer)
        named = body.return_token_strs
        return JSONResponse(
            {
                "count": len(tokens),
                "max_model_len": llm.engine.model.max_context,
                "tokens": tokens,
                "token_strs": [texts.entry(token) for token in tokens] if named else None,
            }
        )

    return await answering.off_the_loop(answer, len(tokens))


@router.post("/detokenize", response_model=Detokenized)
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """Show the text of tokens, special ones included."""
    service = answering.service_of(request)
    answering.model_name(service, body.model)
    llm = service.llm
    vocab = llm.engine.model.vocab_size
    if wrong := [token for token in body.tokens if token >= vocab]:
        raise ApiError(
            400, f"tokens holds {shown(wrong[0])}; allowed is 0 to {vocab - 1}", param="tokens"
        )
    return await answering.off_the_loop(
        lambda: JSONResponse({"prompt": llm.tokenizer.decode(body.tokens)}), len(body.tokens)
    )
