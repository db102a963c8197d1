"""The model under measurement, and the prompts it is measured on."""

from __future__ import annotations

import time
from typing import Any

import psutil
import torch

from compress.core.device import check_dtype, default_device, fastest_dtype
from compress.core.errors import InputError
from compress.core.source import resolve_model
from compress.runtime.engine import Engine
from compress.runtime.loading import MOST_TOKENS, make_decoder
from compress.runtime.weights import load_weights

PROMPT_SEED = 0
MOST_SEQUENCES = 256  # so that at least half of a step is left for prompts


class Subject:
    """A model, loaded once; engines with caches of any size are made on it.

    `threads` None leaves PyTorch's number.  With `keep_head` the output layer stays in memory as it
    is stored, besides, for a draft of the model's own layers.  Raises InputError for a model that
    the runtime does not serve.
    """

    def __init__(
        self,
        model: str,
        dtype: str,
        head_bits: int | None,
        threads: int | None,
        keep_head: bool = False,
        kv_cache_dtype: str = "auto",
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        device = default_device()
        self.model = model
        self.source = resolve_model(model)
        self.dtype = fastest_dtype(device) if dtype == "auto" else dtype
        self.head_bits = head_bits
        started = time.perf_counter()
        check_dtype(self.dtype)
        self.kv_cache_dtype = kv_cache_dtype
        weights = load_weights(self.source, head_bits)
        self.head = weights.head if keep_head else None
        self.decoder = make_decoder(
            weights, device, getattr(torch, self.dtype), kv_cache_dtype=kv_cache_dtype
        )
        self.load_seconds = time.perf_counter() - started
        self.device = device

    @property
    def facts(self) -> dict[str, Any]:
        """What ran, for a report."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "head_bits": self.head_bits,
            "device": str(self.device),
            "kernels": self.decoder.description,
            "threads": torch.get_num_threads(),
            "prompts": f"random token ids, seed {PROMPT_SEED}",
            "load_seconds": round(self.load_seconds, 3),
            "weight_bytes": self.decoder.weight_bytes,
            "kv_cache_dtype": self.decoder.kv_cache_dtype,
            "kv_bytes_per_token": self.kv_bytes_per_token,
        }

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token, all layers."""
        return self.decoder.bytes_per_token

    def check(self, sequences: int, tokens: int) -> None:
        """Raise InputError for what `engine` cannot hold."""
        if not 1 <= sequences <= MOST_SEQUENCES:
            raise InputError(f"a batch of {sequences} is not measured; give 1 to {MOST_SEQUENCES}")
        if tokens > self.decoder.max_context:
            raise InputError(
                f"prompt and new tokens, {tokens} in all, are more than the model's context of "
                f"{self.decoder.max_context}; lower --prompt-tokens or --new-tokens"
            )

    def engine(self, sequences: int, tokens: int) -> Engine:
        """An engine for so many sequences at once, of up to `tokens` each.

        It finds no prefix again, so that a repeated run computes all, and makes no text.  Raises
        InputError when a sequence does not fit in the model's context.
        """
        self.check(sequences, tokens)
        together = MOST_TOKENS[self.device.type]
        return Engine(
            self.decoder,
            sequences * self.decoder.layout.blocks_for(tokens, together),
            max_tokens_per_step=together,
            max_sequences=sequences,
            prefix_caching=False,
        )

    def prompts(self, lengths: list[int]) -> list[list[int]]:
        """Random token ids, the same at each call."""
        generator = torch.Generator().manual_seed(PROMPT_SEED)
        vocab = self.decoder.vocab_size
        return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


def memory_bytes() -> int:
    """What this process has in memory now."""
    return psutil.Process().memory_info().rss
