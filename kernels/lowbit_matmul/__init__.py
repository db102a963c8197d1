"""Linear layers on weights of few bits."""

from compress.kernels.lowbit_matmul.weight import LinearWeight

__all__ = ["LinearWeight"]
