"""Writing text with a model through transformers, to see that a checkpoint still speaks."""

import time
from typing import Any

import torch

from compress.core.errors import InputError
from compress.core.source import ModelSource
from compress.core.tokenizer import load_tokenizer
from compress.loading import load_model


def generate_text(
    source: ModelSource,
    prompt: str,
    max_tokens: int = 64,
    temperature: float = 0.0,
    chat: bool = False,
    seed: int = 0,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Continue `prompt`; greedy at temperature 0.

    `chat` puts the prompt through the tokenizer's chat template.  Raises InputError when there is
    no such template, or the prompt holds no token.
    """
    tokenizer: Any = load_tokenizer(source.folder)
    if chat and not tokenizer.chat_template:
        raise InputError(f"the tokenizer of '{source.ref}' has no chat template; leave out --chat")
    text = prompt
    if chat:
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(text, return_tensors="pt", add_special_tokens=not chat)
    if encoded.input_ids.shape[1] == 0:
        raise InputError("prompt '' holds no token; give some text")
    model: Any = load_model(source.folder, dtype)
    torch.manual_seed(seed)
    started = time.monotonic()
    output = model.generate(
        encoded.input_ids.to(model.device),
        attention_mask=encoded.attention_mask.to(model.device),
        max_new_tokens=max_tokens,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
    )
    seconds = time.monotonic() - started
    new = output[0, encoded.input_ids.shape[1] :]
    return {
        "prompt": prompt,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "tokens": len(new),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(len(new) / seconds, 1),
    }
