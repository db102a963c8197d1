"""Rotary position embedding."""

from compress.kernels.rope.reference import apply_rope, rope_table

__all__ = ["apply_rope", "rope_table"]
