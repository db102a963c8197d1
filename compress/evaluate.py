"""Perplexity of a model on a text, and how far its predictions moved from the original's.

The text is tokenized once, without special tokens, and cut from its start into W windows of N
tokens that do not overlap.  Each window is read on its own and scored on its T = N - 1 next
tokens; natural logarithms throughout:

    nll(w)           = -(1/T) sum_t log p(x[t+1] | x[1..t])
    perplexity       = exp(mean_w nll(w))                                              [1]
    perplexity_ratio = exp(mean_w (nll(w) - nll_original(w)))
    kl(w, t)         = sum_v p_original(v) (log p_original(v) - log p(v)), in nats     [2]
    top1_agreement   = the share of positions where both put the same token first      [2]

A ratio near 1 can hide answers that changed both ways; the divergence is zero only where the two
distributions are equal.  Softmax is fp32 over a slice of a window's positions, means and quantiles
are fp64.  Logits are computed by one engine for both models (compress.engines).

Intervals are 95 % percentile bootstraps [3] over whole windows: tokens of one window share their
context, so resampling tokens would give intervals that are too narrow.  Both models are scored
on the same resampled windows, so what makes a window hard cancels in the ratio.  Under about 20
windows the intervals cover less often than they say.  They speak of this text, not of others.

[1] Frantar et al., GPTQ, 2022, arXiv:2210.17323 (windows without overlap).
[2] Dutta et al., Accuracy is Not All You Need, 2024, arXiv:2407.09141; llama.cpp's perplexity
    tool prints the same mean, 99th percentile and agreement.
[3] Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.core.device import AS_STORED, ServedAs, check_dtype
from compress.core.errors import InputError
from compress.core.progress import track
from compress.core.source import ModelSource, read_config
from compress.core.tokenizer import load_tokenizer
from compress.engines import check_engine, load_predictor, settle_engine

if TYPE_CHECKING:
    from torch import Tensor

    from compress.engines import Predictor

KL_QUANTILE = 0.99
# A resampled quantile costs a pass over all tokens, a resampled mean only one over the windows.
MAX_QUANTILE_RESAMPLES = 1_000
POSITIONS_AT_ONCE = 128  # bounds the fp32 copies of the logits to 128 x V


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """How windows are scored: with weights in `dtype`, by one of compress.engines.ENGINES.

    `served` is for the model; the original that it is compared with is as it is stored.
    """

    dtype: str = "float32"
    engine: str = "auto"
    served: ServedAs = AS_STORED
    bootstrap: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_least(bootstrap=100, seed=0)
        check_dtype(self.dtype)
        check_engine(self.engine)

    def _check_least(self, **least: int) -> None:
        for name, minimum in least.items():
            value = getattr(self, name)
            if value < minimum:
                raise InputError(f"{name} is {value}; allowed is {minimum} or more")


@dataclass(frozen=True)
class TextEvalConfig(ScoringConfig):
    """What to score, and how: `windows` windows of `seq_len` tokens of `text`."""

    text: Path
    seq_len: int = 512
    windows: int = 32

    def __post_init__(self) -> None:
        self._check_least(seq_len=2, windows=2)
        super().__post_init__()


def evaluate_text(
    model: ModelSource, config: TextEvalConfig, against: ModelSource | None = None
) -> dict[str, Any]:
    """Score a model on a text; with `against`, compare it to that original.

    Returns what `evaluate_windows` does, and `text_sha256`.

    Raises InputError when the text is missing, empty, not UTF-8 or too short, and where
    `evaluate_windows` does.
    """
    text = _read_text(config.text)
    folders = [source.folder for source in (model, against) if source is not None]
    check_models(folders, config.seq_len)
    windows = cut_windows(folders, text, config)  # before the slow loading of weights
    digest = hashlib.sha256(text.encode()).hexdigest()
    return evaluate_windows(model, windows, config, against) | {"text_sha256": digest}


def check_text(model: ModelSource, config: TextEvalConfig) -> None:
    """Raise InputError where `evaluate_text` would, but for what only the weights show."""
    check_models([model.folder], config.seq_len)
    cut_windows([model.folder], _read_text(config.text), config)


def evaluate_windows(
    model: ModelSource,
    windows: np.ndarray,
    config: ScoringConfig,
    against: ModelSource | None = None,
) -> dict[str, Any]:
    """Score a model on token ids, int64 [W, N]; with `against`, compare it to that original.

    Returns plain numbers, ready for JSON: `perplexity`, `nll` (nats a token), `tokens` (scored),
    `windows`, `seq_len`, `dtype`, `engine`, what `served` tells; with `against` also
    `perplexity_original`, `perplexity_ratio`, `kl_mean`, `kl_p99` (nats) and `top1_agreement` (0 to
    1).  Each `x_interval` is [low, high].

    Raises InputError when a model cannot be loaded or gives NaN, and when the two models do not
    share vocabulary and tokenization.
    """
    sources = [model] if against is None else [model, against]
    folders = [source.folder for source in sources]
    count, seq_len = windows.shape
    vocabulary = check_models(folders, seq_len)
    if vocabulary is not None and windows.max() >= vocabulary:
        raise InputError(
            f"the tokenizer of '{folders[0]}' gives token {windows.max()}, but the model has "
            f"{vocabulary}; the tokenizer belongs to another model, copy the right one there"
        )
    engine = settle_engine(config.engine, sources, config.served)
    predictors = [
        load_predictor(engine, source, config.dtype, served)
        for source, served in zip(sources, (config.served, AS_STORED), strict=False)
    ]
    rows = []
    for row in track(score_windows(predictors, windows), "Evaluating", total=count):
        rows.append(row)
        if not np.isfinite(row).all():
            broken = folders[int(np.isfinite(row[0]).all())]
            raise InputError(
                f"'{broken}' gives NaN or infinite logits in {config.dtype} (window "
                f"{len(rows)}); try another dtype, or the weights are broken"
            )
    scores = np.stack(rows, axis=1)  # [1 or 4, W, T]
    settings = {"windows": count, "seq_len": seq_len, "dtype": config.dtype, "engine": engine}
    told = settings | config.served.told
    return summarize(scores, config) | {"tokens": int(scores[0].size)} | told


def check_models(folders: list[Path], seq_len: int) -> int | None:
    """Check context lengths and vocabularies; return the vocabulary's size where it is stated.

    Raises InputError for windows longer than a context, and for two vocabularies.
    """
    sizes = []
    for folder in folders:
        model_config = read_config(folder)
        text_config = model_config.get("text_config") or model_config
        sizes.append(text_config.get("vocab_size"))
        context = text_config.get("max_position_embeddings")
        if context is not None and seq_len > context:
            raise InputError(
                f"seq_len is {seq_len}; '{folder}' allows at most {context} tokens, use less"
            )
    if None not in sizes and sizes[0] != sizes[-1]:
        raise InputError(
            f"'{folders[0]}' has {sizes[0]} vocabulary entries and '{folders[1]}' has {sizes[1]}; "
            "compare it with the model it was made from"
        )
    return sizes[0]


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"cannot read text: {error}; give a text file") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"text '{path}' is not UTF-8 (byte {error.start}); convert it to UTF-8"
        ) from None
    if not text.strip():
        raise InputError(f"text '{path}' is empty; give a file with text in it")
    return text


def cut_windows(folders: list[Path], text: str, config: TextEvalConfig) -> np.ndarray:
    """Return the first windows of the text as token ids, int64 [W, N]."""
    tokens = _tokenize(folders[0], text)
    for folder in folders[1:]:
        if not np.array_equal(tokens, _tokenize(folder, text)):
            raise InputError(
                f"the tokenizers of '{folders[0]}' and '{folder}' encode the text differently; "
                "compare it with the model it was made from"
            )
    available = len(tokens) // config.seq_len
    if available < config.windows:
        raise InputError(
            f"text '{config.text}' has {len(tokens)} tokens, which is {available} windows of "
            f"{config.seq_len}, not {config.windows}; ask for fewer windows or a smaller seq_len, "
            "or give a longer text"
        )
    return tokens[: config.windows * config.seq_len].reshape(config.windows, config.seq_len)


def _tokenize(folder: Path, text: str) -> np.ndarray:
    encoded = load_tokenizer(folder)(text, add_special_tokens=False, verbose=False)
    return np.asarray(encoded["input_ids"], dtype=np.int64)


def score_windows(predictors: Sequence[Predictor], windows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the scores of each window, fp64 [1 or 4, T] (see `score_logits`).

    windows  int64 [W, N], of which all T = N - 1 tokens but the first are predicted by the model
             and, where there are two predictors, by the original
    """
    from compress.runtime.scoring import Span

    spans = [Span(window, first=1) for window in windows]
    pieces = zip(*(logits(spans) for logits in predictors), strict=True)
    for index, of_window in groupby(pieces, key=lambda pair: pair[0].index):
        parts = []
        for piece, *other in of_window:
            end = piece.first + len(piece.logits)
            reference = other[0].logits if other else None
            parts.append(score_logits(piece.logits, reference, windows[index, piece.first : end]))
        yield np.concatenate(parts, axis=1)


