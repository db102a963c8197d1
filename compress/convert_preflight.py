"""What can be known before a conversion: whether it will work, and what it will take."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from compress import calibration
from compress.core.blocks import BlockModel, largest_module_list
from compress.core.errors import InputError, reason_of
from compress.core.shards import SINGLE_FILE_BYTES
from compress.core.source import read_config
from compress.preflight import INTERPRETER_BYTES, Needs, check_shares, open_model
from compress.prune.attention import Pairs, find_pairs
from compress.prune.gqa import GqaConfig, GqaStage
from compress.prune.parts import Parts
from compress.prune.shape import NAMES, Shape, shape_of
from compress.prune_preflight import same_parts
from compress.recipe import ConvertRecipe
from compress.walk import probe_of

TRIED_TOKENS = 32  # that channel pairs are tried out on


@dataclass(frozen=True)
class ConvertJob:
    """A recipe that can be carried out: its model and stage, and what `auto` became here.

    target      the shape that comes out
    parameters  of the converted model
    """

    recipe: ConvertRecipe
    model: BlockModel
    stage: GqaStage
    target: Shape
    device: torch.device
    dtype: torch.dtype
    parameters: int

    @property
    def config(self) -> GqaConfig:
        """Of the one stage."""
        return self.recipe.stages[0]

    @property
    def entries(self) -> dict[str, Any]:
        """What changes in config.json."""
        return {NAMES["kv_heads"]: self.target.kv_heads}


def preflight(recipe: ConvertRecipe) -> ConvertJob:
    """Everything that can be refused in the first second; InputError then."""
    model, dtype = open_model(recipe)
    config = recipe.stages[0]
    shape = shape_of(model.config)
    _check_heads(config.kv_heads, shape)
    target = replace(shape, kv_heads=config.kv_heads)
    parts = same_parts(model)
    stock, parameters = _stock_blocks(model, {NAMES["kv_heads"]: config.kv_heads})
    calibration.check_source(recipe.calibration)
    check_shares(recipe.calibration)
    pairs = _pairs(model, parts, shape.head_dim)
    turns = pairs is not None
    if pairs is None:
        pairs = Pairs.neighbours(shape.head_dim, model.device)
    stage = GqaStage(config, shape, parts, pairs, turns, stock)
    return ConvertJob(recipe, model, stage, target, model.device, dtype, parameters)


def _check_heads(asked: int, shape: Shape) -> None:
    """Raise InputError unless the KV heads can come together in that many groups of one size."""
    possible = [n for n in range(1, shape.kv_heads) if shape.kv_heads % n == 0]
    if not possible:
        raise InputError(
            f"the model has {shape.kv_heads} KV heads of {shape.heads} heads; there are no fewer"
        )
    if asked not in possible:
        raise InputError(
            f"kv_heads = {asked} is not possible: the model has {shape.kv_heads}, which come "
            f"together in groups of one size; possible are {', '.join(map(str, possible))}"
        )
    if shape.head_dim % 2:
        raise InputError(f"heads have {shape.head_dim} dimensions, an odd number; not supported")


def _pairs(model: BlockModel, parts: Parts, head_dim: int) -> Pairs | None:
    """How RoPE pairs a head's channels, tried out on the first block; None where none may turn."""
    tokens = torch.arange(TRIED_TOKENS)[None] % model.config.get_text_config().vocab_size
    ((states, kwargs),) = model.capture_inputs([tokens])
    probe = probe_of(states, kwargs[0], model.device)
    turned = _turned(model.config, head_dim)
    return find_pairs(model.load_block(0), parts, head_dim, turned, probe)


def _turned(config: Any, head_dim: int) -> tuple[int, ...]:
    """Numbers of channels of a head that RoPE may turn, by the config."""
    rope = getattr(config, "rope_parameters", None) or {}
    share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None)
    part = int(head_dim * (share or 1.0)) // 2 * 2
    return tuple(dict.fromkeys((part or head_dim, head_dim)))


def _stock_blocks(model: BlockModel, entries: dict[str, Any]) -> tuple[Sequence[nn.Module], int]:
    """The blocks of the class with other config entries, without weights, and its parameters.

    Raises InputError when transformers refuses the config.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    raw: dict[str, Any] = read_config(model.source.folder) | entries
    try:
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a config class may refuse by any exception
        asked = ", ".join(f"{name} = {value}" for name, value in entries.items())
        raise InputError(
            f"'{model.source.ref}' cannot be given {asked}: {reason_of(error)}"
        ) from None
    found = largest_module_list(built)
    assert found is not None
    tied = set(getattr(built, "all_tied_weights_keys", None) or ())
    count = sum(p.numel() for name, p in built.named_parameters() if name not in tied)
    return list(found[1]), count


def needs_of(job: ConvertJob, activation_memory: int) -> Needs:
    """What a run will take, from shapes."""
    model, shape, data = job.model, job.stage.shape, job.recipe.calibration
    output = job.parameters * job.dtype.itemsize
    merged = output if output <= SINGLE_FILE_BYTES else 0
    states = data.samples * data.seq_len * shape.hidden * model.compute_dtype.itemsize
    width = shape.head_dim * max(shape.heads, 2 * shape.kv_heads)
    working = 8 * job.stage.workspace * width**2
    working += 3 * 4 * sum(parameter.numel() for parameter in model.meta_block(0).parameters())
    on_gpu = job.device.type != "cpu"
    host = INTERPRETER_BYTES + min(states, activation_memory) + (0 if on_gpu else working)
    return Needs(output, output + merged + 2 * states, states, host, working if on_gpu else 0)
