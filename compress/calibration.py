"""Calibration tokens: from a text file, a Hugging Face data set, or sampled from the model itself.

Text is tokenized, joined, cut into windows of `seq_len` tokens, and `samples` of them are taken at
random (seeded).  A safetensors file holds token ids as they are to be used.  With `self`, pieces
are sampled from the model, or from one that is named, at temperature 1 and joined, which needs no
data at all (LLM-QAT, arXiv 2305.17888, section 3.1).
"""

import hashlib
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress import texts
from compress.core.blocks import BlockModel
from compress.core.device import native_bfloat16
from compress.core.errors import InputError, naming, reason_of
from compress.core.progress import track
from compress.core.shards import ShardReader, hashed_file
from compress.core.skeleton import build_skeleton, transformers_config
from compress.core.source import ModelSource, resolve_model
from compress.core.tokenizer import difference, load_tokenizer
from compress.loading import load_model
from compress.recipe import CalibrationConfig

MAX_TEXT_BYTES = 64 << 20  # more than any calibration set needs; the rest of a file is not read
SUFFIXES = (*texts.SUFFIXES, ".safetensors")
SELF_BATCH = 128  # sequences sampled side by side
SELF_LENGTH = 256  # tokens of a sampled sequence
TIMED_STEPS = 8


def calibration_tokens(
    config: CalibrationConfig, source: ModelSource, vocab_size: int, device: torch.device
) -> Tensor:
    """Return token ids, int64 [samples, seq_len], on the CPU.

    Raises InputError when the source does not exist, holds too little text, or the tokenizer
    yields ids outside the model's vocabulary.
    """
    if config.is_sampled:
        tokens = _sample_from_model(config, writer_of(config, source), device)
    elif Path(config.source).suffix == ".safetensors":
        tokens = _read_tokens(config)
    else:
        tokens = _windows(config, source)
    top = int(tokens.max())
    if top >= vocab_size:
        raise InputError(
            f"the tokenizer of '{source.ref}' yields token {top}, but the model has only "
            f"{vocab_size}; the tokenizer does not fit the model"
        )
    return tokens


def check_writer(config: CalibrationConfig, model: BlockModel) -> None:
    """Refuse a model to write the text whose tokens are not those of the one to calibrate."""
    if config.writer is None:
        return
    written = writer_skeleton(config).config.get_text_config().vocab_size
    known = model.config.get_text_config().vocab_size
    writer = writer_of(config, model.source)
    if written > known:
        found = f"vocabularies of {written} and {known} tokens"
    else:
        found = difference(writer.folder, model.source.folder, common=True)
    if found:
        raise InputError(
            f"calibration '{config.source}': the model that is to write the text and the one to "
            f"calibrate have {found}; give one with the same vocabulary"
        )


def writer_skeleton(config: CalibrationConfig) -> Any:
    """The model that is to write the text, without its weights; it may be quantized."""
    assert config.writer is not None
    source = resolve_model(config.writer)
    reader = ShardReader(source.folder)
    return build_skeleton(transformers_config(source, reader), source, reader)


def writer_files(config: CalibrationConfig) -> dict[str, str] | None:
    """Hashes of the files of another model that is to write the text, all of which are read."""
    if config.writer is None:
        return None
    folder = resolve_model(config.writer).folder
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return {path.name: hashed_file(path) for path in files}


def fingerprint(tokens: Tensor) -> str:
    """SHA-256 of the token ids, to tell whether two runs saw the same calibration data."""
    return hashlib.sha256(tokens.to(torch.int64).numpy().tobytes()).hexdigest()


def check_source(config: CalibrationConfig) -> None:
    """Refuse a missing or unreadable calibration file, or a missing model that is to write the
    text, before anything long is done."""
    if config.writer is None:
        texts.check_file(config.source, "calibration", SUFFIXES)
    else:
        with naming(f"calibration '{config.source}'"):
            resolve_model(config.writer)


def writer_of(config: CalibrationConfig, source: ModelSource) -> ModelSource:
    """The model that writes text which is sampled, for calibrating the one in `source`."""
    return source if config.writer is None else resolve_model(config.writer)


def _read_tokens(config: CalibrationConfig) -> Tensor:
    """The first samples of a safetensors file's `input_ids`, integers [N, S]."""
    check_source(config)
    try:
        with safe_open(config.source, framework="pt") as file:
            dtype = file.get_slice("input_ids").get_dtype()
            tokens = file.get_tensor("input_ids")
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"calibration file '{config.source}' has no readable tensor 'input_ids' "
            f"({reason_of(error)}); write token ids [samples, tokens] under that name"
        ) from None
    if dtype[0] not in "IU":
        raise InputError(
            f"calibration file '{config.source}' holds 'input_ids' in {dtype}; token ids are "
            "integers, such as I64"
        )
    found = tuple(tokens.shape)
    if len(found) != 2 or found[0] < config.samples or found[1] < config.seq_len:
        raise InputError(
            f"calibration file '{config.source}' holds token ids {list(found)}, fewer than "
            f"{config.samples} samples of {config.seq_len}; ask for less with --samples, --seq-len"
        )
    tokens = tokens[: config.samples, : config.seq_len].to(torch.int64)
    if tokens.min() < 0:
        raise InputError(
            f"calibration file '{config.source}' holds token {int(tokens.min())}; ids count from 0"
        )
    return tokens


