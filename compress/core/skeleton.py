"""From config.json to a model without weights, however wrong the file may be.

A config.json that lost a digit can ask transformers for a billion blocks or a table of terabytes,
so counts are compared with the checkpoint before anything is made of them.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.nn.modules.module import register_module_parameter_registration_hook

from compress.core.errors import InputError, reason_of, shown
from compress.core.shards import ShardReader
from compress.core.source import ModelSource, read_config

MOST_LABELS = 1_000_000


def original_config(source: ModelSource, reader: ShardReader) -> Any:
    """The config of a causal language model that is not quantized yet; InputError otherwise."""
    raw = read_config(source.folder)
    if quantization := raw.get("quantization_config"):
        named = isinstance(quantization, dict) and quantization.get("quant_method")
        raise InputError(
            f"model '{source.ref}' is already quantized ({named or 'method unknown'}); "
            "give the original model"
        )
    config = transformers_config(source, reader)
    _check_task(config, source)
    return config


def transformers_config(source: ModelSource, reader: ShardReader) -> Any:
    """config.json as transformers reads it; InputError when it does not."""
    from transformers import AutoConfig

    import compress.core.cross_layer  # noqa: F401 (adds classes of our own)

    _check_counts(read_config(source.folder), source, reader)
    try:
        with _unlogged():
            return AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:  # a broken config.json can fail anywhere inside transformers
        raise InputError(
            f"transformers cannot read config.json of '{source.ref}': {reason_of(error)}; "
            "correct it, or download the model again"
        ) from None


def _check_counts(raw: dict[str, Any], source: ModelSource, reader: ShardReader) -> None:
    """Refuse counts for which transformers would make lists while it reads config.json.

    A block has at least one tensor, so there are no more blocks than tensors.
    """
    from transformers import CONFIG_MAPPING

    limits = {"num_hidden_layers": len(reader.names), "num_labels": MOST_LABELS}
    for given in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        kind = given.get("model_type")
        if isinstance(kind, str) and kind in CONFIG_MAPPING:
            own_names = CONFIG_MAPPING[kind].attribute_map
            limits |= {own_names.get(key, key): limit for key, limit in tuple(limits.items())}
        for key, limit in limits.items():
            if isinstance(given.get(key), int | float) and given[key] > limit:
                raise InputError(
                    f"config.json of '{source.ref}' has {key} = {shown(given[key])}, with "
                    f"{len(reader.names)} tensors in the checkpoint; at most {limit} is possible"
                )


def _check_task(config: Any, source: ModelSource) -> None:
    """Refuse models of another task, some of which AutoModelForCausalLM would build regardless."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    from compress.core.cross_layer import CLASSES

    kind = config.model_type
    own = {name: cls.__name__ for name, cls in CLASSES.items()}
    causal = {**auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **own}
    if kind not in causal:
        raise InputError(
            f"model '{source.ref}' is of type {kind}, for which transformers has no causal "
            "language model; give one that generates text from left to right"
        )
    named = config.architectures or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise InputError(
            f"config.json of '{source.ref}' has architectures = {shown(named)}; it must be a list "
            "of class names"
        )
    bases = auto.MODEL_MAPPING_NAMES.get(kind, ())
    bases = (bases,) if isinstance(bases, str) else bases
    for name in named:
        if name not in causal.values() and name not in bases and name in dir(transformers):
            raise InputError(
                f"model '{source.ref}' is a {name} by its config.json, which is no causal language "
                f"model; of this type {causal[kind]} is"
            )
    masked = kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    encodes = config.is_encoder_decoder or (masked and not getattr(config, "is_decoder", False))
    if encodes and not set(named) & set(causal.values()):
        raise InputError(
            f"model '{source.ref}' has an encoder by its config.json (type {kind}, neither "
            f"is_decoder nor a causal class under architectures); of this type {causal[kind]} "
            "is supported"
        )


def build_skeleton(
    config: Any, source: ModelSource, reader: ShardReader, real_buffers: bool = False
) -> Any:
    """The model of a transformers config, with its parameters and buffers on the meta device.

    `real_buffers` puts what is computed and not stored in the checkpoint on the CPU.  Raises
    InputError when there is no such model, or it has far more parameters than the checkpoint.
    """
    from transformers import AutoModelForCausalLM

    from compress.core.padded_values import pad_values

    on_meta = init_empty_weights(include_buffers=False) if real_buffers else torch.device("meta")
    try:
        with _at_most(2 * len(reader.names) + 100, source), _unlogged(), on_meta:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # shapes that contradict each other fail inside the model class
        raise InputError(
            f"model '{source.ref}' cannot be built as a causal language model: "
            f"{reason_of(error)}; correct its config.json, or download it again"
        ) from None
    pad_values(model)
    return model.eval().requires_grad_(False)


@contextmanager
def _unlogged() -> Iterator[None]:
    """Keep transformers from logging: on a broken config.json it prints all of it."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


@contextmanager
def _at_most(limit: int, source: ModelSource) -> Iterator[None]:
    """Stop a model that is being built at `limit` parameters: a wrong config.json may ask for a
    billion of them.  Raises InputError.
    """
    count = 0

    def check(*_args: Any) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise InputError(
                f"config.json of '{source.ref}' calls for more than {limit} tensors, far more than "
                "the checkpoint holds; the two do not belong together"
            )

    handle = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        handle.remove()
