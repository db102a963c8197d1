"""Devices by the numbers of their data sheets, dense rates (sheets often print those with sparsity)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

TB, GB = 1e12, 1e9
TERA = 1e12


@dataclass(frozen=True)
class Efficiency:
    """What of a data sheet is reached: shares of bandwidth and rate, and seconds a step on top."""

    bandwidth: float = 1.0
    matmul: float = 1.0
    overhead: float = 0.0


@dataclass(frozen=True)
class Device:
    """memory in bytes, bandwidth and link in bytes/s (the link sends), rates in FLOP/s by name."""

    name: str
    memory: int
    bandwidth: float
    rates: Mapping[str, float]
    link: float | None = None
    efficiency: Efficiency = field(default_factory=Efficiency)
    source: str = ""

    def rate(self, compute: str) -> float:
        """FLOP/s of a kind; that of bf16 where the device has no units for it."""
        return self.rates.get(compute, self.rates["bf16"])


DEVICES = {
    "h100": Device(
        "h100",
        80 * 10**9,
        3.35 * TB,
        {"bf16": 989 * TERA, "fp8": 1979 * TERA, "int8": 1979 * TERA},
        link=450 * GB,
        source="NVIDIA H100 data sheet, SXM5",
    ),
}