def score_logits(logits: Tensor, reference: Tensor | None, targets: np.ndarray) -> np.ndarray:
    """Score positions: fp64 [1, t] with nll, or [4, t] when there is an original's `reference`:
    nll, the original's nll, divergence and agreement (1 or 0) at each position.

    logits, reference  [t, V]
    targets            int64 [t], the tokens that came
    """
    import torch

    parts = []
    for start in range(0, len(logits), POSITIONS_AT_ONCE):
        at = slice(start, start + POSITIONS_AT_ONCE)
        target = torch.from_numpy(targets[at, None]).to(logits.device)  # [t, 1]
        log_p = torch.log_softmax(logits[at].float(), dim=-1)  # [t, V]
        rows = [-log_p.gather(1, target)[:, 0]]
        if reference is not None:
            log_q = torch.log_softmax(reference[at].float(), dim=-1)  # [t, V], the original's
            # Never negative but for rounding, hence the clamp.
            divergence = (log_q.exp() * (log_q - log_p)).sum(-1).clamp_min(0)
            same = log_q.argmax(-1) == log_p.argmax(-1)
            rows += [-log_q.gather(1, target)[:, 0], divergence, same.float()]
        parts.append(torch.stack(rows))
    return torch.cat(parts, dim=1).double().cpu().numpy()