def _windows(config: CalibrationConfig, source: ModelSource) -> Tensor:
    check_source(config)
    tokenizer = load_tokenizer(source.folder)
    path = Path(config.source)
    need = config.samples * config.seq_len
    # A data set is streamed only as far as needed, with some slack to choose windows from.
    is_file = texts.is_file(path, "calibration")
    if is_file:
        documents = texts.read_file(path, "calibration", MAX_TEXT_BYTES)
    else:
        documents = texts.stream_dataset(config.source, "calibration")
    limit = None if is_file else 4 * need
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids: list[int] = []
    for document in documents:
        encoded = texts.encode(tokenizer, document, source, "calibration")
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


def _sample_from_model(
    config: CalibrationConfig, source: ModelSource, device: torch.device
) -> Tensor:
    """Sample pieces of text from the model, each from a random first token, and join them.

    Attention over the growing context is what costs on a CPU, so a sample longer than
    SELF_LENGTH is made of several pieces.
    """
    model = sampling_model(source, device)
    generator = torch.Generator().manual_seed(config.seed)
    rows, length, pieces = _pieces(config)
    batches = []
    for start in range(0, rows, SELF_BATCH):
        first, steps = sampled_batch(model, min(SELF_BATCH, rows - start), length, generator)
        progress = track(steps, "Sampling text", total=length - 1)
        batches.append(torch.cat([first, *progress], dim=1))
    joined = torch.cat(batches).view(config.samples, pieces * length)
    return joined[:, : config.seq_len].contiguous()


def sampling_seconds(config: CalibrationConfig, source: ModelSource, device: torch.device) -> float:
    """About how long sampling text will take, by its first steps; later ones take longer."""
    model = sampling_model(writer_of(config, source), device)
    rows, length, _ = _pieces(config)
    size = min(SELF_BATCH, rows)
    _, steps = sampled_batch(model, size, length, torch.Generator().manual_seed(0))
    ends = [time.monotonic() for _ in islice(steps, TIMED_STEPS)]
    if len(ends) < 2:
        return 0.0
    return (ends[-1] - ends[0]) / (len(ends) - 1) * length * math.ceil(rows / size)


def sampling_model(source: ModelSource, device: torch.device) -> Any:
    """A whole model to sample text from, in the dtype that is fastest."""
    return load_model(source.folder, "bfloat16" if native_bfloat16(device) else "float32", device)


def _pieces(config: CalibrationConfig) -> tuple[int, int, int]:
    """How many pieces are sampled in all, tokens of each, and pieces of a sequence."""
    length = min(config.seq_len, SELF_LENGTH)
    pieces = -(-config.seq_len // length)
    return config.samples * pieces, length, pieces


def sampled_batch(
    model: Any, size: int, length: int, generator: torch.Generator
) -> tuple[Tensor, Iterator[Tensor]]:
    """Random first tokens, int64 [size, 1], and an iterator over the `length` - 1 that follow."""
    vocabulary = model.config.get_text_config().vocab_size
    first = torch.randint(0, vocabulary, (size, 1), generator=generator)
    return first, _sampled_steps(model, first.to(model.device), length - 1, generator)


@torch.inference_mode()
def _sampled_steps(
    model: Any, tokens: Tensor, steps: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield `steps` tokens sampled at temperature 1, int64 [B, 1] each on the CPU."""
    cache = _preallocated_cache(model.config.get_text_config().num_hidden_layers, steps + 1)
    for _ in range(steps):
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1]
        # The first token whose cumulative probability passes a uniform number.
        cumulative = logits.float().cpu().softmax(dim=-1).cumsum(dim=-1)
        drawn = torch.rand(len(tokens), 1, generator=generator) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, drawn).clamp(max=cumulative.shape[1] - 1)
        yield tokens
        tokens = tokens.to(model.device)


def _preallocated_cache(layers: int, length: int) -> Any:
    """A KV cache for `length` tokens that is written in place.

    transformers' dynamic cache copies all keys and values at each step to append to them; on a
    CPU that was 60% of the sampling time at 400 tokens of context.
    """
    from transformers.cache_utils import Cache, DynamicLayer

    class PreallocatedLayer(DynamicLayer):
        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            super().lazy_initialization(key_states, value_states)
            self.buffers = [
                states.new_empty(*states.shape[:2], length, states.shape[3])
                for states in (key_states, value_states)
            ]
            self.keys, self.values = (buffer[:, :, :0] for buffer in self.buffers)

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            assert self.keys is not None
            start = self.keys.shape[2]
            stop = start + key_states.shape[2]
            for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
                buffer[:, :, start:stop] = states
            self.keys, self.values = (buffer[:, :, :stop] for buffer in self.buffers)
            return self.keys, self.values

    return Cache(layers=[PreallocatedLayer() for _ in range(layers)])
