"""The numbers that pruning changes, of a model and as asked for, and what fits together.

    depth L   hidden D   ffn F   heads N   kv_heads K   head_dim H (never changed)

Every K-th part of the heads reads one KV head, so heads go inside their groups, the same number in
each, or a group goes as a whole with its KV head; all layers keep equally many.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from compress.core.errors import InputError
from compress.prune.config import PruneConfig


@dataclass(frozen=True)
class Shape:
    """The numbers of a decoder (see the module's docstring)."""

    depth: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        names = (f"{field.name} {getattr(self, field.name)}" for field in fields(self))
        return ", ".join(names)

    def is_narrower_than(self, other: "Shape") -> bool:
        """Whether blocks are, in any way."""
        keys = ("hidden", "ffn", "heads", "kv_heads")
        return any(getattr(self, key) < getattr(other, key) for key in keys)

    @property
    def queries(self) -> int:
        """Heads that read one KV head."""
        return self.heads // self.kv_heads


# of a config, the names of the numbers
NAMES: Mapping[str, str] = {
    "depth": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}


def shape_of(config: Any) -> Shape:
    """The shape of a model by its transformers config; 0 for what that does not have."""
    found = {key: getattr(config, name, None) or 0 for key, name in NAMES.items()}
    found["kv_heads"] = found["kv_heads"] or found["heads"]
    found["head_dim"] = found["head_dim"] or found["hidden"] // max(found["heads"], 1)
    return Shape(**found)


def pruned_shape(shape: Shape, config: PruneConfig) -> Shape:
    """The shape with the numbers that are asked for in place of its own.

    Without `kv_heads` there are as many as before, or one a head where it was so before.

    Raises InputError for a number that is none or more than there are, for heads that KV heads do
    not divide, and where nothing would change and no target asks for it.
    """
    asked = {key: getattr(config, key) for key in ("depth", "hidden", "ffn", "heads", "kv_heads")}
    if config.layers_out is not None:
        if config.depth is not None:
            raise InputError("depth and layers_out are both given; give one of the two")
        if not 0 <= config.layers_out < shape.depth:
            raise InputError(
                f"layers_out = {config.layers_out} is not possible: the model has {shape.depth} "
                f"blocks; give 1 to {shape.depth - 1}"
            )
        asked["depth"] = shape.depth - config.layers_out
    given = {key: number for key, number in asked.items() if number is not None}
    for key, number in given.items():
        most = getattr(shape, key)
        if not 1 <= number <= most:
            raise InputError(
                f"{key} = {number} is not possible: the model has {most}; give 1 to {most}"
            )
    if "heads" in given and "kv_heads" not in given and shape.queries == 1:
        given["kv_heads"] = given["heads"]
    found = replace(shape, **given)
    if found.heads % found.kv_heads or found.queries > shape.queries:
        possible = [n * found.kv_heads for n in range(1, shape.queries + 1)]
        raise InputError(
            f"heads = {found.heads} is not possible on {found.kv_heads} KV heads, each of which "
            f"has {shape.queries} and keeps equally many; possible are "
            f"{', '.join(map(str, possible))}, or other kv_heads"
        )
    if found == shape and config.target is None:
        raise InputError(
            f"nothing would be pruned from {shape}; ask for less of depth, hidden, ffn or heads, "
            "or for a target"
        )
    return found
