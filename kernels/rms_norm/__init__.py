"""RMSNorm with an optional residual sum."""

from compress.kernels.rms_norm.reference import rms_norm

__all__ = ["rms_norm"]
