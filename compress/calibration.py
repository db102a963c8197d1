"""Calibration tokens: from a text file, a Hugging Face data set, or sampled from the model itself.

Text is tokenized, joined, cut into windows of `seq_len` tokens, and `samples` of them are taken at
random (seeded).  With `self`, sequences are sampled from the model at temperature 1, which needs
no data at all; the idea of data-free calibration text is LLM-QAT's (arXiv 2305.17888, section 3.1).
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.core.errors import InputError
from compress.core.progress import say, track
from compress.core.source import ModelSource
from compress.recipe import CalibrationConfig

MAX_TEXT_BYTES = 64 << 20  # more than any calibration set needs; the rest of a file is not read
SUFFIXES = (".txt", ".jsonl", ".parquet")
SELF_BATCH = 64


def calibration_tokens(
    config: CalibrationConfig, source: ModelSource, vocab_size: int, device: torch.device
) -> Tensor:
    """Return token ids, int64 [samples, seq_len], on the CPU.

    Raises InputError when the source does not exist, holds too little text, or the tokenizer
    yields ids outside the model's vocabulary.
    """
    if config.source == "self":
        tokens = _sample_from_model(config, source, device)
    else:
        tokens = _windows(config, source)
    top = int(tokens.max())
    if top >= vocab_size:
        raise InputError(
            f"the tokenizer of '{source.ref}' yields token {top}, but the model has only "
            f"{vocab_size}; the tokenizer does not fit the model"
        )
    return tokens


def fingerprint(tokens: Tensor) -> str:
    """SHA-256 of the token ids, to tell whether two runs saw the same calibration data."""
    return hashlib.sha256(tokens.to(torch.int64).numpy().tobytes()).hexdigest()


def check_source(config: CalibrationConfig) -> None:
    """Refuse a missing or unreadable calibration file before anything long is done."""
    path = Path(config.source)
    if path.suffix in SUFFIXES and not path.is_file():
        raise InputError(f"calibration file '{path}' does not exist; check the path")
    if path.is_file() and path.suffix not in SUFFIXES:
        raise InputError(
            f"calibration file '{path}' ends in '{path.suffix}'; allowed: {', '.join(SUFFIXES)}"
        )


def load_tokenizer(source: ModelSource) -> Any:
    """Load the model's tokenizer, or raise InputError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.folder)
    except Exception as error:  # missing or broken tokenizer files fail in many ways
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise InputError(f"cannot load the tokenizer of '{source.ref}': {reason}") from None


def _windows(config: CalibrationConfig, source: ModelSource) -> Tensor:
    check_source(config)
    tokenizer = load_tokenizer(source)
    path = Path(config.source)
    need = config.samples * config.seq_len
    # A data set is streamed only as far as needed, with some slack to choose windows from.
    documents = _read_file(path) if path.is_file() else _stream_dataset(config.source)
    limit = None if path.is_file() else 4 * need
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids: list[int] = []
    for document in documents:
        encoded = tokenizer(document, add_special_tokens=False, verbose=False).input_ids
        ids += [*separator, *encoded] if ids else encoded
        if limit is not None and len(ids) >= limit:
            break
    count = len(ids) // config.seq_len
    if count < config.samples:
        raise InputError(
            f"calibration text '{config.source}' has {len(ids)} tokens; {config.samples} samples "
            f"of {config.seq_len} need {need}; give more text, or fewer --samples"
        )
    windows = torch.tensor(ids[: count * config.seq_len], dtype=torch.int64)
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(count, generator=generator)[: config.samples]
    return windows.view(count, config.seq_len)[chosen]


def _read_file(path: Path) -> Iterator[str]:
    try:
        if path.suffix == ".txt":
            yield _head(path)
        elif path.suffix == ".jsonl":
            for number, line in enumerate(_head(path).splitlines(), start=1):
                if line.strip():
                    yield _text_of(json.loads(line), f"{path}, line {number}")
        else:
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                for row in batch.to_pylist():
                    yield _text_of(row, str(path))
    except UnicodeDecodeError:
        raise InputError(f"calibration file '{path}' is not UTF-8 text; convert it first") from None
    except (OSError, ValueError) as error:  # json and pyarrow errors are ValueErrors
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read calibration file '{path}': {error}") from None


def _head(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(MAX_TEXT_BYTES)
    if len(data) < MAX_TEXT_BYTES:
        return data.decode("utf-8")
    say(f"Reading the first {MAX_TEXT_BYTES >> 20} MiB of {path}")
    return data[: data.rindex(b"\n") + 1].decode("utf-8")


def _text_of(row: Any, where: str) -> str:
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"]
    found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    raise InputError(f"calibration data {where} has no text field 'text' (found: {found})")


def _stream_dataset(ref: str) -> Iterator[str]:
    from datasets import load_dataset

    name, _, rest = ref.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in rows:
            yield _text_of(row, f"set '{ref}'")
    except InputError:
        raise
    except Exception as error:  # datasets and the hub raise many types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"calibration source '{ref}' is no file, and loading it as a data set failed: {reason}; "
            "give a .txt, .jsonl or .parquet file, a data set id, or 'self'"
        ) from None


def _sample_from_model(config: CalibrationConfig, source: ModelSource, device: torch.device) -> Tensor:
    """Sample sequences from the model, in batches, each from a random first token."""
    from compress.evaluate import load_model

    dtype = torch.bfloat16 if native_bfloat16(device) else torch.float32
    model = load_model(source.folder, dtype, device)
    generator = torch.Generator().manual_seed(config.seed)
    vocab = model.config.get_text_config().vocab_size
    batches = []
    left = config.samples
    while left > 0:
        size = min(SELF_BATCH, left)
        first = torch.randint(0, vocab, (size, 1), generator=generator)
        steps = _sampled_steps(model, first.to(device), config.seq_len - 1, generator)
        progress = track(steps, "Sampling calibration text", total=config.seq_len - 1)
        batches.append(torch.cat([first, *progress], dim=1))
        left -= size
    return torch.cat(batches)


@torch.inference_mode()
def _sampled_steps(model: Any, tokens: Tensor, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield `steps` sampled next tokens, int64 [B, 1] each on the CPU."""
    cache = None
    for _ in range(steps):
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        # Exponential race: argmax(p / e), e ~ Exp(1), is a sample of p without a cumulative sum.
        logits = output.logits[:, -1].float().cpu()
        race = torch.empty_like(logits).exponential_(generator=generator)
        tokens = (logits - race.log()).argmax(dim=-1, keepdim=True)
        yield tokens
        tokens = tokens.to(model.device)


def native_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
