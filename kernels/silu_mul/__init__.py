"""SiLU of the gate times up."""

from compress.kernels.silu_mul.reference import silu_mul

__all__ = ["silu_mul"]