def summarize(scores: np.ndarray, config: ScoringConfig) -> dict[str, Any]:
    """Turn scores a token, fp64 [1 or 4, W, T] as `score_logits` orders them, into the metrics."""
    means = scores.mean(axis=2)  # [1 or 4, W]
    resampled = resampled_means(means, config)  # [1 or 4, R]
    nll = float(means[0].mean())
    result: dict[str, Any] = {
        "perplexity": float(np.exp(nll)),
        "perplexity_interval": interval(np.exp(resampled[0])),
        "nll": nll,
    }
    if len(scores) == 1:
        return result
    overall = means.mean(axis=1)
    p99, p99_resampled = _resampled_quantile(scores[2], config)
    return result | {
        "perplexity_original": float(np.exp(overall[1])),
        "perplexity_ratio": float(np.exp(overall[0] - overall[1])),
        "perplexity_ratio_interval": interval(np.exp(resampled[0] - resampled[1])),
        "kl_mean": float(overall[2]),
        "kl_mean_interval": interval(resampled[2]),
        "kl_p99": p99,
        "kl_p99_interval": interval(p99_resampled),
        "top1_agreement": float(overall[3]),
        "top1_agreement_interval": interval(resampled[3]),
    }


def resampled_means(per_window: np.ndarray, config: ScoringConfig) -> np.ndarray:
    """Means over resampled windows: fp64 [M, W] -> [M, R], the same windows for all M rows."""
    windows = per_window.shape[1]
    pieces = [per_window @ counts.T for counts in _window_counts(windows, config)]
    return np.concatenate(pieces, axis=1) / windows


def _resampled_quantile(values: np.ndarray, config: ScoringConfig) -> tuple[float, np.ndarray]:
    """The KL_QUANTILE of values [W, T], and the same of up to MAX_QUANTILE_RESAMPLES resamples.

    The quantile is the smallest value with at least that share of the tokens at or below it.
    """
    order = values.ravel().argsort()
    window_of = order // values.shape[1]  # of each token, smallest value first
    rank = int(np.ceil(round(KL_QUANTILE * values.size, 6)))  # 1-based
    ranked = values.ravel()[order]
    counts = np.concatenate(list(_window_counts(len(values), config, MAX_QUANTILE_RESAMPLES)))
    picks = [np.searchsorted(np.cumsum(row[window_of]), rank) for row in counts]
    return float(ranked[rank - 1]), ranked[picks]


def _window_counts(
    windows: int, config: ScoringConfig, limit: int = sys.maxsize
) -> Iterator[np.ndarray]:
    """Yield how often each window is drawn in each resample: int64 [r, W], seeded, in pieces."""
    generator = np.random.default_rng(config.seed)
    left = min(config.bootstrap, limit)
    while left:
        size = min(left, max(1, 4_000_000 // windows))
        yield generator.multinomial(windows, np.full(windows, 1 / windows), size=size)
        left -= size


def interval(resampled: np.ndarray) -> list[float]:
    """The 95 % interval of resampled values [R]."""
    return [float(bound) for bound in np.quantile(resampled, [0.025, 0.975])]
