"""What computes a model's predictions in evaluation: our runtime, or transformers.

The runtime reads quantized checkpoints and .gguf files as they are, with exact codes and scales;
transformers serves model classes that the runtime does not.  Both give the logits of the same
tokens in the same order, so that what is measured does not depend on the engine but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from compress.core.device import AS_STORED, ServedAs, default_device
from compress.core.errors import InputError, nearest
from compress.core.progress import say
from compress.core.source import ModelSource
from compress.loading import load_model

if TYPE_CHECKING:
    from compress.runtime.scoring import Piece, Span

    Predictor = Callable[[Sequence[Span]], Iterator[Piece]]

ENGINES = ("auto", "runtime", "transformers")


def check_engine(engine: str, served: ServedAs = AS_STORED) -> None:
    """Raise InputError for an engine that there is not, and for transformers if something is to be
    rounded on loading, which the runtime alone does."""
    if engine not in ENGINES:
        raise InputError(
            f"engine '{engine}' is unknown; allowed are {', '.join(ENGINES)}"
            f"{nearest(engine, ENGINES)}"
        )
    for name, value in served.told.items():
        if engine == "transformers":
            raise InputError(
                f"{name} '{value}' is for the runtime, and engine 'transformers' rounds nothing "
                "as it loads; leave out one of the two"
            )


def settle_engine(engine: str, sources: Sequence[ModelSource], served: ServedAs = AS_STORED) -> str:
    """Say and return which engine it will be: with `auto` the runtime, where it serves all models.

    Reads no weights.  Raises InputError for the runtime if it does not serve one of the models, and
    where `check_engine` does.
    """
    check_engine(engine, served)
    engine = "runtime" if served.told else engine
    if engine != "transformers":
        try:
            _check_runtime(engine, sources)
        except InputError as error:
            if engine == "runtime":
                raise
            say(f"Engine: transformers ({str(error).partition(';')[0]})")
            return "transformers"
        engine = "runtime"
    say(f"Engine: {engine}")
    return engine


def _check_runtime(engine: str, sources: Sequence[ModelSource]) -> None:
    from compress.runtime.weights import check_served  # imports torch

    if engine == "auto" and default_device().type != "cpu":
        raise InputError("no GPU has run the runtime's kernels yet; --engine runtime does")
    for source in sources:
        check_served(source)


def load_predictor(
    engine: str, source: ModelSource, dtype: str, served: ServedAs = AS_STORED
) -> Predictor:
    """Load a model on a settled engine; what it returns gives the logits of spans, in order.

    `served` is the runtime's alone.
    """
    if engine == "transformers":
        return partial(_transformers_logits, load_model(source.folder, dtype))
    from compress.runtime.loading import load_decoder
    from compress.runtime.scoring import logits

    return partial(logits, load_decoder(source, default_device(), dtype, **asdict(served)))


def _transformers_logits(model: Any, spans: Sequence[Span]) -> Iterator[Piece]:
    """As compress.runtime.scoring.logits, a whole span at a time, in the model's dtype."""
    import torch

    from compress.runtime.scoring import Piece

    for index, span in enumerate(spans):
        ids = torch.from_numpy(span.tokens[None, :-1]).to(model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0]  # [n - 1, V]
        yield Piece(index, span.first, logits[span.first - 1 :])
